"""Launches kept for the next call: what a variant works out on the host is worked out once per kind of operands.

A variant's ``launch`` computes its grid and a few dozen arguments from the problem, the config and the strides of the
operands. The next call with operands of the same strides and alignment repeats its steps instead (see
:mod:`tritonconv.kernels.triton_tape`): new results and workspaces, the weight packed anew, the same kernels.

A launch may have a standby, torch's own operation. It runs while the launch's kernels are compiled in the background,
and for good where they cannot be compiled or launched, which one warning says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from tritonconv.device import current
from tritonconv.errors import KernelWarning
from tritonconv.kernels import triton_background, triton_tape
from tritonconv.kernels.triton_launch import compile_only, compiling, precision, stream_of
from tritonconv.kernels.triton_tape import Step, Tape
from tritonconv.kernels.triton_target import INTERPRETED

MOST_KEPT = 64  # kinds of operands of one plan
MOST_COMPILED = 1024  # and those whose kernels were asked for
ALIGNMENT = 16  # bytes: what Triton specialises pointers on

# The steps and the places of the results among the values: of one result, or of a tuple, None for one not wanted.
Kept = tuple[list[Step], "int | tuple[int | None, ...]"]


class Replay:
    """A ``launch`` with a memory: of a variant, whose first arguments (problem, config) are ``fixed``.

    Calls take the operands after them and return the results. ``keeps`` is false of a launch that may do what no tape
    takes down: each call is then made anew. ``standby`` computes the same of the same operands.
    """

    def __init__(
        self,
        launch: Callable[..., Any],
        *fixed: Any,
        keeps: bool = True,
        standby: Callable[..., Any] | None = None,
        **more: Any,
    ) -> None:
        self.launch, self.keeps = partial(launch, *fixed, **more), keeps
        self.standby = None if INTERPRETED else standby  # which compiles nothing
        self.kept: dict[tuple, Kept | None] = {}
        self.compiled: dict[tuple, Compiled] = {}

    def __call__(self, *operands: Any) -> Any:
        """At least one operand is a tensor; the others may be None or bool. All tensors are on one device."""
        if compiling():
            return self.launch(*operands)
        first = operands[0] if operands[0] is not None else operands[1]
        device = first.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # whose limits the launch asks for, too
                return self(*operands)
        try:
            key = (precision(first.dtype), device, *map(_kind, operands))
        except Exception as error:  # Triton has no driver
            if self.standby is None:
                raise
            _warn_once(_said(error))
            return self.standby(*operands)
        known = self.kept.get(key)
        if known is None:
            if any(map(_lazy, operands)):
                return self(*map(_materialised, operands))
            if self.standby is not None:
                return self._behind_standby(key, operands, device)
            return self._anew(key, operands)
        steps, results = known
        values = list(operands)
        _play(steps, values, stream_of(device))
        if isinstance(results, int):
            return values[results]
        return tuple(None if place is None else values[place] for place in results)

    def _behind_standby(self, key: tuple, operands: tuple, device: torch.device) -> Any:
        """The launch where its kernels are compiled, else the standby."""
        assert self.standby is not None  # the caller checks
        known = self.compiled.get(key)
        if known is None:
            known = Compiled(self.launch, operands, device)
            _keep(self.compiled, key, known, MOST_COMPILED)
            try:
                triton_background.submit(known.compile)
            except RuntimeError as error:  # no thread can be started: there are too many, or the program ends
                known.error = _said(error)
        if known.ready and not _capturing(device):  # loading a kernel may end a capture
            try:
                return self._anew(key, operands)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                known.ready, known.error = False, _said(error)
        if known.error is not None:
            _warn_once(known.error)
        return self.standby(*operands)

    def _anew(self, key: tuple, operands: tuple) -> Any:
        return self._first(key, operands) if self.keeps else self.launch(*operands)

    def _first(self, key: tuple, operands: tuple) -> Any:
        with triton_tape.recording(operands) as tape:
            result = self.launch(*operands)
        if tape.told_apart and key not in self.kept:
            _keep(self.kept, key, _kept(tape, result), MOST_KEPT)
        return result


class Compiled:
    """The kernels of a launch for one kind of operands: ``ready``, or in words the ``error`` that was raised.

    The exception itself would keep the tensors of the frames that it went through.
    """

    def __init__(self, launch: Callable[..., Any], operands: tuple, device: torch.device) -> None:
        self.launch, self.device = launch, device
        self.operands = tuple(_shape_alone(each) for each in operands)
        self.ready = False
        self.error: str | None = None

    def compile(self) -> None:
        try:
            with current(self.device), compile_only():
                self.launch(*self.operands)
        except Exception as error:
            self.error = _said(error)
        else:
            self.ready = True


def _keep(memory: dict[tuple, Any], key: tuple, value: Any, most: int) -> None:
    """The kinds of operands change: the oldest have had their time."""
    if len(memory) >= most:
        memory.pop(next(iter(memory)), None)
    memory[key] = value


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _shape_alone(operand: Any) -> Any:
    """The operand without its memory."""
    if not isinstance(operand, torch.Tensor):
        return operand
    return torch.empty_strided(operand.shape, operand.stride(), dtype=operand.dtype, device="meta")


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


@cache
def _warn_once(what: str) -> None:
    warnings.warn(
        f"a Triton kernel of tritonconv cannot be compiled or launched here, and torch's own runs instead ({what})",
        KernelWarning,
        stacklevel=2,
    )


def _play(steps: list[Step], values: list, stream: int) -> None:
    for step in steps:
        step(values, stream)


def _kind(operand: Any) -> Any:
    """The properties of an operand that the launch may depend on besides the problem; a lazy operand has its own."""
    if isinstance(operand, torch.Tensor):
        address = operand.data_ptr()
        return operand.stride(), address % ALIGNMENT == 0, address == 0, operand.is_neg()
    return operand


def _lazy(operand: Any) -> bool:
    """Its memory does not hold its values: a negated view, such as a conjugate's imaginary part, or zeros without any.

    Complex numbers, whose conjugate is lazy too, are served by no kernel.
    """
    return isinstance(operand, torch.Tensor) and (operand.is_neg() or operand._is_zerotensor())


def _materialised(operand: Any) -> Any:
    if not _lazy(operand):
        return operand
    return torch.zeros_like(operand).add_(0) if operand._is_zerotensor() else operand.resolve_neg()


def _kept(tape: Tape, result: Any) -> Kept | None:
    """The steps of a whole tape with a launch in it, whose results are among its values."""
    several = isinstance(result, tuple)
    places = tuple(None if each is None else tape.place(each) for each in (result if several else (result,)))
    if not tape.whole or not tape.kernels or not tape.untouched():
        return None
    return tape.steps, places if several else places[0]  # type: ignore[return-value]
