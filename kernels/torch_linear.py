"""Images of one voxel: each is a row of a matrix, and all three passes are one product with the weight as it lies.

The first layer of a GAN is of this kind: 4x4x4 taps spread one voxel over a whole output.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from tritonconv.kernels.torch_layout import bias_gradient, matrix_refusal
from tritonconv.kernels.torch_products import product
from tritonconv.kernels.variant import Variant
from tritonconv.problem import Problem


def supports(problem: Problem, device: torch.device) -> str | None:
    if problem.size != (1, 1, 1):
        return f"needs images of one voxel, the problem has {problem.size}"
    if problem.out_size != problem.kernel or any(problem.crop):
        return (
            f"needs one tap per output with nothing cropped or appended, the problem has kernel {problem.kernel}, "
            f"dilation {problem.dilation}, crop {problem.crop}, output {problem.out_size}"
        )
    return matrix_refusal(problem)


def channels_inside(tensor: torch.Tensor) -> bool:
    """The channels of a weight or of y are innermost (channels_last_3d), not the taps."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last_3d)


def flat(tensor: torch.Tensor, inside: bool) -> torch.Tensor:
    """(k, c_out, kd, kh, kw) -> (k, c_out*taps), or (k, taps*c_out) where ``inside``; a view of one that lies so."""
    return tensor.permute(0, 2, 3, 4, 1).flatten(1) if inside else tensor.flatten(1)


def spread(rows: torch.Tensor, problem: Problem, inside: bool) -> torch.Tensor:
    """The inverse of :func:`flat`; always a view."""
    if not inside:
        return rows.view(len(rows), problem.c_out, *problem.kernel)
    return rows.view(len(rows), *problem.kernel, problem.c_out).permute(0, 4, 1, 2, 3)


def forward(problem, config, x, weight, bias):
    """(n, c_in) times the weight (c_in, c_out*taps) is y, in the order of the weight."""
    inside, taps = channels_inside(weight), math.prod(problem.kernel)
    rows, matrix = x.flatten(1), flat(weight, inside)
    offsets = bias
    if bias is not None:
        offsets = bias.repeat(taps) if inside else bias.repeat_interleave(taps)
    return spread(product(rows, matrix, offsets), problem, inside)


def backward_data(problem, config, grad_y, weight):
    """(n, c_out*taps) times the transposed weight."""
    inside = channels_inside(weight)
    return product(flat(grad_y, inside), flat(weight, inside).t()).view(problem.x_shape)


def backward_weight(problem, config, x, grad_y, need_bias):
    """The transposed (n, c_in) times (n, c_out*taps)."""
    inside = channels_inside(grad_y)
    grad_weight = spread(product(x.flatten(1).t(), flat(grad_y, inside)), problem, inside)
    return grad_weight, bias_gradient(grad_y) if need_bias else None


_variant = partial(Variant, idea="images of one voxel: a row each of one GEMM", backend="torch", supports=supports)
VARIANTS = [
    _variant("forward_torch_linear", "forward", launch=forward),
    _variant("backward_data_torch_linear", "backward_data", launch=backward_data),
    _variant("backward_weight_torch_linear", "backward_weight", launch=backward_weight),
]
