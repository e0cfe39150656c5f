"""The default tiles: rows along w, and what fits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tritonconv.kernels import registry
from tritonconv.lab.bench.workloads import workload
from tritonconv.problem import Problem

pytestmark = pytest.mark.skipif(not registry.have_triton(), reason="needs Triton")

HALF, FLOAT = torch.bfloat16, torch.float32


def problem(dtype, layout="ncdhw") -> Problem:
    return dataclasses.replace(workload("psmnet_train_64_32").problem(), dtype=dtype, layout=layout)


@pytest.mark.parametrize(
    ("dtype", "width", "block"),
    [
        (HALF, 8, 8),
        (HALF, 16, 16),
        (HALF, 64, 64),
        (HALF, 33, 16),  # 48 instead of 64 voxels
        (HALF, 65, 16),
        (HALF, 17, 32),  # rows of 8 would cover 24 voxels, and of each sector they touch half is another row's
        (FLOAT, 17, 8),  # of float32 a row of 8 fills a sector
        (HALF, 78, 16),
        (HALF, 85, 32),
        (HALF, 128, 64),
        (HALF, 7, 0),
    ],
)
def test_rows_cover_the_width_with_few_sectors(dtype, width, block):
    from tritonconv.kernels import triton_tiles

    assert triton_tiles.block_w(problem(dtype), (4, 4, width), 128) == block


def test_channels_last_has_no_rows_and_a_row_is_no_longer_than_its_tile():
    from tritonconv.kernels import triton_tiles

    assert triton_tiles.block_w(problem(HALF, "ndhwc"), (4, 4, 64), 128) == 0
    assert triton_tiles.block_w(problem(HALF), (4, 4, 64), 32) == 32


def test_what_divides_the_strides_is_told():
    from tritonconv.kernels.triton_launch import units

    def strides(channels, *size):
        x = torch.empty(2, channels, *size, device="meta")
        return x.to(memory_format=torch.channels_last_3d).stride(), x.stride()

    for channels, unit in ((64, 1), (48, 1), (24, 8), (28, 4), (6, 2), (5, 1)):
        last, first = strides(channels, 3, 5, 8)
        assert units(last) == (unit, 0, unit, unit, unit)
        assert units(first) == (8, 8, 8, 8, 0)
    for width, unit in ((16, 1), (40, 8), (20, 1), (7, 1)):  # of NCDHW 8 alone: each further one would compile again
        assert units(strides(4, 3, 4, width)[1]) == (unit, unit, unit, unit, 0)
    assert units((27 * 24, 27, 1)) == (1, 1, 0) and units((24, 1, 24 * 56)) == (8, 0, 8)
    assert units((0, 1, 0, 24, 24)) == (8, 0, 8, 8, 8)  # expanded
