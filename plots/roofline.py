"""The roofline: FLOP/s against arithmetic intensity under the measured roofs, torch and tritonconv of a layer joined.

Useful FLOPs (multiply-adds that land inside the output) and compulsory bytes (x, weight and y once per pass), so a
layer stands at one intensity whatever computes it. S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful
visual performance model", CACM 52(4), 2009.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.results import BASELINE, OURS, Run
from tritonconv.lab.bench.standings import grouped
from tritonconv.plots import figures, measured_roofs, style, units
from tritonconv.plots.labels import Placer

MADE_BY = "tritonconv bench"
PANEL = (4.68, 3.55)  # inches
WIDE = (7.2, 5.2)  # of a panel with many layers, whose numbers need the room
FEW = 6  # layers that are named in the chart itself; others have numbers
SOME = 12  # layers of which every contestant shows, in small panels
TABLE_LINE = 0.118  # inches
LABEL_LINE = 11.0  # points that a roof's label takes


def draw(run: Run) -> Figure:
    """One panel per pass, dtype and layout. Raises ResultsError where no result is left."""
    rows = run.of_models()
    if not rows:
        raise ResultsError(f"{run.path}: no results to draw")
    numbers = _numbers(rows)
    numbered, many = len(numbers) > FEW, len(numbers) > SOME
    if many:  # beside many layers the single variants would hide the comparison
        rows = [row for row in rows if row["variant"] in (BASELINE, OURS)] or rows
    kinds, layouts = grouped(rows, "pass", "dtype"), list(dict.fromkeys(row["layout"] for row in rows))
    suites = {suite for _, suite in numbers.values()}
    notes = [
        "Useful FLOPs: multiply-adds that land inside the output. Bytes: x, weight and y once per pass (forward + "
        "backward is three passes). Whiskers: 20th to 80th percentile. " + _roof_note(run)
    ]
    above = sum(_above(run, row) for row in rows)
    if above:
        notes.append(
            f"Ringed: {above} of {len(rows)} points lie above every measured roof; other programs slowed "
            "the roofs down, or a smaller cache held the data."
        )
    columns = 1 if many else len(layouts)
    table = (len(numbers) + 2 * len(suites)) * TABLE_LINE
    least = table / (len(kinds) * len(layouts)) - 0.75
    frame = figures.Frame(
        run, f"Roofline of transposed 3-D convolution: {BASELINE} and {OURS} on the same layers", notes,
        (WIDE[0], max(WIDE[1], least)) if many else PANEL, len(kinds) * len(layouts), columns, left=0.62,
        right=2.25 if numbered else 0.2,
    )  # fmt: skip
    limits = _limits(run, rows)
    for line, ((pass_name, dtype), of_kind) in enumerate(kinds.items()):
        for column, layout in enumerate(layouts):
            title = style.title(pass_name, style.LAYOUT_NAMES[layout], dtype)
            axes = frame.panel(line * len(layouts) + column, title)
            mine = [row for row in of_kind if row["layout"] == layout]
            _panel(axes, frame.canvas, run, mine, numbers if numbered else {}, limits, dtype)
    _legend(frame, rows)
    if numbered:
        _table(frame, numbers)
    return frame.done()


def _numbers(rows: Sequence[Mapping]) -> dict[str, tuple[int, str]]:
    """(number, suite) of each layer, counted suite by suite."""
    suites = grouped(rows, "suite").items()
    ordered = [(name, suite) for (suite,), mine in suites for name in sorted({row["layer"] for row in mine})]
    return {name: (index, suite) for index, (name, suite) in enumerate(ordered, start=1)}


def _panel(axes: Axes, canvas, run: Run, rows, numbers, limits, dtype: str) -> None:
    (low_x, high_x), (low_y, high_y) = limits
    figures.log_axes(axes)
    axes.set_xlim(low_x, high_x)
    axes.set_ylim(low_y, high_y)
    axes.set_xlabel("arithmetic intensity (useful FLOP / compulsory byte)")
    divisor, unit = units.unit(high_y, "FLOP/s")
    axes.set_ylabel(f"useful {unit}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / divisor:.12g}"))
    placer = Placer(axes, canvas)
    _roofs(axes, canvas, run, dtype, limits, placer)
    others = sorted({row["variant"] for row in rows} - {BASELINE, OURS})
    by_layer = grouped(rows, "layer")
    for same in by_layer.values():
        x, heights = _intensity(same[0]), [_rate(row) for row in same]
        axes.plot([x, x], [min(heights), max(heights)], color="#B5B5B5", linewidth=0.7, zorder=2)
        if not numbers:  # a name is long enough to hide the line
            placer.block_line((x, min(heights)), (x, max(heights)))
    for row in sorted(rows, key=lambda row: (row["variant"] == OURS, row["variant"] != BASELINE)):
        x, y = _intensity(row), _rate(row)
        colour = style.variant_colour(row["variant"], others)
        spread = [1e3 * row["flops"] / row[key] for key in ("p80_ms", "p20_ms")]
        axes.plot([x, x], spread, color=colour, linewidth=1.0, alpha=0.55, zorder=3, solid_capstyle="butt")
        axes.plot(x, y, "o", markersize=3.6, markeredgewidth=0.8, zorder=4, **style.mark(row["variant"], others))
        if _above(run, row):
            axes.plot(x, y, "o", markersize=6.5, markeredgewidth=0.7, color=style.VERMILLION, markerfacecolor="none",
                      zorder=5)  # fmt: skip
        placer.block_point(x, y, 3.0)
    tops = [max(same, key=lambda row: (row["variant"] == OURS, _rate(row))) for same in by_layer.values()]
    for row in sorted(tops, key=_intensity):
        text = str(numbers[row["layer"]][0]) if numbers else row["layer"]
        placer.place(text, _intensity(row), _rate(row), fontsize=5.6 if len(numbers) > SOME else 6.5)


def _roofs(axes: Axes, canvas, run: Run, dtype: str, limits, placer: Placer) -> None:
    (low_x, high_x), (low_y, _) = limits
    (peak, name), copies = measured_roofs.peak(run, dtype), measured_roofs.copies(run)
    for index, (rate, what) in enumerate(copies):
        end = min(high_x, peak / rate) if peak else high_x
        strong = index == 0
        axes.plot(
            [low_x, end], [low_x * rate, end * rate], color="black", zorder=1,
            linewidth=1.3 if strong else 0.8, linestyle="-" if strong else (0, (5, 2)),
        )  # fmt: skip
        placer.block_line((low_x, low_x * rate), (end, end * rate))
        # The label starts where the line enters the panel; it goes below where the line above leaves it no room.
        start = max(low_x, low_y / rate) * 1.15
        near = index > 0 and _distance(axes, canvas, start, copies[index - 1][0], rate) < LABEL_LINE
        placer.along(
            f"{what}: {units.rate(rate, 'B/s')}", (start, start * rate), (start * 2, start * 2 * rate), fontsize=6.8,
            below=near,
        )  # fmt: skip
    if peak:
        first = max(low_x, peak / copies[0][0]) if copies else low_x
        axes.plot([first, high_x], [peak, peak], color="black", linewidth=1.3, zorder=1)
        placer.block_line((first, peak), (high_x, peak))
        # Behind the ridge, where most panels are empty, if it fits there.
        text = f"{name}: {units.rate(peak, 'FLOP/s')}"
        room = math.log(high_x / first) / math.log(high_x / low_x) * axes.get_window_extent().width / canvas.figure.dpi
        ha, start = ("left", first * 1.05) if 0.063 * len(text) < room else ("right", high_x / 1.05)
        placer.along(text, (start, peak), None, fontsize=6.8, ha=ha)
    if not peak or not copies:
        missing = " and ".join(name for name, has in (("copy", copies), (f"{dtype} matrix", peak)) if not has)
        axes.text(0.02, 0.97, f"no measured {missing} roof in this file", transform=axes.transAxes, va="top",
                  fontsize=7.5, color=style.VERMILLION)  # fmt: skip


def _distance(axes: Axes, canvas, x: float, above: float, rate: float) -> float:
    """Points between two parallel roofs of bytes/s."""
    first, second, along = axes.transData.transform([(x, x * above), (x, x * rate), (2 * x, 2 * x * rate)])
    across, up = map(float, along - second)
    return float(first[1] - second[1]) * across / math.hypot(across, up) * 72 / canvas.figure.dpi


def _roof_note(run: Run) -> str:
    if not run.roofs:
        return "No roofs were measured."
    return "Roofs were measured in the same run with torch's copy and matrix product, the best of many calls."


def _intensity(row: Mapping) -> float:
    return row["flops"] / row["bytes"]


def _rate(row: Mapping) -> float:
    """Useful FLOP/s at the median time."""
    return 1e3 * row["flops"] / row["median_ms"]


def _above(run: Run, row: Mapping) -> bool:
    (peak, _), copies = measured_roofs.peak(run, row["dtype"]), measured_roofs.copies(run)
    return _rate(row) > min(peak or math.inf, copies[0][0] * _intensity(row) if copies else math.inf)


def _limits(run: Run, rows: Sequence[Mapping]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Axis limits shared by all panels: every point, the flat roofs, and whiskers unless they run far out."""
    xs = [_intensity(row) for row in rows]
    medians = [_rate(row) for row in rows]
    whiskers = [1e3 * row["flops"] / row[key] for row in rows for key in ("p20_ms", "p80_ms")]
    ys = [*medians, max(min(whiskers), min(medians) / 2), min(max(whiskers), max(medians) * 2)]
    peaks = [peak for dtype in {row["dtype"] for row in rows} if (peak := measured_roofs.peak(run, dtype)[0])]
    copies = measured_roofs.copies(run)
    # Where the roofs meet belongs in the picture, with enough of the slope to its left to read its label.
    slope = 4 if len({row["layer"] for row in rows}) > SOME else 7  # in a small panel the label takes more of it
    ridge = [min(peaks) / copies[0][0] / slope] if peaks and copies else []
    across = (min([*xs, *ridge]) / 1.7, max(xs) * 1.6)
    return across, (min([*ys, *(peak / 30 for peak in peaks)]) / 1.9, max([*ys, *peaks]) * 1.7)


def _legend(frame: figures.Frame, rows: Sequence[Mapping]) -> None:
    names = [name for name in (BASELINE, OURS) if any(row["variant"] == name for row in rows)]
    others = sorted({row["variant"] for row in rows} - {BASELINE, OURS})
    frame.legend([style.handle(name, 5, others) for name in (*names, *others)], below=True)


def _table(frame: figures.Frame, numbers: Mapping[str, tuple[int, str]]) -> None:
    """The numbers and names at the right, suite by suite, from the top of the panels downwards."""
    left, y, suite = 1 - 2.2 / frame.width, frame.height - 0.52, None
    for name, (number, group) in numbers.items():
        if group != suite:
            y -= TABLE_LINE * (0.4 if suite else 0)
            frame.figure.text(left, y / frame.height, group, fontsize=6.5, fontweight="bold", va="top")
            y -= TABLE_LINE
            suite = group
        frame.figure.text(left, y / frame.height, f"{number:>2}  {name}", fontsize=6.0, va="top")
        y -= TABLE_LINE
