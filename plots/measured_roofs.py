"""The measured roofs of a run, as the charts draw them: the copies and the matrix product of a dtype."""

from __future__ import annotations

from tritonconv.lab.bench.results import Run
from tritonconv.lab.bench.standings import grouped

COPIES = "copy_"  # other rates in bytes/s, of passes of torch's, are no roofs
L2 = "copy_l2"  # the rate of a GPU's L2, in which no layer of a flushed cache begins


def copies(run: Run, l2: bool = True) -> list[tuple[float, str]]:
    """(bytes/s, the copy), the fastest first; the better of several measurements. Without ``l2``, that of L2 is not."""
    rows = [row for row in run.roofs if row["name"].startswith(COPIES) and (l2 or row["name"] != L2)]
    return sorted((max((row["value"], row["what"]) for row in same) for same in grouped(rows, "name").values()),
                  reverse=True)  # fmt: skip


def peak(run: Run, dtype: str) -> tuple[float, str]:
    """(FLOP/s, the matrix product) in a dtype; 0 where none was measured."""
    rows = [row for row in run.roofs if row["unit"] == "FLOP/s" and row["dtype"] == dtype]
    return max(((row["value"], row["what"]) for row in rows), default=(0.0, ""))
