"""The columns in which the counters of ``profile`` rows are shown: a line per kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tritonconv.lab import text_table

# Counters by their names in ncu, in the order of the columns.
COLUMNS = {
    "SM %": "Compute (SM) Throughput [%]",
    "DRAM %": "DRAM Throughput [%]",
    "L2 %": "L2 Cache Throughput [%]",
    "L1 %": "L1/TEX Cache Throughput [%]",
    "L2 hit %": "L2 Hit Rate [%]",
    "issue %": "Issue Slots Busy [%]",
    "occupancy %": "Achieved Occupancy [%]",
    "registers": "Registers Per Thread [register/thread]",
    "waves": "Waves Per SM []",
}
PER_SECOND = ("byte/s", "byte/second")
HEAD = ("kernel", "us", "MB", *COLUMNS)
MOST_NAME = 48  # characters; cuDNN's go on for lines


def moved_bytes(counters: Mapping[str, float], duration_us: float) -> float | None:
    """The bytes that a kernel read from and wrote to device memory; None where that was not counted."""
    rate = next((counters[key] for unit in PER_SECOND if (key := f"Memory Throughput [{unit}]") in counters), None)
    return None if rate is None else rate * duration_us * 1e-6


def cells(row: Mapping) -> list[str | float | None]:
    """The columns of a row: the kernel, its time, the megabytes (10^6) it moved, and its counters."""
    counters, moved = row["counters"], moved_bytes(row["counters"], row["duration_us"])
    values = [counters.get(name) for name in COLUMNS.values()]
    return [row["kernel"][:MOST_NAME], row["duration_us"], None if moved is None else moved / 1e6, *values]


def lines(rows: Iterable[Mapping]) -> list[str]:
    """The table of one cell."""
    body = [[_shown(value) for value in cells(row)] for row in rows]
    return text_table.lines([list(HEAD), *body], numbers=len(HEAD) - 1)


def _shown(value: str | float | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4g}"
