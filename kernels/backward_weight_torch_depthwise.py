"""Backward-weight where every channel is its own group: 2-D depthwise weight gradients, one per tap of the first axis.

oneDNN has a fast depthwise weight gradient in 2-D only. For one tap of the first spatial axis the planes of x and
grad_y that meet are a batch of images, so ``kd`` calls of the 2-D one give the whole gradient.
"""

from __future__ import annotations

import torch

from tritonconv.kernels import torch_native
from tritonconv.kernels.forward_torch_depthwise import supports
from tritonconv.kernels.torch_layout import CHANNELS_LAST, bias_gradient, to_layout
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of

# With up to this many taps in a plane the 2-D gradient is faster in NCDHW than after a copy to channels_last_3d
# (2 x 64, 16x16x32, s2, 2 cores: k3 15.6 against 24.4 ms; k5 181 against 73 ms).
NCDHW_TAPS = 9


def _planes(tensor: torch.Tensor, planes: slice) -> torch.Tensor:
    """(n, c, d, h, w) -> the chosen planes as images (n*planes, c, h, w), channels_last if the tensor is."""
    if tensor.is_contiguous(memory_format=CHANNELS_LAST):
        return tensor.permute(0, 2, 3, 4, 1)[:, planes].flatten(0, 1).permute(0, 3, 1, 2)
    return tensor[:, :, planes].transpose(1, 2).flatten(0, 1)


def launch(problem, config, x, grad_y, need_bias):
    if problem.kernel[1] * problem.kernel[2] > NCDHW_TAPS:
        x, grad_y = to_layout(x, CHANNELS_LAST), to_layout(grad_y, CHANNELS_LAST)
    window, (pad_d, *padding) = torch_native.exact_window(problem, grad_y, torch_native.safe_padding(problem))
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


VARIANT = Variant(
    name="backward_weight_torch_depthwise",
    pass_name="backward_weight",
    idea="groups = channels: 2-D depthwise weight gradients, one per tap of the first axis",
    backend="torch",
    spreads_nonfinite=SPREADS_PADDING,
    launch=launch,
    supports=supports,
    workspace_bytes=lambda problem: 2 * problem.bytes("backward_weight"),
    work=lambda problem, config: by_torch(
        problem, "backward_weight", 2 * size_of(problem, "x", "y"), 4 * problem.kernel[0]
    ),
)
