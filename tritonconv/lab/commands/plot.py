"""``tritonconv plot``: draws the charts of a results file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

from tritonconv.errors import ArgumentError, ResultsError
from tritonconv.lab import flags
from tritonconv.lab.bench import results
from tritonconv.lab.bench.calls import ALL_PASSES
from tritonconv.lab.commands.common import DTYPES, OK, RESULTS
from tritonconv.problem import LAYOUTS

HELP = "draw the charts of a results file"


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.description = (
        "Draws every chart that the results have rows for, as PNG and SVG; needs nothing but the file. Of a folder the "
        "newest file is taken, or all parts of a campaign."
    )
    parser.add_argument(
        "results", nargs="?", type=Path, help="a results file, or a folder of them (default: the newest in --output)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the pictures (default: beside the results)"
    )
    parser.add_argument(
        "--chart", type=flags.any_names, default=(), metavar="NAME[,NAME]", help="only these charts (default: all)"
    )
    parser.add_argument("--pass", dest="pass_name", choices=ALL_PASSES, help="only this pass")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), help="only this layout")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")


def run(options: argparse.Namespace) -> int:
    charts = drawing()
    for name in options.chart:
        if name not in charts.names():
            raise ArgumentError(f"argument --chart: got {name!r}, expected a comma list of {', '.join(charts.names())}")
    path = options.results or options.output or RESULTS
    run = results.load(path)
    for warning in run.warnings:
        print(f"tritonconv plot: {warning}", file=sys.stderr)
    chosen = {"pass_name": options.pass_name, "layout": options.layout, "dtype": options.dtype}
    _check_filters(run, chosen)
    folder = options.output or (path if path.is_dir() else path.resolve().parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = charts.draw(run, folder, options.chart, **chosen)
    except OSError as error:
        raise ResultsError(f"output: cannot write pictures into {folder}: {error}") from None
    except ResultsError:
        if options.chart:
            raise
        raise ResultsError(_nothing(run, charts, chosen)) from None
    for pictures in drawn.values():
        print("\n".join(map(str, pictures)))
    return OK


def drawing() -> ModuleType:
    """The module of the charts. Raises ArgumentError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401

        from tritonconv.plots import charts
    except ImportError as error:
        raise ArgumentError(f"drawing needs matplotlib ({error}): pip install 'tritonconv[bench]'") from None
    return charts


def _check_filters(run: results.Run, chosen: dict[str, str | None]) -> None:
    rows = [*run.results, *run.timings, *run.overheads]
    for name, value in chosen.items():
        field = name.removesuffix("_name")
        found = dict.fromkeys(row[field] for row in rows)
        if value is not None and value not in found:
            raise ResultsError(f"--{field} {value!r}: {run.path} has rows for {', '.join(found) or 'no layer'} only")


def _nothing(run: results.Run, charts: ModuleType, chosen: dict[str, str | None]) -> str:
    """Why no chart could be drawn: what the file holds, and what writes rows for charts."""
    kinds = ("results", "timings", "tuned", "overheads", "checks", "roofs", "skips", "errors")
    held = [f"{len(getattr(run, kind))} {kind}" for kind in kinds if getattr(run, kind)]
    asked = ", ".join(value for value in chosen.values() if value)
    makers = dict.fromkeys(charts.chart(name).MADE_BY for name in charts.names())
    return (
        f"results: {run.path} holds {', '.join(held) or 'no row'}, of which no chart can be drawn"
        f"{f' for {asked}' if asked else ''}; rows for charts are written by {', '.join(makers)}"
    )
