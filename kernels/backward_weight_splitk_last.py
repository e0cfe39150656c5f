"""Backward-weight of an NCDHW layer as a split GEMM on channels-last copies of x and grad_y."""

from __future__ import annotations

from tritonconv.kernels import backward_weight_splitk
from tritonconv.kernels.triton_channels_last import weight_gradient

VARIANT = weight_gradient(
    backward_weight_splitk.VARIANT, "one split GEMM over all voxels, of an NCDHW layer on channels-last copies"
)
