"""Backward-weight where kernel = stride: grad_y unshuffled, then one GEMM with N = taps*c_out."""

from __future__ import annotations

from tritonconv.kernels.torch_layout import bias_gradient, voxel_rows
from tritonconv.kernels.torch_products import product, sum_of_products
from tritonconv.kernels.torch_shuffle import supports, unshuffle
from tritonconv.kernels.variant import Variant
from tritonconv.kernels.work import by_torch, size_of


def launch(problem, config, x, grad_y, need_bias, prepared=None):
    rows = unshuffle(problem, grad_y) if prepared is None else prepared
    c_in, c_out = problem.c_in, problem.c_out
    if problem.layout == "ndhwc":
        sums = product(voxel_rows(x).flatten(0, 1).t(), rows)  # (c_in, taps*c_out)
        grad_weight = sums.view(c_in, *problem.kernel, c_out).permute(0, 4, 1, 2, 3)
    else:
        grad_weight = sum_of_products(x.flatten(2), rows).view(problem.weight_shape)  # (c_in, c_out*taps)
    return grad_weight, bias_gradient(grad_y) if need_bias else None


VARIANT = Variant(
    name="backward_weight_torch_shuffle",
    pass_name="backward_weight",
    idea="kernel = stride: unshuffle of phases, then one GEMM",
    backend="torch",
    launch=launch,
    supports=supports,
    prepare=unshuffle,
    workspace_bytes=lambda problem: problem.bytes("backward_weight"),
    work=lambda problem, config: by_torch(problem, "backward_weight", 2 * size_of(problem, "y"), 3),
)
