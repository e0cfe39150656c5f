"""Backward-weight of an NCDHW layer as a GEMM over cells, on channels-last copies of x and grad_y."""

from __future__ import annotations

from tritonconv.kernels import backward_weight_cells
from tritonconv.kernels.triton_channels_last import channels_last, of


def launch(problem, config, x, grad_y, need_bias, prepared=None):
    grad_y = channels_last(grad_y) if prepared is None else prepared
    return backward_weight_cells.launch(problem, config, channels_last(x), grad_y, need_bias)


VARIANT = of(
    backward_weight_cells.VARIANT, launch, "one GEMM over cells, of an NCDHW layer on channels-last copies",
    ("x", "y"), "c_out",
)  # fmt: skip
