"""Backward-weight of an NCDHW layer as a GEMM over cells, on channels-last copies of x and grad_y."""

from __future__ import annotations

from tritonconv.kernels import backward_weight_cells
from tritonconv.kernels.triton_channels_last import weight_gradient

VARIANT = weight_gradient(
    backward_weight_cells.VARIANT, "one GEMM over cells, of an NCDHW layer on channels-last copies"
)
