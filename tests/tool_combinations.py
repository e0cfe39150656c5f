"""Random combinations of a tool or wrapper and a layer of the real list, converted, against torch's own layer.

``python tests/tool_combinations.py --count 500 --seed 0`` runs as many. A combination is equal, or ours refuses it by
the documented line and is equal after ``tritonconv.restore``, or torch's own layer is refused and so is ours.
Packages that are not there (thop, ptflops, fvcore, torchinfo, onnx) are left out, and named.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from tools_tried import PACKAGES, TOOLS, Case, Net, Tool
from torch import nn

import tritonconv
from tritonconv.lab.bench.workloads import workloads

PHASES = tuple(f"{name}_torch_phases" for name in ("forward", "backward_data", "backward_weight"))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Of this process alone, for DDP and FSDP2."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def case_of(draw: random.Random) -> tuple[str, Case]:
    """A layer of the real list: its kernel, stride, padding, groups and bias, with few channels and a small input."""
    layer = draw.choice(workloads())
    groups = 4 if layer.groups > 1 else 1
    c_in, c_out = (groups * min(c // layer.groups, 3) for c in (layer.c_in, layer.c_out))
    module = nn.ConvTranspose3d(
        c_in, c_out, layer.kernel, layer.stride, layer.padding, layer.output_padding, groups, layer.bias, layer.dilation
    )
    model = Net(module, draw.random() < 0.3).double()
    least = [2 + 2 * p // s for p, s in zip(layer.padding, layer.stride, strict=True)]
    x, other = (torch.randn(2, c_in, *[low + draw.randrange(3) for low in least]).double() for _ in range(2))
    if draw.random() < 0.3:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    return layer.name, Case(model.train(draw.random() < 0.5), x, other, draw.random() < 0.5)


def outcome(tool: Tool, case: Case) -> str:
    """``"equal"``, ``"ours refuses"`` or ``"torch refuses"``. Raises an error for anything else."""
    ours = copy.deepcopy(case.model)
    tritonconv.convert(ours)
    try:
        want = tool(copy.deepcopy(case.model), case)
    except Exception as refusal:
        try:
            tool(ours, case)
        except Exception:
            return "torch refuses"
        raise AssertionError("torch's own layer is refused, and ours is not") from refusal
    try:
        got, said = tool(copy.deepcopy(ours), case), "equal"
    except tritonconv.ArgumentTypeError as refusal:
        if "tritonconv.restore(model)" not in str(refusal) or "\n" in str(refusal):
            raise
        tritonconv.restore(ours)
        got, said = tool(ours, case), "ours refuses"
    torch.testing.assert_close(got, want)
    return said


def combinations(tools: dict[str, Tool], count: int, seed: int) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """(tool, layer, a function that runs both); the tools in turn, all else drawn."""
    draw = random.Random(seed)
    names = list(tools)
    for number in range(count):
        name = names[number % len(names)]
        torch.manual_seed(draw.randrange(2**31))
        layer, case = case_of(draw)
        forced = PHASES if draw.random() < 0.5 and max(case.model.stride) > 1 else ()  # of stride 1 there is one phase

        def run(name=name, case=case, forced=forced) -> str:
            with tritonconv.use(*forced), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return outcome(tools[name], case)

        yield name, layer, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    there = {name: tool for name, tool in PACKAGES.items() if find_spec(name)}
    found: Counter[tuple[str, str]] = Counter()
    with process_group():
        for name, layer, run in combinations({**TOOLS, **there}, asked.count, asked.seed):
            try:
                said = run()
            except Exception as failure:
                said = "DIFFERS"
                print(f"{name} x {layer}: {type(failure).__name__} {str(failure)[:300]}")
            found[name, said] += 1
    for (name, said), times in sorted(found.items()):
        print(f"{name:<22} {said:<14} {times:>4}")
    print({said: sum(n for (_, each), n in found.items() if each == said) for said in {each for _, each in found}})
    print("not installed:", ", ".join(set(PACKAGES) - set(there)) or "none")
    return int(any(said == "DIFFERS" for _, said in found))


if __name__ == "__main__":
    raise SystemExit(main())
