"""Share of the attainable roof: a line per layer, torch and tritonconv on it, one panel per pass, dtype and layout.

100 % is the measured roof at the layer's intensity: useful FLOPs over min(matrix rate, intensity x copy rate).
"""

from __future__ import annotations

from matplotlib.figure import Figure

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.results import BASELINE, OURS, Run
from tritonconv.plots import figures, style

MADE_BY = "tritonconv bench"
ROW, PANEL, COLUMNS = 0.125, 1.02, 4  # inches: a layer, a panel's width; panels side by side
Pairs = dict[str, dict[str, float]]


def draw(run: Run) -> Figure:
    """Raises ResultsError where no row has its share of a roof."""
    panels: dict[tuple[str, str, str], Pairs] = {}
    for row in run.of_models():
        share = row.get("percent_of_roof")
        if share is not None and row["variant"] in (BASELINE, OURS):
            panel = panels.setdefault((row["pass"], row["dtype"], row["layout"]), {})
            panel.setdefault(row["layer"], {})[row["variant"]] = share
    if not panels:
        raise ResultsError(f"{run.path}: no result has its share of a measured roof")
    notes = [
        "100 % is the measured roof at the layer's arithmetic intensity (useful FLOPs, compulsory bytes). More than "
        "100 %: a smaller cache held the data, or other programs slowed the roof down."
    ]
    first = next(iter(panels.values()))
    lines = sorted({name for layers in panels.values() for name in layers},
                   key=lambda name: -first.get(name, {}).get(OURS, 0.0))  # fmt: skip
    frame = figures.Frame(
        run, "Share of the attainable roof", notes, (PANEL, ROW * len(lines)), len(panels), COLUMNS, left=0.12,
        above=0.4, names=figures.room_for(lines) - 0.12,
    )  # fmt: skip
    most = max([100.0, *(value for layers in panels.values() for pair in layers.values() for value in pair.values())])
    for index, ((pass_name, dtype, layout), layers) in enumerate(panels.items()):
        axes = frame.panel(index, f"{style.title(pass_name)}\n{layout.upper()}, {dtype}")
        figures.names_down(axes, lines)
        axes.tick_params(labelleft=index % COLUMNS == 0)
        for line, name in enumerate(lines):
            pair = layers.get(name, {})
            axes.plot(list(pair.values()), [line] * len(pair), color="#B5B5B5", linewidth=0.8, zorder=2)
            for variant, value in pair.items():
                axes.plot(value, line, "o", markersize=3.2, zorder=3, **style.mark(variant))
            if BASELINE in pair:  # its ring over ours too
                axes.plot(pair[BASELINE], line, "o", markersize=3.2, zorder=4, **style.ring(BASELINE))
        axes.axvline(100, color="black", linewidth=0.9)
        axes.set_xlim(-0.03 * most, 1.05 * most)  # room for a mark at 0
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.5)
        axes.set_xlabel("% of the roof")
    frame.legend([style.handle(name, 4.5) for name in (BASELINE, OURS)])
    return frame.done()
