"""The launches of one value in their order: run, compiled, or counted.

A program is made of the results of a variant's ``launches`` for operands of certain shapes, strides and alignment, and
serves every later call with such operands. It holds no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from tritonconv.kernels.triton_buffers import Buffer, Descriptor, KernelLaunch, operand
from tritonconv.problem import PASSES, Problem

JOINT = "joint"  # both gradients
SEGMENT = 256  # bytes: each part of a workspace begins at a multiple, as a tensor of torch's own does


class Program:
    """The kernels behind ``results``: one buffer, or a tuple of buffers and None, in the places of the answer.

    ``operands`` are the buffers and other values that the launches were made of. The values of a run have places: first
    the operands; then the ``owned`` tensors, each with memory of its own, which are the caller's, filled by torch, or
    lent; then the ``parts`` of one workspace.
    """

    def __init__(self, results: Any, operands: Sequence[Any]) -> None:
        self.first = next(place for place, each in enumerate(operands) if isinstance(each, Buffer))
        self.device = operands[self.first].device
        self.several = isinstance(results, tuple)
        self.answer: tuple[Buffer | None, ...] = results if self.several else (results,)
        self.kernels: list[KernelLaunch] = []
        self.owned: list[Buffer] = []
        for result in self.answer:
            if result is not None:
                self._schedule(result.base)
                self._own(result.base)
        for buffer in (each.base for kernel in self.kernels for each in kernel.buffers()):
            if buffer.lent is not None:
                self._own(buffer)
        self.parts: list[Buffer] = []
        for buffer in (each.base for kernel in self.kernels for each in kernel.buffers()):
            if buffer.place is None and buffer not in self.owned and buffer not in self.parts:
                self.parts.append(buffer)
        self.count = len(operands) + len(self.owned) + len(self.parts)  # values of a run
        self.places = {buffer: len(operands) + index for index, buffer in enumerate((*self.owned, *self.parts))}
        sizes = [math.ceil(part.nbytes / SEGMENT) * SEGMENT for part in self.parts]
        self.offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self.workspace_bytes = sum(sizes)
        self.compiled: list[Any] = []  # of the last run: the kernels that Triton launched, None in the interpreter

    @classmethod
    def of(cls, launches: Callable[..., Any], operands: Iterable[Any]) -> Program:
        """The program of what ``launches`` returns for operands like these tensors and other values."""
        buffers = [operand(value, place) for place, value in enumerate(operands)]
        return cls(launches(*buffers), buffers)

    def _schedule(self, buffer: Buffer) -> None:
        """Puts the kernels that fill a buffer into their order; those before them first."""
        if buffer.source is not None:
            self._schedule(buffer.source.base)
            self._own(buffer)
        kernel = buffer.writer
        if kernel is not None and kernel not in self.kernels:
            for each in kernel.read():
                self._schedule(each.base)
            self.kernels.append(kernel)

    def _own(self, buffer: Buffer) -> None:
        if buffer.place is None and buffer not in self.owned:
            self.owned.append(buffer)

    def place(self, buffer: Buffer) -> int:
        """Of its memory among the values."""
        base = buffer.base
        return self.places[base] if base.place is None else base.place

    def run(self, operands: Sequence[Any]) -> Any:
        """The results for operands of the program's kind, by Triton's own launches; these compile what is not yet."""
        values, device = list(operands), operands[self.first].device
        for buffer in self.owned:
            values.append(self.filled(buffer, values))
        if self.parts:
            workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
            for part, offset in zip(self.parts, self.offsets, strict=True):
                memory = workspace[offset : offset + part.nbytes].view(part.dtype)
                values.append(memory.as_strided(part.shape, part.stride()))
        compiled = []
        for kernel in self.kernels:
            arguments = {name: self._argument(value, values) for name, value in kernel.arguments.items()}
            compiled.append(kernel.function[kernel.grid](**arguments))
        self.compiled = compiled
        results = tuple(None if each is None else self._tensor(each, values) for each in self.answer)
        return results if self.several else results[0]

    def filled(self, buffer: Buffer, values: Sequence[Any]) -> torch.Tensor:
        """Memory for an owned buffer, with zeros or a copy in it where it is to have them."""
        device = values[self.first].device
        if buffer.lent is not None:
            return buffer.lent(device)
        tensor = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device=device)
        if buffer.zero:
            tensor.zero_()
        if buffer.source is not None:
            tensor.copy_(self._tensor(buffer.source, values))
        return tensor

    def _argument(self, value: Any, values: Sequence[Any]) -> Any:
        if isinstance(value, Buffer):
            return self._tensor(value, values)
        if isinstance(value, Descriptor):
            return value.made(self._tensor(value.buffer, values))
        return value

    def _tensor(self, buffer: Buffer, values: Sequence[Any]) -> torch.Tensor:
        tensor = values[self.place(buffer)]
        if buffer is buffer.base:
            return tensor
        first = tensor.storage_offset() + buffer.offset // buffer.dtype.itemsize
        return tensor.as_strided(buffer.shape, buffer.stride(), first)

    def compile(self) -> list[Any]:
        """The compiled kernels, in the order of their launches. Nothing runs, and the target need not be here."""
        compiled = []
        for kernel in self.kernels:
            described = {
                name: value.made(value.buffer.like) if isinstance(value, Descriptor) else value
                for name, value in kernel.arguments.items()
            }
            compiled.append(kernel.function.warmup(grid=kernel.grid, **described))
        return [each.result() if hasattr(each, "result") else each for each in compiled]


def operands_of(problem: Problem, pass_name: str, device: torch.device) -> tuple[Any, ...]:
    """Operands of a pass, dense in the problem's layout, to which nothing was written; :data:`JOINT` for the whole
    backward. On the meta device they say what to compile."""

    def empty(shape: tuple[int, ...], layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        return torch.empty(shape, dtype=problem.dtype, device=device, memory_format=layout)

    x, y = (empty(shape, problem.memory_format) for shape in (problem.x_shape, problem.y_shape))
    weight, bias = empty(problem.weight_shape), empty((problem.c_out,)) if problem.bias else None
    operands = (x, weight, bias), (y, weight), (x, y, problem.bias), (x, weight, y, problem.bias)
    return dict(zip((*PASSES, JOINT), operands, strict=True))[pass_name]


def compute(
    launches: Callable[..., Any], operands: Sequence[Any], more: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """Works launches out for these operands and runs them once; ``more`` are operands by name."""
    positional = len(operands)
    program = Program.of(
        lambda *buffers: launches(*buffers[:positional], **dict(zip(more, buffers[positional:], strict=True))),
        (*operands, *more.values()),
    )
    return program.run((*operands, *more.values()))
