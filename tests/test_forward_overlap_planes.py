"""Several tiles of a program: the forward that walks along d, in boxes with halos, and the persistent backward-data."""

from __future__ import annotations

import pytest
import torch
from variant_cases import DEVICE, Case, complaints

from tritonconv.kernels.registry import variant

pytestmark = pytest.mark.usefixtures("poisoned")
pytest.importorskip("triton")

CASES = {
    "k4 s2": Case(n=2, channels=(3, 1), size=(5, 6, 7), kernel=4, stride=2, front=1, back=1),
    "k3 s2": Case(n=2, channels=(5, 2), size=(4, 9, 5), kernel=3, stride=2, front=1, back=0),
    "no overlap along d": Case(n=2, channels=(2, 3), size=(5, 7, 6), kernel=(2, 3, 4), stride=2, front=(0, 2, 1)),
    "no overlap along h": Case(n=1, channels=(16, 1), size=(6, 9, 7), kernel=(3, 2, 4), stride=2, front=(1, 0, 2)),
    "fewer sums than columns": Case(n=1, channels=(3, 1), size=(5, 4, 6), kernel=2, stride=1, front=(0, 1, 0)),
    "strides of one": Case(n=1, channels=(4, 4), size=(5, 7, 9), kernel=(2, 2, 1), stride=1, front=(1, 0, 0)),
}


def configs(problem):
    """Boxes of 4 x 4, 8 x 4 and 4 x 16 voxels, walks over one to three planes and over all of them."""
    default = variant("forward_overlap_planes").default(problem, DEVICE)
    boxes = ((4, 4, 1), (4, 4, 3), (8, 4, 2), (4, 16, 99))
    return [{**default, "BLOCK_H": h, "BLOCK_W": w, "PLANES": planes} for h, w, planes in boxes]


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
@pytest.mark.parametrize("label", CASES)
def test_boxes_and_walks_meet_without_a_gap(label, layout):
    dtype = torch.float16 if layout == "ndhwc" else torch.float32
    assert complaints(variant("forward_overlap_planes"), CASES[label], dtype, layout, True, DEVICE, configs) == []


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_a_persistent_program_takes_each_of_its_tiles(programs, monkeypatch):
    from tritonconv.kernels import backward_data_shuffle_resident as resident

    monkeypatch.setattr(resident, "multiprocessors", lambda device: programs)
    case = Case(n=2, channels=(20, 5), size=(4, 5, 6), kernel=2, stride=2)
    record = variant("backward_data_shuffle_resident")

    def small(problem):
        return [{**record.default(problem, DEVICE), "BLOCK_M": rows, "RESIDENT": 1} for rows in (16, 64)]

    assert complaints(record, case, torch.float16, "ndhwc", True, DEVICE, small) == []
