"""Backward-data of images of one voxel: (n, c_out*taps) times the transposed weight."""

from __future__ import annotations

from tritonconv.kernels.torch_linear import channels_inside, flat, supports
from tritonconv.kernels.torch_products import product
from tritonconv.kernels.variant import Variant


def launch(problem, config, grad_y, weight):
    inside = channels_inside(weight)
    return product(flat(grad_y, inside), flat(weight, inside).t()).view(problem.x_shape)


VARIANT = Variant(
    name="backward_data_torch_linear",
    pass_name="backward_data",
    idea="images of one voxel: a row each of one GEMM",
    backend="torch",
    launch=launch,
    supports=supports,
)
