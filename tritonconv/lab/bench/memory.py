"""Peak memory of a call beside torch's in the same layout, by CUDA's allocator; a CPU has no count of it."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import geometric_mean

from tritonconv.lab.bench.results import BASELINE, OURS, Run

MOST = 1.05  # of torch's peak
NAMED = 5  # of the layers above it

Where = tuple[str, str, str, str]  # layer, pass, dtype, layout


def over_torch(run: Run) -> dict[Where, float]:
    """Our peak over torch's of the cells of plain layers that have both, which count what a call takes besides its
    operands."""
    peaks: dict[Where, dict[str, int]] = {}
    for row in run.results:
        if row.get("peak_bytes") and not row.get("epilogue"):
            peaks.setdefault(_where(row), {})[row["variant"]] = row["peak_bytes"]
    return {where: of[OURS] / of[BASELINE] for where, of in peaks.items() if OURS in of and BASELINE in of}


def _where(row: Mapping) -> Where:
    return row["layer"], row["pass"], row["dtype"], row["layout"]


def lines(run: Run) -> list[str]:
    """A line on all of them, and one for each of the worst above MOST; nothing without a GPU's rows."""
    ratios = over_torch(run)
    if not ratios:
        return []
    above = sorted((where for where in ratios if ratios[where] > MOST), key=lambda where: -ratios[where])
    worst = max(ratios, key=lambda where: ratios[where])
    count = f"{len(above)} of {len(ratios)}" if above else "no layer"
    head = (
        f"peak memory of a call over torch's: geometric mean {geometric_mean(ratios.values()):.3f}, most "
        f"{ratios[worst]:.3f}: {count} above {MOST:g}"
    )
    return [head, *(f"  {ratios[where]:.2f} {' '.join(where)}" for where in above[:NAMED])]
