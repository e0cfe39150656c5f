"""The forward kernel of one phase a program with the depth of a tile shared by several programs (config key SPLITS)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_triton_apart import CHANNELS
from variant_cases import CPU, DEVICE, TINY, Case, complaints, expected, run

from tritonconv.autotune.model import pruned_space
from tritonconv.kernels.registry import variant
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.lab.bench.workloads import workload
from tritonconv.problem import LAYOUTS

pytest.importorskip("triton")
from tritonconv.kernels import forward_phases  # needs Triton

RECORD = variant("forward_phases")
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_W": 0}


def configs_of(splits, turn=0):
    """The default in small tiles, its phases in both orders in turn."""
    return lambda problem: [
        {**RECORD.default(problem, DEVICE), **SMALL, "PHASE_INNER": turn % 2, "SPLITS": splits}
    ]  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("splits", [2, 5])
def test_exact(splits, layout):
    """Of 5 chunks some have no step, and a phase without a tap has none in any: the bias is added once all the same."""
    found = []
    for turn, case in enumerate([*TINY.values()][splits % 2 :: 2]):
        dtype = (torch.float32, torch.float16)[turn // 2 % 2]
        found += complaints(RECORD, case, dtype, layout, turn % 3 != 0, DEVICE, configs_of(splits, turn)) or []
    assert found == []


@pytest.mark.usefixtures("poisoned")
def test_exact_for_any_number_of_channels():
    found = []
    for turn, channels in enumerate(CHANNELS):
        case = Case(n=1, channels=channels, size=(2, 1, 3), kernel=3 + turn % 3 // 2, stride=2, front=1, back=1)
        layout = list(LAYOUTS)[turn % 2]
        found += complaints(RECORD, case, torch.float32, layout, True, DEVICE, configs_of(3, turn)) or []
    assert found == []


@pytest.mark.usefixtures("poisoned")
def test_exact_with_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr("tritonconv.kernels.triton_launch.WIDE_FROM", 1)
    case = Case(n=1, channels=(20, 3), size=(2, 3, 2), stride=2, front=1, back=1, extra=1)
    assert complaints(RECORD, case, torch.float32, "ndhwc", True, DEVICE, configs_of(3)) == []


def test_the_same_bits_each_time_and_0_or_1_stands_for_the_whole_depth():
    case = Case(n=1, channels=(40, 3), size=(2, 3, 2), stride=2, front=1, back=1)
    problem = case.problem(torch.float32, "ndhwc")
    inputs, grad_y, _, _ = expected(case, True)
    inputs = [(t / 7).to(DEVICE, torch.float32) for t in inputs]  # sums that are rounded
    inputs[0] = inputs[0].to(memory_format=torch.channels_last_3d)
    answers = {
        splits: [run(RECORD, problem, *configs_of(splits)(problem), inputs, grad_y, True)[0] for _ in range(2)]
        for splits in (0, 1, 4)
    }
    assert all(torch.equal(*pair) for pair in answers.values())
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.allclose(answers[4][0], answers[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "some"), [("monai_unet_spleen_384_64", True), ("vqvae3d_256_256", False)])
def test_the_tuner_tries_splits_where_tiles_are_few(name, some):
    problem = replace(workload(name).problem(), dtype=torch.float16, layout="ndhwc")
    split = [config for config in pruned_space(RECORD, problem, CPU) if config.get("SPLITS")]
    assert bool(split) == some
    for config in RECORD.space(problem, CPU):
        splits = config.get("SPLITS", 0)
        if splits:
            deepest, whole = (forward_phases.steps_of(problem, config, taps) for taps in (8, 27))
            assert deepest / splits >= max(
                forward_phases.LEAST_STEPS, forward_phases.programs(problem, config) * whole / MULTIPROCESSORS
            )
            assert splits * math.prod(problem.y_shape) * 4 <= RECORD.workspace_bytes(problem)


def test_the_work_counts_the_partials_and_their_launch():
    problem = replace(workload("monai_unet_spleen_384_64").problem(), dtype=torch.float16, layout="ndhwc")
    whole = RECORD.default(problem, CPU)
    one, three = (RECORD.work(problem, {**whole, "SPLITS": splits}) for splits in (0, 3))
    assert (three.launches, three.programs) == (one.launches + 1, 3 * one.programs)
    assert three.memory_bytes - one.memory_bytes == 2 * 3 * 4 * math.prod(problem.y_shape)
    assert three.flops == one.flops and three.depth == pytest.approx(one.depth / 3)
