"""Forward by oneDNN's deconvolution called directly, in channels_last_3d, the bias apart where oneDNN cannot fuse it.

Three things that ``torch.nn.functional.conv_transpose3d`` does on a CPU cost more than the convolution (float32,
2 cores, torch 2.13): NCDHW goes through slow reorders (2 x 32->64, 8x16x16, k3 s2: 10.2 ms, 5.7 ms this way); a bias
is added by a slow path unless every phase has the same number of outputs (2 x 16->32, 16x16x32, k3 s2 p1: 16.1 ms,
4.0 ms this way); and one small image with a kernel of at most 3 does not reach oneDNN at all (1 x 64->64, 12x12x20:
18.0 ms, 6.3 ms this way).
"""

from __future__ import annotations

import torch

from tritonconv.kernels import torch_native
from tritonconv.kernels.torch_layout import CHANNELS_LAST, add_bias_, filled, to_layout
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of


def supports(problem, device):
    if device.type != "cpu":
        return f"needs a CPU, the call is on {device.type}"
    if problem.dtype != torch.float32:
        return f"needs float32, the problem has {problem.dtype}"
    if problem.n == 0 or problem.c_out == 0:
        return f"needs outputs, the problem has batch {problem.n} and {problem.c_out} output channels"
    if any(-axis.back_crop >= axis.stride for axis in problem.axes):
        return f"needs fewer appended planes than the stride {problem.stride}, the output size is {problem.out_size}"
    if goes_past(problem) and problem.torch_crop.output_padding[2] > problem.torch_crop.padding[2]:
        # At other ends it does so too, but rarely (2 of 446 random layers), and there it is what the variant declares.
        return (
            f"oneDNN makes NaN of an infinite weight in planes appended along w (padding {problem.torch_crop.padding}, "
            f"output padding {problem.torch_crop.output_padding}), and torch's own makes one small image without it"
        )
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_transpose_pointwise"):
        return "this build of torch has no oneDNN deconvolution"
    return None


def goes_past(problem) -> bool:
    """torch's own does not hand the call to oneDNN: one small image (ATen Convolution.cpp, ``use_mkldnn``)."""
    few = problem.n == 1 and problem.groups == 1 and min(problem.kernel[1:]) <= 3
    return few and problem.c_in * problem.size[0] * problem.size[1] <= 20480


def fuses_bias(problem) -> bool:
    """oneDNN adds the bias in its fast path only where every phase has the same number of outputs."""
    return problem.dilation == (1, 1, 1) and all(
        o % s == 0 for o, s in zip(problem.out_size, problem.stride, strict=True)
    )


def _deconvolution(x, weight, bias, stride, padding, output_padding, groups, dilation):
    # The operation behind torch.compile's CPU backend; the last three arguments name no fused activation. Unlike
    # torch's own front end it reads a strided bias as if it were dense.
    return torch.ops.mkldnn._convolution_transpose_pointwise(
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        padding,
        output_padding,
        stride,
        dilation,
        groups,
        "none",
        [],
        "",
    )


def forward(problem, config, x, weight, bias, out=None):
    inside = bias if fuses_bias(problem) else None
    y = torch_native.forward(problem, to_layout(x, CHANNELS_LAST), weight, inside, _deconvolution)
    if bias is not None and inside is None:
        y = add_bias_(y, bias)
    return to_layout(y, problem.memory_format) if out is None else filled(out, y)


VARIANT = Variant(
    name="forward_torch_onednn",
    pass_name="forward",
    idea="oneDNN's deconvolution in channels_last_3d, the bias apart where it is not fused",
    backend="torch",
    spreads_nonfinite=SPREADS_PADDING,
    launch=forward,
    strided=True,
    supports=supports,
    workspace_bytes=lambda problem: problem.bytes(),
    work=lambda problem, config: by_torch(
        problem, "forward", (2 if problem.layout == "ncdhw" else 0) * size_of(problem, "x", "y"), 3
    ),
)
