"""One training step of a whole model: forward, loss, backward; and how far its answers are off."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tritonconv.errors import ArgumentError
from tritonconv.lab.models.factories import Shape
from tritonconv.problem import LAYOUTS

HALVES = (torch.float16, torch.bfloat16)
# A converted model sums the same products in another order, and no constant bounds how roundings grow behind the
# normalizations. So torch's own error gives the bound: so many times of it, and this share of the norm for torch's luck
# (float32: about 80 roundings; under autocast one).
CREDIT = 4.0
SLACK = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Without float64 to decide, this may lie between the two.
FAR = 100.0

Step = Callable[[], "Answers"]


class UntrainableError(ArgumentError):
    """A forward gives no floating output that a parameter's gradient comes from."""


@dataclass(frozen=True)
class Answers:
    """The floating outputs of a forward, detached, and the gradients of the parameters that have one."""

    outputs: Sequence[torch.Tensor]
    gradients: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Errors:
    """Relative errors in the 2-norm over all outputs, and over all gradients."""

    outputs: float
    gradients: float

    def worse(self, other: Errors) -> Errors:
        """The larger of each."""
        return Errors(max(self.outputs, other.outputs), max(self.gradients, other.gradients))

    @property
    def finite(self) -> bool:
        return math.isfinite(self.outputs) and math.isfinite(self.gradients)

    def within(self, other: Errors, slack: float) -> bool:
        """At most CREDIT times the other's, and the slack; False for NaN."""
        mine, theirs = (self.outputs, self.gradients), (other.outputs, other.gradients)
        return all(a <= CREDIT * b + slack for a, b in zip(mine, theirs, strict=True))


def inputs_of(
    shapes: Iterable[Shape], dtype: torch.dtype, layout: str, device: torch.device, seed: int
) -> list[torch.Tensor]:
    """Normally distributed tensors; those of five axes are in the layout."""
    draw = torch.Generator().manual_seed(seed)
    kept = torch.float32 if dtype in HALVES else dtype
    tensors = [torch.randn(shape, generator=draw).to(device, kept) for shape in shapes]
    return [each.contiguous(memory_format=LAYOUTS[layout]) if each.dim() == 5 else each for each in tensors]


def training_step(model: nn.Module, forward: nn.Module, inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> Step:
    """The step of a model whose forward is ``forward``: itself, or what torch.compile made of it.

    The loss is the mean square of each floating output; an output of one value is a loss itself. In a half dtype the
    forward runs under autocast, and parameters and inputs are float32. The step raises UntrainableError where the loss
    needs no gradient.
    """

    def step() -> Answers:
        model.zero_grad(set_to_none=True)
        with torch.autocast(inputs[0].device.type, dtype if dtype in HALVES else torch.bfloat16, dtype in HALVES):
            outputs = [each for each in _tensors(forward(*inputs)) if each.is_floating_point()]
        wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in outputs]
        loss = sum((each.square().mean() if each.numel() > 1 else each.sum() for each in wide), torch.zeros(()))
        if not loss.requires_grad:
            raise UntrainableError("no floating output of the forward needs a gradient")
        loss.backward()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        return Answers([each.detach() for each in outputs], gradients)

    return step


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an output: itself, or of a list, tuple, dict or dataclass, in its order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors(vars(value))


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside the block no dropout draws: two dtypes draw differently."""
    kind: Any = nn.modules.dropout._DropoutNd
    drawing = [each for each in model.modules() if isinstance(each, kind) and each.training]
    for each in drawing:
        each.eval()
    try:
        yield
    finally:
        for each in drawing:
            each.train()


def errors(mine: Answers, truth: Answers) -> Errors:
    """The errors of answers against others; infinite where something is missing or has another shape."""
    return Errors(_error(mine.outputs, truth.outputs), _error(mine.gradients, truth.gradients))


def _error(mine: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    if [each.shape for each in mine] != [each.shape for each in truth]:
        return math.inf
    off = whole = 0.0
    for got, want in zip(mine, truth, strict=True):
        exact = want.double()
        off += torch.linalg.vector_norm(got.double() - exact).item() ** 2
        whole += torch.linalg.vector_norm(exact).item() ** 2
    return math.sqrt(off / whole) if whole else math.sqrt(off)
