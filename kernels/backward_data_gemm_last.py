"""Backward-data of an NCDHW layer as an implicit GEMM on a channels-last copy of grad_y; grad_x is written in NCDHW."""

from __future__ import annotations

from tritonconv.kernels import backward_data_gemm
from tritonconv.kernels.triton_channels_last import channels_last, of


def launch(problem, config, grad_y, weight, prepared=None):
    return backward_data_gemm.launch(problem, config, channels_last(grad_y) if prepared is None else prepared, weight)


VARIANT = of(
    backward_data_gemm.VARIANT, launch, "implicit GEMM over all taps, of an NCDHW layer on a channels-last grad_y",
    ("y",), "c_out",
)  # fmt: skip
