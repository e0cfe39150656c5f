"""Backward-data as an ordinary convolution in the other memory format."""

from __future__ import annotations

from tritonconv.kernels import torch_native
from tritonconv.kernels.torch_layout import other_layout, to_layout
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of


def supports(problem, device):
    return None


def launch(problem, config, grad_y, weight):
    grad_x = torch_native.backward_data(problem, to_layout(grad_y, other_layout(problem)), weight)
    return to_layout(grad_x, problem.memory_format)


VARIANT = Variant(
    name="backward_data_torch_other_layout",
    pass_name="backward_data",
    idea="conv3d of grad_y in the other memory format",
    backend="torch",
    spreads_nonfinite=SPREADS_PADDING,
    launch=launch,
    supports=supports,
    workspace_bytes=lambda problem: problem.bytes("backward_data"),
    work=lambda problem, config: by_torch(problem, "backward_data", 2 * size_of(problem, "x", "y"), 3),
)
