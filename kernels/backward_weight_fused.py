"""Backward-weight where kernel = stride, as one half of the fused backward: with backward_data_fused, one launch."""

from __future__ import annotations

from tritonconv.kernels.triton_fused_backward import backward, default, space, supports, work, workspace_bytes
from tritonconv.kernels.variant import Variant


def launch(problem, config, x, grad_y, need_bias):
    return backward(problem, config, x, None, grad_y, need_bias)[1:]


VARIANT = Variant(
    name="backward_weight_fused",
    pass_name="backward_weight",
    idea="kernel = stride: all three gradients from one read of grad_y",
    backend="triton",
    launch=launch,
    supports=supports,
    space=space,
    default=default,
    joint=backward,
    workspace_bytes=workspace_bytes,
    work=lambda problem, config: work(problem, config, "backward_weight"),
)
