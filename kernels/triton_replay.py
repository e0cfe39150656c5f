"""Programs kept for the next call: what a variant works out on the host is worked out once per kind of operands.

A variant's ``launches`` computes grids and a few dozen arguments from the problem, the config, the strides and the
alignment of the operands, and torch's float32 switch. The next call of the same kind plays the same program.

A program may have a standby, torch's own operation. It runs while the program's kernels are compiled in the background,
and for good where they cannot be compiled or launched, which one warning says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from tritonconv.bounded import remember
from tritonconv.device import current
from tritonconv.errors import KernelWarning
from tritonconv.kernels import triton_background, triton_direct
from tritonconv.kernels.triton_buffers import ALIGNMENT
from tritonconv.kernels.triton_program import Program
from tritonconv.kernels.triton_target import INTERPRETED
from tritonconv.precision import float32_precision
from tritonconv.private import current_gpu, dead_wrapper, raw_stream, unwrap_if_dead

MOST_KEPT = 64  # kinds of operands of one plan
ALIGNED, UNALIGNED, NO_MEMORY = 0, 1, 2


class Replay:
    """``launches`` with a memory: takes operands, tensors and other values, and returns the results as tensors.

    ``standby`` computes the same of the same operands. ``counts`` says how the calls were answered.
    """

    def __init__(self, launches: Callable[..., Any], standby: Callable[..., Any] | None = None) -> None:
        self.launches = launches
        self.standby = None if INTERPRETED else standby  # which compiles nothing
        self.kept: dict[tuple, KeptProgram] = {}
        self.counts = Counts()

    def __call__(self, *operands: Any) -> Any:
        """At least one operand is a tensor; the others may be None or bool. All tensors are on one device."""
        addresses: list[Any] = []
        key: list[Any] = []
        for operand in operands:
            if operand is None or operand is True or operand is False:
                key.append(operand)
                addresses.append(None)
            else:
                try:
                    address = operand.data_ptr()
                except RuntimeError:
                    if not dead_wrapper(operand):
                        raise
                    return self(*map(_unwrapped, operands))
                alignment = NO_MEMORY if not address else UNALIGNED if address % ALIGNMENT else ALIGNED
                key += (operand.stride(), alignment, operand.is_neg())
                addresses.append(address)
                first = operand
        device, dtype = first.device, first.dtype
        index = device.index
        if index is not None and index != current_gpu():
            with torch.cuda.device(device):  # whose limits the launches ask for, too
                return self(*operands)
        if dtype is torch.float32:
            key.append(float32_precision())
        known = self.kept.get(tuple(key))
        if known is not None:
            play = known.play
            if play is not None:
                self.counts.repeated += 1
                return play(operands, addresses, 0 if index is None else raw_stream(index))
        return self._slowly(tuple(key), known, operands, device)

    def _slowly(self, key: tuple, known: KeptProgram | None, operands: tuple, device: torch.device) -> Any:
        """A call whose kind is new, or has a program that Triton's own launches run."""
        if known is None:
            if any(map(_lazy, operands)):
                return self(*map(_materialised, operands))
            known = self._keep(key, operands, device)
        if self.standby is None:
            return self._run(known, operands)
        if known.ready and not _capturing(device):  # loading a kernel may end a capture
            try:
                return self._run(known, operands)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                known.ready, known.error = False, _said(error)
        if known.error is not None:
            _warn_once(known.error)
        self.counts.stood_in += 1
        return self.standby(*operands)

    def _keep(self, key: tuple, operands: tuple, device: torch.device) -> KeptProgram:
        known = KeptProgram(device)
        self.counts.anew += 1
        if self.standby is None:
            known.program = Program.of(self.launches, operands)
        else:
            try:
                known.program = Program.of(self.launches, operands)
                triton_background.submit(known.compile)
            except Exception as error:  # Triton has no driver; or no thread can be started: the program ends
                known.error = _said(error)
        return remember(self.kept, key, known, MOST_KEPT)

    def _run(self, known: KeptProgram, operands: tuple) -> Any:
        assert known.program is not None  # of a kind that is ready, or without standby
        if known.runs:
            self.counts.repeated += 1
        known.runs = True
        results = known.program.run(operands)
        known.play = triton_direct.player(known.program)
        return results


@dataclass
class Counts:
    """Of calls: those that ``repeated`` a program, those that worked one out ``anew``, and those that the standby
    answered, ``stood_in``."""

    repeated: int = 0
    anew: int = 0
    stood_in: int = 0


class KeptProgram:
    """The program of one kind of operands: ``ready`` once its kernels are compiled, or in words the ``error`` that was
    raised; ``play`` runs it from the second time on.

    The exception itself would keep the tensors of the frames that it went through.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.program: Program | None = None
        self.play: Callable[..., Any] | None = None
        self.ready = self.runs = False
        self.error: str | None = None

    def compile(self) -> None:
        assert self.program is not None
        try:
            with current(self.device):
                self.program.compile()
        except Exception as error:
            self.error = _said(error)
        else:
            self.ready = True


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


@cache
def _warn_once(text: str) -> None:
    warnings.warn(
        f"a Triton kernel of tritonconv cannot be compiled or launched here, and torch's own runs instead ({text})",
        KernelWarning,
        stacklevel=2,
    )


def _unwrapped(operand: Any) -> Any:
    """The tensor inside one that left a torch.func transform, whose memory is not its own."""
    return unwrap_if_dead(operand) if isinstance(operand, torch.Tensor) else operand


def _lazy(operand: Any) -> bool:
    """Its memory does not hold its values: a negated view, such as a conjugate's imaginary part, or zeros without any.

    Complex numbers, whose conjugate is lazy too, are served by no kernel.
    """
    return isinstance(operand, torch.Tensor) and (operand.is_neg() or operand._is_zerotensor())


def _materialised(operand: Any) -> Any:
    if not _lazy(operand):
        return operand
    return torch.zeros_like(operand).add_(0) if operand._is_zerotensor() else operand.resolve_neg()
