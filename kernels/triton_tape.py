"""A record of the steps of a variant's launch, written during the launch: new tensors, packed weights, kernels.

Each becomes a step that a later call with the same kind of operands repeats, without the arithmetic on the host. A
tensor is known by its address, so a launch may name a view of it. A launch that names any other tensor, or operands
that share an address, cannot be repeated, nor can one beside which torch itself has written to a tensor: the tape is
then not whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

# Takes the values so far (operands, then what the steps made) and the CUDA stream; may append one.
Step = Callable[[list, int], None]
Filler = Callable[[list], Any]  # an argument of a launch, from the values

_tape: ContextVar[Tape | None] = ContextVar("tritonconv_tape", default=None)


class Tape:
    """The steps of one call; ``whole`` while all of it can be repeated."""

    def __init__(self, operands: Sequence[Any]) -> None:
        self.values = list(operands)
        self.steps: list[Step] = []
        self.whole = True
        self.kernels = 0
        self.versions: list[tuple[torch.Tensor, int]] = []
        self.places: dict[int, int] = {}  # by address
        self.owners: dict[int, int] = {}  # by the address of the storage; -1 where several live in it
        for place, value in enumerate(self.values):
            if isinstance(value, torch.Tensor):
                self._place(value, place)
        self.told_apart = self.whole  # operands that share an address may not do so the next time

    def _place(self, tensor: torch.Tensor, place: int) -> None:
        address = tensor.data_ptr()
        self.whole = self.whole and address != 0 and address not in self.places
        self.places[address] = place
        self.versions.append((tensor, _version(tensor)))
        storage = tensor.untyped_storage().data_ptr()
        self.owners[storage] = -1 if storage in self.owners else place

    def untouched(self) -> bool:
        """No operation of torch's has written to a tensor since it was placed."""
        return all(_version(tensor) == version for tensor, version in self.versions)

    def place(self, tensor: torch.Tensor) -> int:
        """Where among the values the tensor is; -1, and the tape is not whole, where it is none of them.

        A view that begins where one of them does is another tensor.
        """
        index = self.places.get(tensor.data_ptr(), -1)
        self.whole = self.whole and index >= 0 and _alike(tensor, self.values[index])
        return index

    def made(self, tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> None:
        """A new tensor, and how to make another like it."""
        self._append(tensor, lambda values, stream: values.append(make()))

    def derived(self, tensor: torch.Tensor, source: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The result of ``make(source)``: a tensor of its own, or ``source`` itself, which needs no step."""
        place = self.place(source)
        if tensor.data_ptr() != source.data_ptr():
            self._append(tensor, lambda values, stream: values.append(make(values[place])))

    def _append(self, tensor: torch.Tensor, step: Step) -> None:
        self._place(tensor, len(self.values))
        self.values.append(tensor)
        self.steps.append(step)

    def launched(self, kernel, grid: tuple[int, ...], arguments: dict[str, Any], compiled) -> None:
        """A launch with all of its arguments; ``compiled`` is what it returned, None in the interpreter."""
        self.kernels += 1
        fillers: dict[str, Filler] = {
            name: each for name, value in arguments.items() if (each := self._filler(value)) is not None
        }
        if _directly(compiled):
            self.steps.append(_direct(kernel, grid, arguments, fillers, compiled))
            return

        def run(values: list, stream: int) -> None:
            kernel[grid](**arguments | {name: fill(values) for name, fill in fillers.items()})

        arguments = {name: value for name, value in arguments.items() if name not in fillers}
        self.steps.append(run)

    def _filler(self, value) -> Filler | None:
        """How an argument is made from the values; None for one that is the same in every call."""
        if isinstance(value, torch.Tensor):
            return self._reader(value)
        if hasattr(value, "base"):  # a TensorDescriptor
            base, make = self._reader(value.base), type(value)
            fields = value.shape, value.strides, value.block_shape
            rest = {"padding": value.padding} if hasattr(value, "padding") else {}
            return lambda values: make(base(values), *fields, **rest)
        return None

    def _reader(self, tensor: torch.Tensor) -> Filler:
        """Finds a tensor among the values, or a view into one of them."""
        place = self.places.get(tensor.data_ptr(), -1)
        if place >= 0 and self.values[place].dtype == tensor.dtype:  # of a view a kernel takes the address alone
            return lambda values: values[place]
        owner = self.owners.get(tensor.untyped_storage().data_ptr(), -1)
        if owner < 0 or self.values[owner].dtype != tensor.dtype:
            self.whole = False
            return lambda values: None
        size, stride = tensor.size(), tensor.stride()
        beyond = tensor.storage_offset() - self.values[owner].storage_offset()
        return lambda values: values[owner].as_strided(size, stride, values[owner].storage_offset() + beyond)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def _version(tensor: torch.Tensor) -> int:
    """How often torch has written to it; 0 where torch does not count, of an operand from inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _directly(compiled) -> bool:
    """Whether a compiled kernel serves every later launch of the same kind of operands.

    Triton's NVIDIA backend specialises on what the key of a replay holds: dtypes, 16-byte alignment, the values of
    integers. AMD's looks at the size of each tensor's storage too.
    """
    return getattr(getattr(compiled, "metadata", None), "target", None) is not None and (
        compiled.metadata.target.backend == "cuda"
    )


def _direct(kernel, grid: tuple[int, ...], arguments: dict[str, Any], fillers: dict[str, Filler], compiled) -> Step:
    """The launch of the compiled kernel itself: ``kernel[grid]`` would derive anew which one serves the arguments.

    In microseconds of Python and C per launch, with the driver's own work taken out: 4 instead of 19 (2 CPU cores of
    an Intel Xeon, Triton 3.6.0 and 3.9.0).
    """
    from triton import knobs

    names = [each.name for each in kernel.params]
    defaults = {each.name: each.default for each in kernel.params if each.has_default}
    template = [arguments.get(name, defaults.get(name)) for name in names]
    filled = [(names.index(name), fill) for name, fill in fillers.items()]
    for index, _ in filled:
        template[index] = None
    whole_grid = (*grid, 1, 1)[:3]
    observed = compiled[whole_grid]
    launch = partial(compiled.run, *whole_grid)
    function, metadata, hooks = compiled.function, compiled.packed_metadata, knobs.runtime

    def run(values: list, stream: int) -> None:
        ready = template.copy()
        for index, fill in filled:
            ready[index] = fill(values)
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # for a profiler
            observed(*ready, stream=stream)
        else:
            launch(stream, function, metadata, None, None, None, *ready)

    return run


def fresh(
    shape: Sequence[int],
    like: torch.Tensor,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    strides: Sequence[int] | None = None,
) -> torch.Tensor:
    """A new tensor for a kernel to write: a result or a workspace, on ``like``'s device, by default of its dtype.

    ``strides`` (dense, in elements) stand before ``memory_format``.
    """
    dtype = like.dtype if dtype is None else dtype
    if strides is None:
        tensor = torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)
    else:
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device=like.device)
    tape = _tape.get()
    if tape is not None:
        size, stride, device = tensor.size(), tensor.stride(), tensor.device
        tape.made(tensor, partial(torch.empty_strided, size, stride, dtype=dtype, device=device))
    return tensor


def derived(source: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``make(source)``: a copy in another order, or ``source`` itself."""
    tensor = make(source)
    tape = _tape.get()
    if tape is not None:
        tape.derived(tensor, source, make)
    return tensor


def current() -> Tape | None:
    """The tape that runs; None outside :func:`recording`."""
    return _tape.get()


@contextlib.contextmanager
def recording(operands: Sequence[Any]) -> Iterator[Tape]:
    """Inside the block the tape takes down what is made and launched.

    In inference mode torch would not count its writes to what is made, so the block leaves that mode.
    """
    tape = Tape(operands)
    token = _tape.set(tape)
    counting = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
    try:
        with counting, torch.no_grad():
            yield tape
    finally:
        _tape.reset(token)
