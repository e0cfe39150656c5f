"""Where every channel is its own group: ordinary depthwise convolutions in channels_last_3d.

torch sends a depthwise transposed convolution to a generic path of about 4 GFLOP/s on 2 cores; oneDNN has a fast
depthwise *ordinary* convolution in channels_last_3d, and inside a phase that is what the operation is. A fast depthwise
weight gradient it has in 2-D only: for one tap of the first spatial axis the planes of x and grad_y that meet are a
batch of images, so ``kd`` calls of the 2-D one give the whole gradient.
"""

from __future__ import annotations

from functools import partial

import torch

from tritonconv.kernels import torch_conv, torch_native, torch_phases
from tritonconv.kernels.torch_layout import CHANNELS_LAST, bias_gradient, filled, to_layout
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of

# With up to this many taps in a plane the 2-D gradient is faster in NCDHW than after a copy to channels_last_3d
# (2 x 64, 16x16x32, s2, 2 cores: k3 15.6 against 24.4 ms; k5 181 against 73 ms).
NCDHW_TAPS = 9


def supports(problem, device):
    if not problem.depthwise:
        return f"needs groups = channels, the problem has groups {problem.groups}, {problem.c_in}->{problem.c_out}"
    return None


def forward(problem, config, x, weight, bias, out=None):
    x = to_layout(x, CHANNELS_LAST)
    if problem.stride != (1, 1, 1):
        return torch_phases.forward(problem, config, x, weight, bias, out)
    y = torch_conv.forward(problem, config, x, weight, bias)
    return y if out is None else filled(out, y)


def backward_data(problem, config, grad_y, weight):
    grad_x = torch_native.backward_data(problem, to_layout(grad_y, CHANNELS_LAST), weight)
    return to_layout(grad_x, problem.memory_format)


def _planes(tensor: torch.Tensor, planes: slice) -> torch.Tensor:
    """(n, c, d, h, w) -> the chosen planes as images (n*planes, c, h, w), channels_last if the tensor is."""
    if tensor.is_contiguous(memory_format=CHANNELS_LAST):
        return tensor.permute(0, 2, 3, 4, 1)[:, planes].flatten(0, 1).permute(0, 3, 1, 2)
    return tensor[:, :, planes].transpose(1, 2).flatten(0, 1)


def backward_weight(problem, config, x, grad_y, need_bias):
    """2-D depthwise weight gradients, one per tap of the first axis."""
    if problem.kernel[1] * problem.kernel[2] > NCDHW_TAPS:
        x, grad_y = to_layout(x, CHANNELS_LAST), to_layout(grad_y, CHANNELS_LAST)
    most = torch_native.fast_padding(problem, x.dtype)
    window, (pad_d, *padding) = torch_native.exact_window(problem, grad_y, most)
    (sd, *stride), (rd, *dilation) = problem.stride, problem.dilation
    like_weight = x.new_empty(problem.c_in, 1, *problem.kernel[1:])
    slices = []
    for tap in range(problem.kernel[0]):
        shift = rd * tap - pad_d  # plane i of x meets plane i*sd + shift of the window
        low = max(0, -(shift // sd))
        high = min(problem.size[0], (window.shape[2] - 1 - shift) // sd + 1)
        if high <= low:
            slices.append(x.new_zeros(like_weight.shape))
            continue
        met = slice(low * sd + shift, (high - 1) * sd + shift + 1, sd)
        gradient = torch.ops.aten.convolution_backward(
            _planes(x, slice(low, high)), _planes(window, met), like_weight, None, stride, padding, dilation,
            False, [0, 0], problem.groups, (False, True, False),
        )[1]  # fmt: skip
        slices.append(gradient)
    return torch.stack(slices, dim=2), bias_gradient(grad_y) if need_bias else None


def _work(pass_name, launches):
    return lambda problem, config: by_torch(problem, pass_name, 2 * size_of(problem, "x", "y"), launches(problem))


_variant = partial(Variant, backend="torch", supports=supports, spreads_nonfinite=SPREADS_PADDING)
VARIANTS = [
    _variant(
        "forward_torch_depthwise", "forward", "groups = channels: depthwise conv3d per phase, in channels_last_3d",
        launch=forward, strided=True, workspace_bytes=lambda problem: 2 * problem.bytes(),
        work=_work("forward", lambda problem: 1 + 3 * len(problem.phases)),
    ),
    _variant(
        "backward_data_torch_depthwise", "backward_data", "groups = channels: depthwise conv3d in channels_last_3d",
        launch=backward_data, workspace_bytes=lambda problem: problem.bytes("backward_data"),
        work=_work("backward_data", lambda problem: 3),
    ),
    _variant(
        "backward_weight_torch_depthwise", "backward_weight",
        "groups = channels: 2-D depthwise weight gradients, one per tap of the first axis", launch=backward_weight,
        workspace_bytes=lambda problem: 2 * problem.bytes("backward_weight"),
        work=_work("backward_weight", lambda problem: 4 * problem.kernel[0]),
    ),
]  # fmt: skip
