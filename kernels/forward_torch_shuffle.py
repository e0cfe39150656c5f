"""Forward where kernel = stride: one GEMM over all phases, x read once, then the phases are interleaved."""

from __future__ import annotations

from tritonconv.kernels.torch_layout import voxel_rows
from tritonconv.kernels.torch_products import product, products
from tritonconv.kernels.torch_shuffle import supports, taps_first, taps_last
from tritonconv.kernels.variant import Variant
from tritonconv.kernels.work import by_torch, size_of


def launch(problem, config, x, weight, bias):
    (d, h, w), (kd, kh, kw) = problem.size, problem.kernel
    n, c_out = problem.n, problem.c_out
    if problem.layout == "ndhwc":
        rows, columns = voxel_rows(x).flatten(0, 1), taps_last(weight)
        z = product(rows, columns, None if bias is None else bias.repeat(kd * kh * kw))
        y = z.view(n, d, h, w, kd, kh, kw, c_out).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return y.reshape(n, d * kd, h * kh, w * kw, c_out).permute(0, 4, 1, 2, 3)
    z = products(taps_first(weight).t(), x.flatten(2))  # (n, c_out*taps, voxels)
    if bias is not None:
        z.view(n, c_out, kd * kh * kw, d * h * w).add_(bias.view(1, c_out, 1, 1))
    y = z.view(n, c_out, kd, kh, kw, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return y.reshape(problem.y_shape)


VARIANT = Variant(
    name="forward_torch_shuffle",
    pass_name="forward",
    idea="kernel = stride: one GEMM, then a shuffle of phases",
    backend="torch",
    launch=launch,
    supports=supports,
    workspace_bytes=lambda problem: problem.bytes(),
    work=lambda problem, config: by_torch(problem, "forward", 2 * size_of(problem, "y"), 2),
)
