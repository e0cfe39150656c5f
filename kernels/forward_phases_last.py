"""Forward of an NCDHW layer as the phases' implicit GEMM on a channels-last copy of x; y is written in NCDHW."""

from __future__ import annotations

from tritonconv.kernels import forward_phases
from tritonconv.kernels.triton_channels_last import channels_last, of


def launch(problem, config, x, weight, bias, out=None):
    return forward_phases.launch(problem, config, channels_last(x), weight, bias, out)


VARIANT = of(
    forward_phases.VARIANT, launch, "implicit GEMM per phase, of an NCDHW layer on a channels-last copy of x",
    ("x",), "c_in",
)  # fmt: skip
