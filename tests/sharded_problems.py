"""Random problems for the ranks of sharded_ranks.py: slabs against the whole, and the bytes that are exchanged."""

from __future__ import annotations

import contextlib
import random
from itertools import pairwise

import torch
import torch.distributed as dist

import tritonconv
from tritonconv import distributed as sharded

WORLD = 4
PROBLEMS = 200
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
                overlap=(None, True, False)[number // 2 % 3],
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
