"""Backward-weight by torch's own ``convolution_backward``: the baseline of every comparison."""

from __future__ import annotations

from tritonconv.kernels import torch_native
from tritonconv.kernels.variant import Variant


def supports(problem, device):
    padding, safe = problem.torch_crop.padding, torch_native.safe_padding(problem)
    if device.type == "cpu" and any(p > most for p, most in zip(padding, safe, strict=True)):
        return f"torch's CPU weight gradient is not safe with padding {padding} beyond half the kernel {problem.kernel}"
    return None


def launch(problem, config, x, grad_y, need_bias):
    like_weight = x.new_empty(problem.weight_shape)  # only its shape is read
    return torch_native.native_gradients(problem, grad_y, x, like_weight, (False, True, need_bias))[1:]


VARIANT = Variant(
    name="backward_weight_torch_native",
    pass_name="backward_weight",
    idea="torch's own convolution_backward, weight and bias gradients together",
    backend="torch",
    launch=launch,
    supports=supports,
    deterministic=False,  # as the forward
    work=lambda problem, config: torch_native.work(problem, "backward_weight"),
)
