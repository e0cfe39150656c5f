"""The noise that null rows show: a difference between contestants counts only beyond theirs (``nulls.py``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tritonconv.lab.bench import columns
from tritonconv.lab.bench.timing import quantile

AGAIN, OUR_ROAD = NAMES = "torch_again", "torch_by_our_road"
OUTER = 0.1
SAID = {AGAIN: "torch against torch", OUR_ROAD: "torch's kernels by our road"}


@dataclass(frozen=True)
class Band:
    """The null rows in one column: the least and the largest ratio to torch, 1 between them; ``rows`` of them."""

    low: float
    high: float
    rows: int

    @property
    def noise(self) -> float:
        """The larger of its ends' distances from 1, as a factor: a ratio beyond it differs from 1."""
        return max(self.high, 1 / self.low)

    def __str__(self) -> str:
        return f"{self.low:.3f} to {self.high:.3f}"


def band(rows: Iterable[Mapping], column: str, name: str | None = None) -> Band | None:
    """Of the null rows of a run in a column, of one contestant or of both; None where there is none.

    Of more than two rows the outermost tenth at each end does not count, which another program may have hit.
    """
    ratios = [columns.ratio(row, column) for row in rows if name is None or row["variant"] == name]
    medians = [ratio.median for ratio in ratios if ratio is not None and math.isfinite(ratio.median)]
    if not medians:
        return None
    outer = OUTER if len(medians) > 2 else 0.0
    return Band(min(1.0, quantile(medians, outer)), max(1.0, quantile(medians, 1 - outer)), len(medians))
