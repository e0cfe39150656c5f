"""``tritonconv report``: pictures and one HTML page of results, or how well the cost model predicts them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import ModuleType

from tritonconv.errors import ArgumentError, ResultsError
from tritonconv.lab import flags, markdown, predictions
from tritonconv.lab.bench import results
from tritonconv.lab.bench.calls import ALL_PASSES
from tritonconv.lab.commands.common import DTYPES, OK, RESULTS, add_flags, folder, load_variant_files
from tritonconv.problem import LAYOUTS

HELP = "draw the pictures and write the HTML page of results"
EXAMPLE = "tritonconv report results --pass forward --charts roofline,speedup"
SELECTION = {"pass": ALL_PASSES, "layout": tuple(LAYOUTS), "dtype": DTYPES}
DESCRIPTION = """\
Reads results: a file, or a folder. Of a folder it takes the newest file, or all parts of a campaign. It draws every
chart that the results have rows for, as PNG and SVG, and writes one HTML page that needs nothing else: means, the
charts, every layer, roofs, tuned choices, errors, the environment.

With --readme it writes one picture and the lines of a README that hold its figures, and nothing else.

With --model it prints instead how well the cost model predicts the times of single variants (of tritonconv tune, or of
tritonconv bench --variants all). First Spearman's rank correlation, the median over the layers, and how often the
model's first choice is the fastest or near it; then the measured over the predicted time of each kind of kernel.
--held-out fits the times of a GPU with one layer after the other left out, and prints how the choice for that layer
compares with the best measured one (the oracle) and with torch's own. --fit writes the fit to a file, as the one that
ships (autotune/fit_sm_90.json). Of several results, all of one device, the first is fitted, and of each further one the
kernels that were not timed before.
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", nargs="*", type=Path, metavar="RESULTS",
        help=f"a results file, or a folder of them; several with --readme or --model (default: {RESULTS})",
    )  # fmt: skip
    parser.add_argument("--output", **folder("folder of the page and the pictures (default: beside the results)"))
    parser.add_argument(
        "--charts", type=flags.any_names, default=(), metavar="NAME[,NAME]", help="draw these charts (default: all)"
    )
    for name, values in SELECTION.items():
        parser.add_argument(f"--{name}", choices=values, help=f"show this {name} only")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE",
        help="also replace the section of this device between the markers of a Markdown file",
    )  # fmt: skip
    parser.add_argument("--every-layer", action="store_true", help="with --markdown: add a table of every layer")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE",
        help="draw the headline of the first RESULTS, and put it and the means of all RESULTS into a Markdown file",
    )  # fmt: skip
    parser.add_argument("--model", action="store_true", help="print how well the cost model predicts the results")
    parser.add_argument("--held-out", action="store_true", help="print how well a fit chooses for layers left out")
    parser.add_argument("--fit", type=Path, metavar="FILE", help="fit the cost model to the results, and write the fit")
    add_flags(parser, "variant-file")


def run(options: argparse.Namespace) -> int:
    load_variant_files(options)
    paths = options.results or [RESULTS]
    if options.model or options.held_out or options.fit:
        _predictions(options, paths)
    elif options.readme:
        _readme(options, paths)
    elif len(paths) > 1:
        raise ArgumentError("argument RESULTS: only --readme, --model, --held-out and --fit take several")
    else:
        _write(options, paths[0])
    return OK


def _predictions(options: argparse.Namespace, paths: list[Path]) -> None:
    runs = [results.load(path) for path in paths]
    if options.model:
        print(predictions.accuracy(paths, runs))
    if options.held_out or options.fit:
        print(predictions.fitted(runs, options.held_out, options.fit))


def _write(options: argparse.Namespace, path: Path) -> None:
    charts = _drawing()
    from tritonconv.plots import html, section

    for name in options.charts:
        if name not in charts.names():
            raise ArgumentError(f"argument --charts: {name!r} is none of {', '.join(charts.names())}")
    if options.markdown is not None:
        markdown.parts(options.markdown, section.COMMAND)
    whole = results.load(path)
    for warning in whole.warnings:
        print(f"tritonconv report: {warning}", file=sys.stderr)
    chosen = whole.only(**{name: getattr(options, name) for name in SELECTION})
    target = options.output or (path if path.is_dir() else path.resolve().parent)
    try:
        pictures = charts.draw(chosen, target, options.charts)
        page = html.write(chosen, target, pictures)
    except OSError as error:
        raise ResultsError(f"argument --output: cannot write into {target}: {error}") from None
    print("\n".join(map(str, [*(each for paths in pictures.values() for each in paths), page])))
    if options.markdown is not None:
        section.update(whole, options.markdown, options.every_layer)
        print(options.markdown)


def _readme(options: argparse.Namespace, paths: list[Path]) -> None:
    _drawing()
    from tritonconv.plots import readme

    target = options.output or (paths[0] if paths[0].is_dir() else paths[0].resolve().parent)
    try:
        target.mkdir(parents=True, exist_ok=True)
        print(readme.update([results.load(path) for path in paths], options.readme, target))
    except OSError as error:
        raise ResultsError(f"argument --readme: cannot write: {error}") from None
    print(options.readme)


def _drawing() -> ModuleType:
    """The module of the charts. Raises ArgumentError where matplotlib is not installed.

    Nothing is shown, so the backend of the environment is of no account: a notebook's may not be installed here, and
    matplotlib would refuse to be imported.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib  # noqa: F401

        from tritonconv.plots import charts
    except ImportError as error:
        raise ArgumentError(f"drawing needs matplotlib ({error}): pip install 'tritonconv[bench]'") from None
    except ValueError as error:
        raise ArgumentError(f"matplotlib cannot be imported: a matplotlibrc of yours is damaged: {error}") from None
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return charts
