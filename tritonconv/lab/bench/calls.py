"""The tensors of a problem, and the calls that are timed of an operation with torch's signature.

A call takes nothing and returns its outputs as a tuple, in the order of :data:`tritonconv.lab.bench.gate.OUTPUTS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tritonconv.problem import LAYOUTS, PASSES, Axis, Problem

TensorCall = Callable[[], tuple]

FORWARD_BACKWARD = "forward_backward"
ALL_PASSES = (*PASSES, FORWARD_BACKWARD)
LEAVES = ("x", "weight", "bias", "beside", "slopes")  # of a training step: each that there is has a gradient


@dataclass(frozen=True)
class Tensors:
    """x (n, c_in, d, h, w) and grad_y (n, c_out, od, oh, ow) in the problem's layout, weight and bias contiguous.

    Of an epilogue ``beside``, the residual or the skip, is like grad_y, and ``slopes`` (c_out,) are prelu's. Of a
    concatenation grad_y is that of the result: the channels of y, then those of the skip.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    grad_y: torch.Tensor
    beside: torch.Tensor | None = None
    slopes: torch.Tensor | None = None

    def in_layout(self, layout: str) -> Tensors:
        """The same values with the images in another layout."""
        beside = None if self.beside is None else laid_out(self.beside, layout)
        return replace(self, x=laid_out(self.x, layout), grad_y=laid_out(self.grad_y, layout), beside=beside)

    @property
    def leaves(self) -> Tensors:
        """In the same memory, as parameters and inputs whose gradients are wanted."""
        own = {name: getattr(self, name) for name in LEAVES}
        return replace(self, **{name: each.detach().requires_grad_() for name, each in own.items() if each is not None})


def make_tensors(problem: Problem, device: torch.device, seed: int) -> Tensors:
    """Normally distributed values, drawn on the device in float32 and then rounded to the problem's dtype.

    Before an epilogue the weight is so small that y's variance is about 1, where an activation bends.
    """
    draw = torch.Generator(device).manual_seed(seed)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device).to(problem.dtype)

    plain = Tensors(
        x=laid_out(values(problem.x_shape), problem.layout),
        weight=values(problem.weight_shape),
        bias=values((problem.c_out,)) if problem.bias else None,
        grad_y=laid_out(values(answer_shape(problem)), problem.layout),
    )
    epilogue = problem.epilogue
    if epilogue is None:
        return plain
    terms = max(1.0, problem.flops / 2 / max(1, math.prod(problem.y_shape)))
    return replace(
        plain,
        weight=plain.weight * terms**-0.5,
        beside=laid_out(values(problem.y_shape), problem.layout) if epilogue.beside else None,
        slopes=values((problem.c_out,)) if epilogue.activation == "prelu" else None,
    )


def answer_shape(problem: Problem) -> tuple[int, ...]:
    """Of the operation's answer: that of y, and of a concatenation with a skip like y twice as many channels."""
    n, c_out, *size = problem.y_shape
    joined = problem.epilogue is not None and not problem.epilogue.in_kernels
    return n, c_out * (1 + joined), *size


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """A copy with exactly the strides of the layout.

    ``contiguous`` would return a tensor of one voxel or one channel as it is, and then torch may read its strides as
    the other layout.
    """
    return torch.empty_like(tensor, memory_format=LAYOUTS[layout]).copy_(tensor)


def operation_call(
    operation_of: Callable[[Problem, Tensors], Callable[..., Any]], problem: Problem, tensors: Tensors, pass_name: str
) -> TensorCall:
    """``forward``, or ``forward_backward`` by autograd. ``operation_of`` makes the operation, with the signature of
    torch's, for the tensors: what it takes besides x, weight and bias is among them."""
    arguments = problem.torch_arguments
    if pass_name == "forward":
        operation = operation_of(problem, tensors)
        x, weight, bias = tensors.x, tensors.weight, tensors.bias
        return lambda: (operation(x, weight, bias, *arguments),)
    leaves, epilogue = tensors.leaves, problem.epilogue
    # With nothing behind it the gradient of a residual or a skip is grad_y itself or a part of it: no output.
    own = LEAVES if epilogue is None or epilogue.activation is not None else (*LEAVES[:3], None)
    return training_step(operation_of(problem, leaves), leaves, *arguments, returned=own)


def training_step(
    operation: Callable[..., Any], leaves: Tensors, *arguments: object, returned: Sequence[str | None] = LEAVES
) -> TensorCall:
    """``operation(x, weight, bias, *arguments)`` and the gradients of the leaves by autograd, of them those that are to
    be ``returned``; None in the place of one that there is not."""
    x, weight, bias, grad_y = leaves.x, leaves.weight, leaves.bias, leaves.grad_y
    names = [name for name in LEAVES if getattr(leaves, name) is not None]
    inputs = [getattr(leaves, name) for name in names]

    def forward_backward():
        y = operation(x, weight, bias, *arguments)
        return (y.detach(), *torch.autograd.grad(y, inputs, grad_y))

    if names == list(LEAVES[: len(names)]) and len(names) <= 3:
        return forward_backward
    places = [1 + names.index(name) if name in names else None for name in returned]

    def in_their_places():
        outputs = forward_backward()
        return (outputs[0], *(None if place is None else outputs[place] for place in places))

    return in_their_places


def work(problem: Problem, pass_name: str) -> tuple[int, int]:
    """(useful FLOPs, compulsory bytes) of a pass; ``forward_backward`` is the sum of the three."""
    passes = PASSES if pass_name == FORWARD_BACKWARD else (pass_name,)
    return problem.flops * len(passes), sum(problem.bytes(name) - _unread(problem, name) for name in passes)


def _unread(problem: Problem, pass_name: str) -> int:
    """Bytes of the operands of a pass that no product needs: a kernel of 1 and stride 2 meets an eighth of grad_y."""
    axes = [_met(axis) for axis in problem.axes]
    shapes = {"x": problem.x_shape, "weight": problem.weight_shape, "grad_y": problem.y_shape}
    read = {"forward": ("x", "weight"), "backward_data": ("grad_y", "weight"), "backward_weight": ("x", "grad_y")}
    unread = 0
    for name in read[pass_name]:
        if name == "grad_y" and problem.bias and pass_name == "backward_weight":  # all of it is summed
            continue
        met = math.prod(axis[list(shapes).index(name)] for axis in axes)
        unread += math.prod(shapes[name][:2]) * (math.prod(shapes[name][2:]) - met)
    return unread * problem.dtype.itemsize


def _met(axis: Axis) -> tuple[int, int, int]:
    """How many inputs, taps and outputs of an axis have a product that lands inside the output."""
    inputs: set[int] = set()
    outputs: set[int] = set()
    taps = 0
    for tap in range(axis.kernel):
        shift = axis.dilation * tap - axis.crop
        low = max(0, -(shift // axis.stride))
        landing = range(low, min(axis.size, (axis.out - 1 - shift) // axis.stride + 1))
        inputs.update(landing)
        outputs.update(each * axis.stride + shift for each in landing)
        taps += bool(landing)
    return len(inputs), taps, len(outputs)
