"""The columns of a row's times, in ms per call. A reader never takes one for another.

- ``gpu``: GPU time of an eager call, between two events, the host out of it;
- ``graph``: the same of the replay of a CUDA graph of the call, which has no launches of its own; where other kernels
  are chosen for a graph, of these, which the fields ``graph_chosen`` and ``graph_config`` name;
- ``wall``: wall time of an eager call, the host in it: what a user waits for. A CPU has this column alone.

Each holds for every contestant and pass alike: torch's, torch.compile's and our forward are captured, and so are their
training steps with the backward. A speed-up is graph against graph, or eager against eager.

Older rows have one column with quantiles, which ``timing`` names, and the others as medians. Of these,
``events`` (an eager call between two events, with the host in it) is none of the three.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tritonconv.lab.bench.timing import Spread

COLUMNS = GPU, GRAPH, WALL = "gpu", "graph", "wall"
SAID = {
    GPU: "the GPU time of an eager call",
    GRAPH: "the GPU time of a CUDA graph of it",
    WALL: "the wall time of an eager call",
}

SPEEDUP = ("speedup", "speedup_p20", "speedup_p80")
Row = Mapping[str, object]


def spread(row: Row, column: str) -> Spread | None:
    """The times of a result row in a column; None where it was not measured, or of an older row without quantiles."""
    return _quantiles(row, column, ("ms", "p20_ms", "p80_ms"), ("median_ms", "p20_ms", "p80_ms"))


def ratio(row: Row, column: str) -> Spread | None:
    """How many times faster than the baseline of the same rounds; None where that was not measured."""
    return _quantiles(row, column, SPEEDUP, SPEEDUP)


def _quantiles(row: Row, column: str, names: Iterable[str], older: Iterable[str]) -> Spread | None:
    values = [row.get(f"{column}_{name}") for name in (*names, "runs")]
    if None in values and column == row.get("timing", WALL):
        values = [row.get(name) for name in (*older, "n_runs")]
    return None if None in values else Spread(*values)  # type: ignore[arg-type]


def median(row: Row, column: str) -> float | None:
    """The median in ms of a column, also of an older row, which has no quantiles of it."""
    ms = row.get(f"{column}_ms", row.get("median_ms") if column == row.get("timing", WALL) else None)
    return ms if isinstance(ms, (int, float)) else None


def columns_of(rows: Iterable[Row]) -> list[str]:
    """The columns that some row has, in their order; the first of them is the device's own."""
    rows = list(rows)
    return [name for name in COLUMNS if any(median(row, name) is not None for row in rows)]
