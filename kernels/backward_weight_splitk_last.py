"""Backward-weight of an NCDHW layer as a split GEMM on channels-last copies of x and grad_y."""

from __future__ import annotations

from tritonconv.kernels import backward_weight_splitk
from tritonconv.kernels.triton_channels_last import channels_last, of


def launch(problem, config, x, grad_y, need_bias, prepared=None):
    grad_y = channels_last(grad_y) if prepared is None else prepared
    return backward_weight_splitk.launch(problem, config, channels_last(x), grad_y, need_bias)


VARIANT = of(
    backward_weight_splitk.VARIANT, launch, "one split GEMM over all voxels, of an NCDHW layer on channels-last copies",
    ("x", "y"), "c_out",
)  # fmt: skip
