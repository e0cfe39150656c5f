"""The weight's gradient where kernel = stride: tiles of taps, chunks, the bias in the same pass, the default."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from variant_cases import DEVICE, Case, complaints, expected, same

from tritonconv.kernels.registry import variant
from tritonconv.lab.bench.workloads import workloads
from tritonconv.lab.inspection.compiling import products_in
from tritonconv.problem import LAYOUTS

shuffle = pytest.importorskip("tritonconv.kernels.triton_shuffle_tiles")
from tritonconv.kernels import backward_weight_shuffle as kernel  # noqa: E402
from tritonconv.kernels.targets import MULTIPROCESSORS  # noqa: E402
from tritonconv.kernels.triton_program import Program, compute  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")

RECORD = variant("backward_weight_shuffle")
CASES = {
    "1 to 2": Case(channels=(1, 2), size=(2, 3, 9), kernel=2, stride=2),
    "3 to 4": Case(channels=(3, 4), size=(1, 2, 17), kernel=(1, 2, 4), stride=(1, 2, 4)),
    "5 to 3": Case(channels=(5, 3), size=(2, 2, 8), kernel=(2, 1, 3), stride=(2, 1, 3)),
    "16 to 28": Case(n=1, channels=(16, 28), size=(2, 3, 8), kernel=2, stride=2),
    "24 to 16": Case(n=1, channels=(24, 16), size=(2, 2, 16), kernel=2, stride=2),
    "28 to 5, 27 taps": Case(n=1, channels=(28, 5), size=(2, 1, 8), kernel=3, stride=3),
    "48 to 24": Case(n=1, channels=(48, 24), size=(2, 2, 8), kernel=(1, 2, 2), stride=(1, 2, 2)),
    "112 to 48 in 2 groups": Case(n=1, channels=(112, 48), size=(1, 2, 8), kernel=2, stride=2, groups=2),
    "64 taps": Case(n=1, channels=(3, 8), size=(1, 2, 8), kernel=4, stride=4),
    "one tap": Case(channels=(20, 3), size=(2, 3, 8), kernel=1),
    "rows that no step divides": Case(channels=(4, 2), size=(2, 3, 12), kernel=2, stride=2),
}


def configs(problem):
    """Tiles of all taps and of some, several of input channels, with chunks and without; both orders of the rows."""
    base = dict(RECORD.default(problem, DEVICE))
    narrow = {**base, "BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_W": min(base["BLOCK_W"], 16)}
    few_taps = {**narrow, "BLOCK_M": 16, "SPLITS": 3}
    return [base, {**base, "SPLITS": 5}, few_taps, {**few_taps, "SPLITS": 1}, {**narrow, "ROWS": 0, "SPLITS": 2}]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("label", CASES)
def test_exact(label, layout):
    with products_in("tf32"):
        assert complaints(RECORD, CASES[label], torch.float16, layout, True, DEVICE, configs) == []
        few = lambda problem: configs(problem)[::2]  # noqa: E731
        assert complaints(RECORD, CASES[label], torch.float32, layout, label == "1 to 2", DEVICE, few) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_offsets_and_wide_counts(layout, monkeypatch):
    """Voxels count in 32 bits where only their offsets take 64, and in 64 bits beyond that."""
    for wide in (1, 2):
        monkeypatch.setattr(kernel, "wide", lambda *buffers, of=None, wide=wide: wide)
        for label in ("1 to 2", "24 to 16"):
            assert complaints(RECORD, CASES[label], torch.float16, layout, True, DEVICE, configs) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_lies_behind_the_operands_reaches_no_sum(layout):
    """It is NaN here: a product of zero with it is NaN too."""
    case = CASES["1 to 2"]
    problem = case.problem(torch.float16, layout)
    (x, _, _), grad_y, _, (_, grad_weight, grad_bias) = expected(case, True)
    longer = (torch.cat((each, torch.full_like(each, math.nan))) for each in (x, grad_y))
    operands = [each.to(DEVICE, torch.float16, memory_format=LAYOUTS[layout])[: case.n] for each in longer]
    for config in configs(problem)[1:]:
        found = compute(partial(RECORD.launches, problem, config), (*operands, True))
        assert same(found[0], grad_weight) and same(found[1], grad_bias), config


def test_the_launches_of_a_config():
    """One writes the results; a second adds partials, or a bias whose taps are in several tiles."""
    case = Case(channels=(16, 8), size=(2, 2, 8), kernel=2, stride=2)
    problem = case.problem(torch.float16, "ndhwc")
    (x, _, _), grad_y, _, (_, grad_weight, grad_bias) = expected(case, True)
    operands = [each.to(DEVICE, torch.float16, memory_format=LAYOUTS["ndhwc"]) for each in (x, grad_y)]
    base = {**RECORD.default(problem, DEVICE), "BLOCK_M": 64, "BLOCK_N": 16}
    for changed, need_bias, count in (
        ({"SPLITS": 1}, True, 1), ({"SPLITS": 2}, True, 2), ({"SPLITS": 2, "ARRIVE": 1}, True, 1),
        ({"SPLITS": 1, "BLOCK_M": 16}, True, 2), ({"SPLITS": 1, "BLOCK_M": 16}, False, 1),
        ({"SPLITS": 2, "BLOCK_M": 16}, True, 3), ({"SPLITS": 2, "BLOCK_M": 16, "ARRIVE": 1}, True, 3),
    ):  # fmt: skip
        config = {**base, **changed}
        program = Program.of(partial(RECORD.launches, problem, config), (*operands, need_bias))
        assert len(program.kernels) == count, (changed, need_bias)
        assert (shuffle.tap_tiles(problem, config) > 1) == (config["BLOCK_M"] == 16)
        found = program.run((*operands, need_bias))
        assert same(found[0], grad_weight) and (not need_bias or same(found[1], grad_bias))


LAYERS = [each for each in workloads() if each.problem(torch.bfloat16).tiles_exactly and each.problem().groups == 1]


def test_the_default_fills_the_multiprocessors():
    """A third of them at least where there are steps for it, and no chunk that is not worth its start."""
    assert len(LAYERS) >= 20
    for layer in LAYERS:
        for layout in LAYOUTS:
            problem = layer.problem(torch.bfloat16, layout)
            config = RECORD.default(problem, torch.device("cuda"))
            each, steps = shuffle.programs(problem, config), shuffle.steps(problem, config)
            assert each * config["SPLITS"] <= 3 * MULTIPROCESSORS or config["SPLITS"] == 1, layer.name
            assert each * config["SPLITS"] >= MULTIPROCESSORS // 3 or steps < 8, layer.name
            assert config["SPLITS"] == 1 or steps // config["SPLITS"] * config["BLOCK_K"] >= shuffle.LEAST_VOXELS
            assert config in RECORD.space(problem, torch.device("cuda"))


def test_the_count_of_bytes():
    """Both operands once where one tile has all rows and input channels; the partials twice."""
    layer = next(each for each in LAYERS if each.name == "nnunet_resenc_160x192_up4")
    problem = layer.problem(torch.bfloat16, "ndhwc")
    config = RECORD.default(problem, torch.device("cuda"))
    assert shuffle.programs(problem, config) == 1
    counts, partials = RECORD.work(problem, config), 8 * config["SPLITS"] * math.prod(problem.weight_shape)
    assert counts.memory_bytes == problem.bytes("backward_weight") + partials
    operands = 2 * (math.prod(problem.x_shape) + math.prod(problem.y_shape))
    assert operands <= counts.cache_bytes - partials <= 1.05 * operands
    splitk = variant("backward_weight_splitk")
    theirs = splitk.work(problem, splitk.default(problem, torch.device("cuda")))
    assert counts.cache_bytes < theirs.cache_bytes and counts.launches == 2


def test_a_tile_has_all_taps_where_few_channels_of_each_fit_beside_them():
    for c_out, block_m, rows, taps in (
        (16, 32, 0, 8), (16, 16, 0, 1), (16, 16, 1, 2), (1, 16, 0, 8), (2, 16, 0, 8), (3, 16, 0, 4),
    ):  # fmt: skip
        assert shuffle.tile_taps((2, 2, 2), c_out, block_m, rows) == taps, (c_out, block_m, rows)
    assert shuffle.tile_taps((4, 4, 4), 16, 128, 0) == 8
