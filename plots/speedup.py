"""The speed-up chart: every layer a row, every layout a mark, torch the line at 1, the geometric means at the top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import geometric_mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.columns import columns_of
from tritonconv.lab.bench.results import BASELINE, OURS, Run
from tritonconv.lab.bench.standings import grouped
from tritonconv.plots import figures, style

MADE_BY = "tritonconv bench"
ROW, PANEL, HEAD_LINE = 0.142, 2.1, 0.14  # inches: a layer, a panel's width, a line above it


def draw(run: Run) -> Figure:
    """One panel per pass and dtype. Raises ResultsError where nothing was timed beside torch."""
    rows = [row for row in run.of_models() if row["variant"] == OURS and row["speedup"] is not None]
    if not rows:
        raise ResultsError(f"{run.path}: no layer was timed beside {BASELINE}, so there is no speed-up to draw")
    lines, layouts = _lines(rows), len({row["layout"] for row in rows})
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    panels = grouped(rows, "pass", "dtype")
    notes = [
        f"Speed-up of {OURS} over torch.nn.functional.conv_transpose3d on the same tensors: median of the ratios of "
        "calls made next to each other; whiskers from the 20th to the 80th percentile. Hollow: the whisker reaches 1. "
        "Dashed: geometric mean. " + figures.band_note(run, columns_of(rows)[0])
    ]
    frame = figures.Frame(
        run, f"{OURS} against torch, {', '.join(dtypes)}", notes, (PANEL, len(lines) * ROW), len(panels), len(panels),
        left=0.2, above=(layouts + 1.6) * HEAD_LINE, names=figures.room_for(lines) - 0.2,
    )  # fmt: skip
    limits, suites = _limits(rows), {row["suite"] for row in rows}
    heads = [index for index, name in enumerate(lines) if name in suites]
    for index, ((pass_name, dtype), mine) in enumerate(panels.items()):
        title = style.title(pass_name, *([dtype] if len(dtypes) > 1 else ()))
        axes = frame.panel(index, title, pad=72 * (0.08 + layouts * HEAD_LINE))
        figures.names_down(axes, lines, heads=heads)
        axes.tick_params(labelleft=index == 0)
        _panel(axes, mine, lines, limits)
        figures.null_band(axes, run, columns_of(rows)[0], style.GREY, **{"pass": pass_name, "dtype": dtype})
    return frame.done()


def _lines(rows: Sequence[Mapping]) -> list[str]:
    """The suites and below each its layers by speed-up, from top to bottom."""
    lines: list[str] = []
    for (suite,), of_suite in grouped(rows, "suite").items():
        layers = grouped(of_suite, "layer").items()
        means = {name: geometric_mean(row["speedup"] for row in same) for (name,), same in layers}
        lines += [suite, *sorted(means, key=lambda name: -means[name])]
    return lines


def _limits(rows: Sequence[Mapping]) -> tuple[float, float]:
    values = [row["speedup"] for row in rows]
    # A whisker that runs far out is cut off at the frame: it must not squeeze everything else.
    low = max(min(row["speedup_p20"] for row in rows), min(values) / 1.5)
    high = min(max(row["speedup_p80"] for row in rows), max(values) * 1.5)
    return min(0.72, low / 1.12), max(2.2, high * 1.12)


def _panel(axes: Axes, rows: Sequence[Mapping], lines: Sequence[str], limits: tuple[float, float]) -> None:
    place = {name: index for index, name in enumerate(lines)}
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
        average = geometric_mean(row["speedup"] for row in mine)
        axes.axvline(average, color=colour, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        text = f"{style.LAYOUT_NAMES[layout].split(' ')[0]}: mean {average:.2f}, {len(mine)} layers"
        height = 1 + (0.06 + (len(layouts) - 1 - step) * HEAD_LINE) / (len(lines) * ROW)
        axes.plot(0.012, height + 0.045 / (len(lines) * ROW), marker, color=colour, markersize=4, clip_on=False,
                  transform=axes.transAxes)  # fmt: skip
        axes.text(0.045, height, text, transform=axes.transAxes, fontsize=7)
    figures.ratio_axis(axes, *limits)
    axes.set_xlabel("speed-up over torch")
