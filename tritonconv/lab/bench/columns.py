"""The columns of a row's times, in ms per call. A reader never takes one for another.

- ``gpu``: GPU time of an eager call, between two events, the host out of it;
- ``graph``: the same of the replay of a CUDA graph of the call, which has no launches of its own;
- ``wall``: wall time of an eager call, the host in it: what a user waits for. A CPU has this column alone.

Older rows have one column with quantiles, which ``timing`` names, and the others as medians. Of these,
``events`` (an eager call between two events, with the host in it) is none of the three.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tritonconv.lab.bench.timing import Ratio, Spread

COLUMNS = GPU, GRAPH, WALL = "gpu", "graph", "wall"
SAID = {GPU: "the GPU time of an eager call", GRAPH: "that of a CUDA graph", WALL: "the wall time of an eager call"}

Row = Mapping[str, object]


def spread(row: Row, column: str) -> Spread | None:
    """The times of a result row in a column; None where it was not measured, or of an older row without quantiles."""
    found = [row.get(f"{column}_{name}") for name in ("ms", "p20_ms", "p80_ms", "runs")]
    if None in found and column == row.get("timing", WALL):  # an older row
        found = [row.get(name) for name in ("median_ms", "p20_ms", "p80_ms", "n_runs")]
    return None if None in found else Spread(*found)  # type: ignore[arg-type]


def median(row: Row, column: str) -> float | None:
    """The median in ms of a column, also of an older row, which has no quantiles of it."""
    found = row.get(f"{column}_ms", row.get("median_ms") if column == row.get("timing", WALL) else None)
    return found if isinstance(found, (int, float)) else None


def ratio(row: Row, column: str) -> Ratio | None:
    """How many times faster than the baseline of the same rounds; None where that was not measured."""
    found = [row.get(f"{column}_speedup{tail}") for tail in ("", "_p20", "_p80")]
    if None in found and column == row.get("timing", WALL):  # an older row
        found = [row.get(f"speedup{tail}") for tail in ("", "_p20", "_p80")]
    return None if None in found else Ratio(*found)  # type: ignore[arg-type]


def columns_of(rows: Iterable[Row]) -> list[str]:
    """The columns that some row has, in their order; the first of them is the device's own."""
    rows = list(rows)
    return [name for name in COLUMNS if any(median(row, name) is not None for row in rows)]
