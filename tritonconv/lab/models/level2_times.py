"""A problem of KernelBench's level 2: its model with torch's layer beside the same with ours, correct and timed.

As KernelBench evaluates: float32 tensors, uniform inputs, the forward without gradients, the model in the mode that it
was built in; right is an output that ``torch.allclose`` accepts on each of five draws, with an absolute and a relative
tolerance of 1e-4. Ours is ``convert(model)``, and ``fuse`` where that takes an operation behind the layer. ``fuse`` is
for models in ``eval()``: one without a batch norm, which does the same in both modes, is put there.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn

from tritonconv.convert import convert
from tritonconv.dispatch import wait_until_compiled
from tritonconv.fusion import fuse
from tritonconv.lab.bench import gpu
from tritonconv.lab.bench.clock import gpu_clock
from tritonconv.lab.bench.failures import context_is_lost, one_line
from tritonconv.lab.bench.first_calls import let_choose
from tritonconv.lab.bench.measure import measure
from tritonconv.lab.bench.noise import AGAIN
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS, OURS_COMPILED, Writer
from tritonconv.lab.bench.timing import MIN_ROUNDS
from tritonconv.lab.models.factories import Network, Shape, shown
from tritonconv.lab.models.level2 import LAYER, defined_batch

TRIALS, TOLERANCE = 5, 1e-4
SECONDS = 30.0  # of a problem, its check and torch.compile included
MOST_TIMED_SECONDS = 3.0
CALLS = 2 + TRIALS + MIN_ROUNDS  # of a contestant, at least
COPIES = 5  # of the layer's output, which a forward may hold at once, as a rule of thumb
PASS = "forward"

Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Asked:
    """How problems are measured: ``seconds`` for each of them; ``compiled`` adds torch.compile."""

    device: torch.device
    seconds: float = SECONDS
    seed: int = 0
    compiled: bool = False


def measured(network: Network, asked: Asked, writer: Writer) -> None:
    """Writes a row for each contestant; a skip row where the seconds or the memory would not do."""
    with torch.no_grad(), gpu.cudnn_benchmark(asked.device):
        try:
            _Measurement(network, asked, writer)()
        except Exception as error:  # the next problem may do
            if context_is_lost(error):
                raise
            _row(writer, "error", network, variant=BASELINE, status="error", message=one_line(error))


class _Measurement:
    def __init__(self, network: Network, asked: Asked, writer: Writer) -> None:
        self.network, self.asked, self.writer = network, asked, writer
        self.end = perf_counter() + asked.seconds
        torch.manual_seed(asked.seed)
        self.models = {BASELINE: network.build().to(asked.device)}
        self.models[AGAIN] = copy.deepcopy(self.models[BASELINE])
        self.models[OURS], self.fused = ours(self.models[BASELINE])

    def __call__(self) -> None:
        refusal = self._too_much()
        if refusal is not None:
            _row(self.writer, "skip", self.network, variant="all", message=refusal)
            return
        fields: dict[str, dict[str, object]] = {BASELINE: {}, AGAIN: {}, OURS: {"fused": list(self.fused)}}
        calls: dict[str, nn.Module | Callable] = {name: self.models[name] for name in fields}
        if self.asked.compiled:
            calls |= self._compiled(fields)
        right = {name: self._judged(name, call) for name, call in calls.items() if name != BASELINE}
        calls = {name: call for name, call in calls.items() if name == BASELINE or right[name] is not None}
        inputs = self._drawn(self.asked.seed)
        timed = {name: lambda call=call: call(*inputs) for name, call in calls.items()}
        device, left = self.asked.device, max(self.end - perf_counter(), 0.0)
        times = measure(timed, BASELINE, device, gpu_clock(device), min(left, MOST_TIMED_SECONDS))
        first = times.times[times.first]
        for name in calls:
            spread, ratio = first.spread(name), first.speedup(name, BASELINE)
            difference = {"max_difference": right[name], "tolerance": TOLERANCE} if name != BASELINE else {}
            _row(
                self.writer, "problem", self.network, variant=name, baseline=BASELINE, timing=times.first,
                defined_batch=defined_batch(self.network.name),
                median_ms=spread.median, p20_ms=spread.p20, p80_ms=spread.p80, n_runs=spread.runs,
                speedup=ratio.median, speedup_p20=ratio.p20, speedup_p80=ratio.p80,
                **difference, **fields[name], **times.fields(name, BASELINE),
            )  # fmt: skip

    def _drawn(self, seed: int, batch: int | None = None) -> Inputs:
        draw = torch.Generator().manual_seed(seed)
        shapes: list[Shape] = [(batch or shape[0], *shape[1:]) for shape in self.network.inputs]
        return tuple(torch.rand(shape, generator=draw).to(self.asked.device) for shape in shapes)

    def _too_much(self) -> str | None:
        """Why a CPU cannot measure the problem in its seconds, from a call with one image; None where it can."""
        if self.asked.device.type != "cpu":
            return None
        one, images = self._drawn(self.asked.seed, batch=1), self.network.inputs[0][0]
        model: Any = copy.deepcopy(self.models[BASELINE])
        first = model.steps[0][0]
        y = model.conv_transpose(one[0] if first == LAYER else getattr(model, first)(one[0]))
        held = COPIES * images * max(each.nbytes for each in (*one, y))
        if held > (free := os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
            return f"it holds about {held / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        model(*one)
        begin = perf_counter()
        model(*one)
        call = (perf_counter() - begin) * images
        count = CALLS * len(self.models)
        if call * count > self.asked.seconds:
            return (f"a call takes about {call:.2g} s, by one of a single image: {count} calls are not made in the "
                    f"{self.asked.seconds:.3g} s of a problem")  # fmt: skip
        return None

    def _compiled(self, fields: dict[str, dict[str, object]]) -> dict[str, Callable]:
        """Both models as torch.compile has them; a skip or an error row for one that it does not have."""
        found: dict[str, Callable] = {}
        torch.compiler.reset()
        converted = copy.deepcopy(self.models[BASELINE])
        convert(converted)
        for name, model in ((COMPILED, copy.deepcopy(self.models[BASELINE])), (OURS_COMPILED, converted)):
            begin = perf_counter()
            if begin >= self.end:
                _row(self.writer, "skip", self.network, variant=name,
                     message=f"out of the {self.asked.seconds:.3g} s of a problem")  # fmt: skip
                continue
            try:
                call = torch.compile(model, fullgraph=True, dynamic=False)
                call(*self._drawn(self.asked.seed))
            except Exception as error:
                self._failed(name, error)
                continue
            found[name], fields[name] = call, {"compile_s": round(perf_counter() - begin, 2)}
        return found

    def _judged(self, name: str, call: Callable) -> float | None:
        """The largest difference to torch's answer on all draws; None, and an error row, where one is too large."""
        try:
            return self._difference(name, call)
        except Exception as error:
            self._failed(name, error)
            return None

    def _difference(self, name: str, call: Callable) -> float | None:
        if self.asked.device.type == "cuda":
            call(*self._drawn(self.asked.seed))  # has the kernels compiled
            wait_until_compiled()
        let_choose(partial(call, *self._drawn(self.asked.seed)))
        worst = 0.0
        for trial in range(TRIALS):
            inputs = self._drawn(self.asked.seed + 1 + trial)
            theirs = self.models[BASELINE](*inputs)
            mine = call(*inputs)
            if mine.shape != theirs.shape:
                message = f"the output has shape {tuple(mine.shape)}, torch's {tuple(theirs.shape)}"
            else:
                difference = (mine - theirs).abs().max().item()
                message = f"the largest difference to torch's output is {difference:.3g}"
                if torch.allclose(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE):
                    worst = max(worst, difference)
                    continue
            _row(self.writer, "error", self.network, variant=name, status="wrong",
                 message=f"{message}; KernelBench allows {TOLERANCE:g}, absolute and relative")  # fmt: skip
            return None
        return worst

    def _failed(self, name: str, error: Exception) -> None:
        if context_is_lost(error):
            raise error
        _row(self.writer, "error", self.network, variant=name, status="error", message=one_line(error))


def ours(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """A converted copy, and what its fused call computes behind the layer; nothing where ``fuse`` takes none."""
    mine = copy.deepcopy(model)
    convert(mine)
    if any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in mine.modules()):
        return mine, ()
    mine.eval()
    return mine, tuple(what.partition(", in the forward")[0].removeprefix("with ") for _, what in fuse(mine).fused)


def _row(writer: Writer, kind: str, network: Network, **fields: object) -> None:
    head: Mapping[str, object] = {
        "layer": network.name, "pass": PASS, "model": network.name, "inputs": shown(network.inputs),
        "layout": "ncdhw", "dtype": "float32",
    }  # fmt: skip
    writer.write(kind, {**head, **fields})
