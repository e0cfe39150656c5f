"""Backward-weight as the weight gradient of an ordinary convolution, in the other memory format."""

from __future__ import annotations

from tritonconv.kernels import torch_native
from tritonconv.kernels.torch_layout import other_layout, to_layout
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of


def supports(problem, device):
    return None


def launch(problem, config, x, grad_y, need_bias):
    other = other_layout(problem)
    return torch_native.backward_weight_and_bias(problem, to_layout(x, other), to_layout(grad_y, other), need_bias)


VARIANT = Variant(
    name="backward_weight_torch_other_layout",
    pass_name="backward_weight",
    idea="weight gradient of conv3d in the other memory format",
    backend="torch",
    spreads_nonfinite=SPREADS_PADDING,
    launch=launch,
    supports=supports,
    workspace_bytes=lambda problem: problem.bytes("backward_weight"),
    work=lambda problem, config: by_torch(problem, "backward_weight", 2 * size_of(problem, "x", "y"), 3),
)
