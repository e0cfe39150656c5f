"""Share of the attainable roof per layer, sorted: torch and tritonconv on one line, one panel per pass, dtype, layout.

100 % is the measured roof at the layer's intensity: useful FLOPs over min(matrix rate, intensity x copy rate).
"""

from __future__ import annotations

from matplotlib.figure import Figure

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.results import BASELINE, OURS, Run
from tritonconv.plots import figures, style

MADE_BY = "tritonconv bench"
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
    frame = figures.frame_of_layers(run, "Share of the attainable roof", notes, panels, width=2.0, columns=2)
    most = max([100.0, *(value for layers in panels.values() for pair in layers.values() for value in pair.values())])
    for index, ((pass_name, dtype, layout), layers) in enumerate(panels.items()):
        axes = frame.panel(index, style.title(pass_name, layout.upper(), dtype))
        ordered = sorted(layers.items(), key=lambda pair: -pair[1].get(OURS, 0.0))
        figures.names_down(axes, [name for name, _ in ordered])
        for line, (_, pair) in enumerate(ordered):
            axes.plot(list(pair.values()), [line] * len(pair), color="#B5B5B5", linewidth=0.8, zorder=2)
            for name, value in pair.items():
                axes.plot(value, line, "o", markersize=3.2, zorder=3, **style.mark(name))
        axes.axvline(100, color="black", linewidth=0.9)
        axes.set_xlim(0, most * 1.05)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.5)
        axes.set_xlabel("% of the attainable roof")
    frame.legend([style.handle(name, 4.5) for name in (BASELINE, OURS)])
    return frame.done()
