"""The value of a launch: its results as buffers, each of which knows the kernel that writes it.

A buffer stands for a tensor without its memory: shape, strides, dtype and device, and whether it begins at a multiple
of 16 bytes. A variant's ``launches`` gets buffers for the operands, makes others, names the kernels that write them
(:func:`tritonconv.kernels.triton_launch.launch`) and returns the results. Nothing runs meanwhile.
:class:`tritonconv.kernels.triton_program.Program` puts the kernels in order and runs, compiles or counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16  # bytes: what Triton specialises pointers on


class Buffer:
    """A tensor without memory; ``like`` is a meta tensor of its shape, strides, offset and dtype.

    The memory is an operand's (``place`` among the operands), or new; a view has another buffer's, its ``base``. A
    kernel fills new memory, the ``writer``; or torch does, with a copy of the buffer ``source`` or with ``zero``.
    Memory that outlives the call is ``lent``: this function of the device hands it out at each run.
    """

    def __init__(
        self,
        like: torch.Tensor,
        device: torch.device,
        place: int | None = None,
        base: Buffer | None = None,
        source: Buffer | None = None,
        zero: bool = False,
        aligned: bool = True,
        lent: Callable[[torch.device], torch.Tensor] | None = None,
    ) -> None:
        self.like, self.device, self.place, self.source, self.zero, self.lent = like, device, place, source, zero, lent
        self.base: Buffer = self if base is None else base
        self.begins_aligned = aligned
        self.writer: KernelLaunch | None = None
        self.copies: dict[Any, Buffer] = {}
        self.shape, self.dtype = tuple(like.shape), like.dtype
        self.stride, self.numel, self.is_contiguous = like.stride, like.numel, like.is_contiguous

    @property
    def offset(self) -> int:
        """Bytes from the beginning of its base."""
        return int(self.like.storage_offset() - self.base.like.storage_offset()) * self.dtype.itemsize

    @property
    def aligned(self) -> bool:
        return self.base.begins_aligned and self.offset % ALIGNMENT == 0

    @property
    def nbytes(self) -> int:
        """Of the memory from its first element to its last."""
        if self.numel() == 0:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride(), strict=True))
        return (last + 1) * self.dtype.itemsize

    def view(self, make: Callable[[torch.Tensor], torch.Tensor]) -> Buffer:
        """The view that ``make`` takes of a tensor like this one."""
        return Buffer(make(self.like), self.device, base=self.base)

    def copy(self, key: Any, make: Callable[[], Buffer]) -> Buffer:
        """A buffer made of this one, once for each key: two kernels that want the same copy share it."""
        if key not in self.copies:
            self.copies[key] = make()
        return self.copies[key]

    # Triton's compiler asks an argument for these.

    def data_ptr(self) -> int:
        """An address as far aligned."""
        return 0 if self.aligned else 1

    def ptr_range(self) -> int:
        """Bytes behind the address."""
        return self.nbytes


@dataclass(frozen=True)
class Descriptor:
    """An argument of a kernel: a tensor descriptor of a buffer, with blocks of the shape ``block``."""

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    def made(self, tensor: torch.Tensor) -> TensorDescriptor:
        """Triton's descriptor of a tensor in the buffer's place."""
        return TensorDescriptor(tensor, list(self.shape), list(self.strides), list(self.block))


@dataclass(frozen=True, eq=False)
class KernelLaunch:
    """One launch: Triton's function, its grid and its arguments by name. Of the buffers among them it writes some."""

    function: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    written: tuple[Buffer, ...]

    @property
    def name(self) -> str:
        return self.function.fn.__name__

    def buffers(self) -> list[Buffer]:
        """Those among its arguments."""
        values = (each.buffer if isinstance(each, Descriptor) else each for each in self.arguments.values())
        return [each for each in values if isinstance(each, Buffer)]

    def read(self) -> list[Buffer]:
        """The buffers among its arguments that something else fills."""
        own = [each.base for each in self.written]
        return [each for each in self.buffers() if each.base not in own]


def operand(value: Any, place: int) -> Any:
    """The buffer of an operand, given as a tensor; anything else is itself."""
    if not isinstance(value, torch.Tensor):
        return value
    aligned = value.device.type == "meta" or value.data_ptr() % ALIGNMENT == 0
    return Buffer(_like(value.shape, value.stride(), value.dtype), value.device, place=place, aligned=aligned)


def _like(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device="meta")


def new(
    shape: Sequence[int],
    beside: Buffer,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    strides: Sequence[int] | None = None,
    zero: bool = False,
) -> Buffer:
    """A new buffer for a kernel to write: a result or a workspace, on another's device, by default of its dtype.

    ``strides`` (dense, in elements) stand before ``memory_format``; ``zero`` fills it with zeros.
    """
    dtype = beside.dtype if dtype is None else dtype
    if strides is None:
        like = torch.empty(tuple(shape), dtype=dtype, device="meta", memory_format=memory_format)
    else:
        like = _like(shape, strides, dtype)
    return Buffer(like, beside.device, zero=zero)


def copied(source: Buffer, make: Callable[[torch.Tensor], torch.Tensor], always: bool = False) -> Buffer:
    """A copy by torch, in the strides that ``make`` gives a tensor like the source; the source itself where it has
    these already, unless ``always``."""
    strides = tuple(make(source.like).stride())
    if strides == tuple(source.stride()) and not always:
        return source
    return source.copy(
        strides, lambda: Buffer(_like(source.shape, strides, source.dtype), source.device, source=source)
    )
