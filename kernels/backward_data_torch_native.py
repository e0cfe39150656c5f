"""Backward-data by torch's own ``convolution_backward``: the baseline of every comparison."""

from __future__ import annotations

import torch

from tritonconv.kernels import torch_native
from tritonconv.kernels.variant import Variant


def supports(problem, device):
    return None


def launch(problem, config, grad_y, weight):
    # Only its shape and layout are read.
    like_x = torch.empty(problem.x_shape, dtype=grad_y.dtype, device=grad_y.device, memory_format=problem.memory_format)
    return torch_native.native_gradients(problem, grad_y, like_x, weight, (True, False, False))[0]


VARIANT = Variant(
    name="backward_data_torch_native",
    pass_name="backward_data",
    idea="torch's own convolution_backward, the input gradient alone",
    backend="torch",
    launch=launch,
    supports=supports,
    deterministic=False,  # as the forward
    work=lambda problem, config: torch_native.work(problem, "backward_data"),
)
