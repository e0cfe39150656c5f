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
from tritonconv.plots import figures, headline, measured_roofs, style, units
from tritonconv.plots.labels import Placer

MADE_BY = "tritonconv bench"
PANEL = (4.2, 3.2)  # inches: a panel under the other, for text that is read at 500 pixels
NAMED = 14  # layers that are named in a panel, at most
SOME = 12  # layers of which every contestant shows; beside more of them these would hide the comparison
SLIDES = (1.0, 1.2, 1.45, 1.75, 2.1, 2.5, 3.0)  # how far up its line a roof's label may begin, times
LABEL_LINE = 11.0  # points that a roof's label takes


def draw(run: Run) -> Figure:
    """One panel per pass, dtype and layout. Raises ResultsError where no result is left."""
    rows = run.of_models()
    if not rows:
        raise ResultsError(f"{run.path}: no results to draw")
    count = len({row["layer"] for row in rows})
    if count > SOME:
        rows = [row for row in rows if row["variant"] in (BASELINE, OURS)] or rows
    kinds = {key: mine for of_pass in grouped(rows, "pass", "dtype").values()
             for key, mine in grouped(of_pass, "pass", "dtype", "layout").items()}  # fmt: skip
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
    if count > NAMED:
        notes.append(
            "Named (black edge), where there is room: the largest and the smallest gain, share of the roof and "
            "intensity of the panel, then layers of known models. The chart percent names all."
        )
    frame = figures.Frame(
        run, f"Roofline of transposed 3-D convolution: {BASELINE} and {OURS}", notes, PANEL, len(kinds), left=0.62,
        right=0.15,
    )  # fmt: skip
    limits = _limits(run, rows)
    for index, ((pass_name, dtype, layout), mine) in enumerate(kinds.items()):
        axes = frame.panel(index, style.title(pass_name, style.LAYOUT_NAMES[layout], dtype))
        _panel(axes, frame.canvas, run, mine, limits, dtype)
    _legend(frame, rows)
    return frame.done()


def _named(run: Run, rows: Sequence[Mapping]) -> list[str]:
    """The layers of a panel in the order in which they are named: the extremes, those of the headline, all others by
    how far their times are apart."""
    by_layer = {name: {row["variant"]: row for row in same} for (name,), same in grouped(rows, "layer").items()}

    def gain(name: str) -> float:
        both = by_layer[name]
        return math.log(_rate(both[OURS]) / _rate(both[BASELINE])) if {BASELINE, OURS} <= set(both) else 0.0

    def share(name: str) -> float:
        return max(_rate(row) / _roof(run, row) for row in by_layer[name].values())

    def intensity(name: str) -> float:
        return _intensity(next(iter(by_layer[name].values())))

    extremes = [pick(by_layer, key=key) for key in (gain, share, intensity) for pick in (max, min)]
    known = [name for name in headline.LAYERS if name in by_layer]
    others = sorted(by_layer, key=lambda name: -abs(gain(name)))
    return list(dict.fromkeys((*extremes, *known, *others)))[:NAMED]


def _panel(axes: Axes, canvas, run: Run, rows: Sequence[Mapping], limits, dtype: str) -> None:
    (low_x, high_x), (low_y, high_y) = limits
    figures.log_axes(axes)
    axes.set_xlim(low_x, high_x)
    axes.set_ylim(low_y, high_y)
    axes.set_xlabel("arithmetic intensity (useful FLOP / compulsory byte)")
    divisor, unit = units.unit(high_y, "FLOP/s")
    axes.set_ylabel(f"useful {unit}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / divisor:.12g}"))
    placer = Placer(axes, canvas)
    others = sorted({row["variant"] for row in rows} - {BASELINE, OURS})
    by_layer = grouped(rows, "layer")
    for same in by_layer.values():
        x, heights = _intensity(same[0]), [_rate(row) for row in same]
        axes.plot([x, x], [min(heights), max(heights)], color="#B5B5B5", linewidth=0.7, zorder=2)
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
    for row in rows:
        if row["variant"] == BASELINE:  # its ring over ours too
            axes.plot(_intensity(row), _rate(row), "o", markersize=3.6, zorder=4.5, **style.ring(BASELINE))
    _roofs(axes, canvas, run, dtype, limits, placer)
    for name in _named(run, rows):
        top = max(by_layer[name,], key=lambda row: (row["variant"] == OURS, _rate(row)))
        if placer.place(name, _intensity(top), _rate(top), fontsize=6.2):
            axes.plot(_intensity(top), _rate(top), "o", markersize=3.8, markeredgewidth=0.8, color="black",
                      markerfacecolor="none", zorder=5)  # fmt: skip


def _roofs(axes: Axes, canvas, run: Run, dtype: str, limits, placer: Placer) -> None:
    (low_x, high_x), (low_y, _) = limits
    (peak, name), copies = measured_roofs.peak(run, dtype), measured_roofs.copies(run)
    lines: list[tuple[tuple[float, float], tuple[float, float]]] = []
    labels: list[tuple[float, list[str]]] = []
    for index, (rate, what) in enumerate(copies):
        end = min(high_x, peak / rate) if peak else high_x
        lines.append(((low_x, low_x * rate), (end, end * rate)))
        axes.plot(*zip(*lines[-1], strict=True), color="black", zorder=1, linewidth=0.8 if index else 1.3,
                  linestyle=(0, (5, 2)) if index else "-")  # fmt: skip
        text = f"{what.split(' (')[0]}{' (dashed)' if index else ''}: {units.rate(rate, 'B/s')}"
        # Where the line above leaves a label no room, it stands over that line's.
        if index and _distance(axes, canvas, max(low_x, low_y / rate), copies[index - 1][0], rate) < LABEL_LINE:
            labels[-1][1].insert(0, text)
        else:
            labels.append((rate, [text]))
    for rate, texts in labels:
        # It starts where the line enters the panel, or further up where points are.
        starts = [(step * x, step * x * rate) for x in [1.15 * max(low_x, low_y / rate)] for step in SLIDES]
        placer.along("\n".join(texts), starts, starts[-1], fontsize=6.8)
    if peak:
        first = max(low_x, peak / copies[0][0]) if copies else low_x
        axes.plot([first, high_x], [peak, peak], color="black", linewidth=1.3, zorder=1)
        lines.append(((first, peak), (high_x, peak)))
        # Behind the ridge, where most panels are empty, if it fits there.
        text = f"{name.split(' (')[0]}: {units.rate(peak, 'FLOP/s')}"
        room = math.log(high_x / first) / math.log(high_x / low_x) * axes.get_window_extent().width / canvas.figure.dpi
        ha, start = ("left", first * 1.05) if 0.063 * len(text) < room else ("right", high_x / 1.05)
        starts = [(start * step if ha == "left" else start / step, peak) for step in SLIDES]
        placer.along(text, starts, None, fontsize=6.8, ha=ha)
    for line in lines:
        placer.block_line(*line, closed=True)
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


def _roof(run: Run, row: Mapping) -> float:
    """The measured roof at the row's intensity, FLOP/s; infinite where none was measured."""
    (peak, _), copies = measured_roofs.peak(run, row["dtype"]), measured_roofs.copies(run)
    return min(peak or math.inf, copies[0][0] * _intensity(row) if copies else math.inf)


def _above(run: Run, row: Mapping) -> bool:
    return _rate(row) > _roof(run, row)


def _limits(run: Run, rows: Sequence[Mapping]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Axis limits shared by all panels: every point, the flat roofs, and whiskers unless they run far out."""
    xs = [_intensity(row) for row in rows]
    medians = [_rate(row) for row in rows]
    whiskers = [1e3 * row["flops"] / row[key] for row in rows for key in ("p20_ms", "p80_ms")]
    ys = [*medians, max(min(whiskers), min(medians) / 2), min(max(whiskers), max(medians) * 2)]
    peaks = [peak for dtype in {row["dtype"] for row in rows} if (peak := measured_roofs.peak(run, dtype)[0])]
    copies = measured_roofs.copies(run)
    # Where the roofs meet belongs in the picture, with enough of the slope to its left to read its label.
    ridge = [min(peaks) / copies[0][0] / 7] if peaks and copies else []
    across = (min([*xs, *ridge]) / 1.7, max(xs) * 1.6)
    return across, (min([*ys, *(peak / 30 for peak in peaks)]) / 1.9, max([*ys, *peaks]) * 1.7)


def _legend(frame: figures.Frame, rows: Sequence[Mapping]) -> None:
    names = [name for name in (BASELINE, OURS) if any(row["variant"] == name for row in rows)]
    others = sorted({row["variant"] for row in rows} - {BASELINE, OURS})
    frame.legend([style.handle(name, 5, others) for name in (*names, *others)], below=True)
