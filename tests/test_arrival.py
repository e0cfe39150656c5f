"""Split reductions whose last program sums (ARRIVE=1): exact, whoever is last, with counters at zero afterwards."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from variant_cases import DEVICE, Case, complaints, expected, run, same

from tritonconv.autotune.choose import config_fault
from tritonconv.kernels.registry import variant
from tritonconv.lab.inspection.compiling import products_in
from tritonconv.problem import LAYOUTS

arrival = pytest.importorskip("tritonconv.kernels.triton_arrival")
from tritonconv.kernels import triton_reduce  # noqa: E402
from tritonconv.kernels.triton_program import Program  # noqa: E402
from tritonconv.kernels.triton_target import INTERPRETED  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = {
    "splitk": Case(n=1, channels=(3, 2), size=(3, 4, 5), stride=2, front=1, back=1, extra=1),
    "splitk groups": Case(channels=(4, 6), size=(3, 4, 4), kernel=2, stride=2, groups=2),
    "splitk batch 0": Case(n=0, channels=(16, 16), size=2, stride=2),
    "cells": Case(n=2, channels=(5, 3), size=(3, 4, 3), stride=2, front=(0, 1, 2), back=(1, 0, 0)),
    "cells k4": Case(channels=(3, 8), size=(2, 4, 3), kernel=4, stride=2, front=1, back=1),
    "depthwise": Case(channels=(5, 5), size=(2, 3, 2), kernel=5, stride=2, front=2, back=2, groups=5),
    "depthwise k3": Case(channels=(16, 16), size=(2, 1, 3), stride=2, front=1, back=1, extra=1, groups=16),
    "depthwise batch 0": Case(n=0, channels=(3, 3), size=2, kernel=2, stride=2, groups=3),
    "depthwise_cells": Case(channels=(16, 16), size=(3, 2, 3), stride=2, front=1, back=1, extra=1, groups=16),
    "depthwise_cells batch 0": Case(n=0, channels=(3, 3), size=2, kernel=2, stride=2, groups=3),
    "fused": Case(channels=(20, 3), size=(3, 2, 9), kernel=2, stride=2),
    "fused groups": Case(channels=(4, 6), size=(2, 2, 10), kernel=2, stride=2, groups=2),
    "fused batch 0": Case(n=0, kernel=2, stride=2),
}
SMALL = {"BLOCK_K": 16, "BLOCK_M": 16, "BLOCK_W": 0}  # a few voxels are several steps then
# Splits, with a bias or without, dtype, layout. One round of loads; one that is not full; two, and programs without a
# voxel. A split that is none has nothing to add up.
CALLS = [
    (1, True, torch.float32, "ndhwc"), (2, True, torch.float32, "ncdhw"), (5, False, torch.float16, "ndhwc"),
    (19, True, torch.float32, "ndhwc"),
]  # fmt: skip


def record_of(label: str):
    return variant(f"backward_weight_{label.split()[0]}")


def split(record, problem, splits: int, **more: int) -> dict[str, int]:
    """A config of small tiles."""
    config = dict(record.default(problem, DEVICE))
    small = {key: value for key, value in SMALL.items() if key in config and "depthwise" not in record.name}
    return {**config, **small, "SPLITS": splits, **more}


def counted() -> int:
    """The sum of all counters."""
    return sum(int(buffer.sum()) for buffer in arrival._buffers.values())


@pytest.fixture(params=["first to last", "last to first", "mixed"])
def order(request, monkeypatch):
    """The order in which the interpreter runs the programs of a grid; a GPU has its own."""
    if not INTERPRETED or request.param == "first to last":
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    set_grid_idx, orders = builder.set_grid_idx, {}

    def set_other(x: int, y: int, z: int) -> None:
        programs = builder.grid_dim[0]
        if programs not in orders:
            indices = range(programs)
            mixed = request.param == "mixed"
            orders[programs] = random.Random(programs).sample(indices, programs) if mixed else indices[::-1]
        set_grid_idx(orders[programs][x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", set_other)


@pytest.mark.parametrize("label", CASES)
def test_whoever_comes_last_writes_the_sums(label, order, monkeypatch):
    """Exact, in one launch, with and without a bias; the counters are at zero after each launch."""
    record, case = record_of(label), CASES[label]
    if case.n:
        monkeypatch.setattr(triton_reduce, "sum_partials_kernel", None)
    for splits, bias, dtype, layout in CALLS:

        def configs(problem, splits=splits):
            return [split(record, problem, splits, ARRIVE=1)]

        if splits > 1:
            with products_in("tf32"):
                assert complaints(record, case, dtype, layout, bias, configs=configs) == []
            assert counted() == 0


@pytest.mark.parametrize("label", [label for label, case in CASES.items() if case.n])
def test_the_bits_are_those_of_a_second_launch_that_adds_in_index_order(label, monkeypatch):
    """Of numbers whose sums are rounded, so that other parts of the sum have other bits."""
    record, case, found = record_of(label), CASES[label], []
    monkeypatch.setattr(triton_reduce, "TILE", triton_reduce.ROW)  # a program of the second launch adds one at a time
    problem = case.problem(torch.float32, "ndhwc", True)
    x, grad_y = (torch.randn(s).to(DEVICE, memory_format=LAYOUTS["ndhwc"]) for s in (problem.x_shape, problem.y_shape))
    with products_in("tf32"):
        for splits in (1, 2, 4):
            config = split(record, problem, splits)
            apart = run(record, problem, config, (x, None, None), grad_y, True)
            together = run(record, problem, {**config, "ARRIVE": 1}, (x, None, None), grad_y, True)
            assert all(map(torch.equal, apart, together))
            found.append(together)
    assert not all(torch.equal(*pair) for pair in zip(*found[1:], strict=True))


def test_both_gradients_at_once():
    """One launch writes grad_x, and its last program the sums."""
    case, record = CASES["fused"], record_of("fused")
    problem = case.problem(torch.float16, "ncdhw")
    (x, weight, _), grad_y, _, wanted = expected(case, True)
    operands = [each.to(DEVICE, torch.float16) for each in (x, weight, grad_y)]
    with products_in("tf32"):
        config = split(record, problem, 3, ARRIVE=1)
        program = Program.of(partial(record.joint, problem, config), (*operands, True))
        assert len(program.kernels) == 1
        assert all(map(same, program.run((*operands, True)), wanted))
    assert counted() == 0


def test_launches_of_a_stream_share_counters_and_large_ones_have_their_own():
    device = torch.empty(0, device=DEVICE).device
    one, other = arrival.counters(3, device), arrival.counters(arrival.COUNTERS, device)
    assert one is other and one.dtype == torch.int32 and one.numel() == arrival.COUNTERS and not one.any()
    large = arrival.counters(arrival.COUNTERS + 1, device)
    assert large is not one and large.numel() == arrival.COUNTERS + 1 and not large.any()


@pytest.mark.parametrize("label", ["splitk", "cells", "depthwise", "depthwise_cells", "fused"])
def test_the_counters_are_asked_for_at_each_run(label):
    """A program is one kernel, and holds none: the next run may be on another stream, or captured."""
    record, problem = record_of(label), CASES[label].problem(torch.float16, "ndhwc")
    x, grad_y = (torch.ones(s, device=DEVICE, dtype=torch.float16) for s in (problem.x_shape, problem.y_shape))
    with products_in("tf32"):
        config = split(record, problem, 2, ARRIVE=1)
        program = Program.of(lambda *operands: record.launches(problem, config, *operands), (x, grad_y, True))
    assert len(program.kernels) == 1
    (lent,) = [each for each in program.owned if each.lent is not None]
    assert lent not in (*program.answer, *program.parts)
    assert program.filled(lent, (x, grad_y, True)) is arrival.counters(1, x.device)


def test_the_tuner_tries_it_where_it_is_switched_on(monkeypatch):
    seen = set()
    for label, case in CASES.items():
        record, problem = record_of(label), case.problem(torch.float16, "ndhwc")
        with products_in("tf32"):
            assert not any(arrival.ARRIVE in config for config in record.space(problem, DEVICE))
            with monkeypatch.context() as patched:
                patched.setattr(arrival, "TUNED", True)
                space = record.space(problem, DEVICE)
            more = [config for config in space if arrival.ARRIVE in config]
            for config in more:
                assert config[arrival.ARRIVE] == 1 and config["SPLITS"] > 1
                assert config_fault(record, config, problem, DEVICE) is None
                plain = {key: value for key, value in config.items() if key != arrival.ARRIVE}
                assert plain in space
                assert record.work(problem, config).launches == record.work(problem, plain).launches - 1
            seen |= {record.name} if more else set()
    assert seen == {record_of(label).name for label in CASES}
    assert "its keys are ARRIVE" in config_fault(
        variant("backward_data_fused"), {arrival.ARRIVE: 1}, CASES["fused"].problem(torch.float16, "ndhwc"), DEVICE
    )
