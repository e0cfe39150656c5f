"""The forward kernel of packed phases with some axes' phases in programs of their own (config key APART)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from variant_cases import CPU, DEVICE, TINY, Case, complaints

from tritonconv.autotune.model import pruned_space
from tritonconv.kernels.registry import variant
from tritonconv.problem import LAYOUTS, Problem

phases_apart = pytest.importorskip("tritonconv.kernels.triton_apart")
from tritonconv.kernels import forward_phases_packed as packed  # noqa: E402

NAME = "forward_phases_packed"
CHANNELS = (
    (1, 2), (2, 1), (3, 4), (4, 5), (5, 3), (16, 24), (24, 16), (28, 3), (3, 28), (48, 5), (5, 48), (112, 2), (14, 3),
)  # fmt: skip
SMALL = {"BLOCK_N": 16, "BLOCK_K": 16}


def configs_of(apart, turn):
    """The default, in small tiles, with whole rows and without in turn."""

    def configs(problem):
        default = variant(NAME).default(problem, DEVICE)
        rows, width = turn % 2 if problem.stride[2] > 1 else 0, (0, 2, 4, 16)[turn // 2 % 4]
        return [{**default, **SMALL, "BLOCK_M": 16 if turn % 5 else 64, "ROWS": rows, "BLOCK_W": width, "APART": apart}]

    return configs


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("apart", [1, 2, 3])
def test_exact(apart, layout):
    record, served, found = variant(NAME), 0, []
    for turn, case in enumerate([*TINY.values()][:: 3 if apart == 3 else 1], start=apart):  # 3 is in no space
        dtype = (torch.float32, torch.float16)[turn // 2 % 2]
        answer = complaints(record, case, dtype, layout, turn % 3 != 0, DEVICE, configs_of(apart, turn))
        served += answer is not None
        found += answer or []
    assert found == []
    assert served > (6 if apart == 3 else 20)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("apart", [1, 2])
def test_exact_for_any_number_of_channels(apart):
    found = []
    for turn, channels in enumerate(CHANNELS):
        case = Case(n=1, channels=channels, size=(2, 1, 3), kernel=3 + turn % 3 // 2, stride=2, front=1, back=1)
        layout = list(LAYOUTS)[turn % 2]
        found += complaints(variant(NAME), case, torch.float32, layout, True, DEVICE, configs_of(apart, turn)) or []
    assert found == []


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("apart", [1, 2, 3])
def test_exact_with_offsets_of_64_bits(apart, monkeypatch):
    monkeypatch.setattr("tritonconv.kernels.triton_launch.WIDE_FROM", 1)
    case = Case(n=1, channels=(5, 3), size=(2, 3, 2), stride=2, front=1, back=1, extra=1)
    assert complaints(variant(NAME), case, torch.float32, "ndhwc", True, DEVICE, configs_of(apart, 1)) == []


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("apart", [0, 1])
def test_exact_where_the_outputs_of_a_cell_read_one_voxel_along_a_width_of_whole_steps(apart, layout):
    """Then the voxels are compared with the borders, and no word tells which are inside; see WORDS."""
    case = Case(channels=(3, 4), size=(2, 3, 8), kernel=(3, 4, 2), stride=2, front=(1, 0, 0), back=(0, 1, 0))

    def configs(problem):
        return [{**configs_of(apart, 2)(problem)[0], "BLOCK_W": 4}]

    assert complaints(variant(NAME), case, torch.float16, layout, True, DEVICE, configs) == []


LAYERS = {
    "memory-bound": Problem(4, 32, 16, (48, 32, 40), (3, 3, 3), (2, 2, 2), (1, 1, 1), (96, 64, 80)),
    "compute-bound": Problem(32, 128, 64, (16, 16, 16), (4, 4, 4), (2, 2, 2), (1, 1, 1), (32, 32, 32)),
    "one stride of 1": Problem(2, 64, 32, (16, 40, 40), (3, 3, 3), (1, 2, 2), (1, 1, 1), (16, 80, 80)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("label", LAYERS)
def test_the_space_has_each_set_of_packed_axes_that_differs(label, layout):
    problem = replace(LAYERS[label], dtype=torch.float16, layout=layout)
    found = {config.get("APART", 0) for config in pruned_space(variant(NAME), problem, CPU)}
    assert found == ({0, 2} if problem.stride[0] == 1 else {0, 1, 2})


def test_the_work_counts_products_and_reads_of_each_set():
    """At k3 s2 the products for one that counts are 64, 48 and 36 of 27, the reads of a voxel 8, 12 and 18."""
    problem, record = replace(LAYERS["memory-bound"], dtype=torch.float16, layout="ndhwc"), variant(NAME)
    tile = {**record.default(problem, CPU), "BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32}
    steps = {apart: record.work(problem, {**tile, "APART": apart}) for apart in (0, 1, 2)}
    cells = {0: 49 * 33 * 41, 1: 48 * 33 * 41, 2: 48 * 32 * 41}  # of one image, those that the crop cuts among them
    for apart, products in ((0, 64), (1, 48), (2, 36)):
        counted = steps[apart].flops / (2 * 4 * cells[apart] * problem.c_in * problem.c_out)
        assert counted == pytest.approx(products, rel=0.01)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("apart", [0, 1, 2, 3])
@pytest.mark.parametrize("block_k", [16, 32, 64])
def test_a_step_over_a_part_of_the_channels_over_neighbours_or_over_anything(block_k, apart, layout):
    case = Case(n=1, channels=(16, 5), size=(1, 2, 5), kernel=(3, 3, 4), stride=2, front=1, back=1)

    def configs(problem):
        return [{**each, "BLOCK_K": block_k} for turn in (1, 2) for each in configs_of(apart, turn)(problem)]

    assert complaints(variant(NAME), case, torch.float32, layout, True, DEVICE, configs) == []


def test_the_compiler_knows_the_depth_where_all_phases_apart_have_as_many_taps():
    stride = (2, 2, 2)
    assert phases_apart.one_depth((4, 3, 3), stride, 1) and phases_apart.one_depth((3, 3, 3), stride, 0)
    assert not phases_apart.one_depth((3, 4, 4), stride, 1) and not phases_apart.one_depth((4, 1, 4), stride, 2)


def test_a_step_is_of_neighbours_along_w_where_w_is_packed_and_their_channels_fill_it():
    window, channels = (2, 2, 2), 16
    tries = itertools.product((16, 32), (2, 3))  # BLOCK_K, APART
    places = {each: int(phases_apart.places_of(window, channels, *each)) for each in tries}
    assert places == {(16, 2): 1, (16, 3): 1, (32, 2): 2, (32, 3): 0}
    assert phases_apart.places_of(window, 24, 32, 0) == 0 and phases_apart.places_of((2, 2, 1), channels, 32, 0) == 0


@pytest.mark.parametrize(
    ("kernel", "stride", "crop", "late"), [(3, 2, 1, 1), (3, 2, 2, 0), (4, 2, 1, 0), (5, 3, 4, 0), (5, 3, 2, 2)]
)
def test_stored_rows_begin_with_the_first_output_where_no_cell_then_reads_more(kernel, stride, crop, late):
    problem = Case(kernel=kernel, stride=stride, front=crop).problem()
    assert [packed.cell_start(problem, {"ROWS": 1, "APART": apart}) for apart in (0, 2, 3)] == [late, late, 0]
    assert packed.cell_start(problem, {"ROWS": 0}) == 0
