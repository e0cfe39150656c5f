"""Launches of compiled kernels, handed to Triton's launcher in C without the arithmetic of its ``kernel[grid]``.

``kernel[grid](...)`` derives anew which compiled kernel serves the arguments. A program's kind of operands settles
that: Triton's NVIDIA backend specialises on dtypes, 16-byte alignment and the values of integers. Addresses are handed
over as integers, which the launcher takes as they are; of a tensor it would ask the driver where the memory is. Tensor
maps are kept by address.

The launcher's arguments are private to Triton and differ between versions. So only versions are known that the tests
hold against ``kernel[grid]``; any other takes this public way.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from triton import knobs

from tritonconv.bounded import remember
from tritonconv.kernels.triton_buffers import Buffer, Descriptor, KernelLaunch
from tritonconv.kernels.triton_program import Program
from tritonconv.kernels.triton_target import triton_version
from tritonconv.private import empty_on

# Takes the operands, their addresses (of what is no tensor: anything), which it appends to, and the CUDA stream.
Player = Callable[[Sequence[Any], list, int], Any]
Launch = Callable[[list, int], None]

MOST_MAPS = 64  # addresses of one operand: the tensors of a training step come back at the same ones


def player(program: Program) -> Player | None:
    """Runs a program that has run once, with the kernels of that run; None where Triton's own launches must."""
    compiled = program.compiled
    launcher = LAUNCHERS.get(triton_version())
    views = any(each is not None and each is not each.base for each in program.answer)
    if launcher is None or views or not all(map(_launched_alone, compiled)):
        return None
    pool = _Pool(program)
    arguments = [_arguments(*both, pool) for both in zip(program.kernels, compiled, strict=True)]
    launches = [
        launcher(kernel.grid, each, pool.picker(given.leading), given.rest)
        for kernel, each, given in zip(program.kernels, compiled, arguments, strict=True)
        if given is not None
    ]
    return _played(program, pool, launches) if len(launches) == len(compiled) else None


class _Pool:
    """The list that launches pick their arguments from: the addresses of the program's values and of views, then tensor
    maps, then constants.

    ``views`` are (place of the base among the values, offset in bytes); ``maps`` are by the place of the base, each an
    offset in bytes and a function that makes the map of an address.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.views: list[tuple[int, int]] = []
        self.maps: dict[int, list[tuple[int, Callable[[int], Any]]]] = {}
        self.constants: list[Any] = []

    def address(self, buffer: Buffer) -> _Place:
        view = self.program.place(buffer), buffer.offset
        if not view[1]:
            return lambda: view[0]
        self.views.append(view)
        index = len(self.views) - 1
        return lambda: self.program.count + index

    def tensor_map(self, descriptor: Descriptor, facts: Any) -> _Place:
        place = self.program.place(descriptor.buffer)
        group = self.maps.setdefault(place, [])
        group.append((descriptor.buffer.offset, partial(_tensor_map, descriptor.made(descriptor.buffer.like), facts)))
        index = len(group) - 1

        def found() -> int:
            before = itertools.takewhile(lambda base: base != place, self.maps)
            return self.program.count + len(self.views) + sum(len(self.maps[base]) for base in before) + index

        return found

    def picker(self, leading: Sequence[_Place | _Constant]) -> Callable[[list], tuple]:
        """Takes the leading arguments of a launch. It is for a pool that has all its views and maps."""
        first = self.program.count + len(self.views) + sum(map(len, self.maps.values()))
        places = []
        for each in leading:
            if isinstance(each, _Constant):
                self.constants.append(each.value)
                places.append(first + len(self.constants) - 1)
            else:
                places.append(each())
        return itemgetter(*places) if len(places) > 1 else lambda pool: tuple(pool[place] for place in places)


_Place = Callable[[], int]  # where in the pool, once that has all its parts


class _Constant(NamedTuple):
    value: Any


class _Arguments(NamedTuple):
    """Those of a launch in their order: the ``leading`` ones, up to the last that differs between calls, and the
    ``rest``, which are constants."""

    leading: Sequence[_Place | _Constant]
    rest: tuple[Any, ...]


def _played(program: Program, pool: _Pool, launches: Sequence[Launch]) -> Player:
    owned = [_maker(program, buffer) for buffer in program.owned]
    answer = [None if each is None else program.place(each) for each in program.answer]
    offsets, nbytes = program.offsets, max(1, program.workspace_bytes)
    only = None if program.several else answer[0]
    runtime, views, constants = knobs.runtime, pool.views, pool.constants
    described = [(place, _maps_at(group)) for place, group in pool.maps.items()]
    workspace_of = _empty(program.device, (nbytes,), (1,), torch.uint8)

    def play(operands: Sequence[Any], addresses: list, stream: int) -> Any:
        if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:  # a profiler sees Triton's own launches
            return program.run(operands)
        values = [*operands]
        for make in owned:
            tensor = make(values)
            values.append(tensor)
            addresses.append(tensor.data_ptr())
        if offsets:
            workspace = workspace_of()
            base = workspace.data_ptr()
            addresses += [base + offset for offset in offsets]
        if views:
            addresses += [addresses[place] + offset for place, offset in views]
        for place, maps_at in described:
            addresses += maps_at(addresses[place])
        addresses += constants
        for launch in launches:
            launch(addresses, stream)
        if only is not None:
            return values[only]
        return tuple([None if place is None else values[place] for place in answer])

    return play


def _maker(program: Program, buffer: Buffer) -> Callable[[list], torch.Tensor]:
    if buffer.zero or buffer.source is not None or buffer.lent is not None:
        return partial(program.filled, buffer)
    empty = _empty(buffer.device, buffer.shape, buffer.stride(), buffer.dtype)
    return lambda values: empty()


def _empty(device: torch.device, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Callable[[], Any]:
    """Makes new tensors on the device, which is the current one. A deterministic run has torch fill them."""
    quick = empty_on.get(device.type)
    if quick is None or torch.are_deterministic_algorithms_enabled():
        return partial(torch.empty_strided, size, stride, dtype=dtype, device=device)
    return partial(quick, size, stride, dtype)


def _launched_alone(compiled: Any) -> bool:
    """Whether the kernel serves every later launch with arguments of its kind, and its launcher allocates nothing.

    AMD's backend looks at the size of each tensor's storage too. The interpreter has no compiled kernel.
    """
    target = getattr(getattr(compiled, "metadata", None), "target", None)
    if target is None or target.backend != "cuda" or not hasattr(compiled.run, "launch"):
        return False
    needs = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    return not any(getattr(compiled.run, name, 0) for name in needs)


def _arguments(kernel: KernelLaunch, compiled: Any, pool: _Pool) -> _Arguments | None:
    """The launcher's, by position; None where the compiler passes a descriptor in another way than as a tensor map."""
    facts = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    ordered: list[_Place | _Constant] = []
    for each in kernel.function.params:
        value = kernel.arguments.get(each.name, each.default if each.has_default else None)
        if isinstance(value, Descriptor):
            known = next(facts, None)
            if known is None:
                return None
            ordered += [pool.tensor_map(value, known), *map(_Constant, (*value.shape, *value.strides))]
        else:
            ordered.append(pool.address(value) if isinstance(value, Buffer) else _Constant(value))
    count = max((index for index, each in enumerate(ordered) if not isinstance(each, _Constant)), default=-1) + 1
    return _Arguments(ordered[:count], tuple(each.value for each in ordered[count:] if isinstance(each, _Constant)))


def _maps_at(group: Sequence[tuple[int, Callable[[int], Any]]]) -> Callable[[int], list]:
    """From the address of a base to the tensor maps of its descriptors."""
    known: dict[int, list] = {}

    def maps_at(address: int) -> list:
        maps = known.get(address)
        if maps is None:
            maps = remember(known, address, [make(address + offset) for offset, make in group], MOST_MAPS)
        return maps

    return maps_at


def _tensor_map(template: Any, facts: Any, address: int) -> Any:
    """The tensor map of a descriptor like ``template`` at the address, as Triton has the driver encode it."""
    from triton.backends.nvidia import driver

    here = copy(template)
    here.base = _At(address)
    more = [None] * (len(inspect.signature(driver.make_tensordesc_arg).parameters) - 2)
    return driver.make_tensordesc_arg(here, facts, *more)[0]


class _At(NamedTuple):
    """As much of a tensor as a tensor map is made of."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def _in_c(compiled: Any) -> Any:
    """Triton's launcher in C, behind the Python that makes tensor maps."""
    launch = compiled.run.launch
    return inspect.getclosurevars(launch).nonlocals["launcher"] if inspect.isfunction(launch) else launch


def _facts(compiled: Any) -> tuple:
    run = compiled.run
    return compiled.function, run.launch_cooperative_grid, run.launch_pdl


def _for_3_6(grid, compiled: Any, pick: Callable[[list], tuple], rest: tuple) -> Launch:
    x, y, z = (*grid, 1, 1)[:3]
    run, facts = _in_c(compiled), (*_facts(compiled), None, None, compiled.packed_metadata, None, None, None)

    def launch(addresses: list, stream: int) -> None:
        run(x, y, z, stream, *facts, *pick(addresses), *rest)

    return launch


def _for_3_9(grid, compiled: Any, pick: Callable[[list], tuple], rest: tuple) -> Launch:
    x, y, z = (*grid, 1, 1)[:3]
    run, signature = _in_c(compiled), (compiled.run.arg_annotations, compiled.run.kernel_signature)
    facts = (*_facts(compiled), compiled.packed_metadata, None, None, None, None, None, *signature)

    def launch(addresses: list, stream: int) -> None:
        run(x, y, z, stream, *facts, (*pick(addresses), *rest))

    return launch


LAUNCHERS: dict[tuple[int, int], Callable[..., Launch]] = {(3, 6): _for_3_6, (3, 9): _for_3_9}
