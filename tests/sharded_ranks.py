"""Four gloo ranks in processes of this machine, which run the checks of test_distributed.py and write what they found.

``python tests/sharded_ranks.py FOLDER`` leaves FOLDER/RANK.json: for each check its findings, or the error it ended in.
The ranks are forked from a process that has imported torch and computed nothing.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import sys
import time
import traceback
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
import torch._dynamo  # once, not in each rank: optimizers and DDP import it
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import tritonconv
from tritonconv import distributed as sharded

WORLD = 4
PROBLEMS = 200
SHORT = timedelta(seconds=1)  # a group's timeout where a rank does not come
f64 = torch.float64


def integers(generator, *shape):
    return torch.randint(-3, 4, shape, generator=generator, dtype=f64)


def random_problem(rng: random.Random) -> dict:
    """Sizes and arguments of a call along a random axis; slabs of 0 to 4 planes."""
    while True:
        at = rng.randrange(3)
        kernel, stride, dilation = ([rng.randint(1, most) for _ in range(3)] for most in (3, 3, 2))
        begin, end = ([rng.randint(0, 2) for _ in range(3)] for _ in range(2))
        kernel[at], stride[at], dilation[at] = rng.randint(1, 6), rng.randint(1, 4), rng.randint(1, 3)
        begin[at], end[at] = rng.randint(0, 5), rng.randint(0, 5)
        more = [rng.randrange(max(pair)) for pair in zip(stride, dilation, strict=True)]
        sizes = [1] * WORLD if rng.random() < 0.2 else [rng.randint(0, 4) for _ in range(WORLD)]
        size = [rng.randint(1, 4) for _ in range(3)]
        size[at] = sum(sizes)
        axes = zip(size, stride, begin, end, dilation, kernel, more, strict=True)
        out = [(i - 1) * s - b - e + r * (k - 1) + q + 1 for i, s, b, e, r, k, q in axes]
        if size[at] and min(out) >= 1 and max(out) <= 60:
            break
    groups = rng.choice((1, 1, 2))
    problem = {"at": at, "sizes": sizes, "size": size, "out": out, "kernel": kernel, "n": rng.choice((0, 1, 1, 1, 2)),
               "c_in": groups * rng.randint(1, 2), "c_out": groups * rng.randint(1, 2), "bias": rng.random() < 0.5,
               "last": rng.random() < 0.4}  # fmt: skip
    problem["call"] = {"stride": stride, "padding": list(zip(begin, end, strict=True)), "output_padding": more,
                       "groups": groups, "dilation": dilation}  # fmt: skip
    return problem


def planes_read(problem: dict, own: tuple[int, int], out: tuple[int, int]) -> int:
    """Planes of other ranks between the first and the last that a rank's planes of y need, by trying all."""
    at, call = problem["at"], problem["call"]
    stride, crop, rate = call["stride"][at], call["padding"][at][0], call["dilation"][at]
    needed = [i for i in range(problem["size"][at]) for tap in range(problem["kernel"][at])
              if out[0] <= stride * i + rate * tap - crop < out[1]]  # fmt: skip
    run = range(min(needed), max(needed) + 1) if needed else range(0)
    return len([i for i in run if not own[0] <= i < own[1]])


@contextlib.contextmanager
def counted():
    """{"isend": bytes, "irecv": bytes, "gathered": calls} of what is exchanged inside."""
    counts = {"isend": 0, "irecv": 0, "gathered": 0}
    swap, gather = dist.batch_isend_irecv, dist.all_gather

    def counting(operations):
        for each in operations:
            counts[each.op.__name__] += each.tensor.numel() * each.tensor.element_size()
        return swap(operations)

    def gathering(*args, **kwargs):
        counts["gathered"] += 1
        return gather(*args, **kwargs)

    dist.batch_isend_irecv, dist.all_gather = counting, gathering
    try:
        yield counts
    finally:
        dist.batch_isend_irecv, dist.all_gather = swap, gather


def spans(sizes) -> list[tuple[int, int]]:
    ends = [sum(sizes[: rank + 1]) for rank in range(len(sizes))]
    return list(zip([0, *ends], ends, strict=False))


def first_and_second(y, leaves, grad_y, factors):
    """y, the gradients of the leaves, and those of a sum of these gradients by ``factors`` (none: left out)."""
    grads = torch.autograd.grad(y, leaves, grad_y, create_graph=bool(factors))
    more = ()
    if factors:
        loss = sum((grad * factor).sum() for grad, factor in zip(grads, factors, strict=True))
        more = torch.autograd.grad(loss, (grad_y, *leaves[:2]))
    return [t.detach() for t in (y, *grads, *more)]


def problems(rank: int) -> dict:
    """Outputs, gradients, second derivatives and bytes of random problems against the unsharded call."""
    wrong, kinds = [], {"halo of two": 0, "empty": 0, "stride > kernel": 0, "bytes": 0}
    rng = random.Random(0)
    for number in range(PROBLEMS):
        problem = random_problem(rng)
        generator = torch.Generator().manual_seed(number)
        axis, sizes, call = problem["at"] + 2, problem["sizes"], problem["call"]
        dtype = torch.float32 if number % 4 == 1 else f64
        x = integers(generator, problem["n"], problem["c_in"], *problem["size"]).to(dtype)
        weight = integers(generator, problem["c_in"], problem["c_out"] // call["groups"], *problem["kernel"]).to(dtype)
        bias = [integers(generator, problem["c_out"]).to(dtype)] if problem["bias"] else []
        if problem["last"]:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        out = problem["out"][problem["at"]]
        if number % 5 == 4:
            cuts = [0, *sorted(rng.randint(0, out) for _ in range(WORLD - 1)), out]
            owned = tuple(b - a for a, b in pairwise(cuts))
        else:
            owned = sharded.output_sizes(tuple(sizes), call["stride"][problem["at"]], out)
        leaves = [t.requires_grad_() for t in (x, weight, *bias)]
        y = tritonconv.conv_transpose3d(*leaves, **call)
        grad_y = integers(generator, *y.shape).to(dtype)
        twice = number % 5 == 2
        factors = [[integers(generator, *t.shape).to(dtype) for t in leaves] for _ in range(WORLD)] if twice else None
        # Each rank's loss has its own factors of what all have.
        whole = [factors[0][0], *map(sum, list(zip(*factors, strict=True))[1:])] if twice else None
        want = first_and_second(y, leaves, grad_y.requires_grad_(twice), whole)
        mine = [(axis, sizes if like_x else owned) for like_x in (False, True)]
        cut_as = [mine[0], mine[1], *[None] * (1 + len(bias)), *((mine[0], mine[1], None) if twice else ())]

        def part(tensor, cut, rank=rank):
            return tensor if cut is None else tensor.detach().split(list(cut[1]), cut[0])[rank]

        like = torch.channels_last_3d if problem["last"] else torch.contiguous_format
        slab = part(x, mine[1]).clone(memory_format=like).requires_grad_()
        rest = [t.detach().clone().requires_grad_() for t in (weight, *bias)]
        grad_slab = part(grad_y, mine[0]).clone().requires_grad_(twice)
        with counted() as forward:
            got_y = sharded.conv_transpose3d(
                slab, *rest, **call, axis=axis, out_sizes=owned if number % 5 == 4 else None,
                sizes=sizes if number % 3 == 2 else None,
            )  # fmt: skip
        own = [part(factors[0][0], mine[1]), *factors[rank][1:]] if twice else None
        with counted() as backward:
            got = first_and_second(got_y, [slab, *rest], grad_slab, own)
        for index, (one, other, cut) in enumerate(zip(got, want, cut_as, strict=True)):
            if not torch.equal(one, part(other, cut)):
                wrong.append(f"{number}: result {index} of {problem}")
        read = planes_read(problem, spans(sizes)[rank], spans(owned)[rank])
        plane = problem["n"] * problem["c_in"] * dtype.itemsize
        for index, extent in enumerate(problem["size"]):
            plane *= 1 if index == problem["at"] else extent
        expected = read * plane
        if forward["irecv"] != expected or forward["gathered"] != (number % 3 != 2):
            wrong.append(f"{number}: {forward}, {expected} bytes by formula of {problem}")
        if not twice and (backward["isend"], backward["irecv"]) != (expected, forward["isend"]):
            wrong.append(f"{number}: backward {backward}, {expected} bytes by formula of {problem}")
        kinds["bytes"] += forward["irecv"]
        kinds["halo of two"] += read > max([sizes[r] for r in (rank - 1, rank + 1) if 0 <= r < WORLD])
        kinds["empty"] += sizes[rank] == 0
        kinds["stride > kernel"] += call["stride"][problem["at"]] > problem["kernel"][problem["at"]]
    return {"wrong": wrong, **kinds}


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
                 "out_sizes": {"out_sizes": [1] * WORLD}, "no group": {"group": "none"}}  # fmt: skip
    for name, more in all_alike.items():
        found[name] = said(call, **more)
    group = dist.new_group(timeout=SHORT)  # in which the ranks meet first, so that sizes too are compared
    found["sizes"] = said(call, group=group, **({"sizes": [2] * WORLD} if rank == 2 else {}))
    return {**found, "then": list(call().shape)}


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
    spread = distribute_tensor(x[0].detach(), mesh, [Shard(1)])
    rest = [distribute_tensor(t.detach(), mesh, [Replicate()]) for t in (weight, bias)]
    if not torch.equal(tritonconv.conv_transpose3d(spread, *rest, **call).full_tensor(), y[0]):
        wrong.append("without a batch")

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
    return {"wrong": wrong, "refused": found}


def silent_rank(rank: int) -> dict:
    """The last rank does not call: the others have the group's error within its timeout, at either first message."""
    found = {}
    for name, sizes in (("compared", None), ("given sizes", [1] * WORLD)):
        group = dist.new_group(timeout=SHORT)
        x, weight = torch.ones(1, 1, 1, 2, 2), torch.ones(1, 1, 9, 1, 1)
        if sizes is not None:  # its first call meets all ranks
            sharded.conv_transpose3d(x, weight, padding=(4, 0, 0), group=group, sizes=sizes)
        if rank != WORLD - 1:
            found[name] = said(sharded.conv_transpose3d, x, weight, padding=(4, 0, 0), group=group, sizes=sizes)
    return found


def dead_rank(rank: int) -> dict:
    """The last rank dies before the backward."""
    group = dist.new_group(timeout=SHORT)
    x = torch.ones(1, 1, 1, 2, 2, requires_grad=True)
    y = sharded.conv_transpose3d(x, torch.ones(1, 1, 3, 1, 1, requires_grad=True), padding=(1, 0, 0), group=group)
    if rank == WORLD - 1:
        return {}
    found = {"backward": said(y.sum().backward)}
    return {**found, "next call": said(sharded.conv_transpose3d, x, x[:, :, :1], group=group)}


CHECKS = (problems, layers, other_arguments, placements, silent_rank, dead_rank)


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict = {"no group": said(sharded.conv_transpose3d, torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1))}
    where = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=WORLD, timeout=timedelta(seconds=30))
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
