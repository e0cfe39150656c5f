"""Ten layers of known models: TB/s or TFLOP/s of torch, torch.compile and tritonconv, under the measured roofs.

The layers were chosen by their models, the ones that gain nothing among them. Each contestant is shown in its fastest
memory format. A layer whose arithmetic intensity is below the ridge of the roofs is drawn by its compulsory bytes, any
other by its useful FLOPs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.columns import columns_of, median
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS, Run
from tritonconv.plots import figures, measured_roofs, style, units

MADE_BY = "tritonconv bench"
LAYERS = {
    "nnunet_dynunet_128_up4": "nnU-Net",
    "nnunet_resenc_160x192_up4": "nnU-Net ResEnc",
    "swinunetr_fs48_up4": "SwinUNETR",
    "vnet_up3": "V-Net",
    "mednext_k3_dw_64": "MedNeXt",
    "psmnet_train_64_32": "PSMNet",
    "vqvae3d_256_256": "VQ-VAE",
    "3dgan_128_64": "3D-GAN",
    "videogpt_240_240_pad3": "VideoGPT",
    "foundationstereo_112_56": "FoundationStereo",
}
PASSES = {"forward": "forward", "forward_backward": "training step"}
CONTESTANTS = (BASELINE, COMPILED, OURS)
# They differ in lightness too: 60, 71 and 46 of 100.
COLOURS = {BASELINE: "#909090", COMPILED: style.ORANGE, OURS: style.BLUE}
ROOF: dict[str, Any] = {"color": "black", "linewidth": 0.9, "linestyle": (0, (4, 2))}
BAR, BETWEEN = 0.1, 0.09  # inches: a bar, and the room between two layers
PANEL = 1.62  # inches
NUMBER = 0.075  # inches: a character of a number, with the room around it
LABEL = {"boxstyle": "square,pad=0.05", "facecolor": "white", "linewidth": 0}  # of a loss inside of a bar
HALO = [withStroke(linewidth=2, foreground="white")]


class Bars(NamedTuple):
    """The rates of a layer in one pass, by contestant, in FLOP/s or bytes/s."""

    layer: str
    by_bytes: bool
    rates: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times faster than the fastest of torch and torch.compile."""
        return self.rates[OURS] / max(rate for name, rate in self.rates.items() if name != OURS)


def draw(run: Run) -> Figure:
    """Raises ResultsError where none of the layers was timed beside torch, or no roof was measured."""
    panels, dtype = bars(run)
    groups = [by_bytes for by_bytes in (True, False) if any(each.by_bytes is by_bytes for each in panels["forward"])]
    names = [name for name in CONTESTANTS if any(name in each.rates for mine in panels.values() for each in mine)]
    if len(panels["forward"]) == len(LAYERS):  # then the picture lacks nothing, wherever the run ended
        run = replace(run, end={"reason": "complete"})
    row = BAR * len(names) + BETWEEN
    heights = [row * sum(each.by_bytes is by_bytes for each in panels["forward"]) for by_bytes in groups]
    frame = figures.Frame(
        run, f"{run.environment['device_name']}, {dtype}: {len(panels['forward'])} layers of known models",
        _notes(run, dtype, names), (PANEL, heights[0]), len(groups) * len(PASSES), len(PASSES), left=0.2, above=0.22,
        names=1.15, right=0.14, heights=heights,
    )  # fmt: skip
    for line, by_bytes in enumerate(groups):
        unit, limits = (
            ("B/s", measured_roofs.copies(run, l2=False)) if by_bytes else ("FLOP/s", [measured_roofs.peak(run, dtype)])
        )
        of_group = [each for mine in panels.values() for each in mine if each.by_bytes is by_bytes]
        # Room for the numbers behind the longest bar.
        most = max(1.06 * max(limits)[0], 1.4 * max(rate for each in of_group for rate in each.rates.values()))
        for column, (pass_name, title) in enumerate(PASSES.items()):
            mine = [each for each in panels[pass_name] if each.by_bytes is by_bytes]
            axes = frame.panel(line * len(PASSES) + column, title if line == 0 else "")
            _panel(axes, mine, names, most, unit, [limit for limit, _ in limits])
            figures.names_down(axes, [_label(run, each.layer) for each in mine], 7.0)
            axes.tick_params(labelleft=column == 0)
    bars_of = [Patch(color=COLOURS[name], label=name.replace("_", ".")) for name in names]
    frame.legend([*bars_of, Line2D([], [], label="measured roof", **ROOF)], below=True)
    return frame.done()


def bars(run: Run) -> tuple[dict[str, list[Bars]], str]:
    """By pass the layers that were timed beside torch, by the run's first column; and their dtype, the first there is.

    Raises ResultsError where there is none, or no roof of both kinds.
    """
    rows = [row for row in run.results if row["layer"] in LAYERS and row["pass"] in PASSES]
    column = next(iter(columns_of(rows)), None)
    dtype = next((row["dtype"] for row in rows), "")
    peak, copies = measured_roofs.peak(run, dtype)[0], measured_roofs.copies(run, l2=False)
    best: dict[tuple[str, str], dict[str, tuple[float, Mapping]]] = {}
    for row in rows if column else ():
        ms = median(row, str(column))
        if row["variant"] in CONTESTANTS and row["dtype"] == dtype and ms is not None:
            mine = best.setdefault((row["pass"], row["layer"]), {})
            if row["variant"] not in mine or ms < mine[row["variant"]][0]:
                mine[row["variant"]] = ms, row
    both = [name for name in LAYERS if all({BASELINE, OURS} <= set(best.get((each, name), ())) for each in PASSES)]
    if not both or not peak or not copies:
        raise ResultsError(f"{run.path}: no layer of {', '.join(LAYERS.values())} was timed under measured roofs")
    ridge = peak / copies[0][0]
    by_bytes = {name: _intensity(best["forward", name][OURS][1]) < ridge for name in both}
    return {each: [_bars(best[each, name], by_bytes[name]) for name in both] for each in PASSES}, dtype


def _intensity(row: Mapping) -> float:
    return row["flops"] / row["bytes"]


def _bars(timed: Mapping[str, tuple[float, Mapping]], by_bytes: bool) -> Bars:
    row = timed[OURS][1]
    work = row["bytes" if by_bytes else "flops"]
    return Bars(row["layer"], by_bytes, {name: 1e3 * work / ms for name, (ms, _) in timed.items()})


def digest(run: Run) -> str:
    """Of all that the picture shows: it stands in the picture's file, so that an old picture is found out."""
    panels, dtype = bars(run)
    shown = [[*each] for mine in panels.values() for each in mine]
    return hashlib.sha256(json.dumps([shown, dtype, run.roofs, style.machine(run)]).encode()).hexdigest()[:16]


def _label(run: Run, layer: str) -> str:
    problem = next((row.get("problem") for row in run.results if row["layer"] == layer), None)
    if not problem:
        return LAYERS[layer]
    kernel = "k" + "x".join(map(str, dict.fromkeys(problem["kernel"])))
    what = f"depthwise {problem['c_in']}" if problem["groups"] > 1 else f"{problem['c_in']}→{problem['c_out']}"
    return f"{LAYERS[layer]}\n{what}, {kernel}"


def _panel(
    axes: Axes, mine: Sequence[Bars], names: Sequence[str], most: float, unit: str, limits: Sequence[float]
) -> None:
    divisor, shown = units.unit(most, unit)
    step = 1 / (len(names) + BETWEEN / BAR)
    for index, each in enumerate(mine):
        lines = {name: index + (place - (len(names) - 1) / 2) * step for place, name in enumerate(names)}
        for name, rate in each.rates.items():
            axes.barh(lines[name], rate / divisor, height=0.94 * step, color=COLOURS[name], linewidth=0)
        colour = "black" if each.ratio >= 1 else style.VERMILLION
        longest = max(each.rates, key=lambda name: each.rates[name])
        end, text = each.rates[longest], f"{units.ratio(each.ratio)}x" if each.ratio < 9.95 else f"{each.ratio:.0f}x"
        wide = most * NUMBER * len(text) / PANEL
        how: dict[str, Any] = {"fontsize": 7, "va": "center_baseline", "color": colour, "xytext": (2.5, 0)}
        how |= {"path_effects": HALO, "fontweight": "normal" if each.ratio >= 1 else "bold"}
        # Behind the bars; where a roof would go through the number, inside of ours or behind it.
        ours = each.rates[OURS]
        places = ((end, index), (ours - wide, lines[OURS]), (ours, lines[OURS]))
        start, line = next((place for place in places if _free(place[0], wide, limits)), places[0])
        if start == ours - wide:
            start = ours
            how |= {"ha": "right", "xytext": (-2.5, 0)}
            how |= {"path_effects": []} | ({"color": "white"} if each.ratio >= 1 else {"bbox": LABEL})
        axes.annotate(text, (start / divisor, line), textcoords="offset points", **how)
    for limit in limits:
        axes.axvline(limit / divisor, **ROOF)
    axes.set_xlim(0, most / divisor)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.5)
    axes.set_xlabel(f"{shown} ({'compulsory bytes' if unit == 'B/s' else 'useful FLOPs'})", fontsize=7.5)


def _free(start: float, wide: float, limits: Sequence[float]) -> bool:
    """Whether a number is inside of the panel and no roof goes through it."""
    return start >= 0 and not any(start < limit <= start + wide for limit in limits)


def _notes(run: Run, dtype: str, names: Sequence[str]) -> list[str]:
    column = columns_of(run.results)[0]
    measured = [
        f"{what.split(' (')[0]} {units.rate(value, 'B/s')}" for value, what in measured_roofs.copies(run, l2=False)
    ]
    peak, product = measured_roofs.peak(run, dtype)
    measured.append(f"{product.split(' (')[0]} {units.rate(peak, 'FLOP/s')}")
    untimed = "" if COMPILED in names else " torch.compile was not timed in this run."
    return [
        f"By {style.COLUMN_NAMES[column]}, median, in the fastest memory format of each. Numbers: speed-up over "
        f"the fastest torch. Roofs: {', '.join(measured)}.{untimed}"
    ]
