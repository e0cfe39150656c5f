"""Backward-data where every channel is its own group: a strided depthwise ``conv3d`` in channels_last_3d."""

from __future__ import annotations

from tritonconv.kernels import torch_native
from tritonconv.kernels.forward_torch_depthwise import supports
from tritonconv.kernels.torch_layout import CHANNELS_LAST, to_layout
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of


def launch(problem, config, grad_y, weight):
    grad_x = torch_native.backward_data(problem, to_layout(grad_y, CHANNELS_LAST), weight)
    return to_layout(grad_x, problem.memory_format)


VARIANT = Variant(
    name="backward_data_torch_depthwise",
    pass_name="backward_data",
    idea="groups = channels: depthwise conv3d in channels_last_3d",
    backend="torch",
    spreads_nonfinite=SPREADS_PADDING,
    launch=launch,
    supports=supports,
    workspace_bytes=lambda problem: problem.bytes("backward_data"),
    work=lambda problem, config: by_torch(problem, "backward_data", 2 * size_of(problem, "x", "y"), 3),
)
