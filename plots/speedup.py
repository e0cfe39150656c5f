"""The speed-up chart: every layer a row, every layout a mark, torch the line at 1, the geometric means at the top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.results import BASELINE, OURS, Run
from tritonconv.lab.bench.standings import mean
from tritonconv.plots import figures, style

MADE_BY = "tritonconv bench"
ROW = 0.148  # inches per layer
PANEL = 3.5  # inches
MARGIN_RIGHT, AXIS = 0.25, 0.5
TITLE, HEAD_LINE = 0.42, 0.15  # inches: the title of the figure, a line above a panel


def draw(run: Run, folder: Path) -> list[Path]:
    """Draws the speed-ups of tritonconv over torch and returns the paths of the PNG and the SVG.

    One panel per pass (and dtype, where there are several). Raises ResultsError where nothing was timed beside torch.
    """
    rows = [row for row in run.of_models() if row["variant"] == OURS and row["speedup"] is not None]
    if not rows:
        raise ResultsError(f"{run.path}: no layer was timed beside {BASELINE}, so there is no speed-up to draw")
    panels: dict[tuple[str, str], list[Mapping]] = {}
    for row in rows:
        panels.setdefault((row["pass"], row["dtype"]), []).append(row)
    lines = _lines(rows)
    with style.style():
        figure = _figure(run, panels, lines)
        return style.save(figure, run, folder, "speedup")


def _lines(rows: Sequence[Mapping]) -> list[str | None]:
    """The names of the layers from top to bottom, by suite and then by speed-up; None before each suite."""
    suites: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        suites.setdefault(row["suite"], {}).setdefault(row["layer"], []).append(row["speedup"])
    lines: list[str | None] = []
    for layers in suites.values():
        lines += [None, *sorted(layers, key=lambda name: -mean(layers[name]))]
    return lines


def _figure(run: Run, panels: Mapping[tuple[str, str], Sequence[Mapping]], lines: Sequence[str | None]):
    longest = max(len(name) for name in lines if name)
    left = 0.35 + 0.062 * longest
    width = left + len(panels) * PANEL + MARGIN_RIGHT
    notes = [
        f"Speed-up of {OURS} over torch.nn.functional.conv_transpose3d on the same tensors: median of the ratios of "
        "calls made next to each other; whiskers from the 20th to the 80th percentile. Hollow: the whisker reaches 1. "
        "Dashed: geometric mean."
    ]
    footer = style.footer_lines(run, notes, width)
    bottom = AXIS + 0.15 + len(footer) * style.FOOTER_LINE
    layouts = len({row["layout"] for rows in panels.values() for row in rows})
    height = TITLE + (layouts + 1.6) * HEAD_LINE + len(lines) * ROW + bottom
    figure, _ = style.new_figure(width, height)
    limits = _limits([row for rows in panels.values() for row in rows])
    several_dtypes = len({dtype for _, dtype in panels}) > 1
    for index, ((pass_name, dtype), rows) in enumerate(panels.items()):
        box = (
            (left + index * PANEL) / width, bottom / height, (PANEL - 0.22) / width, len(lines) * ROW / height,
        )  # fmt: skip
        axes = figure.add_axes(box)
        _panel(axes, rows, lines, limits)
        title = style.PASS_NAMES.get(pass_name, pass_name) + (f", {dtype}" if several_dtypes else "")
        above = 1 + (0.06 + layouts * HEAD_LINE + 0.02) / (len(lines) * ROW)
        axes.text(0, above, title, transform=axes.transAxes, fontsize=9, fontweight="bold")
        if index == 0:
            _names(axes, rows_by_suite(panels), lines)
    dtypes = ", ".join(dict.fromkeys(dtype for _, dtype in panels))
    title = f"{OURS} against torch, {dtypes}"
    figure.text(0.12 / width, 1 - 0.12 / height, title, fontsize=10.5, fontweight="bold", va="top")
    style.draw_footer(figure, footer)
    return figure


def rows_by_suite(panels: Mapping[tuple[str, str], Sequence[Mapping]]) -> dict[str, str]:
    """The suite of each layer."""
    return {row["layer"]: row["suite"] for rows in panels.values() for row in rows}


def _limits(rows: Sequence[Mapping]) -> tuple[float, float]:
    values = [row["speedup"] for row in rows]
    # A whisker that runs far out is cut off at the frame: it must not squeeze everything else.
    low = max(min(row["speedup_p20"] for row in rows), min(values) / 1.5)
    high = min(max(row["speedup_p80"] for row in rows), max(values) * 1.5)
    return min(0.72, low / 1.12), max(2.2, high * 1.12)


def _panel(axes: Axes, rows: Sequence[Mapping], lines: Sequence[str | None], limits: tuple[float, float]) -> None:
    place = {name: index for index, name in enumerate(lines) if name}
    for index, name in enumerate(lines):
        if name is None:
            axes.axhline(index, color=style.LIGHT, linewidth=0.8, zorder=0)
        elif index % 2:
            axes.axhspan(index - 0.5, index + 0.5, color="#F6F6F6", linewidth=0, zorder=0)
    axes.axvline(1, color="black", linewidth=0.9, zorder=1)
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    shift = 0.0 if len(layouts) == 1 else 0.17
    for step, layout in enumerate(layouts):
        colour, marker = style.LAYOUT_STYLE[layout]
        mine = [row for row in rows if row["layout"] == layout]
        offset = -shift if step == 0 else shift
        for row in mine:
            y = place[row["layer"]] + offset
            reaches_one = row["speedup_p20"] <= 1 <= row["speedup_p80"]
            axes.plot([row["speedup_p20"], row["speedup_p80"]], [y, y], color=colour, linewidth=0.8, zorder=2)
            axes.plot(
                row["speedup"], y, marker, markersize=3.4 if marker == "o" else 3.0, markeredgewidth=0.7,
                color=colour, markerfacecolor="white" if reaches_one else colour, zorder=3,
            )  # fmt: skip
        average = mean(row["speedup"] for row in mine)
        axes.axvline(average, color=colour, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        text = f"{style.LAYOUT_NAMES[layout].split(' ')[0]}: geometric mean {average:.2f} ({len(mine)} layers)"
        height = 1 + (0.06 + (len(layouts) - 1 - step) * HEAD_LINE) / (len(lines) * ROW)
        axes.plot(0.012, height + 0.045 / (len(lines) * ROW), marker, color=colour, markersize=4, clip_on=False,
                  transform=axes.transAxes)  # fmt: skip
        axes.text(0.035, height, text, transform=axes.transAxes, color=colour, fontsize=7.5)
    figures.ratio_axis(axes, *limits)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("speed-up over torch (1 = torch; to the right is faster)")
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.spines["left"].set_visible(False)


def _names(axes: Axes, suites: Mapping[str, str], lines: Sequence[str | None]) -> None:
    axes.set_yticks([])
    for index, name in enumerate(lines):
        if name is None:
            text, weight, size = suites[lines[index + 1] or ""], "bold", 7.5
        else:
            text, weight, size = name, "normal", 7.0
        axes.annotate(
            text, (0, index), xytext=(-5, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="center", fontsize=size, fontweight=weight, annotation_clip=False,
        )  # fmt: skip
