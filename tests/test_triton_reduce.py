"""The sums of partial results: integers, so every order of summation is exact; several tiles along each axis."""

from __future__ import annotations

import pytest
import torch
from variant_cases import DEVICE, same

from tritonconv.problem import LAYOUTS

triton_reduce = pytest.importorskip("tritonconv.kernels.triton_reduce")
from tritonconv.kernels.triton_buffers import new  # noqa: E402
from tritonconv.kernels.triton_program import compute  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")


def partials(*shape: int) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(7)).to(DEVICE, torch.float32)


def sums(partial, bias_partial, shape):
    """(grad_weight, grad_bias) of the partial results."""

    def launches(given, given_bias):
        grad_weight, grad_bias = new(shape, given), new(given_bias.shape[1:], given)
        triton_reduce.sum_weights(given, grad_weight, given_bias, grad_bias)
        return grad_weight, grad_bias

    return compute(launches, (partial, bias_partial))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(3, 5, 7), (2, 4, 8)])  # of an odd width, and of one that a wide store divides
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("splits", [1, 37])  # in one step, and in several
def test_volumes(splits, channels, size, layout):
    partial = partials(splits, 2, *size, channels)

    def launches(given):
        result = new((2, channels, *size), given, torch.float16, LAYOUTS[layout])
        triton_reduce.sum_volumes(given, result)
        return result

    out = compute(launches, (partial,))
    assert same(out, partial.double().sum(0).permute(0, 4, 1, 2, 3).cpu())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels", [(5, 3), (48, 33)])
@pytest.mark.parametrize("splits", [0, 3, 37])
def test_weights_and_bias(splits, channels, groups):
    c_in, c_out = channels
    partial, bias_partial = partials(splits, groups, 6, c_out, c_in), partials(splits, groups * c_out)
    grad_weight, grad_bias = sums(partial, bias_partial, (groups * c_in, c_out, 1, 2, 3))
    exact = partial.double().sum(0)  # (groups, taps, c_out, c_in)
    assert same(grad_weight, exact.permute(0, 3, 2, 1).reshape(grad_weight.shape).cpu())
    assert same(grad_bias, bias_partial.double().sum(0).cpu())


def test_a_long_bias_takes_several_programs():
    partial, bias_partial = partials(2, 1, 1, 1, 1), partials(2, 300)
    grad_weight, grad_bias = sums(partial, bias_partial, (1, 1, 1, 1, 1))
    assert same(grad_weight, partial.double().sum(0)[None].cpu()) and same(
        grad_bias, bias_partial.double().sum(0).cpu()
    )
