"""The roofline: FLOP/s against arithmetic intensity under the measured roofs, torch and tritonconv of a layer joined.

Useful FLOPs (multiply-adds that land inside the output) and compulsory bytes (x, weight and y once per pass), so a
layer stands at one intensity whatever computes it. S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful
visual performance model", CACM 52(4), 2009.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.results import BASELINE, OURS, Run
from tritonconv.plots import figures, style
from tritonconv.plots.labels import Placer

MADE_BY = "tritonconv bench"
PANEL_WIDTH, PANEL_HEIGHT = 5.3, 4.3  # inches, with its axis labels
FEW = 12  # layers that are named in the chart itself
TABLE_LINE = 0.118  # inches


def draw(run: Run, folder: Path) -> list[Path]:
    """Draws one panel per pass, dtype and layout and returns the paths of the PNG and the SVG.

    Raises ResultsError where no result is left.
    """
    rows = run.of_models()
    if not rows:
        raise ResultsError(f"{run.path}: no results to draw")
    numbers = _numbers(rows)
    if len(numbers) > FEW:  # beside many layers the single variants would hide the comparison
        rows = [row for row in rows if row["variant"] in (BASELINE, OURS)] or rows
    with style.style():
        figure = _figure(run, rows, numbers)
        return style.save(figure, run, folder, "roofline")


def _numbers(rows: Sequence[Mapping]) -> dict[str, tuple[int, str]]:
    """(number, suite) of each layer, counted suite by suite."""
    suites: dict[str, list[str]] = {}
    for row in rows:
        layers = suites.setdefault(row["suite"], [])
        if row["layer"] not in layers:
            layers.append(row["layer"])
    ordered = [(name, suite) for suite, layers in suites.items() for name in sorted(layers)]
    return {name: (index, suite) for index, (name, suite) in enumerate(ordered, start=1)}


def _figure(run: Run, rows: Sequence[Mapping], numbers: Mapping[str, tuple[int, str]]):
    kinds = list(dict.fromkeys((row["pass"], row["dtype"]) for row in rows))
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    many = len(numbers) > FEW
    suites = len({suite for _, suite in numbers.values()})
    table = 2.35 if many else 0.1
    width = len(layouts) * PANEL_WIDTH + table
    notes = [
        "Useful FLOPs: multiply-adds that land inside the output. Bytes: x, weight and y once per pass (forward + "
        "backward is three passes). Whiskers: 20th to 80th percentile. " + _roof_note(run)
    ]
    above = [row for row in rows if _above(run, row)]
    if above:
        notes.append(
            f"Ringed: {len(above)} of {len(rows)} points lie above every measured roof; other programs slowed "
            "the roofs down, or a smaller cache held the data."
        )
    footer = style.footer_lines(run, notes, width)
    foot = 0.12 + len(footer) * style.FOOTER_LINE
    head = 0.62
    panels = max(len(kinds) * PANEL_HEIGHT, (len(numbers) + 2 * suites) * TABLE_LINE if many else 0)
    height = head + panels + foot
    figure, canvas = style.new_figure(width, height)
    limits = _limits(run, rows)
    each = panels / len(kinds)
    for line, (pass_name, dtype) in enumerate(kinds):
        for column, layout in enumerate(layouts):
            bottom = foot + (len(kinds) - 1 - line) * each
            box = (
                (column * PANEL_WIDTH + 0.62) / width, (bottom + 0.45) / height,
                (PANEL_WIDTH - 0.75) / width, (each - 0.75) / height,
            )  # fmt: skip
            mine = [row for row in rows if (row["pass"], row["dtype"], row["layout"]) == (pass_name, dtype, layout)]
            axes = figure.add_axes(box)
            title = f"{style.PASS_NAMES.get(pass_name, pass_name)}, {style.LAYOUT_NAMES[layout]}, {dtype}"
            _panel(axes, canvas, run, mine, numbers, limits, dtype, many, title)
    _legend(figure, rows, width, height)
    if many:
        _table(figure, numbers, (len(layouts) * PANEL_WIDTH + 0.05) / width, height - head + 0.1, height)
    style.draw_footer(figure, footer)
    return figure


def _panel(axes: Axes, canvas, run: Run, rows, numbers, limits, dtype: str, many: bool, title: str) -> None:
    (low_x, high_x), (low_y, high_y) = limits
    figures.log_axes(axes)
    axes.set_xlim(low_x, high_x)
    axes.set_ylim(low_y, high_y)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("arithmetic intensity (useful FLOP / compulsory byte)")
    axes.set_ylabel("useful GFLOP/s")
    axes.set_axisbelow(True)
    placer = Placer(axes, canvas)
    _roofs(axes, run, dtype, limits, placer)
    others = sorted({row["variant"] for row in rows} - {BASELINE, OURS})
    by_layer: dict[str, list[Mapping]] = {}
    for row in rows:
        by_layer.setdefault(row["layer"], []).append(row)
    for same in by_layer.values():
        x, heights = _intensity(same[0]), [_rate(row) for row in same]
        axes.plot([x, x], [min(heights), max(heights)], color="#B5B5B5", linewidth=0.7, zorder=2)
        if not many:  # a name is long enough to hide the line
            placer.block_line((x, min(heights)), (x, max(heights)))
    for row in sorted(rows, key=lambda row: (row["variant"] == OURS, row["variant"] != BASELINE)):
        x, y = _intensity(row), _rate(row)
        colour = style.variant_colour(row["variant"], others)
        spread = [row["flops"] / row[key] / 1e6 for key in ("p80_ms", "p20_ms")]
        axes.plot([x, x], spread, color=colour, linewidth=1.0, alpha=0.55, zorder=3, solid_capstyle="butt")
        axes.plot(x, y, "o", markersize=3.6, markeredgewidth=0.8, zorder=4, **style.mark(row["variant"], others))
        if _above(run, row):
            axes.plot(x, y, "o", markersize=8, color=style.VERMILLION, markerfacecolor="none", zorder=5)
        placer.block_point(x, y, 3.0)
    top = {layer: max(same, key=lambda row: (row["variant"] == OURS, _rate(row))) for layer, same in by_layer.items()}
    for layer, row in sorted(top.items(), key=lambda pair: _intensity(pair[1])):
        text = str(numbers[layer][0]) if many else layer
        placer.place(text, _intensity(row), _rate(row), fontsize=5.6 if many else 6.5)


def _roofs(axes: Axes, run: Run, dtype: str, limits, placer: Placer) -> None:
    (low_x, high_x), (low_y, _) = limits
    peak, copies = _peak(run, dtype), _copies(run)
    for index, (rate, what) in enumerate(sorted(copies.values(), reverse=True)):
        end = min(high_x, peak / rate) if peak else high_x
        strong = index == 0
        axes.plot(
            [low_x, end], [low_x * rate, end * rate], color="black", zorder=1,
            linewidth=1.3 if strong else 0.8, linestyle="-" if strong else (0, (5, 2)),
        )  # fmt: skip
        placer.block_line((low_x, low_x * rate), (end, end * rate))
        # The label starts where the line enters the panel.
        start = max(low_x, low_y / rate) * 1.15
        placer.along(f"{what}: {rate:.3g} GB/s", (start, start * rate), (start * 2, start * 2 * rate), fontsize=6.8)
    if peak:
        first = min((peak / rate for rate, _ in copies.values()), default=low_x)
        axes.plot([max(low_x, first), high_x], [peak, peak], color="black", linewidth=1.3, zorder=1)
        placer.block_line((max(low_x, first), peak), (high_x, peak))
        text = f"{_peak_name(run, dtype)}: {peak:.4g} GFLOP/s"
        placer.along(text, (high_x / 1.05, peak), None, fontsize=6.8, ha="right")
    if not peak or not copies:
        missing = " and ".join(name for name, has in (("copy", copies), (f"{dtype} matrix", peak)) if not has)
        axes.text(0.02, 0.97, f"no measured {missing} roof in this file", transform=axes.transAxes, va="top",
                  fontsize=7.5, color=style.VERMILLION)  # fmt: skip


def _copies(run: Run) -> dict[str, tuple[float, str]]:
    """{name: (GB/s, what)}; the better of several measurements."""
    rates: dict[str, tuple[float, str]] = {}
    for row in run.roofs:
        if row["unit"] == "byte/s":
            best = rates.get(row["name"], (0.0, ""))
            rates[row["name"]] = max(best, (row["value"] / 1e9, row["what"]))
    return rates


def _peak(run: Run, dtype: str) -> float | None:
    """GFLOP/s of the matrix product in a dtype."""
    rates = [row["value"] / 1e9 for row in run.roofs if row["unit"] == "FLOP/s" and row["dtype"] == dtype]
    return max(rates, default=None)


def _peak_name(run: Run, dtype: str) -> str:
    rows = [row for row in run.roofs if row["unit"] == "FLOP/s" and row["dtype"] == dtype]
    return max(rows, key=lambda row: row["value"])["what"]


def _roof_note(run: Run) -> str:
    if not run.roofs:
        return "No roofs were measured."
    return "Roofs were measured in the same run with torch's copy and matrix product, the best of many calls."


def _intensity(row: Mapping) -> float:
    return row["flops"] / row["bytes"]


def _rate(row: Mapping) -> float:
    """Useful GFLOP/s at the median time."""
    return row["flops"] / row["median_ms"] / 1e6


def _above(run: Run, row: Mapping) -> bool:
    peak, copies = _peak(run, row["dtype"]), _copies(run)
    ceiling = min(peak or math.inf, max((rate for rate, _ in copies.values()), default=math.inf) * _intensity(row))
    return _rate(row) > ceiling


def _limits(run: Run, rows: Sequence[Mapping]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Axis limits shared by all panels: every point, the flat roofs, and whiskers unless they run far out."""
    xs = [_intensity(row) for row in rows]
    medians = [_rate(row) for row in rows]
    whiskers = [row["flops"] / row[key] / 1e6 for row in rows for key in ("p20_ms", "p80_ms")]
    ys = [*medians, max(min(whiskers), min(medians) / 2), min(max(whiskers), max(medians) * 2)]
    peaks = [peak for dtype in {row["dtype"] for row in rows} if (peak := _peak(run, dtype))]
    best_copy = max((rate for rate, _ in _copies(run).values()), default=None)
    # Where the roofs meet belongs in the picture, with enough of the slope to its left to read its label.
    ridge = [min(peaks) / best_copy / 8] if peaks and best_copy else []
    across = (min([*xs, *ridge]) / 1.7, max(xs) * 1.9)
    return across, (min([*ys, *(peak / 30 for peak in peaks)]) / 1.9, max([*ys, *peaks]) * 1.7)


def _legend(figure, rows: Sequence[Mapping], width: float, height: float) -> None:
    names = [name for name in (BASELINE, OURS) if any(row["variant"] == name for row in rows)]
    others = sorted({row["variant"] for row in rows} - {BASELINE, OURS})
    handles = [style.handle(name, 5, others) for name in (*names, *others)]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.1 / width, 1 - 0.26 / height), ncols=6, borderaxespad=0,
        handletextpad=0.2, columnspacing=1.4,
    )  # fmt: skip
    title = f"Roofline of transposed 3-D convolution: {BASELINE} and {OURS} on the same layers"
    figure.text(0.12 / width, 1 - 0.1 / height, title, fontsize=10.5, fontweight="bold", va="top")


def _table(figure, numbers: Mapping[str, tuple[int, str]], left: float, top: float, height: float) -> None:
    """The numbers and names, suite by suite, ``top`` inches from the foot downwards."""
    y, suite = top, None
    for name, (number, group) in numbers.items():
        if group != suite:
            y -= TABLE_LINE * (0.4 if suite else 0)
            figure.text(left, y / height, group, fontsize=6.5, fontweight="bold", va="top")
            y -= TABLE_LINE
            suite = group
        figure.text(left, y / height, f"{number:>2}  {name}", fontsize=6.0, va="top")
        y -= TABLE_LINE
