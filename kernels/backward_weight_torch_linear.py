"""Backward-weight of images of one voxel: the transposed (n, c_in) times (n, c_out*taps)."""

from __future__ import annotations

from tritonconv.kernels.torch_layout import bias_gradient
from tritonconv.kernels.torch_linear import channels_inside, flat, spread, supports
from tritonconv.kernels.torch_products import product
from tritonconv.kernels.variant import Variant


def launch(problem, config, x, grad_y, need_bias):
    inside = channels_inside(grad_y)
    grad_weight = spread(product(x.flatten(1).t(), flat(grad_y, inside)), problem, inside)
    return grad_weight, bias_gradient(grad_y) if need_bias else None


VARIANT = Variant(
    name="backward_weight_torch_linear",
    pass_name="backward_weight",
    idea="images of one voxel: a row each of one GEMM",
    backend="torch",
    launch=launch,
    supports=supports,
)
