"""torch's own transposed convolution and its two gradients, for any problem, by differentiable torch operations.

torch takes one crop per axis; a call here has a front and a back crop. torch's padding and output padding cannot
express every such pair: the rest is cut off the result (forward) or filled with zeros in grad_y (gradients). Every
function here works on any device and dtype that torch serves, under every torch transform, so they are baseline,
fallback and reference at once.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

from tritonconv.kernels import torch_one_channel
from tritonconv.kernels.torch_layout import bias_gradient, pad
from tritonconv.kernels.variant import Variant
from tritonconv.kernels.work import Work, by_torch, parts, size_of
from tritonconv.problem import TorchCrop, Triple


class Call(Protocol):
    """The fields read of a call: a :class:`tritonconv.problem.Problem`, or the same fields with symbolic sizes."""

    @property
    def c_out(self) -> int: ...
    @property
    def size(self) -> Triple: ...
    @property
    def stride(self) -> Triple: ...
    @property
    def torch_crop(self) -> TorchCrop: ...
    @property
    def out_size(self) -> Triple: ...
    @property
    def dilation(self) -> Triple: ...
    @property
    def groups(self) -> int: ...
    @property
    def weight_shape(self) -> tuple[int, ...]: ...


def forward(problem: Call, x, weight, bias, operation=F.conv_transpose3d):
    """y (n, c_out, od, oh, ow) from x (n, c_in, d, h, w), weight (c_in, c_out/groups, kd, kh, kw), bias (c_out,).

    ``operation`` has the signature of ``torch.nn.functional.conv_transpose3d``.
    """
    crop = problem.torch_crop
    y = operation(x, weight, bias, problem.stride, crop.padding, crop.output_padding, problem.groups, problem.dilation)
    return cut(y, crop)


def cut(y, crop: TorchCrop):
    """torch's answer without the planes that its padding and output padding cannot express."""
    if not crop.exact:
        for axis, (first, last) in enumerate(zip(crop.front, crop.back, strict=True), start=2):
            y = y.narrow(axis, first, y.shape[axis] - first - last)
    return y


def native_gradients(problem: Call, grad_y, x, weight, mask: tuple[bool, bool, bool]):
    """(grad_x, grad_weight, grad_bias) of torch's own backward; the entries that ``mask`` leaves out are None."""
    crop = problem.torch_crop
    if not crop.exact:
        grad_y = pad(grad_y, crop.front, crop.back)
    bias_sizes = [problem.c_out] if mask[2] else None
    return torch.ops.aten.convolution_backward(
        grad_y, x, weight, bias_sizes, problem.stride, crop.padding, problem.dilation,
        True, crop.output_padding, problem.groups, mask,
    )  # fmt: skip


def safe_padding(problem: Call, dtype: torch.dtype) -> Triple:
    """The padding per axis up to which torch's 3-D weight gradient on a CPU is right: the problem's own padding, or
    more, where any is.

    oneDNN computes it. In float32 its AVX-512 kernel takes padding of the first axis below the kernel's extent, but is
    wrong or writes outside its buffers for some beyond half of that (for example kernel (5, 4, 2), stride (2, 2, 1),
    padding (3, 1, 0), x (3, 3, 3, 4, 3)). Where the second axis has more than half of the extent it declines, and
    another kernel serves, which is right (``jit_avx512_common_conv_kernel.cpp``, ``boundaries_ok``). So the first axis
    alone has a limit, and none where the second has more; the padding of the other two is right as it is. With torch
    2.13 none of 3,696 random layers that this function calls safe was wrong, and 8 of 954 others (AVX2, AVX-512, AMX).
    In float64, which oneDNN does not have, any is right.

    In bfloat16, on a CPU with AMX, the gradient is not safe along an axis where each voxel of x has taps outside
    grad_y: of 6,000 random layers 1,778 were padded along such an axis, and of them 261 had wrong gradients and 33
    ended the process, of the others none (for example 16->8, x (2, 16, 4, 1, 3), kernel (1, 4, 3), stride 2, padding
    (0, 1, 1); 32->6, x (2, 32, 2, 1, 7), kernel (3, 4, 4), stride (3, 2, 1), padding 1). Padding beyond :func:`half`
    was not tried in bfloat16 and float16: that is the limit of the other axes, in float16 of all three.
    """
    most, crop, kernel = list(half(problem)), problem.torch_crop, problem.weight_shape[2:]
    if dtype in (torch.float32, torch.float64):
        # oneDNN's own bound, half of the extent: for an even one it is a plane more than :func:`half`.
        declined = crop.padding[1] > (problem.dilation[1] * (kernel[1] - 1) + 1) // 2
        exact = declined or dtype is torch.float64  # oneDNN has no float64
        return (crop.padding[0] if exact else most[0], *crop.padding[1:])
    if dtype is torch.bfloat16:
        for axis, (size, stride) in enumerate(zip(problem.size, problem.stride, strict=True)):
            front, back = crop.padding[axis], crop.padding[axis] - crop.output_padding[axis]
            if parts(front, stride) + max(0, parts(back, stride)) >= size:
                most[axis] = 0
    return tuple(most)  # type: ignore[return-value]


def half(problem: Call) -> Triple:
    """Half of the distance between the outer taps, rounded down (1 of a kernel of 4): the padding per axis up to which
    torch's CPU weight gradient is fast.

    With more it is slow where it works (2 x 240->240, 6x5x5, k4 s2 p3: 33 ms against 6 ms for the input gradient; 2
    cores).
    """
    return tuple(r * (k - 1) // 2 for r, k in zip(problem.dilation, problem.weight_shape[2:], strict=True))  # type: ignore[return-value]


def fast_padding(problem: Call, dtype: torch.dtype) -> Triple:
    """The most padding per axis with which torch's CPU weight gradient is right and fast."""
    return tuple(map(min, half(problem), safe_padding(problem, dtype)))  # type: ignore[return-value]


def exact_window(problem: Call, grad_y, most: Triple | None = None):
    """grad_y cut or zero-filled so that an ordinary convolution over it has exactly x's size, and its padding.

    An ordinary convolution ignores up to ``stride - 1`` planes at the end, so an output padding below the stride
    needs nothing; a larger one (torch allows it up to the dilation) is cut off. Padding beyond ``most`` becomes
    zeros around grad_y.
    """
    crop = problem.torch_crop
    padding, front, back = list(crop.padding), list(crop.front), list(crop.back)
    for axis, (appended, stride) in enumerate(zip(crop.output_padding, problem.stride, strict=True)):
        allowed = padding[axis] if most is None else min(padding[axis], most[axis])
        if appended >= stride or allowed < padding[axis]:
            cut = padding[axis] - appended  # planes cut at the back, negative where planes are appended
            shared = min(allowed, max(cut, 0))
            front[axis] += padding[axis] - shared
            back[axis] += cut - shared
            padding[axis] = shared
    return (pad(grad_y, front, back) if any(front) or any(back) else grad_y), tuple(padding)


def backward_data(problem: Call, grad_y, weight):
    """dx[i] = sum_t grad_y[i*s - p + r*t] weight[t]^T: an ordinary strided convolution of grad_y with the weight."""
    grad_y, padding = exact_window(problem, grad_y)
    return torch_one_channel.conv3d(grad_y, weight, None, problem.stride, padding, problem.dilation, problem.groups)


def backward_weight(problem: Call, x, grad_y):
    """dw[t] = sum_i x[i] (outer) grad_y[i*s - p + r*t]: the weight gradient of that same ordinary convolution."""
    window, padding = exact_window(problem, grad_y, fast_padding(problem, x.dtype))
    like_weight = x.new_empty(problem.weight_shape)  # only its shape is read
    return torch.ops.aten.convolution_backward(
        x, window, like_weight, None, problem.stride, padding, problem.dilation,
        False, [0, 0, 0], problem.groups, (False, True, False),
    )[1]  # fmt: skip


def backward_weight_and_bias(problem: Call, x, grad_y, need_bias: bool):
    """(grad_weight, grad_bias or None), the contract of the backward_weight variants."""
    return backward_weight(problem, x, grad_y), bias_gradient(grad_y) if need_bias else None


def work(problem, pass_name: str) -> Work:
    """torch's own: NCDHW is reordered for the convolution and back, the bias is a pass of its own (ATen Convolution.cpp
    adds it after cuDNN, and oneDNN in a slow path; its gradient is a sum of its own).
    """
    reorders = 2 * (problem.layout == "ncdhw")
    moved = reorders * size_of(problem, "x", "y")
    apart = problem.bias and pass_name != "backward_data"
    if apart:
        moved += (2 if pass_name == "forward" else 1) * size_of(problem, "y")
    return by_torch(problem, pass_name, moved, 1 + reorders + apart)


def launch_forward(problem, config, x, weight, bias):
    return forward(problem, x, weight, bias)


def launch_backward_data(problem, config, grad_y, weight):
    # Only its shape and layout are read.
    like_x = torch.empty(problem.x_shape, dtype=grad_y.dtype, device=grad_y.device, memory_format=problem.memory_format)
    return native_gradients(problem, grad_y, like_x, weight, (True, False, False))[0]


def launch_backward_weight(problem, config, x, grad_y, need_bias):
    like_weight = x.new_empty(problem.weight_shape)  # only its shape is read
    return native_gradients(problem, grad_y, x, like_weight, (False, True, need_bias))[1:]


def safe_on(problem, device):
    padding, safe = problem.torch_crop.padding, safe_padding(problem, problem.dtype)
    if device.type == "cpu" and any(p > most for p, most in zip(padding, safe, strict=True)):
        return (
            f"torch's CPU weight gradient is not safe with padding {padding} beyond {safe} "
            f"(kernel {problem.kernel}, x {problem.size}, {problem.dtype})"
        )
    return None


# torch lists ConvTranspose3d on CUDA among the operations that may not be reproducible.
_variant = partial(Variant, backend="torch", deterministic=False)
VARIANTS = [
    _variant(
        "forward_torch_native", "forward", "torch's own conv_transpose3d", launch=launch_forward,
        work=lambda problem, config: work(problem, "forward"),
    ),
    _variant(
        "backward_data_torch_native", "backward_data", "torch's own convolution_backward, the input gradient alone",
        launch=launch_backward_data, supports=torch_one_channel.refusal,
        work=lambda problem, config: work(problem, "backward_data"),
    ),
    _variant(
        "backward_weight_torch_native", "backward_weight",
        "torch's own convolution_backward, weight and bias gradients together",
        launch=launch_backward_weight, supports=safe_on, work=lambda problem, config: work(problem, "backward_weight"),
    ),
]  # fmt: skip
