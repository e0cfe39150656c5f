"""Backward-weight as the weight gradient of an ordinary ``conv3d`` from grad_y to x; the bias gradient apart."""

from __future__ import annotations

from tritonconv.kernels import torch_native
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of


def supports(problem, device):
    return None


def launch(problem, config, x, grad_y, need_bias):
    return torch_native.backward_weight_and_bias(problem, x, grad_y, need_bias)


VARIANT = Variant(
    name="backward_weight_torch_conv",
    pass_name="backward_weight",
    idea="weight gradient of conv3d from grad_y to x",
    backend="torch",
    spreads_nonfinite=SPREADS_PADDING,
    launch=launch,
    supports=supports,
    work=lambda problem, config: by_torch(problem, "backward_weight", size_of(problem, "y"), 3),
)
