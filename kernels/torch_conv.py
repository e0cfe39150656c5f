"""Each pass as the ordinary convolution that it is: the forward at stride 1 alone, both gradients at any stride."""

from __future__ import annotations

from functools import partial

from tritonconv.kernels import torch_native, torch_phases
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of


def stride_1(problem, device):
    return None if problem.stride == (1, 1, 1) else f"needs stride 1, the problem has {problem.stride}"


def forward(problem, config, x, weight, bias):
    """``conv3d`` of x with the taps reversed."""
    # out[j] = sum_m x[j + p - r*(k-1) + r*m] weight[k-1-m]
    starts = [p - r * (k - 1) for p, r, k in zip(problem.crop, problem.dilation, problem.kernel, strict=True)]
    reversed_taps = torch_phases.as_conv_weight(problem, weight)
    return torch_phases.correlate(x, reversed_taps, bias, starts, problem.out_size, problem.dilation, problem.groups)


def backward_data(problem, config, grad_y, weight):
    """Strided ``conv3d`` of grad_y with the same weight."""
    return torch_native.backward_data(problem, grad_y, weight)


def backward_weight(problem, config, x, grad_y, need_bias):
    """The weight gradient of that ``conv3d``; the bias gradient apart."""
    return torch_native.backward_weight_and_bias(problem, x, grad_y, need_bias)


_variant = partial(Variant, backend="torch")
VARIANTS = [
    _variant(
        "forward_torch_conv", "forward", "stride 1: conv3d with the taps reversed", launch=forward, supports=stride_1,
        spreads_nonfinite=SPREADS_PADDING, workspace_bytes=lambda problem: problem.bytes(),
        work=lambda problem, config: by_torch(problem, "forward", 2 * size_of(problem, "weight"), 2),
    ),
    _variant(
        "backward_data_torch_conv", "backward_data", "conv3d of grad_y with the weight", launch=backward_data,
        work=lambda problem, config: by_torch(problem, "backward_data", 0.0, 2),
    ),
    _variant(
        "backward_weight_torch_conv", "backward_weight", "weight gradient of conv3d from grad_y to x",
        launch=backward_weight, spreads_nonfinite=SPREADS_PADDING,
        work=lambda problem, config: by_torch(problem, "backward_weight", size_of(problem, "y"), 3),
    ),
]  # fmt: skip
