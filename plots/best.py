"""Speed-up over the best torch: a line per layer, GPU time and wall time side by side, one panel per pass and dtype.

Which is the best torch, and which our best: :mod:`tritonconv.lab.bench.standings`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import geometric_mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.columns import WALL, columns_of
from tritonconv.lab.bench.results import OURS, Run
from tritonconv.lab.bench.standings import by_pass, standings
from tritonconv.plots import figures, style

MADE_BY = "tritonconv bench"
MARKS = ((style.BLUE, "o"), (style.SKY, "s"))  # of the device's columns; the wall time beside them has its own
WALLS = (style.ORANGE, "D")
ROW, PANEL, HEAD_LINE = 0.142, 2.0, 0.13  # inches: a layer, a panel's width, a line above it
Ratios = dict[str, float]


def draw(run: Run) -> Figure:
    """Raises ResultsError where nothing was timed beside torch."""
    rows = run.of_models()
    drawn = {column: ratios(rows, column) for column in columns_of(rows)}
    panels = drawn[next(iter(drawn))] if drawn else {}
    if not panels:
        raise ResultsError(f"{run.path}: no layer was timed beside torch")
    notes = [
        f"Ratio of medians: {style.best_torch(rows)}, by {OURS} in its fastest memory format. "
        "Hollow: below 1. Dashed: geometric mean. " + figures.band_note(run, next(iter(drawn)))
    ]
    first = next(iter(panels.values()))
    lines = sorted({name for layers in panels.values() for name in layers}, key=lambda name: -first.get(name, 0.0))
    frame = figures.Frame(
        run, f"{OURS} against the best torch", notes, (PANEL, ROW * len(lines)), len(panels), len(panels),
        left=0.2, above=0.3 + HEAD_LINE * len(drawn), names=figures.room_for(lines) - 0.2,
    )  # fmt: skip
    values = [value for of_column in drawn.values() for layers in of_column.values() for value in layers.values()]
    limits = min(0.8, min(values) / 1.1), max(2.0, max(values) * 1.12)
    for column, (pass_name, dtype) in enumerate(panels):
        axes = frame.panel(column, style.title(pass_name, dtype), pad=5 + 72 * HEAD_LINE * len(drawn))
        figures.names_down(axes, lines)
        axes.tick_params(labelleft=column == 0)
        mine = {name: of_column.get((pass_name, dtype), {}) for name, of_column in drawn.items()}
        _panel(axes, mine, lines)
        figures.null_band(axes, run, next(iter(drawn)), style.BLUE, **{"pass": pass_name, "dtype": dtype})
        figures.ratio_axis(axes, *limits)
        axes.set_xlabel("speed-up over the best torch")
    handles = [
        Line2D([], [], linestyle="none", color=colour, marker=marker, markersize=4, label=style.COLUMN_NAMES[name])
        for name, (colour, marker) in _marks(drawn).items()
    ]
    frame.legend(handles, below=True)
    return frame.done()


def ratios(rows: Sequence[Mapping], column: str | None = None) -> dict[tuple[str, str], Ratios]:
    """Speed-ups by layer, by (pass, dtype), in a column; None is the first."""
    groups = by_pass(standings(rows, column))
    return {key: {each.ours["layer"]: each.ratio for each in layers} for key, layers in groups.items()}


def _marks(columns: Collection[str]) -> dict[str, tuple[str, str]]:
    """The colour and the marker of each column."""
    return {name: WALLS if index and name == WALL else MARKS[index] for index, name in enumerate(columns)}


def _panel(axes: Axes, columns: Mapping[str, Ratios], lines: Sequence[str]) -> None:
    axes.axvline(1, color="black", linewidth=0.9)
    marks, place = _marks(columns), {name: index for index, name in enumerate(lines)}
    for index, (name, layers) in enumerate(columns.items()):
        colour, marker = marks[name]
        shift = 0.4 * ((index + 0.5) / len(columns) - 0.5)
        for layer, value in layers.items():
            y = place[layer] + shift
            axes.plot([1, value], [y, y], color=colour, linewidth=0.8, solid_capstyle="butt", zorder=2)
            axes.plot(value, y, marker, color=colour, markersize=3.1 if marker == "o" else 2.7, markeredgewidth=0.8,
                      markerfacecolor="white" if value < 1 else colour, zorder=3)  # fmt: skip
        if not layers:
            continue
        average, below = geometric_mean(layers.values()), sum(value < 1 for value in layers.values())
        axes.axvline(average, color=colour, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        height = HEAD_LINE * (len(columns) - 1 - index)  # inches over the panel
        text = f"mean {average:.2f}, {below} of {len(layers)} below 1"
        axes.text(0.05, 1 + (0.05 + height) / (ROW * len(lines)), text, transform=axes.transAxes, fontsize=7)
        axes.plot(0.02, 1 + (0.09 + height) / (ROW * len(lines)), marker, color=colour, markersize=3.5,
                  transform=axes.transAxes, clip_on=False)  # fmt: skip
