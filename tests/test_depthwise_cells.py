"""The depthwise kernels over cells: programs that walk over several cells along d, which tiny problems have not."""

from __future__ import annotations

import pytest
import torch
from variant_cases import CPU, DEVICE, Case, complaints

pytest.importorskip("triton")

from tritonconv.kernels import triton_depthwise_cells as cells
from tritonconv.kernels.registry import variant
from tritonconv.problem import LAYOUTS, PASSES

CASES = {
    "k3 s2": Case(channels=(5, 5), size=(5, 2, 3), stride=2, front=1, back=1, groups=5),
    "k3 s2 q1": Case(channels=(16, 16), size=(4, 2, 3), stride=2, front=1, back=1, extra=1, groups=16),
    "k3 s1": Case(n=1, channels=(3, 3), size=(7, 2, 3), front=1, back=1, groups=3),
    "k2 s2": Case(n=1, channels=(3, 3), size=(5, 2, 3), kernel=2, stride=2, groups=3),
    "k1 s2": Case(n=1, channels=(2, 2), size=(5, 2, 3), kernel=1, stride=2, extra=1, groups=2),
    "k5x2x3 s2x1x3": Case(n=1, channels=(2, 2), size=(5, 3, 2), kernel=(5, 2, 3), stride=(2, 1, 3), groups=2),
    "k4x1x1 s3, cropped": Case(
        n=1,
        channels=(3, 3),
        size=(6, 3, 2),
        kernel=(4, 1, 1),
        stride=(3, 1, 1),
        front=(5, 0, 0),
        back=(4, 1, 0),
        groups=3,
    ),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("planes", [2, 3, 16])
def test_columns_of_cells_are_exact(pass_name, layout, planes):
    """Columns that end within the image, and one that holds it whole."""
    record = variant(f"{pass_name}_depthwise_cells")

    def configs(problem):
        config = {**record.default(problem, DEVICE), "BLOCK_H": 2, "BLOCK_W": 4, "PLANES": planes}
        return [config | ({"SPLITS": 2} if "SPLITS" in config else {})]

    for turn, case in enumerate(CASES.values()):
        dtype = (torch.float32, torch.float16)[turn % 2]
        assert complaints(record, case, dtype, layout, turn % 3 != 0, DEVICE, configs) == []


def test_what_is_refused_is_left_to_the_others():
    wide = Case(n=1, channels=(2, 4), stride=2, groups=2)
    apart = Case(n=1, channels=(2, 2), stride=2, dilation=2, groups=2)
    many = Case(n=1, channels=(2, 2), kernel=5, stride=2, groups=2)
    for case, word in ((wide, "output channel"), (apart, "apart"), (many, "125 taps")):
        problem = case.problem(torch.float32)
        for pass_name in PASSES:
            assert word in (variant(f"{pass_name}_depthwise_cells").supports(problem, CPU) or "")
            assert variant(f"{pass_name}_depthwise").supports(problem, CPU) is None


def test_planes_fill_the_gpu_before_they_are_many():
    """A program of a large image walks far; one of a small image leaves multiprocessors none without a program."""
    large = cells.tile_sizes("ndhwc", 64, (64, 64, 64), 2)
    small = cells.tile_sizes("ndhwc", 512, (8, 8, 8), 2)
    assert large["PLANES"] == cells.MOST_PLANES and 1 < small["PLANES"] < 8


def test_a_tap_joins_each_slot_to_an_output_once():
    """Over a window of k3 s2: each tap once, and each output of the cell has as many as its residues say."""
    problem = CASES["k3 s2"].problem(torch.float32)
    windows, slots = cells.windows(problem), cells.slots(problem)
    along = [windows[f"TAPS_{axis}"] for axis in "DHW"]
    found = [
        [cells.tap_of.fn(slot, place, slots, problem.kernel, problem.stride, *along) for slot in range(8)]
        for place in range(8)
    ]
    taps = [tap for row in found for tap in row if tap >= 0]
    assert sorted(taps) == list(range(27)) and slots == (2, 2, 2)
    assert [sum(tap >= 0 for tap in row) for row in found] == [1, 2, 2, 4, 2, 4, 4, 8]
