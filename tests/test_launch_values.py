"""Launch values: a replay finds for operands the value that would be worked out afresh, in 10,000 random calls."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from variant_cases import DEVICE

pytest.importorskip("triton")

from tritonconv import Problem
from tritonconv.kernels import triton_direct
from tritonconv.kernels.registry import variants
from tritonconv.kernels.triton_buffers import Buffer, Descriptor
from tritonconv.kernels.triton_program import Program, operands_of
from tritonconv.kernels.triton_replay import MOST_KEPT, Replay
from tritonconv.lab.inspection.compiling import GPU, products_in
from tritonconv.problem import output_size

CALLS, PLAYED, PLANS = 10_000, 200, 120
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
RECORDS = [record for record in variants() if record.backend == "triton"]


def a_problem(draw: random.Random) -> Problem:
    k, s, r = (tuple(draw.choice(choices) for _ in range(3)) for choices in ((1, 2, 3, 4), (1, 2), (1, 1, 1, 2)))
    if draw.random() < 0.4:
        k, r = s, (1, 1, 1)
    size = tuple(draw.randint(1, 5) for _ in range(3))
    crop = tuple(draw.randint(0, (kernel - 1) // 2) for kernel in k)
    groups = draw.choice((1, 1, 2))
    channels = groups * draw.choice((1, 3, 8)), groups * draw.choice((1, 4, 8))
    if draw.random() < 0.2:
        groups = channels[0]
        channels = groups, groups
    out = output_size(size, k, s, crop, crop, (0, 0, 0), r)
    layout, dtype, bias = draw.choice(("ncdhw", "ndhwc")), draw.choice(DTYPES), draw.random() < 0.5
    if min(out) < 1:
        return a_problem(draw)
    return Problem(draw.choice((0, 1, 1, 2)), *channels, size, k, s, crop, out, r, groups, dtype, layout, bias)


def another(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """The shape and dtype of the tensor in memory of other strides, of another alignment, or like it."""
    kind = draw.randrange(5)
    values = torch.randint(-3, 4, tensor.shape, device=DEVICE).to(tensor.dtype)
    if kind == 0 and tensor.dim() == 5:
        return values.contiguous(memory_format=draw.choice((torch.channels_last_3d, torch.contiguous_format)))
    if kind == 1:  # every other element of a longer last axis
        wide = values.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1])
        return wide[..., ::2].copy_(values)
    if kind == 2:  # dense, at an odd address
        memory = values.new_empty(values.numel() + 1)[1:]
        return memory.view(tensor.shape).copy_(values)
    if kind == 3 and tensor.dim() == 5:
        return values.transpose(3, 4).contiguous().transpose(3, 4)
    return values.as_strided(tensor.shape, tensor.stride()) if values.stride() == tensor.stride() else values


def told(program: Program) -> list:
    """Kernels, grids and arguments, and how memory is laid out; buffers by place, offset, shape and strides."""

    def value(given):
        if isinstance(given, Buffer):
            return program.place(given), given.offset, given.shape, given.stride(), given.dtype, given.aligned
        if isinstance(given, Descriptor):
            return value(given.buffer), given.shape, given.strides, given.block
        return given

    kernels = [
        (kernel.name, kernel.grid, {name: value(given) for name, given in kernel.arguments.items()})
        for kernel in program.kernels
    ]
    owned = [(each.shape, each.stride(), each.dtype, each.zero) for each in program.owned]
    return [kernels, owned, program.offsets, [None if each is None else value(each) for each in program.answer]]


@pytest.mark.usefixtures("poisoned")
def test_a_replayed_value_is_the_one_that_would_be_worked_out(monkeypatch):
    draw = random.Random(19)
    torch.manual_seed(19)
    run, seen = Program.run, []
    monkeypatch.setattr(Program, "run", lambda program, operands: seen.append(program) or program)
    monkeypatch.setattr(triton_direct, "player", lambda program: None)  # a program of no kernel has one
    plans = []
    while len(plans) < PLANS:
        problem, record = a_problem(draw), draw.choice(RECORDS)
        if record.supports(problem, GPU) is None:
            config = draw.choice(record.space(problem, GPU))
            launches = partial(record.launches, problem, config)
            plans.append((problem, record, launches, Replay(launches)))
    played = due = 0
    for call in range(CALLS):
        problem, record, launches, replay = draw.choice(plans)
        like = operands_of(problem, record.pass_name, torch.device("meta"))
        operands = tuple(another(each, draw) if isinstance(each, torch.Tensor) else each for each in like)
        precision = draw.choice(("tf32", "ieee")) if problem.dtype is torch.float32 else "float16"
        with products_in(precision):
            if record.supports(problem, GPU) is not None:
                continue
            kept, fresh = replay(*operands), Program.of(launches, operands)
        assert kept is seen[-1] and told(kept) == told(fresh), (record.name, str(problem))
        assert len(replay.kept) <= MOST_KEPT
        due += call % (CALLS // PLAYED) == 0
        if due and record.supports(problem, DEVICE) is None:  # the interpreter computes bfloat16 wrongly
            due -= 1
            results, wanted = (run(each, operands) for each in (kept, fresh))
            several = isinstance(results, tuple)
            pairs = zip(results, wanted, strict=True) if several else ((results, wanted),)
            assert all(one is other is None or torch.equal(one, other) for one, other in pairs)
            played += 1
    assert played > 0.9 * PLAYED
    repeated, anew = (sum(getattr(plan[3].counts, name) for plan in plans) for name in ("repeated", "anew"))
    assert repeated > anew > PLANS
