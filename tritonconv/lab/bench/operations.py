"""The operations that are timed, with the signature of torch's convolution: torch's own and ours.

Of a problem with an epilogue torch's are separate operations, each with an answer of its own as a model's modules have;
ours is one call. The same in float64 is what both are held against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tritonconv.concatenation import up_concat
from tritonconv.epilogue import Epilogue, activated
from tritonconv.functional import conv_transpose3d
from tritonconv.lab.bench.calls import FORWARD_BACKWARD, TensorCall, Tensors, operation_call
from tritonconv.lab.bench.stages import CONCAT
from tritonconv.layer import ConvTranspose3d
from tritonconv.problem import Problem


def torch_call(problem: Problem, tensors: Tensors, pass_name: str) -> TensorCall:
    """torch's own: ``conv_transpose3d``, its autograd, or the ATen function its autograd calls for one gradient."""
    if pass_name in ("forward", FORWARD_BACKWARD):
        return operation_call(torchs_operation, problem, tensors, pass_name)
    stride, padding, output_padding, groups, dilation = problem.torch_arguments
    data = pass_name == "backward_data"
    mask = (data, not data, not data and problem.bias)
    first = 0 if data else 1
    last = 1 + first + mask[2]
    sizes = [problem.c_out] if mask[2] else None
    x, weight, grad_y = tensors.x, tensors.weight, tensors.grad_y

    def backward():
        return torch.ops.aten.convolution_backward(
            grad_y, x, weight, sizes, stride, padding, dilation, True, output_padding, groups, mask
        )[first:last]

    return backward


def torchs_operation(problem: Problem, t: Tensors) -> Callable[..., torch.Tensor]:
    """torch's separate operations, with the signature of its convolution; ``t`` holds what else they take."""
    epilogue = problem.epilogue
    if epilogue is None:
        return F.conv_transpose3d
    if epilogue == CONCAT:
        return lambda *operands: torch.cat((F.conv_transpose3d(*operands), t.beside), 1)  # type: ignore[arg-type]

    def separate(*operands):
        y = F.conv_transpose3d(*operands)
        return activated(y if t.beside is None else y + t.beside, epilogue, t.slopes)

    return separate


def our_operation(problem: Problem, t: Tensors) -> Callable[..., torch.Tensor]:
    """The same as one call of ours."""
    epilogue = problem.epilogue
    if epilogue is None:
        return conv_transpose3d
    if epilogue == CONCAT:
        layer = _layer(problem, t)
        return lambda x, *_: up_concat(layer, x, t.beside)
    how = {"activation": _argument(epilogue, t), "residual": t.beside, "rounding": epilogue.rounding}
    return lambda *operands: conv_transpose3d(*operands, **how)


def _argument(epilogue: Epilogue, t: Tensors) -> Any:
    """The argument ``activation`` that stands for the record."""
    pairs = {"leaky_relu": epilogue.slope, "prelu": t.slopes, "gelu_tanh": "tanh"}
    name = epilogue.activation
    return (name.removesuffix("_tanh"), pairs[name]) if name in pairs else name


def _layer(problem: Problem, t: Tensors) -> ConvTranspose3d:
    """The problem as a layer over the weight and the bias of ``t``."""
    stride, padding, output_padding, groups, dilation = problem.torch_arguments
    layer = ConvTranspose3d(
        problem.c_in, problem.c_out, problem.kernel, stride, padding, output_padding, groups, problem.bias, dilation,
        device="meta",
    )  # fmt: skip
    # Past nn.Module's checks: as a Parameter each would be a leaf of its own.
    layer._parameters |= {"weight": t.weight, "bias": t.bias}  # type: ignore[dict-item]
    return layer


def exact(
    problem: Problem, t: Tensors, y: torch.Tensor, image: slice, channels: slice, slopes: torch.Tensor | None = None
) -> torch.Tensor:
    """The epilogue in float64, of a convolution with its bias for these images and channels of y; ``slopes`` are those
    of the channels where autograd records it."""
    epilogue = problem.epilogue
    if epilogue is None or epilogue == CONCAT:
        return y
    if t.beside is not None:
        y = y + t.beside[image, channels].to(y.dtype)
    if t.slopes is not None and slopes is None:
        slopes = t.slopes[channels].to(y.dtype)
    return activated(y, epilogue, slopes)
