"""Taps that no voxel of a tile reaches are left out of backward-data: which ones, and that no other goes with them."""

from __future__ import annotations

import pytest
import torch
from variant_cases import DEVICE, TINY, complaints

from tritonconv.kernels import registry
from tritonconv.kernels.registry import variant
from tritonconv.lab.bench.workloads import workload

if not registry.have_triton():
    pytest.skip("needs Triton", allow_module_level=True)

import triton
import triton.language as tl
from test_triton_kernels import small

from tritonconv.kernels import backward_data_gemm
from tritonconv.kernels.triton_gemm import reached


@triton.jit
def reached_kernel(index_ptr, out_ptr, count, size, taps, STEP: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    mask = lane < count
    first, left = reached(tl.load(index_ptr + lane, mask=mask, other=7), mask, size, taps, STEP)
    tl.store(out_ptr, first)
    tl.store(out_ptr + 1, left)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize(("low", "high"), [(-3, -3), (-3, 1), (0, 0), (4, 7), (5, 5), (8, 9), (-9, -9), (-5, 12)])
def test_the_taps_of_a_tile_are_those_that_some_index_between_reaches(low, high, step):
    size, taps = 6, 4
    index = torch.tensor([low, high, 3, 3], device=DEVICE, dtype=torch.int32)  # the last two are not of the tile
    out = torch.empty(2, device=DEVICE, dtype=torch.int32)
    reached_kernel[(1,)](index, out, 2, size, taps, STEP=step, BLOCK=4)
    first, left = out.tolist()
    least = {m for m in range(taps) for start in (low, high) if 0 <= start + m * step < size}
    assert least <= set(range(first, first + left))
    exact = {m for m in range(taps) if high + m * step >= 0 and low + m * step < size}
    assert set(range(first, first + left)) == exact


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("layout", ["ndhwc", "ncdhw"])
def test_exact(layout, splits):
    record = variant("backward_data_gemm")
    changes = {"SKIP": 1, "SPLITS": splits}
    found, served = [], 0
    for case in TINY.values():
        if case.front == 0 and splits > 1:
            continue
        answer = complaints(record, case, torch.float32, layout, False, DEVICE,
                            lambda problem: [{**small(record.default(problem, DEVICE)), **changes}])  # fmt: skip
        served += answer is not None
        found += answer or []
    assert found == [] and served > 5


def test_the_default_skips_where_the_border_takes_a_tenth():
    cropped, plain = workload("videogpt_240_240_pad3"), workload("3dgan_128_64")
    for layer, skips in ((cropped, 1), (plain, 0)):
        problem = layer.problem(torch.bfloat16, "ndhwc")
        assert variant("backward_data_gemm").default(problem, torch.device("cuda"))["SKIP"] == skips
    problem = cropped.problem(torch.bfloat16, "ndhwc")
    config = variant("backward_data_gemm").default(problem, torch.device("cuda"))
    assert backward_data_gemm.kept(problem, config) == pytest.approx(16 / 24)  # 6 planes, 4 taps, 8 outputs
