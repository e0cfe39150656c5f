"""Launch overhead: microseconds per call of torch's layer and ours on an input too small for anything else to count."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.results import BASELINE, OURS, Run
from tritonconv.plots import figures, style

MADE_BY = "tritonconv bench --overhead"
PANEL = (2.3, 0.33)
NAMES = {**style.PASS_NAMES, "forward": "forward, no gradients", "forward_recorded": "forward, recorded"}


def draw(run: Run) -> Figure:
    """Raises ResultsError where no overhead was measured."""
    rows = run.overheads
    if not rows:
        raise ResultsError(f"{run.path}: no overhead was measured")
    kinds = list(dict.fromkeys((row["pass"], row["dtype"]) for row in rows))
    several = len({dtype for _, dtype in kinds}) > 1
    labels = [NAMES.get(name, name) + (f", {dtype}" if several else "") for name, dtype in kinds]
    notes = [
        f"{rows[0]['layer']}. Bars: median per call; whiskers: 20th to 80th percentile. Beside: ours minus torch's."
    ]
    size = (PANEL[0], PANEL[1] * len(kinds) + 0.15)
    frame = figures.Frame(run, "Overhead of a call", notes, size, left=figures.room_for(labels), above=0.1)
    axes = frame.panel(0)
    figures.names_down(axes, labels, fontsize=7.2)
    most = max(row["p80_us"] for row in rows)
    for index, kind in enumerate(kinds):
        mine = {row["variant"]: row for row in rows if (row["pass"], row["dtype"]) == kind}
        for shift, name in ((-0.18, BASELINE), (0.18, OURS)):
            row = mine.get(name)
            if row is None:
                continue
            colour = style.variant_colour(name)
            axes.barh(index + shift, row["median_us"], height=0.32, color=colour)
            axes.plot([row["p20_us"], row["p80_us"]], [index + shift] * 2, color="black", linewidth=0.8)
        if len(mine) >= 2:
            difference = mine[OURS]["median_us"] - mine[BASELINE]["median_us"]
            end = max(row["p80_us"] for row in mine.values())
            axes.text(end + 0.03 * most, index, f"{difference:+.1f} µs", va="center", fontsize=7)
    axes.set_xlim(0, most * 1.3)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.5)
    axes.set_xlabel("µs per call")
    frame.legend([Patch(color=style.variant_colour(name), label=name) for name in (BASELINE, OURS)])
    return frame.done()
