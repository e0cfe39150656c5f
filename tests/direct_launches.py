"""Run by test_direct_launch.py beside the stub driver: prints, per variant, how its repeated launches compare.

The first run of a program goes through ``kernel[grid]``, the second past it. Both end at Triton's launcher in C, whose
arguments are written down in its place.
"""

from __future__ import annotations

from functools import partial

import stub_driver
import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver
from triton.compiler.compiler import LazyDict

from tritonconv import Problem
from tritonconv.kernels.registry import variant
from tritonconv.kernels.triton_direct import player
from tritonconv.kernels.triton_program import JOINT, Program, operands_of
from tritonconv.lab.inspection.compiling import GPU

HALF = torch.float16
SHUFFLE = Problem(1, 32, 16, (3, 4, 5), (2, 2, 2), (2, 2, 2), (0, 0, 0), (6, 8, 10), dtype=HALF, bias=True)
HALO = Problem(1, 16, 16, (3, 4, 5), (3, 3, 3), (2, 2, 2), (1, 1, 1), (6, 8, 10), dtype=HALF, layout="ndhwc")
CASES = (
    ("forward_shuffle", SHUFFLE),  # one launch
    ("backward_data_gemm", HALO),  # a sum of partial results
    ("forward_boxes", HALO),  # a packed weight, descriptors
    ("backward_data_boxes", HALO),  # of views
    ("backward_weight_fused", SHUFFLE),  # partial sums, the bias too; and the whole backward at once
    ("backward_weight_together", HALO),
)
launched: list[tuple] = []
maps: list[tuple] = []


class Launcher:
    """Stands where Triton's launcher in C does."""

    def __call__(self, *arguments):
        launched.append(_flat(arguments))


class TensorMap(tuple):
    """The facts of a tensor map in its place."""


def _flat(values) -> tuple:
    return tuple(each for value in values for each in (_flat(value) if type(value) in (tuple, list) else (value,)))


def _fill(*arguments):
    maps.append(arguments)
    return TensorMap(_flat(arguments))


def stand_between() -> None:
    wrap = driver.wrap_handle_tensordesc
    driver.wrap_handle_tensordesc = lambda launcher, *more: wrap(Launcher(), *more)
    utils = triton.runtime.driver.active.utils
    for name in ("fill_tma_descriptor", "fill_tma_descriptor_tiled"):
        if hasattr(utils, name):
            setattr(utils, name, _fill)


def told(first: tuple, second: tuple, places: dict[int, int], others: dict[int, int]) -> list:
    """The arguments of the second launch that are not those of the first: addresses are compared by what they are of,
    new memory by the order of appearance."""

    def label(value, known):
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        return known.setdefault(value, len(known))

    differ = []
    for one, other in zip(first, second, strict=True):
        if isinstance(one, TensorMap):
            same = label(one[0], places) == label(other[0], others) and one[1:] == other[1:]
        elif isinstance(one, torch.Tensor):
            same = label(one, places) == label(other, others) and type(other) is int
        else:  # without a profiler no hook is handed over, nor what it would be told
            same = one is other or one == other or (other is None and isinstance(one, (LazyDict, knobs.HookChain)))
        if not same:
            differ.append((one, other))
    return differ


def main() -> None:
    stub_driver.install()
    stand_between()
    for name, problem in CASES:
        record = variant(name)
        config = record.default(problem, GPU)
        for launches, passes in ((record.launches, record.pass_name), (record.joint, JOINT)):
            if launches is None:
                continue
            operands = operands_of(problem, passes, torch.device("cpu"))
            program = Program.of(partial(launches, problem, config), operands)
            known = {each.data_ptr(): at for at, each in enumerate(operands) if isinstance(each, torch.Tensor)}
            results = []
            launched.clear()
            results.append(program.run(operands))
            first = [*launched]
            play = player(program)
            assert play is not None, name
            for _ in range(2):
                launched.clear()
                made = len(maps)
                addresses = [each.data_ptr() if isinstance(each, torch.Tensor) else None for each in operands]
                results.append(play(operands, addresses, 0))
            places, others = dict(known), dict(known)
            differ = [told(*both, places, others) for both in zip(first, launched, strict=True)]
            kinds = [
                [None if each is None else (each.shape, each.stride(), each.dtype) for each in _several(result)]
                for result in results
            ]
            same = not any(differ) and kinds[0] == kinds[1] == kinds[2]
            kept = len(maps) - made <= sum(each.place is None for each in _described(program))
            print(name, passes, len(first), "same" if same and kept else f"differ: {differ} {kinds}")


def _several(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def _described(program) -> list:
    values = (each for kernel in program.kernels for each in kernel.arguments.values())
    return [each.buffer.base for each in values if hasattr(each, "block")]


if __name__ == "__main__":
    main()
