"""Backward-data where kernel = stride, as one half of the fused backward: with backward_weight_fused, one launch."""

from __future__ import annotations

from tritonconv.kernels.triton_fused_backward import backward, default, space, supports, work
from tritonconv.kernels.variant import Variant


def launch(problem, config, grad_y, weight):
    return backward(problem, config, None, weight, grad_y, False)[0]


VARIANT = Variant(
    name="backward_data_fused",
    pass_name="backward_data",
    idea="kernel = stride: all three gradients from one read of grad_y",
    backend="triton",
    launch=launch,
    supports=supports,
    space=space,
    default=default,
    joint=backward,
    work=lambda problem, config: work(problem, config, "backward_data"),
)
