"""How time grows with work: one layer at several input sizes, time against useful FLOPs, torch and tritonconv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.results import BASELINE, OURS, Run
from tritonconv.lab.bench.standings import grouped
from tritonconv.plots import figures, style

MADE_BY = "tritonconv bench --sizes 4,8,16,32"
LEAST = 3  # sizes that make a line
PANEL = (2.55, 1.9)
LINES = {"ncdhw": ("o", "-"), "ndhwc": ("D", (0, (3, 1.5)))}


def draw(run: Run) -> Figure:
    """Raises ResultsError where no layer was measured at three sizes."""
    rows = [row for row in run.results if row.get("family") and row["variant"] in (BASELINE, OURS)]
    panels = grouped(rows, "family", "pass", "dtype")
    panels = {key: mine for key, mine in panels.items() if len({row["layer"] for row in mine}) >= LEAST}
    if not panels:
        raise ResultsError(f"{run.path}: no layer was measured at {LEAST} sizes")
    notes = [
        "One layer per panel at cubic input sizes, batch 1. Bands: 20th to 80th percentile. Circles and full lines: "
        "NCDHW; diamonds and dashes: NDHWC (channels_last_3d). Grey: the least time the measured roofs allow."
    ]
    frame = figures.Frame(run, "Time against work", notes, PANEL, len(panels), columns=2, left=0.62)
    for index, ((family, pass_name, dtype), mine) in enumerate(panels.items()):
        axes = frame.panel(index, f"{family}, {style.title(pass_name, dtype)}")
        _lines(axes, mine)
        axes.set_xlabel("useful GFLOP")
        axes.set_ylabel("ms")
    handles = [Line2D([], [], color=style.variant_colour(name), label=name) for name in (BASELINE, OURS)]
    frame.legend(handles)
    return frame.done()


def _lines(axes: Axes, rows: Sequence[Mapping]) -> None:
    for name in (BASELINE, OURS):
        for layout, (marker, dash) in LINES.items():
            mine = sorted(
                (row for row in rows if row["variant"] == name and row["layout"] == layout),
                key=lambda row: row["flops"],
            )
            if not mine:
                continue
            colour = style.variant_colour(name)
            work = [row["flops"] / 1e9 for row in mine]
            low, high = ([row[key] for row in mine] for key in ("p20_ms", "p80_ms"))
            axes.fill_between(work, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(work, [row["median_ms"] for row in mine], marker=marker, linestyle=dash, **style.mark(name),
                      markersize=3, linewidth=1.1)  # fmt: skip
    floors = {row["flops"]: row["median_ms"] * row["percent_of_roof"] / 100
              for row in rows if row.get("percent_of_roof")}  # fmt: skip
    if floors:
        axes.plot([flops / 1e9 for flops in sorted(floors)], [floors[flops] for flops in sorted(floors)],
                  color="#9A9A9A", linewidth=0.9, zorder=1)  # fmt: skip
    figures.log_axes(axes)
