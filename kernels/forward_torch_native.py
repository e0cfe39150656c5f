"""Forward by torch's own ``conv_transpose3d``: the baseline of every comparison."""

from __future__ import annotations

from tritonconv.kernels import torch_native
from tritonconv.kernels.variant import Variant


def supports(problem, device):
    return None


def launch(problem, config, x, weight, bias):
    return torch_native.forward(problem, x, weight, bias)


VARIANT = Variant(
    name="forward_torch_native",
    pass_name="forward",
    idea="torch's own conv_transpose3d",
    backend="torch",
    launch=launch,
    supports=supports,
    deterministic=False,  # torch lists ConvTranspose3d on CUDA among the operations that may not be reproducible
    work=lambda problem, config: torch_native.work(problem, "forward"),
)
