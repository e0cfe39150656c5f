"""Backward-data by phases: grad_y of one residue class at a time, a stride-1 ``conv3d`` each, summed.

Outputs that no tap reaches are never read: at kernel 1, stride 2 that leaves an eighth of grad_y.
"""

from __future__ import annotations

from tritonconv.kernels import torch_phases
from tritonconv.kernels.torch_layout import sum_dtype
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of


def supports(problem, device):
    if problem.stride == (1, 1, 1):
        return "stride 1 has a single phase: that is backward_data_torch_conv"
    return None


def launch(problem, config, grad_y, weight):
    grad_x = None
    for phase in problem.phases:
        if not phase.taps:
            continue
        taps = torch_phases.taps_of(problem, phase, weight)
        # x[i] fed output j = i - offset of tap t; the offsets fall while the taps rise
        starts = [-axis.offsets[0] for axis in phase.axes]
        part = torch_phases.correlate(
            torch_phases.outputs(problem, phase, grad_y),
            taps, None, starts, problem.size, torch_phases.dilation(phase), problem.groups,
        ).to(sum_dtype(problem.dtype))  # fmt: skip
        grad_x = part if grad_x is None else grad_x.add_(part)
    if grad_x is None:  # no tap reaches any output
        return grad_y.new_zeros(problem.x_shape)
    return grad_x.to(problem.dtype)


VARIANT = Variant(
    name="backward_data_torch_phases",
    pass_name="backward_data",
    idea="sum over phases of a stride-1 conv3d of that phase's grad_y",
    backend="torch",
    spreads_nonfinite=SPREADS_PADDING,
    launch=launch,
    supports=supports,
    workspace_bytes=lambda problem: 2 * problem.bytes("backward_data"),
    work=lambda problem, config: by_torch(
        problem, "backward_data", 2 * size_of(problem, "weight", "y", "x"), 3 * len(problem.phases)
    ),
)
