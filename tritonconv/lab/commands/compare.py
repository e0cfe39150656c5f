"""``tritonconv compare A B``: the rows that became faster or slower between two results files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

from tritonconv.errors import ArgumentError, ResultsError
from tritonconv.lab import flags, text_table
from tritonconv.lab.bench import results
from tritonconv.lab.bench.columns import COLUMNS, SAID, WALL, ratio, spread
from tritonconv.lab.bench.results import BASELINE, Run
from tritonconv.lab.commands.common import OK, WRONG

HELP = "compare two results files; the exit code is 1 where B is slower beyond noise"
EXAMPLE = "tritonconv compare old.jsonl new.jsonl --threshold 0.1"
THRESHOLD = 0.05
SHOWN = 10
KEY = ("layer", "pass", "dtype", "layout", "variant")
DESCRIPTION = """\
Compares the rows of two results files that have the same layer, pass, dtype, layout and variant. On a GPU it compares
times, in the first column (gpu, graph, wall) that both files have. On a CPU other programs change the speed, so it
compares speed-ups over torch in the same run. B is slower in a row where it is so by more than the threshold, and the
intervals from the 20th to the 80th percentile do not touch.
"""


class Change(NamedTuple):
    """One row in both files. ``ratio`` above 1: B is faster. ``beyond``: the intervals from the 20th to the 80th
    percentile do not touch."""

    row: Mapping
    ratio: float
    beyond: bool


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, metavar="A", help="a results file, or a folder (its newest)")
    parser.add_argument("after", type=Path, metavar="B", help="a results file, or a folder (its newest)")
    parser.add_argument(
        "--threshold", type=flags.share, default=THRESHOLD, metavar="X",
        help="count a row as slower beyond this share (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--any-device", action="store_true", help="compare runs of different devices too")


def run(options: argparse.Namespace) -> int:
    paths = (options.before, options.after)
    before, after = (results.read(results.latest(path) if path.is_dir() else path) for path in paths)
    names = [side.environment["device_name"] for side in (before, after)]
    if names[0] != names[1] and not options.any_device:
        raise ArgumentError(f"A was measured on {names[0]}, B on {names[1]} (--any-device compares them all the same)")
    by_speedup = "cpu" in (before.environment["device"], after.environment["device"])
    changes = compare(before, after, by_speedup)
    if not changes:
        raise ResultsError("compare: A and B have no row in common, or none that was timed alike")
    regressions = [change for change in changes if change.beyond and change.ratio < 1 / (1 + options.threshold)]
    column = column_of(before, after, by_speedup)
    measure = "speed-up over torch in B over that in A" if by_speedup else "time in A over time in B"
    print(f"A {before.run}\nB {after.run}\n{measure}, by {SAID[column or WALL]}; above 1: B is faster\n")
    print("\n".join(_means(changes)))
    faster = [change for change in reversed(changes) if change.beyond and change.ratio > 1 + options.threshold]
    for title, rows in (("slower beyond noise", regressions), ("faster beyond noise", faster)):
        print(f"\n{title}: {len(rows)} of {len(changes)}")
        cells = [[f"  {change.ratio:.3f}", *(str(change.row[key]) for key in KEY)] for change in rows[:SHOWN]]
        print("\n".join(text_table.lines(cells, numbers=0) if cells else ["  none"]))
    return WRONG if regressions else OK


def column_of(before: Run, after: Run, by_speedup: bool) -> str | None:
    """The first column that both runs have with its spread; of ratios that of the wall, which a CPU has alone."""
    both = [{name for row in run.results for name in COLUMNS if spread(row, name)} for run in (before, after)]
    return next((name for name in ((WALL,) if by_speedup else COLUMNS) if all(name in each for each in both)), None)


def compare(before: Run, after: Run, by_speedup: bool) -> list[Change]:
    """The rows that both runs have in :func:`column_of`, the slowest in B first."""
    column = column_of(before, after, by_speedup)
    if column is None:
        return []
    left, right = ({tuple(row[key] for key in KEY): row for row in each.results} for each in (before, after))
    changes = []
    for key in left.keys() & right.keys():
        old, new = left[key], right[key]
        a, b = ((ratio if by_speedup else spread)(row, column) for row in (old, new))
        if a is None or b is None or (by_speedup and old["variant"] == BASELINE):
            continue
        change = b.median / a.median if by_speedup else a.median / b.median
        apart = b.p80 < a.p20 or b.p20 > a.p80
        changes.append(Change(new, change, apart))
    return sorted(changes, key=lambda change: (change.ratio, str(change.row["layer"])))


def _means(changes: list[Change]) -> list[str]:
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for change in changes:
        pass_name = change.row["pass"] + (" + epilogue" if change.row.get("epilogue") else "")
        ratios.setdefault((pass_name, change.row["dtype"], change.row["variant"]), []).append(change.ratio)
    lines = [["pass", "dtype", "variant", "rows", "geomean", "least", "most"]]
    for kind, mine in sorted(ratios.items()):
        means = (f"{ratio:.3f}" for ratio in (geometric_mean(mine), min(mine), max(mine)))
        lines.append([*kind, str(len(mine)), *means])
    return text_table.lines(lines, numbers=4)
