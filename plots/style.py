"""The style of the charts: colours, type, the footer with the environment, saving as PNG and SVG.

Nothing here opens a window or keeps state in pyplot; the same results give the same SVG, byte for byte.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

from tritonconv.lab.bench.columns import GPU, GRAPH, WALL
from tritonconv.lab.bench.results import BASELINE, COMPILED, OF_RUN, OURS, Run

# Okabe and Ito's palette, safe for the common kinds of colour blindness.
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000",
)  # fmt: skip
GREY, LIGHT = "#6F6F6F", "#EDEDED"
VARIANT_COLOURS = {BASELINE: GREY, OURS: BLUE}
OTHER_COLOURS = (ORANGE, GREEN, PURPLE, SKY, BLACK)
LAYOUT_STYLE = {"ncdhw": (BLUE, "o"), "ndhwc": (ORANGE, "D")}
LAYOUT_NAMES = {"ncdhw": "NCDHW", "ndhwc": "NDHWC (channels_last_3d)"}
COLUMN_NAMES = {
    GPU: "GPU time of an eager call",
    GRAPH: "GPU time of a CUDA graph",
    WALL: "wall time of an eager call",
}
PASS_NAMES = {
    "forward": "forward",
    "backward_data": "backward, data",
    "backward_weight": "backward, weight",
    "forward_backward": "forward + backward",
}

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "svg.hashsalt": "tritonconv",
    "svg.fonttype": "path",
    "path.simplify": False,
}
DPI = 200


def new_figure(width: float, height: float) -> tuple[Figure, FigureCanvasAgg]:
    """An empty figure, inches, and its canvas; to be drawn inside :func:`style`."""
    figure = Figure(figsize=(width, height), facecolor="white")
    return figure, FigureCanvasAgg(figure)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The context in which a chart is drawn and saved: our own, whatever a user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def variant_colour(name: str, others: Sequence[str] = ()) -> str:
    """The colour of a variant; ``others`` lists the variants beside torch and tritonconv."""
    return VARIANT_COLOURS.get(name) or OTHER_COLOURS[list(others).index(name) % len(OTHER_COLOURS)]


def mark(name: str, others: Sequence[str] = ()) -> dict[str, Any]:
    """The colours of a variant's mark, which is hollow for torch."""
    colour = variant_colour(name, others)
    return {"color": colour, "markerfacecolor": "white" if name == BASELINE else colour}


def ring(name: str) -> dict[str, Any]:
    """The same without what is inside of it, to be seen over another mark."""
    return {"color": variant_colour(name), "markerfacecolor": "none", "markeredgewidth": 0.7}


def handle(name: str, size: float, others: Sequence[str] = ()) -> Line2D:
    """A variant's mark in a legend, of ``size`` points."""
    return Line2D([], [], linestyle="none", marker="o", markersize=size, label=name, **mark(name, others))


def title(pass_name: str, *rest: str) -> str:
    """The title of a panel: its pass, then the rest."""
    return ", ".join([PASS_NAMES.get(pass_name, pass_name), *rest])


def machine(run: Run) -> str:
    """The line that says where a run was made."""
    env = run.environment
    commit = "no commit" if env["commit"] is None else env["commit"][:10] + ("+changes" if env.get("dirty") else "")
    where = f"{env['device_name']}, {env['threads']} threads" if env["device"] == "cpu" else env["device_name"]
    where += clock(run)
    return (
        f"{where}; torch {env['torch']}, triton {env['triton'] or 'not installed'}; "
        f"tritonconv {commit}; {env['utc'][:10]}; {env['run']}"
    )


def best_torch(rows: Iterable[Mapping]) -> str:
    """The other side of a ratio to the best torch."""
    if any(row["variant"] == COMPILED for row in rows):
        return "the fastest of torch and torch.compile in any memory format"
    return "torch's fastest (torch.compile was not timed)"


def made_by(rows: Iterable[Mapping]) -> str:
    """The sentence about the runs that rows of whole models come from; "" where these are the file's own."""
    runs = dict.fromkeys(row[OF_RUN] for row in rows if OF_RUN in row)
    return f"Made by {', '.join(runs)}." if runs else ""


def clock(run: Run) -> str:
    """The frequency of a GPU's multiprocessors while the results were taken, or that they do not say; "" of a CPU."""
    if run.environment["device"] == "cpu":
        return ""
    seen = [row["sm_mhz"] for row in run.results if row.get("sm_mhz")]
    return f" at {median(seen):.0f} MHz" if seen else " (clock not recorded)"


def footer_lines(run: Run, notes: Sequence[str], width: float) -> list[str]:
    """Notes, scale rule and environment wrapped to a figure ``width`` inches wide."""
    env = run.environment
    scale = f"Layer sizes ({env['scale']}): {env['scale_rule']}."
    if run.end is None or run.end["reason"] != "complete":
        notes = [*notes, "The run ended early: not every layer is shown."]
    if run.disturbance:
        notes = [*notes, run.disturbance]
    return [line for text in (*notes, scale, machine(run)) for line in wrapped(text, width - 2 * FOOTER_LEFT)]


def wrapped(text: str, width: float) -> list[str]:
    """The lines of a footer's text that are at most ``width`` inches long: of digits fewer go in than of letters."""
    characters = int(width * LETTERS)
    lines = textwrap.wrap(text, characters, break_on_hyphens=False)
    while characters > 1 and any(_inches(line) > width for line in lines):
        characters -= 1
        lines = textwrap.wrap(text, characters, break_on_hyphens=False)
    return lines


def _inches(line: str) -> float:
    """At a coarse resolution, at which letters are rounded up to whole pixels."""
    font = FontProperties(family=RC["font.family"], size=FOOTER_SIZE)
    return RendererAgg(1, 1, COARSE).get_text_width_height_descent(line, font, ismath=False)[0] / COARSE


FOOTER_LINE, FOOTER_LEFT, FOOTER_SIZE = 0.125, 0.12, 6.2  # inches, inches, points
LETTERS, COARSE = 20, 100  # of an inch of a footer, at most: letters, pixels


def draw_footer(figure: Figure, lines: Sequence[str]) -> None:
    """Sets the lines at the foot of the figure, in the space of ``len(lines) * FOOTER_LINE`` inches."""
    width, height = figure.get_size_inches()
    for index, line in enumerate(reversed(lines)):
        figure.text(
            FOOTER_LEFT / width, (0.08 + index * FOOTER_LINE) / height, line, fontsize=FOOTER_SIZE, color=GREY,
            va="bottom",
        )  # fmt: skip


def save(figure: Figure, run: Run, folder: Path, chart: str) -> list[Path]:
    """Writes PNG and SVG, named by the run, the chart and the run's selection; raises OSError where that fails."""
    stem = "-".join([run.run, chart, *run.selection])
    paths = [folder / f"{stem}.png", folder / f"{stem}.svg"]
    figure.savefig(paths[0], dpi=DPI, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths
