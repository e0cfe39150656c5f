"""Four gloo ranks in processes of this machine, which run the checks of test_distributed.py and write what they found.

``python tests/sharded_ranks.py FOLDER`` leaves FOLDER/RANK.json: for each check its findings, or the error it ended in.
The ranks are forked from a process that has imported torch and computed nothing.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # once, not in each rank: optimizers and DDP import it
import torch.distributed as dist
from sharded_problems import WORLD, f64, integers, problems
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import tritonconv
from tritonconv import distributed as sharded
from tritonconv.lab import cli
from tritonconv.lab.bench.workloads import workload
from tritonconv.lab.commands.measurements import slabs

# Timeouts of a group: where a rank does not come, and where all do, however busy the machine is.
SHORT, LONG = timedelta(seconds=3), timedelta(seconds=100)


def layers(rank: int) -> dict:
    """Two layers in training, DDP around a layer, autocast, and the layer's state_dict."""

    def network(kind, **more):
        torch.manual_seed(0)
        return nn.Sequential(
            kind(2, 4, 4, stride=2, padding=1, **more), nn.ReLU(), kind(4, 2, 3, padding=1, groups=2, **more)
        ).to(f64)

    torchs, ours = network(nn.ConvTranspose3d), network(sharded.ConvTranspose3d, axis=3)
    same_keys = list(torchs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(torchs.state_dict())
    sizes, x = [3, 1, 0, 2], torch.randn(2, 2, 3, 6, 2, dtype=f64)
    for model, mine in ((torchs, x), (ours, x.split(sizes, 3)[rank])):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            y = model(mine)
            y.square().sum().backward()
            optimizer.step()
    pairs = list(zip(torchs.parameters(), ours.parameters(), strict=True))
    apart = max(float((a - b).detach().abs().max()) for a, b in pairs)
    wrapped = nn.parallel.DistributedDataParallel(ours)
    wrapped.zero_grad()
    for model, mine in ((torchs, x), (wrapped, x.split(sizes, 3)[rank])):
        model.zero_grad()
        model(mine).square().sum().backward()
    ddp = max(float((a.grad - b.grad).abs().max()) for a, b in pairs)
    layer = sharded.ConvTranspose3d(2, 4, 4, stride=2, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(torch.ones(1, 2, 2, 4, 4), sizes=[2] * WORLD)
    layer.group = dist.group.WORLD
    copied = copy.deepcopy(layer)
    return {"same keys": same_keys, "apart": apart, "ddp apart": ddp, "half": str(half.dtype),
            "copied": copied.group is None, "repr": repr(layer)}  # fmt: skip


def said(function, *args, **kwargs) -> dict:
    """The error of a call, and the seconds until it came."""
    start = time.monotonic()
    try:
        function(*args, **kwargs)
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error), "seconds": time.monotonic() - start}
    return {"error": "", "text": "", "seconds": time.monotonic() - start}


def gradients_wanted(rank: int) -> list[str]:
    """Each choice of operands that need a gradient: those whose gradient is not the whole's."""
    generator, wrong = torch.Generator().manual_seed(1), []
    operands = integers(generator, 1, 2, 2, 6, 2), integers(generator, 2, 2, 3, 4, 3), integers(generator, 2)
    for needs in itertools.product((False, True), repeat=3):
        if not any(needs):
            continue
        whole = [t.clone().requires_grad_(need) for t, need in zip(operands, needs, strict=True)]
        parts = [operands[0].split([3, 0, 2, 1], 3)[rank], *operands[1:]]
        slab = [t.clone().requires_grad_(need) for t, need in zip(parts, needs, strict=True)]
        tritonconv.conv_transpose3d(*whole, stride=2, padding=1).square().sum().backward()
        sharded.conv_transpose3d(*slab, stride=2, padding=1, axis=3).square().sum().backward()
        for index, (one, other) in enumerate(zip(whole, slab, strict=True)):
            want = one.grad if index or one.grad is None else one.grad.split([3, 0, 2, 1], 3)[rank]
            if (want is None) != (other.grad is None) or not (want is None or torch.equal(want, other.grad)):
                wrong.append(f"{needs}: {index}")
    with torch.no_grad():
        plain = sharded.conv_transpose3d(*slab, stride=2, padding=1, axis=3)
    return wrong + (["recorded"] if plain.requires_grad else [])


def other_arguments(rank: int) -> dict:
    """One rank comes with other arguments, or refuses its own; then all come with the same."""

    def call(x=None, weight=None, bias=None, **more):
        x = torch.ones(1, 2, 2, 2, 2) if x is None else x
        return sharded.conv_transpose3d(x, torch.ones(2, 2, 3, 3, 3) if weight is None else weight, bias, **more)

    odd = {
        "stride": {"stride": (1, 2, 1)}, "axis": {"axis": 3}, "dtype": {"x": torch.ones(1, 2, 2, 2, 2).double(),
        "weight": torch.ones(2, 2, 3, 3, 3).double()}, "input shape": {"x": torch.ones(1, 2, 2, 3, 2)},
        "bias": {"bias": torch.ones(2)}, "gradients": {"x": torch.ones(1, 2, 2, 2, 2, requires_grad=True)},
        "refuses its own": {"stride": 0}, "refuses its own too": {"x": torch.ones(1, 2, 2, 2, 2, dtype=torch.int64)},
    }  # fmt: skip
    found = {}
    for number, (name, more) in enumerate(odd.items()):
        found[name] = said(call, **(more if rank == number % WORLD else {}))
    all_alike = {"channels": {"x": torch.ones(1, 3, 2, 2, 2)}, "nothing left": {"padding": 9}, "axis 5": {"axis": 5},
                 "out_sizes": {"out_sizes": [1] * WORLD}, "no group": {"group": "none"}, "axis 2.0": {"axis": 2.0},
                 "sizes of floats": {"sizes": [2.0] * WORLD}}  # fmt: skip
    for name, more in all_alike.items():
        found[name] = said(call, **more)
    found["bias shape"] = said(call, bias=torch.ones(3 if rank == 2 else 2))
    with torch.autocast("cpu", torch.bfloat16):
        found["no tensor"] = said(call, x="x" if rank == 2 else None)
    group = dist.new_group(timeout=LONG)  # in which the ranks meet first, so that sizes too are compared
    found["sizes"] = said(call, group=group, **({"sizes": [2] * WORLD} if rank == 2 else {}))
    found["sizes and a refusal"] = said(call, group=group, sizes=[2] * WORLD, stride=int(rank != 2))
    with_sizes = call(group=group, sizes=[2] * WORLD), call(group=group, sizes=[2] * WORLD)
    # They have met, and kernel 1 needs no message: a refusal waits for nobody.
    alone = {"weight": torch.ones(2, 2, 1, 1, 1), "group": group, "sizes": [2] * WORLD, "stride": int(rank != 2)}
    found["refusal after all have met"] = said(call, **alone)
    return {**found, "then": list(call().shape), "equal": all(torch.equal(y, call()) for y in with_sizes)}


def second(x, weight, bias, grad_y, **call) -> tuple[torch.Tensor, ...]:
    """The gradients of a loss of all first gradients; none where torch 2.11's DTensor lost the way back."""
    y = tritonconv.conv_transpose3d(x, weight, bias, **call)
    first = torch.autograd.grad(y, (x, weight, bias), grad_y, create_graph=True)
    if any(each.grad_fn is None for each in first):
        return ()
    return torch.autograd.grad(sum(each.square().sum() for each in first), (x, weight))


def placements(rank: int) -> dict:
    """DTensors: spatial shards against the whole, those that are refused."""
    generator, mesh = torch.Generator().manual_seed(0), init_device_mesh("cpu", (WORLD,))
    square = init_device_mesh("cpu", (2, 2))
    found, wrong = {}, []
    call = {"stride": 2, "padding": 1, "output_padding": (1, 0, 1)}
    x, weight = integers(generator, 2, 2, 5, 4, 6), integers(generator, 2, 2, 3, 3, 3)
    bias = integers(generator, 2)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = tritonconv.conv_transpose3d(*leaves, **call)
    grad_y = integers(generator, *y.shape)
    want = [y, *torch.autograd.grad(y, leaves, grad_y)]
    for where, kinds in ((mesh, [Shard(2)]), (mesh, [Shard(3)]), (mesh, [Shard(4)]), (square, [Shard(0), Shard(2)]),
                         (square, [Shard(3), Replicate()])):  # fmt: skip
        none = [Replicate()] * len(kinds)
        spread = [distribute_tensor(t.detach(), where, kinds if t is x else none).requires_grad_() for t in leaves]
        got_y = tritonconv.conv_transpose3d(*spread, **call)
        grads = torch.autograd.grad(got_y, spread, distribute_tensor(grad_y, where, kinds))
        for index, (one, other) in enumerate(zip((got_y, *grads), want, strict=True)):
            if not torch.equal(one.full_tensor(), other):
                wrong.append(f"{kinds}: result {index}")
        if got_y.placements != tuple(kinds) or got_y.stride() != y.stride():
            wrong.append(f"{kinds}: {got_y.placements} {got_y.stride()}")
        twice = [second(*leaves, grad_y, **call), second(*spread, distribute_tensor(grad_y, where, kinds), **call)]
        wrong += [f"{kinds}: second {index}" for index, (one, other) in enumerate(zip(*twice, strict=False))
                  if not torch.equal(one, other.full_tensor())]  # fmt: skip
    spread = distribute_tensor(x[0].detach(), mesh, [Shard(1)])
    rest = [distribute_tensor(t.detach(), mesh, [Replicate()]) for t in (weight, bias)]
    if not torch.equal(tritonconv.conv_transpose3d(spread, *rest, **call).full_tensor(), y[0]):
        wrong.append("without a batch")

    like = {"memory_format": torch.channels_last_3d}
    last = tritonconv.conv_transpose3d(distribute_tensor(x.detach(), mesh, [Shard(2)]).contiguous(**like), *rest)
    if not (last.is_contiguous(**like) and (last.to_local().is_contiguous(**like) or not last.to_local().numel())):
        wrong.append(f"channels_last_3d: {last.stride()} of the whole, {last.to_local().stride()} of the slab")

    def of(tensor, *kinds):
        return distribute_tensor(tensor.detach(), mesh if len(kinds) == 1 else square, kinds)

    partial = DTensor.from_local(x.detach(), mesh, [Partial()])
    for name, operands in {
        "channels": (of(x, Shard(1)), *rest), "channels of both": (of(x, Shard(1)), of(weight, Shard(0)), rest[1]),
        "two axes": [of(t, *([Shard(2), Shard(3)] if t is x else [Replicate()] * 2)) for t in leaves],
        "partial": (partial, *rest), "weight": (of(x, Shard(2)), of(weight, Shard(1)), of(bias, Shard(0))),
        "weight and a batch": (of(x, Shard(0)), of(weight, Shard(1)), of(bias, Shard(0))),
    }.items():  # fmt: skip
        found[name] = said(tritonconv.conv_transpose3d, *operands, **call)
    pair = DeviceMesh("cpu", [1, 3])
    outside = [distribute_tensor(t.detach(), pair, [Shard(2) if t is x else Replicate()]) for t in leaves]
    found["outside"] = said(tritonconv.conv_transpose3d, *outside, **call)
    return {"wrong": wrong, "refused": found}


def benched(rank: int) -> int:
    """``tritonconv bench --slabs`` of a tiny layer on the ranks; rank 0 writes its results."""
    sizes = {"n": 1, "c_in": 2, "c_out": 2, "size": (2, 5, 3), "kernel": (3, 3, 3), "padding": (1, 1, 1)}
    tiny = replace(workload("vnet_up3"), **sizes)
    slabs.workloads = lambda *chosen: (tiny,)
    flags = ["--seconds", "0.1", "--output", f"{sys.argv[1]}/results"]
    return cli.main(["bench", "--slabs", "--device", "cpu", *flags])


def silent_rank(rank: int) -> dict:
    """The last rank does not call: the others have the group's error within its timeout, at either first message."""
    found = {}
    for name, sizes in (("compared", None), ("given sizes", [1] * WORLD)):
        group = dist.new_group(timeout=SHORT)
        x, weight = torch.ones(1, 1, 1, 2, 2), torch.ones(1, 1, 9, 1, 1)
        dist.barrier()  # the ranks are in step, by the long timeout
        if sizes is not None:  # its first call meets all ranks
            sharded.conv_transpose3d(x, weight, padding=(4, 0, 0), group=group, sizes=sizes)
        if rank != WORLD - 1:
            found[name] = said(sharded.conv_transpose3d, x, weight, padding=(4, 0, 0), group=group, sizes=sizes)
    return found


def dead_rank(rank: int) -> dict:
    """The last rank dies before the backward."""
    group = dist.new_group(timeout=SHORT)
    x = torch.ones(1, 1, 1, 2, 2, requires_grad=True)
    dist.barrier()
    y = sharded.conv_transpose3d(x, torch.ones(1, 1, 3, 1, 1, requires_grad=True), padding=(1, 0, 0), group=group)
    if rank == WORLD - 1:
        return {}
    found = {"backward": said(y.sum().backward)}
    return {**found, "next call": said(sharded.conv_transpose3d, x, x[:, :, :1], group=group)}


CHECKS = (problems, layers, gradients_wanted, other_arguments, placements, benched, silent_rank, dead_rank)


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict = {"no group": said(sharded.conv_transpose3d, torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1))}
    where = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=WORLD, timeout=LONG)
    for check in CHECKS:
        start = time.process_time()
        try:
            found[check.__name__] = check(rank)
        except Exception:
            found[check.__name__] = {"failed": traceback.format_exc()}
            break  # the ranks are no longer in step
        finally:
            found[check.__name__, "seconds"] = time.process_time() - start
    (folder / f"{rank}.json").write_text(json.dumps({str(key): value for key, value in found.items()}))


def main() -> None:
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            try:
                run(rank, Path(sys.argv[1]))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)  # the group may wait for a rank that is gone
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
