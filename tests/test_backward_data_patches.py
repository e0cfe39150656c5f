"""Backward-data by patches of grad_y: several tiles of a program, of channels, and voxels that fill no tile."""

from __future__ import annotations

import pytest
import torch
from variant_cases import DEVICE, Case, complaints

from tritonconv.kernels.registry import variant
from tritonconv.problem import LAYOUTS

pytestmark = pytest.mark.usefixtures("poisoned")
patches = pytest.importorskip("tritonconv.kernels.triton_patches")
from tritonconv.kernels import backward_data_patches as kernel  # noqa: E402

RECORD = variant("backward_data_patches")
# More voxels than a tile of 128; their number is a multiple of 16 in the second, so rows are loaded and stored wide.
CASES = {
    "k4 s2": Case(n=2, channels=(20, 1), size=(5, 6, 7), kernel=4, stride=2, front=1, back=1),
    "k3 s2 p1 q1, 256 voxels": Case(n=2, channels=(5, 2), size=(4, 8, 8), stride=2, front=1, back=1, extra=1),
    "70 channels": Case(n=1, channels=(70, 1), size=(3, 7, 8), kernel=(2, 3, 4), stride=(2, 1, 3), front=(1, 0, 2)),
    "dilation": Case(n=1, channels=(3, 3), size=(5, 5, 6), kernel=(2, 3, 2), stride=2, dilation=(1, 2, 3), front=1),
    "5 channels": Case(n=1, channels=(24, 5), size=(3, 8, 6), kernel=(1, 2, 3), stride=(1, 2, 2), back=(0, 1, 0)),
    "kernel = stride": Case(n=3, channels=(8, 3), size=(4, 3, 12), kernel=2, stride=2),
    # Longer patches than a thread has room for: two load them, in parts; of the second the last part is half empty.
    "192 places": Case(n=1, channels=(20, 3), size=(3, 5, 6), kernel=4, stride=2, front=3, back=(3, 1, 3)),
    "160 places": Case(
        n=2, channels=(70, 5), size=(2, 4, 8), kernel=(2, 4, 4), stride=(1, 2, 3), dilation=(2, 1, 1), front=1
    ),
    "one tap of a stride": Case(n=1, channels=(17, 4), size=(2, 9, 9), kernel=1, stride=2, extra=1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("label", CASES)
def test_programs_that_take_tiles_in_turn(label, layout, monkeypatch):
    """One program has all tiles of its channels, and two leave each other none."""

    def configs(problem):
        base = RECORD.default(problem, DEVICE)
        return [{**base, "BLOCK_N": 16, "RESIDENT": 1}, {**base, "WEIGHT": 1, "RESIDENT": 2}]

    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 2 if label == "k4 s2" else 1)
    monkeypatch.setattr(patches, "compute_capability", lambda: 90 if layout == "ncdhw" else 80)  # either order
    dtype = torch.float32 if label == "5 channels" else torch.float16
    assert complaints(RECORD, CASES[label], dtype, layout, True, DEVICE, configs) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_offsets(layout, monkeypatch):
    monkeypatch.setattr(kernel, "wide", lambda *buffers, of=None: True)
    base = [RECORD.default]
    for label in ("k4 s2", "dilation", "160 places"):
        configs = lambda problem: [each(problem, DEVICE) for each in base]  # noqa: E731
        assert complaints(RECORD, CASES[label], torch.float16, layout, True, DEVICE, configs) == []


def test_the_refusals_name_the_limit():
    for case, words in (
        (Case(channels=(8, 6)), "6 output channels"),
        (Case(channels=(8, 4), groups=4), "4 groups"),
        (Case(channels=(8, 5), kernel=4, stride=2), "320 taps and output channels"),
        (Case(channels=(8, 3), kernel=(3, 4, 4), stride=2), "144 taps and output channels"),
    ):
        assert words in str(RECORD.supports(case.problem(torch.float16), DEVICE))
        assert words in str(variant("backward_weight_patches").supports(case.problem(torch.float16), DEVICE))
    assert RECORD.supports(Case(channels=(8, 4)).problem(torch.float16), DEVICE) is None
    assert "108 taps" in str(RECORD.supports(Case(channels=(8, 4)).problem(torch.float32), DEVICE))


def test_the_programs_fit_their_registers():
    """As many are resident as the compiled kernels of 200, 152 and 69 registers a thread allow, four at most."""
    found = []
    for channels, taps in (((64, 1), 4), ((32, 1), 4), ((16, 1), 3)):
        problem = Case(n=32, channels=channels, size=32, kernel=taps, stride=2).problem(torch.float16, "ndhwc")
        found.append(RECORD.default(problem, torch.device("cuda"))["RESIDENT"])
    assert found == [2, 3, 4]
    assert patches.resident(problem, 16, 64, 8) == 1
