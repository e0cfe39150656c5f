"""Forward at stride 1: an ordinary ``conv3d`` of x with the taps reversed."""

from __future__ import annotations

from tritonconv.kernels import torch_phases
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of


def supports(problem, device):
    if problem.stride != (1, 1, 1):
        return f"needs stride 1, the problem has {problem.stride}"
    return None


def launch(problem, config, x, weight, bias):
    # out[j] = sum_m x[j + p - r*(k-1) + r*m] weight[k-1-m]
    starts = [p - r * (k - 1) for p, r, k in zip(problem.crop, problem.dilation, problem.kernel, strict=True)]
    reversed_taps = torch_phases.as_conv_weight(problem, weight)
    return torch_phases.correlate(x, reversed_taps, bias, starts, problem.out_size, problem.dilation, problem.groups)


VARIANT = Variant(
    name="forward_torch_conv",
    pass_name="forward",
    idea="stride 1: conv3d with the taps reversed",
    backend="torch",
    spreads_nonfinite=SPREADS_PADDING,
    launch=launch,
    supports=supports,
    workspace_bytes=lambda problem: problem.bytes(),
    work=lambda problem, config: by_torch(problem, "forward", 2 * size_of(problem, "weight"), 2),
)
