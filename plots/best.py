"""Speed-up over the best torch: every layer sorted, the geometric mean, one panel per pass and dtype.

Which is the best torch, and which our best: :mod:`tritonconv.lab.bench.standings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import geometric_mean

from matplotlib.figure import Figure

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS, Run
from tritonconv.lab.bench.standings import by_pass, standings
from tritonconv.plots import figures, style

MADE_BY = "tritonconv bench"
Ratios = dict[str, float]


def draw(run: Run) -> Figure:
    """Raises ResultsError where nothing was timed beside torch."""
    panels = ratios(run.of_models())
    if not panels:
        raise ResultsError(f"{run.path}: no layer was timed beside torch")
    notes = [
        f"Ratio of medians: the fastest of {BASELINE} and {COMPILED} in any memory format, by {OURS}'s best memory "
        "format. Dashed: geometric mean."
    ]
    frame = figures.frame_of_layers(run, f"{OURS} against the best torch", notes, panels, 2.2, columns=len(panels))
    values = [value for layers in panels.values() for value in layers.values()]
    low, high = min(0.8, min(values) / 1.1), max(2.0, max(values) * 1.12)
    for column, ((pass_name, dtype), layers) in enumerate(panels.items()):
        axes = frame.panel(column, style.title(pass_name, dtype), pad=13)
        ordered = sorted(layers.items(), key=lambda pair: -pair[1])
        figures.names_down(axes, [name for name, _ in ordered])
        for index, (_, value) in enumerate(ordered):
            colour = style.BLUE if value >= 1 else style.VERMILLION
            axes.plot([1, value], [index, index], color=colour, linewidth=1.0, solid_capstyle="butt", zorder=2)
            axes.plot(value, index, "o" if value >= 1 else "v", color=colour, markersize=3.2, zorder=3)
        average = geometric_mean(layers.values())
        axes.axvline(1, color="black", linewidth=0.9)
        axes.axvline(average, color=style.BLUE, linewidth=0.9, linestyle=(0, (4, 2)))
        axes.annotate(
            f"mean {average:.2f}", (average, 1), xytext=(2, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=7, color=style.BLUE, va="bottom", annotation_clip=False,
        )  # fmt: skip
        figures.ratio_axis(axes, low, high)
        axes.set_xlabel("speed-up over the best torch")
    return frame.done()


def ratios(rows: Sequence[Mapping]) -> dict[tuple[str, str], Ratios]:
    """Speed-ups by layer, by (pass, dtype)."""
    groups = by_pass(standings(rows))
    return {key: {each.ours["layer"]: each.ratio for each in layers} for key, layers in groups.items()}
