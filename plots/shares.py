"""The time of a model's training step: a bar per operation, as wide as its share, as high as its time with our layers.

The area is time: the part of a bar below 1 that is missing is the part of the step that is saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.noise import AGAIN
from tritonconv.lab.bench.results import OF_MODEL, OURS, Run
from tritonconv.lab.bench.standings import grouped
from tritonconv.plots import figures, style

MADE_BY = "tritonconv bench --model"
PANEL = (5.6, 1.25)
TRANSPOSED = "transposed convolution"
NAMED = 0.055  # the least share whose name is written into its bar
CHARACTERS = 95  # of a name in a bar as wide as the panel


def draw(run: Run) -> Figure:
    """Raises ResultsError where no model was measured."""
    panels = grouped(run.operations, *OF_MODEL)
    if not panels:
        raise ResultsError(f"{run.path}: no model was measured")
    notes = [
        "Width: the operation's share of a training step with torch's layers, its backward included, by torch's "
        "profiler. Height: the time of the same call with our layers, by itself, torch's is 1; whatever is no "
        "transposed convolution stays as it is. So the area is the time of the step. Null: a copy with torch's layers. "
        + style.made_by(run.operations)
    ]
    sizes = {"scale_rule": "whole models, inputs as over each panel"}
    run = replace(run, environment=run.environment | sizes, end={"reason": "complete"})
    frame = figures.Frame(run, "Shares of a training step", notes, PANEL, len(panels), left=0.65)
    for index, (key, rows) in enumerate(panels.items()):
        gains = {row["variant"]: row["speedup"] for row in run.steps if _key(row) == key}
        gain = f": the whole step {gains[OURS]:.3f} times as fast" if OURS in gains else ""
        null = f" (null {gains[AGAIN]:.3f})" if gain and AGAIN in gains else ""
        axes = frame.panel(index, f"{', '.join((*key[:-1], key[-1].upper()))}{gain}{null}")
        _bars(axes, rows)
    frame.legend([Patch(color=style.BLUE, label=TRANSPOSED), Patch(color="#D9D9D9", label="anything else")])
    return frame.done()


def _key(row: Mapping) -> tuple:
    return tuple(row[name] for name in OF_MODEL)


def _bars(axes: Axes, rows: Sequence[Mapping]) -> None:
    """The transposed convolutions first, each kind from the longest to the shortest."""
    begin = 0.0
    heights = [1 / (row.get("speedup") or 1.0) for row in rows]
    for row in sorted(rows, key=lambda row: (not row.get("layers"), -row["share"])):
        share, ours, height = 100 * row["share"], bool(row.get("layers")), 1 / (row.get("speedup") or 1.0)
        axes.bar(begin, height, share, align="edge", color=style.BLUE if ours else "#D9D9D9", edgecolor="white",
                 linewidth=0.5)  # fmt: skip
        if row["share"] >= NAMED:
            room = int(CHARACTERS * row["share"])
            name = row["layers"][0] if ours else row["operation"]
            axes.text(begin + share / 2, min(height, 1) / 2, f"{_cut(name, room)}\n{share:.0f} %", ha="center",
                      va="center", fontsize=6, color="white" if ours else "black")  # fmt: skip
        begin += share
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, max(begin, 1e-9))
    axes.set_ylim(0, 1.08 * max([1.0, *heights]))
    of_them = sum(row["share"] for row in rows if row.get("layers"))
    axes.set_xlabel(f"% of the step with torch's layers; {TRANSPOSED}s: {100 * of_them:.2g} %")
    axes.set_ylabel("time, torch's is 1")


def _cut(name: str, room: int) -> str:
    return name if len(name) <= room else f"{name[: max(room - 1, 1)]}…"
