"""``tritonconv report``: tables and pictures of a run as one self-contained HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from tritonconv.errors import ResultsError
from tritonconv.lab import markdown
from tritonconv.lab.bench import results
from tritonconv.lab.commands.common import OK, RESULTS
from tritonconv.lab.commands.plot import drawing

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
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE",
        help="also replace the section of this device between the markers of a Markdown file",
    )  # fmt: skip
    parser.add_argument("--every-layer", action="store_true", help="with a table of every layer in the Markdown file")


def run(options: argparse.Namespace) -> int:
    drawing()
    from tritonconv.plots import readme, report

    if options.markdown is not None:
        markdown.parts(options.markdown, readme.COMMAND)
    found = results.load(options.results)
    folder = options.results if options.results.is_dir() else options.results.resolve().parent
    path = options.output or folder / "report.html"
    try:
        print(report.write(found, path))
    except OSError as error:
        raise ResultsError(f"output: cannot write {path}: {error}") from None
    if options.markdown is not None:
        readme.update(found, options.markdown, options.every_layer)
        print(options.markdown)
    return OK
