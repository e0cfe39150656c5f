"""torch's ``conv3d`` with one input channel per group, which a CPU gets wrong for some sizes in channels_last_3d.

The input gradient of a transposed convolution with one output channel per group is such a convolution, and so is the
forward, by phases, of one with one input channel per group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def misread(dtype: torch.dtype, depth: int, kernel_depth: int, width: int, stride_w: int) -> bool:
    """Whether oneDNN's channels-last convolution of one input channel per group is not safe with ``depth`` planes of
    input and outputs ``width`` wide.

    It is wrong, leaves outputs unwritten or writes outside its buffers where outputs are one voxel wide and the stride
    along them is more than 1 (x (3, 8, 7, 2, 1), weight (8, 1, 1, 4, 6), stride (1, 1, 2), padding (0, 2, 2): in
    float32 544 of 3,008 random layers with torch 2.13 and AVX-512; the half types ended the process), and in the half
    types where the input has one plane and the kernel more. Of 93,000 random layers outside these kinds none was wrong,
    and none of 55,000 with 2 to 8 channels.
    """
    narrow, flat = width == 1 and stride_w > 1, depth == 1 and kernel_depth > 1
    return (narrow and dtype is not torch.float64) or (flat and dtype.itemsize == 2)  # oneDNN has no float64


def refusal(problem, device: torch.device) -> str | None:
    """Why torch's own input gradient is not safe on the device; None where it is."""
    if device.type != "cpu" or problem.weight_shape[1] != 1:
        return None
    crop = problem.torch_crop
    depth = problem.out_size[0] + crop.front[0] + crop.back[0]
    if not misread(problem.dtype, depth, problem.kernel[0], problem.size[2], problem.stride[2]):
        return None
    return (
        "torch's CPU input gradient is not safe with one output channel per group where x is 1 voxel wide and the "
        "stride along w above 1, or in a half type where y has 1 plane and the kernel more (x "
        f"{problem.size}, y depth {depth}, kernel {problem.kernel}, stride {problem.stride}, {problem.dtype})"
    )


def conv3d(tensor, weight, bias, stride, padding, dilation, groups, operation=F.conv3d):
    """``operation``, which has the signature of ``F.conv3d``, with NCDHW operands where channels-last ones are not
    safe; ``stride``, ``padding`` and ``dilation`` are triples."""
    if weight.shape[1] == 1 and tensor.device.type == "cpu":
        span = dilation[2] * (weight.shape[4] - 1)
        width = (tensor.shape[4] + 2 * padding[2] - span - 1) // stride[2] + 1
        if misread(tensor.dtype, tensor.shape[2], weight.shape[2], width, stride[2]):
            tensor, weight = _in_ncdhw(tensor), _in_ncdhw(weight)
    return operation(tensor, weight, bias, stride, padding, dilation, groups)


def _in_ncdhw(tensor):
    """With the strides of NCDHW. One channel has both formats, and torch takes its strides for channels_last_3d."""
    return tensor.reshape(-1).view(tensor.shape)
