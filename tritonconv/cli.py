"""The command line: ``tritonconv bench``, ``plot``, ``explain``, ``inspect``, ``list``.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a result was wrong or could not be had,
2 bad usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from tritonconv import flags
from tritonconv.bench import results
from tritonconv.bench.calls import ALL_PASSES, FORWARD_BACKWARD
from tritonconv.bench.progress import progress
from tritonconv.bench.summary import columns, summary
from tritonconv.bench.workloads import ALL, SCALES, Workload, suites, workload, workloads
from tritonconv.errors import ArgumentError, ResultsError
from tritonconv.explain import explain
from tritonconv.inspection import command as inspect_command
from tritonconv.kernels.registry import Variant, variant, variants
from tritonconv.problem import LAYOUTS
from tritonconv.runner import Options, bench

OK, WRONG, USAGE, INTERRUPTED = 0, 1, 2, 130
DTYPES = ("float32", "float16", "bfloat16", "float64")
RESULTS = Path("results")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    try:
        options = parser.parse_args(given)
    except SystemExit as stop:  # argparse printed its message; --help ends with 0
        return stop.code if isinstance(stop.code, int) else USAGE
    options.given = given
    try:
        return options.command(options)
    except (ArgumentError, ResultsError) as error:
        print(f"tritonconv {options.name}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(f"tritonconv {options.name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what Python would still flush at exit has no reader
        return 0


def _bench(options: argparse.Namespace) -> int:
    device = _device(options.device)
    scale = options.scale or ("cpu" if device.type == "cpu" else "full")
    layers = workloads(options.suite or ALL, options.only)
    if options.list:
        print("\n".join(_layer_lines(layers, scale)))
        return OK
    passes = flags.once(options.passes, ("forward", FORWARD_BACKWARD))
    wanted = Options(
        layers=layers,
        passes=passes,
        dtypes=tuple(getattr(torch, name) for name in flags.once(options.dtype, ("float32",))),
        layouts=flags.once(options.layout, tuple(LAYOUTS)),
        variants=_variants(flags.once(options.variants, ()), passes),
        scale=scale,
        seconds=options.seconds,
        device=device,
        seed=options.seed,
        command=("tritonconv", *options.given),
    )
    shown = progress(options.quiet)
    try:
        outcome = bench(wanted, options.output, shown)
    finally:
        shown.close()
    print(summary(results.read(outcome.path)))
    print(f"\nresults: {outcome.path}")
    if outcome.reason == "interrupted":
        return INTERRUPTED
    return WRONG if outcome.errors else OK


def _plot(options: argparse.Namespace) -> int:
    try:
        from tritonconv.plots import roofline, speedup
    except ImportError as error:
        raise ArgumentError(f"drawing needs matplotlib ({error}): pip install 'tritonconv[bench]'") from None
    folder = options.output or RESULTS
    path = options.results or results.latest(folder)
    if path.is_dir():
        path = results.latest(path)
    run = results.read(path)
    for warning in run.warnings:
        print(f"tritonconv plot: {warning}", file=sys.stderr)
    chosen = {"pass_name": options.pass_name, "layout": options.layout, "dtype": options.dtype}
    _check_filters(run, chosen)
    folder = options.output or path.resolve().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in (roofline, speedup):
            for picture in chart.draw(run, folder, **chosen):
                print(picture)
    except OSError as error:
        raise ResultsError(f"output: cannot write pictures into {folder}: {error}") from None
    return OK


def _check_filters(run: results.Run, chosen: dict[str, str | None]) -> None:
    for name, value in chosen.items():
        field = name.removesuffix("_name")
        found = run.values(field)
        if value is not None and value not in found:
            raise ResultsError(f"--{field} {value!r}: {run.path} has results for {', '.join(found) or 'no layer'} only")
    if not run.select(**chosen):
        asked = ", ".join(value for value in chosen.values() if value)
        raise ResultsError(f"results: {run.path} holds no result{f' for {asked}' if asked else ''}")


def _explain(options: argparse.Namespace) -> int:
    layer = workload(options.layer)
    for dtype in flags.once(options.dtype, ("float32",)):
        for layout in flags.once(options.layout, ("ncdhw",)):
            explain(layer.problem(getattr(torch, dtype), layout, options.scale))
    print(f"{layer.name}, suite {layer.suite}, scale {options.scale} ({SCALES[options.scale]}); source: {layer.source}")
    return OK


def _list(options: argparse.Namespace) -> int:
    if options.layers:
        print("\n".join(_layer_lines(workloads(options.suite or ALL), options.scale)))
        return OK
    for record in variants():
        varies = "" if record.deterministic else " (may differ from run to run on a GPU)"
        print(f"{record.name}\n    {record.idea}{varies}")
    return OK


def _inspect(options: argparse.Namespace) -> int:
    return OK if inspect_command.inspect(options) else WRONG


def _layer_lines(layers: Iterable[Workload], scale: str) -> list[str]:
    rows = [["layer", "suite", "sizes", "used in", "source"]]
    for layer in layers:
        sizes = str(layer.problem(scale=scale)).replace(" float32 ncdhw", "")
        rows.append([layer.name, layer.suite, sizes, layer.used_in, layer.source])
    return columns(rows, numbers=0)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"argument --device: got 'cuda', and torch {torch.__version__} sees only the CPU")
    return torch.device(name)


def _variants(names: tuple[str, ...], passes: tuple[str, ...]) -> tuple[Variant, ...]:
    if names == (ALL,):
        return tuple(record for record in variants() if record.pass_name in passes)
    found = []
    for name in names:
        try:
            record = variant(name)
        except ArgumentError as error:
            raise ArgumentError(f"argument --variants: {error}") from None
        if record.pass_name not in passes:
            raise ArgumentError(
                f"argument --variants: {name} computes {record.pass_name}, --passes has {','.join(passes)}"
            )
        found.append(record)
    return tuple(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tritonconv",
        description="Measures 3-D transposed convolution on the layers of real models.",
        epilog="exit codes: 0 done; 1 a result was wrong or could not be had; 2 bad usage or input; 130 interrupted",
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="{bench,plot,explain,inspect,list}")
    _add_bench(commands.add_parser(
        "bench",
        help="time the layers beside torch",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times tritonconv beside torch.nn.functional.conv_transpose3d, interleaved, each output checked\n"
        "against float64 first. One new results file (JSON Lines) per run; every finished row is kept\n"
        "whatever ends the run.\n\n"
        + "\n".join(f"scale {name}: {rule}" for name, rule in SCALES.items())
        + "\n\nsuites:\n"
        + "\n".join(f"  {name:12} {what}" for name, what in suites().items()),
        epilog="example: tritonconv bench --suite unet --only monai --passes forward --layout ndhwc --seconds 20",
    ))  # fmt: skip
    _add_plot(commands.add_parser("plot", help="draw the roofline and the speed-up chart of a results file"))
    asked = commands.add_parser("explain", help="say which variant serves a layer, and why")
    asked.add_argument("layer", help="a layer's name (tritonconv list --layers)")
    flags.add_choice(asked, "--layout", LAYOUTS, "layouts (default: ncdhw)")
    flags.add_choice(asked, "--dtype", DTYPES, "dtypes (default: float32)")
    asked.add_argument("--scale", choices=tuple(SCALES), default="full", help="sizes to explain (default: %(default)s)")
    asked.set_defaults(command=_explain)
    compiled = commands.add_parser("inspect", help="compile the Triton kernels for GPUs that are not here, and look")
    inspect_command.add(compiled)
    compiled.set_defaults(command=_inspect)
    listed = commands.add_parser("list", help="list the variants, or the layers")
    listed.add_argument("--layers", action="store_true", help="list the layers instead")
    flags.add_choice(listed, "--suite", suites(), "with --layers: suites (default: all)")
    listed.add_argument("--scale", choices=tuple(SCALES), default="full", help="sizes to list (default: %(default)s)")
    listed.set_defaults(command=_list)
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    flags.add_choice(parser, "--suite", suites(), "suites to run (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only layers whose name contains TEXT")
    flags.add_choice(parser, "--passes", ALL_PASSES, f"{', '.join(ALL_PASSES)} (default: forward,{FORWARD_BACKWARD})")
    flags.add_choice(parser, "--dtype", DTYPES, f"{', '.join(DTYPES)} (default: float32)")
    flags.add_choice(parser, "--layout", LAYOUTS, f"{', '.join(LAYOUTS)} (default: both)")
    parser.add_argument(
        "--variants", type=flags.any_names, action="extend", metavar="NAME[,NAME]",
        help="time these variants by themselves too, or 'all'; each in the cells of its own pass",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=flags.seconds, metavar="S",
        help="budget for the run: layers share it, and it ends early with everything kept (default: 0.5 s a cell)",
    )  # fmt: skip
    parser.add_argument(
        "--scale", choices=tuple(SCALES), help="cpu shrinks the layers as said above (default: cpu on a CPU, else full)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: cuda if any)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the results (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=flags.seed, default=0, metavar="N", help="seed of the random inputs (default: 0)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--list", action="store_true", help="list the layers that would run, and stop")
    parser.set_defaults(command=_bench)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", nargs="?", type=Path, help="a results file, or a folder of them (default: the newest in --output)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the pictures (default: beside the results)"
    )
    parser.add_argument("--pass", dest="pass_name", choices=ALL_PASSES, help="only this pass")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), help="only this layout")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.set_defaults(command=_plot)
