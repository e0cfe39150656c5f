"""Forward by phases: one stride-1 ``conv3d`` per residue class, only the taps that hit, each copied to its place.

A phase without taps (kernel < stride, or a dilation that shares a factor with the stride) is filled with the bias.
"""

from __future__ import annotations

from tritonconv.kernels import torch_phases
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of


def supports(problem, device):
    if problem.stride == (1, 1, 1):
        return "stride 1 has a single phase: that is forward_torch_conv"
    return None


def launch(problem, config, x, weight, bias):
    y = x.new_empty(problem.y_shape).contiguous(memory_format=problem.memory_format)
    turned = not x.is_contiguous(memory_format=problem.memory_format)
    for phase in problem.phases:
        target = torch_phases.outputs(problem, phase, y)
        part, box = None, ()
        if phase.taps:
            taps = torch_phases.as_conv_weight(problem, torch_phases.taps_of(problem, phase, weight))
            starts = [axis.offsets[-1] for axis in phase.axes]
            counts = [axis.count for axis in phase.axes]
            rates = torch_phases.dilation(phase)
            part, box = torch_phases.correlate_inside(x, taps, bias, starts, counts, rates, problem.groups)
        if part is None or part.shape != target.shape:
            target.copy_(bias.view(1, -1, 1, 1, 1).expand_as(target)) if bias is not None else target.zero_()
        if part is not None:
            if turned:  # while a phase is small enough for the caches
                part = part.contiguous(memory_format=problem.memory_format)
            target[box].copy_(part)
    return y


VARIANT = Variant(
    name="forward_torch_phases",
    pass_name="forward",
    idea="one stride-1 conv3d per phase, only the taps that hit",
    backend="torch",
    spreads_nonfinite=SPREADS_PADDING,
    launch=launch,
    supports=supports,
    workspace_bytes=lambda problem: problem.bytes(),
    work=lambda problem, config: by_torch(
        problem, "forward", 2 * size_of(problem, "weight", "y"), 3 * len(problem.phases)
    ),
)
