"""The sums of partial results: integers, so every order of summation is exact; several tiles along each axis."""

from __future__ import annotations

import pytest
import torch
from variant_cases import DEVICE, same

from tritonconv.problem import LAYOUTS

triton_reduce = pytest.importorskip("tritonconv.kernels.triton_reduce")
pytestmark = pytest.mark.usefixtures("poisoned")


def partials(*shape: int) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(7)).to(DEVICE, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(3, 5, 7), (2, 4, 8)])  # of an odd width, and of one that a wide store divides
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("splits", [1, 37])  # in one step, and in several
def test_volumes(splits, channels, size, layout):
    partial = partials(splits, 2, *size, channels)
    out = torch.empty(2, channels, *size, device=DEVICE, dtype=torch.float16).to(memory_format=LAYOUTS[layout])
    triton_reduce.sum_volumes(partial, out)
    assert same(out, partial.double().sum(0).permute(0, 4, 1, 2, 3).cpu())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels", [(5, 3), (48, 33)])
@pytest.mark.parametrize("splits", [0, 3, 37])
def test_weights_and_bias(splits, channels, groups):
    c_in, c_out = channels
    partial, bias_partial = partials(splits, groups, 6, c_out, c_in), partials(splits, groups * c_out)
    grad_weight = torch.empty(groups * c_in, c_out, 1, 2, 3, device=DEVICE)
    grad_bias = torch.empty(groups * c_out, device=DEVICE)
    triton_reduce.sum_weights(partial, grad_weight, bias_partial, grad_bias)
    exact = partial.double().sum(0)  # (groups, taps, c_out, c_in)
    assert same(grad_weight, exact.permute(0, 3, 2, 1).reshape(grad_weight.shape).cpu())
    assert same(grad_bias, bias_partial.double().sum(0).cpu())


def test_a_long_bias_takes_several_programs():
    partial, bias_partial = partials(2, 1, 1, 1, 1), partials(2, 300)
    grad_weight, grad_bias = torch.empty(1, 1, 1, 1, 1, device=DEVICE), torch.empty(300, device=DEVICE)
    triton_reduce.sum_weights(partial, grad_weight, bias_partial, grad_bias)
    assert same(grad_weight, partial.double().sum(0)[None].cpu()) and same(
        grad_bias, bias_partial.double().sum(0).cpu()
    )
