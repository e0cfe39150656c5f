"""Measured roofs of a device: how fast it copies, and how fast it multiplies matrices, with torch's own routines.

The best of many runs counts: a roof is what the machine can do, and other programs only ever make it look lower.
Copy rates count each byte read and each byte written. On a CPU a copy that stays in the caches is a roof of its own,
because the layers of the CPU scale fit there; on a GPU each timed call starts with L2 flushed, so one roof is enough.
The rate of a GPU's L2 is measured for the cost model alone.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from tritonconv.autotune.ceilings import COPY_CACHE, COPY_L2, COPY_MEMORY, LAUNCH, MATMUL
from tritonconv.kernels.torch_products import product
from tritonconv.lab.bench import gpu
from tritonconv.lab.bench.calls import work
from tritonconv.lab.bench.clock import WallClock, stopwatch_for
from tritonconv.lab.bench.timing import Call, quantile
from tritonconv.precision import IEEE, TF32
from tritonconv.problem import Problem

CACHE_BYTES = 16 << 20
MEMORY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
LARGE_MATRIX = {"cpu": 2048, "cuda": 8192}
# A dtype that takes this long (ms) for the small matrix stays with it: a CPU may be 100 times slower in float16.
SMALL_MATRIX = 512
SLOW_MS = 50.0
MIN_RUNS = 3
LAUNCHES, MOST_LAUNCH_SECONDS = 100, 0.2

# A result so many times as fast as the roof of its memory is not believed without a second look.
BEYOND = 1.3
L2_OF_COPY = 2  # L2, by the working set of its copies
L2_COPIES = 100  # in one timed graph: the flush before it is then of no account


def measure(device: torch.device, dtypes: Iterable[torch.dtype], seconds: float = 0.3) -> Iterator[dict[str, Any]]:
    """One row per roof, each measured for about ``seconds``: copies in bytes/s, matrix products in FLOP/s."""
    watch = stopwatch_for(device)
    if device.type == "cpu":
        yield _copy(COPY_CACHE, CACHE_BYTES, device, watch, seconds)
    yield _copy(COPY_MEMORY, MEMORY_BYTES[device.type], device, watch, seconds)
    if device.type == "cuda":
        yield from _copies_in_l2(device, watch, seconds)
    yield _launch(device, seconds)
    for dtype in dtypes:
        yield from _matmuls(dtype, device, watch, seconds)


def _copy(name, working_set, device, watch, seconds):
    source = torch.ones(working_set // 8, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    moved = 2 * source.numel() * source.element_size()
    times = times_of(lambda: target.copy_(source), watch, seconds)
    where = "in cache" if name == COPY_CACHE else "in memory"
    return row_of(name, f"copy {where} ({moved >> 20} MiB)", None, moved, "byte/s", times, working_set_bytes=moved)


def _copies_in_l2(device: torch.device, watch, seconds: float) -> Iterator[dict[str, object]]:
    """Copies within half of L2 after each other, in a graph; nothing where they cannot be captured."""
    half = torch.cuda.get_device_properties(device).L2_cache_size // 2
    source = torch.ones(half // 8, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)

    def copies() -> None:
        for _ in range(L2_COPIES):
            torch.add(source, 1, out=target)  # a kernel, where a copy would be the copy engine's

    replay = gpu.captured(copies, device)
    if replay is not None:
        moved = 2 * source.numel() * source.element_size()
        times = times_of(replay, watch, seconds)
        yield row_of(COPY_L2, f"read and write in L2 ({moved >> 20} MiB)", None, L2_COPIES * moved, "byte/s", times,
                   working_set_bytes=moved)  # fmt: skip


def _launch(device: torch.device, seconds: float):
    """One call of the smallest operation, from Python: on a GPU of many that are queued, on a CPU with its work."""
    tensor, wall = torch.zeros(1, device=device), WallClock(device, LAUNCHES)
    times = times_of(lambda: tensor.add_(1), wall, min(seconds, MOST_LAUNCH_SECONDS))
    best, middle = min(times) * 1e3, quantile(times, 0.5) * 1e3
    return {"name": LAUNCH, "what": "launch of a tiny operation", "dtype": None, "value": best, "median": middle,
            "unit": "us", "runs": len(times) * LAUNCHES}  # fmt: skip


def _matmuls(dtype: torch.dtype, device: torch.device, watch, seconds: float) -> Iterator[dict[str, object]]:
    """The product; on a GPU float32 without TF32 and then with it, named so."""
    if device.type != "cuda" or dtype is not torch.float32:
        yield _matmul(dtype, device, watch, seconds)
        return
    switch: Any = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        for precision, name in ((IEEE, None), (TF32, TF32)):
            switch.fp32_precision = precision
            yield _matmul(dtype, device, watch, seconds, name)
    finally:
        switch.fp32_precision = before


def _matmul(dtype, device, watch, seconds, name=None):
    size = SMALL_MATRIX
    times = times_of(_product(size, dtype, device), watch, 0.0)
    if min(times) < SLOW_MS:
        size = LARGE_MATRIX[device.type]
        times = times_of(_product(size, dtype, device), watch, seconds)
    name = name or str(dtype).removeprefix("torch.")
    return row_of(MATMUL, f"{name} matrix product ({size}³)", name, 2 * size**3, "FLOP/s", times)


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Call:
    return functools.partial(product, *(torch.rand(size, size, device=device).to(dtype) for _ in range(2)))


def times_of(call: Call, watch, seconds: float) -> list[float]:
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < MIN_RUNS or time.perf_counter() - begin < seconds:
        times.append(watch(call))
    return times


def row_of(name, what, dtype, work, unit, times, **more):
    return {
        "name": name,
        "what": what,
        "dtype": dtype,
        "value": work / (min(times) * 1e-3),
        "median": work / (quantile(times, 0.5) * 1e-3),
        "unit": unit,
        "runs": len(times),
        **more,
    }


def attainable(
    roofs: Iterable[Mapping], dtype: str, flops: float, moved: float, working_set: float, tf32: bool = False
) -> float | None:
    """The FLOP/s that the roofs allow work of ``flops`` FLOP and ``moved`` bytes; None where a roof is missing.

    ``tf32``: convolutions of float32 multiply in TF32, as on a GPU by default.

    ``working_set``: of :func:`memory_rate`. Of a roof measured twice the better value counts.
    """
    rows = list(roofs)
    copy = memory_rate(rows, working_set)
    if dtype == "float32" and tf32 and any(row["name"] == MATMUL and row["dtype"] == TF32 for row in rows):
        dtype = TF32
    peak = max((row["value"] for row in rows if row["name"] == MATMUL and row["dtype"] == dtype), default=None)
    if peak is None or copy is None or moved <= 0:
        return None
    return min(peak, flops / moved * copy)


def memory_rate(roofs: Iterable[Mapping], working_set: float) -> float | None:
    """Bytes/s of the memory whose roof was measured with the working set nearest to these bytes; None without one."""
    copies: dict[float, float] = {}
    for row in roofs:
        if row["name"] in (COPY_CACHE, COPY_MEMORY):
            size = row["working_set_bytes"]
            copies[size] = max(row["value"], copies.get(size, 0.0))
    if not copies:
        return None
    return copies[min(copies, key=lambda size: abs(math.log(size / max(working_set, 1.0))))]


def fastest_rate(roofs: Iterable[Mapping], working_set: float) -> float | None:
    """The same, or that of a GPU's L2 where the data fits in it: results stay there, also behind a flush."""
    rows = list(roofs)
    rate = memory_rate(rows, working_set)
    in_l2 = [row["value"] for row in rows
             if row["name"] == COPY_L2 and working_set <= L2_OF_COPY * row["working_set_bytes"]]  # fmt: skip
    return max(in_l2 if rate is None else [rate, *in_l2], default=None)


def beyond(problem: Problem, pass_name: str, ms: float, rate: float | None) -> str:
    """A warning where a pass in so many ms is more than BEYOND times as fast as its bytes can be had at ``rate``, in
    bytes/s; "" where it is not, and without a rate."""
    if rate is None or work(problem, pass_name)[1] <= BEYOND * rate * ms * 1e-3:
        return ""
    moved = work(problem, pass_name)[1] / (ms * 1e-3)
    return (
        f"{moved / rate:.3g} times as fast as memory gives its bytes: {moved / 1e9:.3g} GB/s, the roof is "
        f"{rate / 1e9:.3g} GB/s"
    )
