"""Backward-data by torch's own ``convolution_backward``: the baseline of every comparison."""

from __future__ import annotations

from tritonconv.kernels import torch_native
from tritonconv.kernels.registry import Variant


def supports(problem, device):
    return None


def launch(problem, config, grad_y, weight):
    like_x = grad_y.new_empty(()).expand(problem.x_shape)  # only its shape is read
    return torch_native.native_gradients(problem, grad_y, like_x, weight, (True, False, False))[0]


VARIANT = Variant(
    name="backward_data_torch_native",
    pass_name="backward_data",
    idea="torch's own convolution_backward, the input gradient alone",
    backend="torch",
    launch=launch,
    supports=supports,
    deterministic=False,  # as the forward
)
