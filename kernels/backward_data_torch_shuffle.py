"""Backward-data where kernel = stride: grad_y unshuffled, then one GEMM with K = taps*c_out."""

from __future__ import annotations

from tritonconv.kernels.torch_products import product, products
from tritonconv.kernels.torch_shuffle import supports, taps_first, taps_last, unshuffle
from tritonconv.kernels.variant import Variant
from tritonconv.kernels.work import by_torch, size_of


def launch(problem, config, grad_y, weight, prepared=None):
    rows = unshuffle(problem, grad_y) if prepared is None else prepared
    if problem.layout == "ndhwc":
        grad_x = product(rows, taps_last(weight).t())  # (n*voxels, c_in)
        return grad_x.view(problem.n, *problem.size, problem.c_in).permute(0, 4, 1, 2, 3)
    return products(taps_first(weight), rows).view(problem.x_shape)


VARIANT = Variant(
    name="backward_data_torch_shuffle",
    pass_name="backward_data",
    idea="kernel = stride: unshuffle of phases, then one GEMM",
    backend="torch",
    launch=launch,
    supports=supports,
    prepare=unshuffle,
    workspace_bytes=lambda problem: problem.bytes("backward_data"),
    work=lambda problem, config: by_torch(problem, "backward_data", 2 * size_of(problem, "y"), 2),
)
