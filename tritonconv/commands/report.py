"""``tritonconv report``: tables and pictures of a run as one self-contained HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from tritonconv.bench import results
from tritonconv.commands.common import OK, RESULTS
from tritonconv.commands.plot import drawing
from tritonconv.errors import ResultsError

HELP = "make one HTML page of a run's tables and pictures"


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.description = (
        "Reads a results file (of a folder the newest, or all parts of a campaign) and writes one HTML page that needs "
        "nothing else: means, charts, every layer, roofs, tuned choices, errors, the environment."
    )
    parser.add_argument(
        "results", nargs="?", type=Path, default=RESULTS, help="a results file or a folder (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (default: report.html beside the results)"
    )


def run(options: argparse.Namespace) -> int:
    drawing()
    from tritonconv.plots import report

    found = results.load(options.results)
    folder = options.results if options.results.is_dir() else options.results.resolve().parent
    path = options.output or folder / "report.html"
    try:
        print(report.write(found, path))
    except OSError as error:
        raise ResultsError(f"output: cannot write {path}: {error}") from None
    return OK
