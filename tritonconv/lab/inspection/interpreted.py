"""Measures how a launch accesses memory: one program of each kernel runs in Triton's interpreter, in another process.

The program is from the middle of the grid. It stores nothing, so the tensors may be large: their memory stays
untouched. :mod:`tritonconv.lab.inspection.accesses` counts the sectors.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tritonconv.errors import ResultsError
from tritonconv.kernels.registry import variant
from tritonconv.kernels.targets import TARGETS
from tritonconv.lab.inspection.accesses import FEWEST, Access, Layouts, layouts_of, sectors
from tritonconv.lab.inspection.compiling import GPU, Job, compile_launch, compiling_for, products_in
from tritonconv.lab.inspection.workers import Workers

MOST_KEPT = 4  # accesses of one kind and tile
MOST_SEEN = 3000  # accesses of one program: a persistent one goes through many tiles
PLACE = 0.47  # of the grid

Seen = tuple[str, int, np.ndarray, np.ndarray]  # kind, bytes of an element, addresses, mask


class _Enough(Exception):
    """The program has shown what it does."""


def named(unwrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton's function that takes the values out of constants, with the names of a tuple kept: that of 3.6 drops them
    on the way into a constexpr function."""

    def kept(value: Any) -> Any:
        fields = isinstance(value, tuple) and hasattr(value, "_fields")
        return type(value)(*map(kept, value)) if fields else unwrap(value)

    return kept


@contextlib.contextmanager
def watching() -> Iterator[list[Seen]]:
    """Inside the block each kernel runs one program, which stores nothing; the list fills with its accesses."""
    from triton.language import core
    from triton.runtime import interpreter

    seen: list[Seen] = []
    counts: Counter = Counter()
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    load, set_idx, set_dim, call = (
        builder.create_masked_load, builder.set_grid_idx, builder.set_grid_dim, executor.__call__,
    )  # fmt: skip
    grid = [1, 1, 1]

    def note(kind, pointers, mask) -> None:
        counts["all"] += 1
        if counts["all"] > MOST_SEEN:
            raise _Enough
        counts[kind, pointers.data.shape] += 1
        if counts[kind, pointers.data.shape] <= MOST_KEPT and pointers.data.size >= FEWEST:
            itemsize = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
            seen.append((kind, itemsize, pointers.data.copy(), np.array(mask.data, dtype=bool)))

    def masked_load(pointers, mask, *rest, **more):
        note("load", pointers, mask)
        return load(pointers, mask, *rest, **more)

    def masked_store(pointers, value, mask, *rest, **more):
        note("store", pointers, mask)

    def one_program(self, *args, **kwargs):
        grid[:] = [*self.grid, 1, 1][:3]
        counts.clear()
        whole, self.grid = self.grid, (1, 1, 1)
        try:
            call(self, *args, **kwargs)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, _Enough):  # the interpreter wraps it at each call
                cause = cause.__cause__
            if cause is None:
                raise
        finally:
            self.grid = whole

    replaced = {
        "create_masked_load": masked_load,
        "create_masked_store": masked_store,
        "set_grid_dim": lambda *_: set_dim(*grid),
        "set_grid_idx": lambda *_: set_idx(*(min(size - 1, int(size * PLACE)) for size in grid)),
    }
    for name, value in replaced.items():
        setattr(builder, name, value)
    executor.__call__ = one_program
    unwrap = core._unwrap_if_constexpr
    core._unwrap_if_constexpr = named(unwrap)
    try:
        yield seen
    finally:
        for name in replaced:
            delattr(builder, name)
        executor.__call__ = call
        core._unwrap_if_constexpr = unwrap


def measure(jobs: Sequence[Job]) -> list[Access]:
    """The accesses of each launch, compiled for its target in this process and interpreted in another.

    Raises ResultsError where the interpreter fails; its error is on stderr then.
    """
    with Workers(1, {"TRITON_INTERPRET": "1"}) as interpreter:
        running = [interpreter.submit(accesses_of, *_compiled(job), lost=_lost) for job in jobs]
        return [access for each in running for access in each.result()]


def _lost(reason: str) -> list[Access]:
    raise ResultsError("accesses: the interpreter failed; its error stands above")


def _compiled(job: Job) -> tuple[Job, Layouts]:
    """The job with its config, and the layouts that the compiler chose for its accesses."""
    record = variant(job.variant)
    layouts: Layouts = {}
    with compiling_for(TARGETS[job.target]), products_in(job.precision):
        config = record.default(job.problem, GPU) if job.config is None else job.config
        for name, kernel in compile_launch(record, job.problem, config):
            for key, distinct in layouts_of(kernel.asm["ttgir"]).items() if "joint" not in name else ():
                layouts.setdefault(key, []).extend(distinct)
    return replace(job, config=dict(config)), layouts


def accesses_of(job: Job, layouts: Layouts) -> list[Access]:
    """The accesses of one launch, in a process of Triton's interpreter."""
    from tritonconv.kernels.triton_program import operands_of

    assert job.config is not None
    with watching() as seen, np.errstate(all="ignore"):
        record = variant(job.variant)
        operands = operands_of(job.problem, record.pass_name, torch.device("cpu"))
        record.compute(job.problem, job.config, *operands)
    sums: dict[tuple, np.ndarray] = {}
    for kind, itemsize, addresses, mask in seen:
        counts = [
            (*sectors(addresses, mask, itemsize, layout), copied)
            for layout, copied in layouts.get((kind, addresses.shape), ())
        ]
        counts = [count for count in counts if count[1]]
        if counts:
            # Two tiles of one shape may have two layouts: the compiler gave each the one that suits its addresses.
            fewest, touched, requests, lane_bytes, copied = max(counts, key=lambda count: count[0] / count[1])
            key = kind, addresses.shape, copied, lane_bytes
            sums[key] = sums.get(key, 0) + np.array([requests, touched, fewest])
    return [Access(job.variant, job.layer.name, job.layout, *key, *figures.tolist()) for key, figures in sums.items()]
