"""The half of :mod:`tritonconv.lab.inspection.accesses` that runs in Triton's interpreter, as a process of its own.

Reads the launches and their layouts as JSON from standard input, runs one program of each kernel, from the middle of
the grid, and writes the accesses as JSON. Nothing is stored, so the tensors may be large: their memory stays untouched.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from tritonconv.kernels.registry import variant
from tritonconv.lab.bench.workloads import workload
from tritonconv.lab.inspection.accesses import FEWEST, Layout, sectors
from tritonconv.precision import PRECISIONS
from tritonconv.problem import Problem

MOST_KEPT = 4  # accesses of one kind and tile
MOST_SEEN = 3000  # accesses of one program: a persistent one goes through many tiles
PLACE = 0.47  # of the grid

Seen = tuple[str, int, np.ndarray, np.ndarray]  # kind, bytes of an element, addresses, mask


class _Enough(Exception):
    """The program has shown what it does."""


@contextlib.contextmanager
def watching() -> Iterator[list[Seen]]:
    """Inside the block each kernel runs one program, which stores nothing; the list fills with its accesses."""
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
    try:
        yield seen
    finally:
        for name in replaced:
            delattr(builder, name)
        executor.__call__ = call


def accesses_of(launch: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one launch."""
    record, dtype = variant(launch["variant"]), PRECISIONS[launch["precision"]]
    problem = workload(launch["layer"]).problem(dtype, launch["layout"])
    with watching() as seen:
        _launch(record, problem, launch["config"])
    rows: dict[tuple, dict[str, Any]] = {}
    for kind, itemsize, addresses, mask in seen:
        # Two tiles of one shape may have two layouts: the compiler gave each the one that suits its addresses.
        best = None
        for layout, copied in launch["layouts"].get(json.dumps([kind, addresses.shape]), ()):
            count = *sectors(addresses, mask, itemsize, _layout(layout)), copied
            if count[1] and (best is None or count[0] / count[1] > best[0] / best[1]):
                best = count
        if best is None:
            continue
        fewest, touched, requests, lane_bytes, copied = best
        head = {name: launch[name] for name in ("variant", "layer", "layout")}
        row = rows.setdefault(
            (kind, addresses.shape, lane_bytes, copied),
            {**head, "kind": kind, "tile": addresses.shape, "asynchronous": copied, "lane_bytes": lane_bytes,
             "requests": 0, "sectors": 0, "fewest": 0},
        )  # fmt: skip
        for name, value in (("requests", requests), ("sectors", touched), ("fewest", fewest)):
            row[name] += int(value)
    return list(rows.values())


def _layout(fields: dict[str, list[int]]) -> Layout:
    return Layout(**{name: tuple(value) for name, value in fields.items()})


def _launch(record, problem: Problem, config: dict[str, int]) -> None:
    def tensor(shape: tuple[int, ...], spatial: bool = False) -> torch.Tensor:
        zeros = torch.zeros(math.prod(shape), dtype=problem.dtype)  # whose pages are not there until they are written
        if not spatial or problem.layout == "ncdhw":
            return zeros.view(shape)
        n, channels, *size = shape
        return zeros.view(n, *size, channels).permute(0, 4, 1, 2, 3)

    x, y, weight = tensor(problem.x_shape, True), tensor(problem.y_shape, True), tensor(problem.weight_shape)
    if record.pass_name == "forward":
        record.launch(problem, config, x, weight, tensor((problem.c_out,)) if problem.bias else None)
    elif record.pass_name == "backward_data":
        record.launch(problem, config, y, weight)
    else:
        record.launch(problem, config, x, y, problem.bias)


if __name__ == "__main__":
    print(json.dumps([row for each in json.load(sys.stdin) for row in accesses_of(each)]))
