"""The tuning landscape: what the tuner timed on one layer, and how the cost model had ranked it.

Where one kernel was timed with several tiles, a map of time over the two tile sizes that vary most (the best over the
rest of the config); where the candidates are formulations without a config, a bar for each. Beside it the measured rank
against the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.results import Run
from tritonconv.lab.bench.standings import grouped
from tritonconv.plots import figures, style

MADE_BY = "tritonconv tune"
SHOWN = 2  # layers
LEAST = 3  # candidates
ROW, PANEL = 0.25, 2.0  # inches: a candidate, a panel's width

Group = list[Mapping]


def draw(run: Run) -> Figure:
    """Raises ResultsError where nothing was tuned."""
    screened = [row for row in run.timings if row["stage"] == "screen"]
    groups = grouped(screened, "layer", "pass", "dtype", "layout")
    largest = sorted((rows for rows in groups.values() if len(rows) >= LEAST), key=_interest, reverse=True)
    if not largest:
        raise ResultsError(f"{run.path}: nowhere {LEAST} candidates of one layer and pass were timed")
    return _figure(run, largest[:SHOWN])


def _interest(rows: Group) -> tuple[int, int]:
    """The most configs of one variant, then the most candidates."""
    return max(len(each) for each in grouped(rows, "variant").values()), len(rows)


def _figure(run: Run, groups: Sequence[Group]) -> Figure:
    names = figures.room_for([line for rows in groups for label in _labels(rows) for line in label.split("\n")])
    tallest = max(2.0, max(ROW * min(len(rows), 24) for rows in groups))
    notes = ["Times of the tuner's first round. Ranks: 1 is fastest. Map: best over the rest of the config."]
    frame = figures.Frame(
        run, "Tuning landscape", notes, (PANEL, tallest), 2 * len(groups), 2, above=0.5,
        names=max(0.0, names - 0.6),
    )  # fmt: skip
    for line, rows in enumerate(groups):
        first = rows[0]
        where = f"{first['layer']}\n{style.title(first['pass'], first['layout'].upper(), first['dtype'])}"
        (name,), most = max(grouped(rows, "variant").items(), key=lambda pair: len(pair[1]))
        tiles = _tiles(most)
        axes = frame.panel(2 * line, where if tiles is None else f"{where}\n{name}")
        if tiles is not None:
            _map(axes, most, tiles)
        else:
            _bars(axes, sorted(rows, key=lambda row: row["median_ms"])[:24])
        _ranks(frame.panel(2 * line + 1), rows)
    return frame.done()


def _labels(rows: Group) -> list[str]:
    """A candidate's variant, and below it its tile sizes with what else tells it from others of the same ones."""
    tiles = [{key: value for key, value in row["config"].items() if key.startswith("BLOCK_") and value} for row in rows]
    labels = []
    for row, mine in zip(rows, tiles, strict=True):
        same = [each["config"] for each, theirs in zip(rows, tiles, strict=True)
                if (each["variant"], theirs) == (row["variant"], mine)]  # fmt: skip
        shown = mine | {
            key: value for key, value in row["config"].items() if any(each.get(key) != value for each in same)
        }
        said = " ".join(f"{key.removeprefix('BLOCK_')}={value}" for key, value in shown.items())
        labels.append(f"{row['variant']}\n{said}".strip())
    return labels


def _tiles(rows: Group) -> tuple[str, str] | None:
    """The two tile sizes with the most values, None where fewer than two vary."""
    counts = {key: len({row["config"].get(key) for row in rows}) for key in rows[0]["config"] if "BLOCK" in key}
    varied = sorted((key for key, count in counts.items() if count > 1), key=lambda key: -counts[key])
    return (varied[0], varied[1]) if len(varied) >= 2 else None


def _map(axes: Axes, rows: Group, tiles: tuple[str, str]) -> None:
    down, across = tiles
    ys, xs = (sorted({row["config"][key] for row in rows}) for key in tiles)
    best = np.full((len(ys), len(xs)), np.nan)
    for row in rows:
        place = ys.index(row["config"][down]), xs.index(row["config"][across])
        best[place] = np.nanmin([best[place], row["median_ms"]])
    axes.imshow(best, cmap="cividis", aspect="auto", origin="lower")
    middle = float(np.nanmean([np.nanmin(best), np.nanmax(best)]))
    for (y, x), value in np.ndenumerate(best):
        if not np.isnan(value):
            axes.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=7,
                      color="white" if value < middle else "black")  # fmt: skip
    axes.set_xticks(range(len(xs)), [str(x) for x in xs])
    axes.set_yticks(range(len(ys)), [str(y) for y in ys])
    axes.set_xlabel(f"{across} (ms in the cells)")
    axes.set_ylabel(down)


def _bars(axes: Axes, rows: Group) -> None:
    figures.names_down(axes, _labels(rows), fontsize=6.2)
    for index, row in enumerate(rows):
        axes.barh(index, row["median_ms"], height=0.62, color=style.BLUE if index == 0 else style.SKY)
        axes.plot([row["p20_ms"], row["p80_ms"]], [index, index], color="black", linewidth=0.8)
    axes.set_xlim(0, max(row["p80_ms"] for row in rows) * 1.08)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.5)
    axes.set_xlabel("ms")


def _ranks(axes: Axes, rows: Group) -> None:
    rows = [row for row in rows if row["predicted_ms"] is not None]
    axes.set_xlabel("measured rank")
    axes.set_ylabel("the model's rank")
    if len(rows) < LEAST:
        return
    measured, predicted = (_rank([row[key] for row in rows]) for key in ("median_ms", "predicted_ms"))
    axes.plot([1, len(rows)], [1, len(rows)], color="#B5B5B5", linewidth=0.8, zorder=1)
    axes.plot(measured, predicted, "o", color=style.BLUE, markersize=4, zorder=2)
    flat = np.ptp(measured) == 0 or np.ptp(predicted) == 0
    spearman = 0.0 if flat else float(np.corrcoef(measured, predicted)[0, 1])
    axes.set_title(f"rank correlation {spearman:.2f}", loc="left")
    axes.set_xlim(0.5, len(rows) + 0.5)
    axes.set_ylim(0.5, len(rows) + 0.5)
    axes.grid(color="#E4E4E4", linewidth=0.5)


def _rank(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean."""
    array = np.asarray(values, dtype=float)
    less = (array[None] < array[:, None]).sum(1)
    return less + ((array[None] == array[:, None]).sum(1) + 1) / 2
