"""The copies in another order of axes: every element in its place, whatever the sizes, in the strides that are said."""

from __future__ import annotations

import pytest
import torch
from repeated import twice
from variant_cases import DEVICE

from tritonconv.kernels import triton_transpose, triton_weights
from tritonconv.kernels.triton_program import compute


def packed(weight: torch.Tensor, order: int) -> torch.Tensor:
    return compute(lambda given: triton_weights.packed(given, order), (weight,))


# (c_in, c_out, kernel): channels that are no multiple of a tile, more than one tile along each axis, one tap, many.
WEIGHTS = [
    (3, 5, (1, 1, 1)),
    (17, 24, (2, 2, 2)),
    (48, 3, (3, 3, 3)),
    (5, 520, (1, 2, 2)),
    (70, 9, (4, 4, 4)),
    (2, 3, (5, 7, 5)),
    (32, 32, (3, 3, 3)),
]
STRIDES = {
    triton_weights.OUT_INNERMOST: lambda c_in, c_out: (c_out, 1, c_in * c_out),
    triton_weights.IN_INNERMOST: lambda c_in, c_out: (1, c_in, c_in * c_out),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("order", STRIDES)
@pytest.mark.parametrize(("c_in", "c_out", "kernel"), WEIGHTS)
def test_a_packed_weight_is_the_weight_in_another_order(c_in, c_out, kernel, order, dtype):
    for _ in range(2):
        weight = torch.randn(c_in, c_out, *kernel, device=DEVICE).to(dtype)
        (found,) = twice(lambda weight=weight: [packed(weight, order)])
        assert found.shape == weight.shape and torch.equal(found, weight)
        assert triton_weights.strides(found) == STRIDES[order](c_in, c_out) or weight[0, 0].numel() == 1


@pytest.mark.parametrize("order", STRIDES)
def test_a_weight_that_is_not_contiguous_is_packed_too(order):
    base = torch.randn(6, 9, 2, 3, 5, device=DEVICE)
    for weight in (base[:, 1:8], base[::2], base.transpose(0, 1), base[..., ::2], base.flip(2)):
        (found,) = twice(lambda weight=weight: [packed(weight, order)])
        assert torch.equal(found, weight) and found.stride(triton_weights._INNERMOST[order]) == 1


@pytest.mark.parametrize("shape", [(1, 3, 2, 3, 4), (2, 130, 3, 5, 17), (3, 16, 1, 1, 1), (2, 8, 8, 8, 8)])
def test_a_copy_in_channels_last(shape):
    x = torch.randn(*shape, device=DEVICE)
    (found,) = twice(lambda: [compute(triton_transpose.channels_last, (x,))])
    assert torch.equal(found, x) and found.is_contiguous(memory_format=torch.channels_last_3d)
