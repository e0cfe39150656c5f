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
    launcher = LAUNCHERS.get(triton_version())
    kernels = list(zip(program.kernels, program.compiled, strict=True))
    views = any(each is not None and each is not each.base for each in program.answer)
    if launcher is None or views or not all(_launched_alone(*each) for each in kernels):
        return None
    pool = _Pool(program)
    arguments = [_arguments(*each, pool) for each in kernels]
    launches = [
        _launch(kernel.grid, *launcher(compiled), template, [(index, place()) for index, place in varying])
        for (kernel, compiled), (template, varying) in zip(kernels, arguments, strict=True)
    ]
    return _played(program, pool, launches)


class _Pool:
    """The list that launches take their varying arguments from: addresses of the program's values and of views, then
    tensor maps.

    ``views`` are (place of the base among the values, offset in bytes); ``maps`` are by the place of the base, each an
    offset in bytes and a function that makes the map of an address.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.views: list[tuple[int, int]] = []
        self.maps: dict[int, list[tuple[int, Callable[[int], Any]]]] = {}

    def address(self, buffer: Buffer) -> _Place:
        place, offset = self.program.place(buffer), buffer.offset
        if not offset:
            return lambda: place
        self.views.append((place, offset))
        index = self.program.count + len(self.views) - 1
        return lambda: index

    def tensor_map(self, descriptor: Descriptor, facts: Any) -> _Place:
        base = self.program.place(descriptor.buffer)
        group = self.maps.setdefault(base, [])
        group.append((descriptor.buffer.offset, partial(_tensor_map, descriptor.made(descriptor.buffer.like), facts)))
        index = len(group) - 1

        def place() -> int:
            before = itertools.takewhile(lambda each: each != base, self.maps)
            return self.program.count + len(self.views) + sum(len(self.maps[each]) for each in before) + index

        return place


_Place = Callable[[], int]  # where in the pool, once that has all its parts


def _played(program: Program, pool: _Pool, launches: Sequence[Launch]) -> Player:
    owned = [_maker(program, buffer) for buffer in program.owned]
    answer = [None if each is None else program.place(each) for each in program.answer]
    offsets, nbytes = program.offsets, max(1, program.workspace_bytes)
    only = None if program.several else answer[0]
    runtime, views = knobs.runtime, pool.views
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


def _launched_alone(kernel: KernelLaunch, compiled: Any) -> bool:
    """Whether the compiled kernel serves every later launch with arguments of its kind, its launcher allocates nothing,
    and its descriptors are tensor maps.

    AMD's backend looks at the size of each tensor's storage too. The interpreter has no compiled kernel.
    """
    target = getattr(getattr(compiled, "metadata", None), "target", None)
    if target is None or target.backend != "cuda" or not hasattr(compiled.run, "launch"):
        return False
    needs = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    described = sum(isinstance(each, Descriptor) for each in kernel.arguments.values())
    facts = _facts_of_maps(compiled)
    return not any(getattr(compiled.run, name, 0) for name in needs) and None not in facts and len(facts) == described


def _facts_of_maps(compiled: Any) -> tuple:
    """Of each descriptor among the arguments, as the compiler wants its tensor map."""
    return tuple(getattr(compiled.metadata, "tensordesc_meta", None) or ())


def _arguments(kernel: KernelLaunch, compiled: Any, pool: _Pool) -> tuple[list, list[tuple[int, _Place]]]:
    """(the launcher's arguments by position, the places of those that vary and where these come from)."""
    facts = iter(_facts_of_maps(compiled))
    template: list[Any] = []
    varying: list[tuple[int, _Place]] = []
    for each in kernel.function.params:
        value = kernel.arguments.get(each.name, each.default if each.has_default else None)
        if isinstance(value, Descriptor):
            varying.append((len(template), pool.tensor_map(value, next(facts))))
            template += [None, *value.shape, *value.strides]
        elif isinstance(value, Buffer):
            varying.append((len(template), pool.address(value)))
            template.append(None)
        else:
            template.append(value)
    return template, varying


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


# By Triton's version, for a compiled kernel: its launcher, what stands between the stream and the kernel's arguments
# (scratch memory, metadata, hooks: none), and whether the arguments follow one by one or as one list.


def _of_3_6(compiled: Any) -> tuple[Any, tuple, bool]:
    return _in_c(compiled), (*_facts(compiled), None, None, compiled.packed_metadata, None, None, None), True


def _of_3_9(compiled: Any) -> tuple[Any, tuple, bool]:
    signature = compiled.run.arg_annotations, compiled.run.kernel_signature
    between = (*_facts(compiled), compiled.packed_metadata, None, None, None, None, None, *signature)
    return _in_c(compiled), between, False


LAUNCHERS: dict[tuple[int, int], Callable[[Any], tuple[Any, tuple, bool]]] = {(3, 6): _of_3_6, (3, 9): _of_3_9}


def _launch(
    grid: tuple, run: Any, between: tuple, one_by_one: bool, template: list, varying: Sequence[tuple[int, int]]
) -> Launch:
    x, y, z = (*grid, 1, 1)[:3]

    def launch(pool: list, stream: int) -> None:
        arguments = template.copy()
        for index, place in varying:
            arguments[index] = pool[place]
        if one_by_one:
            run(x, y, z, stream, *between, *arguments)
        else:
            run(x, y, z, stream, *between, arguments)

    return launch
