"""The summary of a run: geometric means of the speed-ups over torch, and the layers that are slowest."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from tritonconv.lab import text_table
from tritonconv.lab.bench import memory, noise, same_traffic
from tritonconv.lab.bench.classes import CLASSES
from tritonconv.lab.bench.columns import SAID, columns_of
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS, Run
from tritonconv.lab.bench.standings import by_column, by_pass, standings
from tritonconv.lab.bench.timing import quantile
from tritonconv.lab.bench.workloads import ALL

# Slower than this, and with the 80th percentile of the paired ratios below it too, counts as slower than torch.
FLOOR = 0.95
WORST = 5
# A cell counts as undisturbed while other programs keep at most this many cores busy.
QUIET = 0.1
FAST_P = (0.8, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Group:
    """The speed-ups of one variant in one pass, dtype and layout (``"all"``: both layouts together)."""

    variant: str
    pass_name: str
    dtype: str
    layout: str
    rows: tuple[Mapping, ...]
    noise: float = 1.0  # the factor that null rows show

    @property
    def geomean(self) -> float:
        return geometric_mean(row["speedup"] for row in self.rows)

    @property
    def p5(self) -> float:
        """The 5th percentile of the speed-ups."""
        return quantile([row["speedup"] for row in self.rows], 0.05)

    @property
    def layers(self) -> int:
        return len({row["layer"] for row in self.rows})

    @property
    def faster(self) -> int:
        """Rows faster than torch with their 20th percentile too, and by more than null rows show."""
        return sum(row["speedup"] > self.noise and row["speedup_p20"] > 1 for row in self.rows)

    @property
    def slower(self) -> int:
        """Rows below 0.95 beyond noise."""
        return sum(below_floor(row) and row["speedup"] < 1 / self.noise for row in self.rows)

    @property
    def worst(self) -> list[Mapping]:
        return sorted(self.rows, key=lambda row: row["speedup"])[:WORST]


def below_floor(row: Mapping) -> bool:
    """Slower than 0.95 of torch, beyond noise: even the 80th percentile of the paired ratios is below."""
    return row["speedup"] < FLOOR and row["speedup_p80"] < FLOOR


def overlaps_one(row: Mapping) -> bool:
    """The interval from the 20th to the 80th percentile of the paired ratios holds 1: no difference is shown."""
    return row["speedup_p20"] <= 1 <= row["speedup_p80"]


def groups(rows: Iterable[Mapping], variant: str = OURS, noise: float = 1.0) -> list[Group]:
    """One group per pass, dtype and layout, and one of all layouts where there are several; in the rows' order."""
    rows = [row for row in rows if row["variant"] == variant and row["speedup"] is not None and not row.get("family")]
    rows = [row for row in rows if not row.get("epilogue")]
    parts: dict[tuple[str, str], dict[str, list[Mapping]]] = {}
    for row in rows:
        parts.setdefault((row["pass"], row["dtype"]), {}).setdefault(row["layout"], []).append(row)
    for layouts in parts.values():
        if len(layouts) > 1:
            layouts["all"] = list(itertools.chain(*layouts.values()))
    return [
        Group(variant, *key, layout, tuple(mine), noise)
        for key, layouts in parts.items()
        for layout, mine in layouts.items()
    ]


def fast_p(ratios: Sequence[float], p: float) -> float:
    """KernelBench's fast_p: the share of all that are right and more than ``p`` times as fast as torch."""
    return sum(ratio > p for ratio in ratios) / len(ratios) if ratios else 0.0


def _in_classes(run: Run) -> list[str]:
    """Geometric means per class of layer and pass, our best layout against the best torch."""
    ranked = standings(run.of_models())
    if not ranked:
        return []
    plain = [row for row in run.errors if row["variant"] == OURS and not row.get("epilogue")]
    wrong = {(row["layer"], row.get("dtype"), row["pass"]) for row in plain}
    wrong_in = Counter(pass_name for *_, pass_name in wrong)
    lines = [["class", "pass", "layers", "geomean", *(f"fast_{p:g}" for p in FAST_P)]]
    passes = dict.fromkeys(one.ours["pass"] for one in ranked)
    for name, pass_name in [*itertools.product((*CLASSES, "?"), passes), *(("all", name) for name in passes)]:
        of_class = [one for one in ranked if name in ("all", one.ours.get("class", "?"))]
        ratios = [one.ratio for one in of_class if one.ours["pass"] == pass_name]
        if ratios:
            # A wrong answer is not fast.
            values = ratios + [0.0] * (wrong_in[pass_name] if name == "all" else 0)
            shares = [f"{fast_p(values, p):.0%}" for p in FAST_P]
            lines.append([name, pass_name, str(len(ratios)), f"{geometric_mean(ratios):.2f}", *shares])
    return text_table.lines(lines, numbers=2 + len(FAST_P))


def _in_columns(run: Run) -> list[str]:
    """Against the best torch in every column of a GPU, and what null rows show there."""
    by = by_column(run.of_models())
    if len(by) < 2:
        return []
    rows = [["column", "pass", "dtype", "layers", "geomean", "slower", "null rows"]]
    for column, standing in by.items():
        band = noise.band(run.nulls, column)
        for key, ranked in by_pass(standing).items():
            ratios = [one.ratio for one in ranked]
            below = sum(ratio < (band.low if band else 1) for ratio in ratios)
            interval = str(band) if band else "none"
            rows.append([column, *key, str(len(ratios)), f"{geometric_mean(ratios):.2f}", str(below), interval])
    legend = "; ".join(f"{column}: {SAID[column]}" for column in by) + "; slower: below what the null rows show"
    title = "our best layout against the best torch, by column:"
    return ["", title, "", *text_table.lines(rows, numbers=4), "", legend]


def _stages(run: Run) -> list[str]:
    """The layers with an epilogue, which no mean of plain layers holds."""
    rows = [row for row in run.of_stages() if row["speedup"] is not None and row["variant"] != BASELINE]
    if not rows:
        return []
    compiled = {_cell(row): row["median_ms"] for row in rows if row["variant"] == COMPILED}
    peaks = {_cell(row): row.get("peak_bytes") for row in run.of_stages() if row["variant"] == BASELINE}
    first = ["layer", "then", "pass", "dtype", "layout", "variant"]
    lines = [[*first, "speed-up", "20th to 80th", COMPILED, "peak", "MB", "MB spared"]]
    for row in rows:
        interval = f"{row['speedup_p20']:.2f} to {row['speedup_p80']:.2f}"
        theirs = compiled.get(_cell(row)) if row["variant"] != COMPILED else None
        over = f"{theirs / row['median_ms']:.2f}" if theirs else ""
        peak = f"{row['peak_bytes'] / peaks[_cell(row)]:.2f}" if row.get("peak_bytes") and peaks.get(_cell(row)) else ""
        moved = (f"{row[name] / 1e6:.3g}" for name in ("bytes", "spared_bytes"))
        lines.append([*_cell(row)[1:], row["variant"], f"{row['speedup']:.2f}", interval, over, peak, *moved])
    title = "layers with what stands behind them, against torch's separate operations:"
    legend = f"{COMPILED}: how many times faster than it, by the medians; peak: memory of a call by torch's; " + (
        "MB spared: what torch's operations move more, in the forward"
    )
    return ["", title, "", *text_table.lines(lines, numbers=6), "", legend]


def _cell(row: Mapping) -> tuple[str, ...]:
    return row["layer"], row["layer"].partition("+")[0], row["epilogue"], row["pass"], row["dtype"], row["layout"]


def summary(run: Run) -> str:
    """The text that ``bench`` prints at its end."""
    env = run.environment
    lines = [
        f"{env['device_name']}, {env['threads']} threads, torch {env['torch']}, triton {env['triton'] or 'none'}",
        f"scale {env['scale']}: {env['scale_rule']}",
    ]
    first = next(iter(columns_of(run.results)), None)
    band = noise.band(run.nulls, first) if first else None
    factor = band.noise if band else 1.0
    per_variant = {name: groups(run.results, name, factor) for name in run.values("variant") if name != BASELINE}
    if not any(per_variant.values()):
        lines += ["no layer was timed beside torch"] * (not run.of_stages())
    else:
        lines += ["", f"speed-up over {BASELINE} in the same layout, median of the ratios of neighbouring calls:", ""]
        lines += _table([group for each in per_variant.values() for group in each])
        legend = "p5: 5th percentile of the layers; faster: 20th percentile of the pairs above 1; slower: 80th below"
        lines += ["", f"{legend} {FLOOR:g}"]
        if band is not None:
            lines[-1] += f"; each beyond the null rows, {band}"
        classes = _in_classes(run)
        if classes:
            lines += ["", "our best layout against the best torch (any layout; medians of different rounds):", ""]
            lines += classes
            lines += ["", "fast_p: share of layers that are right and more than p times as fast (KernelBench)"]
        lines += _in_columns(run)
        more = [*same_traffic.lines(run), *memory.lines(run)]
        lines += ["", *more] if more else []
        for group in per_variant.get(OURS, []):
            if group.layout == "all" or len({g.layout for g in per_variant[OURS]}) == 1:
                lines += ["", f"slowest in {group.pass_name}, {group.dtype} (20th to 80th percentile of the pairs):"]
                lines += [f"  {line}" for line in _worst(group.worst)]
    lines += _stages(run)
    if run.disturbance:
        lines += ["", run.disturbance]
        quiet = groups((row for row in run.results if (row.get("other_cores") or 0.0) <= QUIET), noise=factor)
        if quiet:
            lines += [f"{OURS} in the cells where they kept at most {QUIET} cores busy:", "", *_table(quiet)]
    for error in run.errors:
        lines.append(f"{error['status']}: {error['variant']} on {error['layer']} ({error['pass']}): {error['message']}")
    for row in (*run.results, *run.tuned):
        if row.get("warning"):
            lines.append(f"warning: {row['variant']} on {row['layer']} ({row['pass']}): {row['warning']}")
    whole = [row for row in run.skips if row["variant"] == ALL]
    lines += [f"left out: {row['layer']}: {row['message']}" for row in whole]
    if len(run.skips) > len(whole):
        lines.append(f"{len(run.skips) - len(whole)} times a variant does not serve the layer (reasons in the file)")
    if run.end is not None and run.end["reason"] != "complete":
        done = f"{run.end['cells']} of {run.end['of_cells']} cells" if "cells" in run.end else "its finished rows"
        why = "the time budget was used up" if run.end["reason"] == "budget" else run.end["reason"]
        lines.append(f"ended early ({why}): {done} are in the file")
    return "\n".join(lines)


def _table(rows: Sequence[Group]) -> list[str]:
    head = ["variant", "pass", "dtype", "layout", "layers", "geomean", "p5", "faster", "slower"]
    cells = [
        [
            g.variant,
            g.pass_name,
            g.dtype,
            g.layout,
            str(g.layers),
            f"{g.geomean:.2f}",
            f"{g.p5:.2f}",
            str(g.faster),
            str(g.slower),
        ]
        for g in rows
    ]
    unnamed = all(group.variant == OURS for group in rows)
    return text_table.lines([line[unnamed:] for line in (head, *cells)], numbers=5)


def _worst(rows: Sequence[Mapping]) -> list[str]:
    cells = []
    for row in rows:
        note = "overlaps 1" if overlaps_one(row) else f"below {FLOOR:g}" if below_floor(row) else ""
        interval = f"{row['speedup_p20']:.2f} to {row['speedup_p80']:.2f}"
        cells.append([f"{row['speedup']:.2f}", interval, row["layout"], row["layer"], note])
    return text_table.lines(cells, numbers=0)
