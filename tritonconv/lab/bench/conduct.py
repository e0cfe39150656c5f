"""How a call behaves besides its answer: it has to compute anew, in memory of its own, before it returns.

A call is timed on the same tensors many times over. So a call that remembers its answer, that hands out memory of an
operand or of an earlier answer, or that leaves work for later would look fast; and one that changes its operands would
spoil those of the others. Values change while calls are timed (:class:`Operands`), and each call is watched before and
after (:func:`answer`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from tritonconv import fallback
from tritonconv.lab.bench.calls import TensorCall, Tensors
from tritonconv.problem import Problem

PLACES = 64  # of an operand that get other values from round to round
STEPS = 7  # factors of these values
HELD_CYCLES = 2_000_000  # about a millisecond for which a stream is held back, so that others run ahead of it
LATE_SECONDS = 0.02  # in which a thread does what it was left
LATE = "it was not ready when the call returned: work was left for another stream or thread"
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Checksums = Mapping[str, tuple[int, ...]]  # by operand


def named(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The operands that there are, by name."""
    return {name: each for name, each in vars(tensors).items() if each is not None}


def checksums(tensors: Tensors) -> Checksums:
    """Of the bits of each operand: of all of them, and of the first half."""
    operands = named(tensors)
    words = [_flat(each).view(WORDS[each.element_size()]) for each in operands.values()]
    parts = [part.sum(dtype=torch.int64) for each in words for part in (each, each[: len(each) // 2])]
    values = torch.stack(parts).cpu().tolist() if parts else []
    return {name: (*values[2 * i : 2 * i + 2], *each.shape) for i, (name, each) in enumerate(operands.items())}


class Operands:
    """The operands of calls while these are watched: a context manager, behind which the values are as they were.

    It keeps the values of ``PLACES`` places of each, the first and the last among them. ``settle`` makes grad_y fit the
    others where all have changed.
    """

    def __init__(self, tensors: Tensors, settle: Callable[[], object] | None = None) -> None:
        self._tensors, self._step, self._whole = tensors, 0, False
        self._settle = settle
        self._grad_y: torch.Tensor | None = None
        self._kept = []
        for each in named(tensors).values():
            flat = _flat(each)
            count = flat.numel()
            every = torch.arange(0, count, max(1, count // PLACES), device=flat.device)[:PLACES]
            places = torch.unique(torch.cat([every, every[:1] + (count - 1)])) if count else every
            self._kept.append((flat, places, flat[places]))

    def change(self) -> None:
        """Other values in some places of each operand, different ones each time."""
        self._step += 1
        factor = -(1 + self._step % STEPS / (STEPS + 1))
        for flat, places, values in self._kept:
            flat.index_copy_(0, places, values.roll(self._step) * factor)

    def change_wholly(self) -> None:
        """Every output changes in every element: x is doubled, which is exact, and grad_y negated, besides."""
        self.change()
        self._whole = True
        self._tensors.x.mul_(2)
        self._tensors.grad_y.neg_()
        if self._settle is not None:
            self._grad_y = self._tensors.grad_y.clone()
            self._settle()

    def restore(self) -> None:
        """The values as they were."""
        if self._whole:
            if self._grad_y is not None:
                self._tensors.grad_y.copy_(self._grad_y)
                self._grad_y = None
            self._tensors.x.mul_(0.5)
            self._tensors.grad_y.neg_()
            self._whole = False
        for flat, places, values in self._kept:
            flat.index_copy_(0, places, values)

    def __enter__(self) -> Operands:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with contextlib.suppress(*((Exception,) if kind is not None else ())):  # a GPU may be lost
            self.restore()


class Watched(NamedTuple):
    """The outputs of a call by name, ``outputs`` as they were when it returned, and the tensors that it returned.

    ``output`` names one in which a fault of its conduct shows, ``fault`` says it; both "" where there is none.
    """

    outputs: Mapping[str, torch.Tensor]
    returned: Mapping[str, torch.Tensor]
    output: str = ""
    fault: str = ""

    def late(self) -> str:
        """The name of an output that has changed since, for an answer that is wrong; "" where none has."""
        time.sleep(LATE_SECONDS)
        return next((name for name, each in self.returned.items() if not _same(each, self.outputs[name])), "")


def answer(
    call: TensorCall, names: Iterable[str], problem: Problem, operands: Operands, after: Callable[[], object]
) -> Watched:
    """The answer of a call for operands that have just changed wholly.

    ``after`` is run between the return and a second look at the outputs: work that was left for later shows by then.
    """
    names = tuple(names)
    operands.change()
    first = _by_name(names, call())
    operands.change_wholly()
    device = operands._tensors.x.device
    if device.type == "cuda":
        torch.cuda._sleep(HELD_CYCLES)
    returned = _by_name(names, call())
    found = {name: each.clone() for name, each in returned.items() if isinstance(each, torch.Tensor)}
    after()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for name, each in returned.items():
        fault = _fault(name, each, problem, named(operands._tensors), first, found)
        if fault:
            return Watched(found, returned, name, fault)
    return Watched(found, returned)


def _fault(
    name: str,
    output: torch.Tensor,
    problem: Problem,
    operands: Mapping[str, torch.Tensor],
    first: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
) -> str:
    if type(output) not in fallback.PLAIN_TYPES or output.is_neg() or output.is_conj():
        lazy = "lazily negated " if isinstance(output, torch.Tensor) and output.is_neg() else ""
        return f"expected a torch.Tensor, got a {lazy}{type(output).__name__}"
    if output.dtype != problem.dtype:
        return f"expected {problem.dtype}, got {output.dtype}"
    for operand, each in operands.items():
        if _overlap(output, each):
            return f"it lies in the memory of the operand {operand}"
    for other, each in first.items():
        if _overlap(output, each):
            return f"it lies in the memory of {other} of the call before: an answer is remembered or overwritten"
    same = bool(problem.flops and output.numel()) and _same(output, first[name])
    if same:
        time.sleep(LATE_SECONDS)  # or neither was ready
    if not _same(output, found[name]):
        return LATE
    return "it is the same for other operands: an answer is remembered" if same else ""


def _by_name(names: tuple[str, ...], values: tuple) -> dict[str, torch.Tensor]:
    return {name: value for name, value in zip(names, values, strict=False) if value is not None}


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The memory from the first to the last element of one has bytes of the other's."""
    if not one.numel() or not other.numel():
        return False
    (begin, end), (start, stop) = (_span(each) for each in (one, other))
    return begin < stop and start < end


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same values, NaN at the same places."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(torch.equal(one, other) or ((one == other) | (one.isnan() & other.isnan())).all())
