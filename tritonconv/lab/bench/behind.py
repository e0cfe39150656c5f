"""The gradients of what stands behind a convolution, in float64: for the gate of a training step with an epilogue.

The derivative of relu, leaky_relu and prelu jumps at 0, where rounding decides on which side z lies: no tolerance holds
two right answers together there. So grad_y is 0 where z is near 0 while a training step is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tritonconv.lab.bench.calls import Tensors
from tritonconv.lab.bench.operations import exact
from tritonconv.lab.bench.stages import CONCAT
from tritonconv.problem import Problem

KINKED = ("relu", "leaky_relu", "prelu")
EVERYTHING = slice(None)
TF32_EPS = 2.0**-10  # of float32, whose products a GPU may round so
NEAR = 2  # times eps and the largest of the values that are summed

# Of (x, weight, bias, grad_y, outputs) -> the outputs of a convolution in float64.
Reference = Callable[..., dict[str, torch.Tensor]]


class Behind(NamedTuple):
    """The gradients of z (n, c, od, oh, ow) and, with prelu, of the slopes (c,), of these images and channels."""

    z: torch.Tensor
    slopes: torch.Tensor | None


def behind(problem: Problem, t: Tensors, y: torch.Tensor, image: slice, channels: slice) -> Behind:
    """The gradients of what stands behind the convolution, with its bias, ``y`` for these images and channels."""
    if problem.epilogue is None or problem.epilogue == CONCAT:
        return Behind(t.grad_y[:, : problem.c_out][image, channels].to(y.dtype), None)
    with torch.enable_grad():
        z = y.detach().requires_grad_()
        slopes = None if t.slopes is None else t.slopes[channels].to(y.dtype).requires_grad_()
        found = exact(problem, t, z, image, channels, slopes)
        leaves = [z] if slopes is None else [z, slopes]
        grads = torch.autograd.grad(found, leaves, t.grad_y[image, channels].to(y.dtype))
    return Behind(grads[0], grads[1] if slopes is not None else None)


def gradients(
    problem: Problem, t: Tensors, y: torch.Tensor, reference: Reference, outputs: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Those of ``outputs`` that are gradients, of a convolution with its bias ``y`` in float64."""
    wanted = set(outputs)
    found = behind(problem, t, y, EVERYTHING, EVERYTHING)
    answers = reference(problem.plain, t.x, t.weight, t.bias, found.z, wanted & {"grad_x", "grad_weight"})
    own = {"grad_bias": found.z.sum((0, 2, 3, 4)) if t.bias is not None else None, "grad_slopes": found.slopes}
    if problem.epilogue is not None and problem.epilogue.activation is not None and t.beside is not None:
        own["grad_beside"] = found.z
    return answers | {name: each for name, each in own.items() if name in wanted and each is not None}


def off_the_kink(problem: Problem, t: Tensors) -> None:
    """Makes grad_y 0 where the activation has a kink near; nothing without one, or where torch has no arguments for the
    crops, and so no training step."""
    epilogue = problem.epilogue
    kinked = epilogue is not None and epilogue.activation in KINKED
    if not kinked or not problem.torch_crop.exact or not t.grad_y.numel():
        return
    z = F.conv_transpose3d(t.x, t.weight, t.bias, *problem.torch_arguments)
    largest = z.abs().max()
    if t.beside is not None:
        z += t.beside
        largest = torch.maximum(largest, t.beside.abs().max())
    eps = TF32_EPS if z.dtype is torch.float32 else torch.finfo(z.dtype).eps
    t.grad_y.masked_fill_(z.abs() <= NEAR * eps * largest, 0)
