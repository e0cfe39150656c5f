"""Backward-weight by phases: the taps of one residue class at a time, from x and that class's grad_y."""

from __future__ import annotations

import torch

from tritonconv.kernels import torch_phases
from tritonconv.kernels.torch_layout import bias_gradient, window
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of


def supports(problem, device):
    if problem.stride == (1, 1, 1):
        return "stride 1 has a single phase: that is backward_weight_torch_conv"
    return None


def launch(problem, config, x, grad_y, need_bias):
    grad_weight = x.new_zeros(problem.weight_shape)
    for phase in problem.phases:
        if not phase.taps:
            continue
        target = torch_phases.taps_of(problem, phase, grad_weight)
        rates = torch_phases.dilation(phase)
        # tap t of x[i] meets output i - offset(t): the window starts where i = 0 meets the first tap
        boxes = [
            (-axis.offsets[0], size + rate * (len(axis.taps) - 1))
            for axis, size, rate in zip(phase.axes, problem.size, rates, strict=True)
        ]
        box = window(torch_phases.outputs(problem, phase, grad_y), boxes)
        like_weight = x.new_empty(target.shape)
        gradient = torch.ops.aten.convolution_backward(
            x, box, like_weight, None, [1, 1, 1], [0, 0, 0], rates,
            False, [0, 0, 0], problem.groups, (False, True, False),
        )[1]  # fmt: skip
        target.copy_(gradient)
    return grad_weight, bias_gradient(grad_y) if need_bias else None


VARIANT = Variant(
    name="backward_weight_torch_phases",
    pass_name="backward_weight",
    idea="weight gradient of a stride-1 conv3d per phase",
    backend="torch",
    spreads_nonfinite=SPREADS_PADDING,
    launch=launch,
    supports=supports,
    workspace_bytes=lambda problem: 2 * problem.bytes("backward_weight"),
    work=lambda problem, config: by_torch(
        problem, "backward_weight", 2 * size_of(problem, "weight", "y"), 3 * len(problem.phases)
    ),
)
