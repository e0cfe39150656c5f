"""``tritonconv bench``: times the layers beside torch."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tritonconv.errors import ArgumentError
from tritonconv.kernels.registry import variant, variants
from tritonconv.kernels.variant import Variant
from tritonconv.lab import flags
from tritonconv.lab.bench import results
from tritonconv.lab.bench.calls import ALL_PASSES, FORWARD_BACKWARD
from tritonconv.lab.bench.options import Options
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.bench.runner import bench
from tritonconv.lab.bench.summary import summary
from tritonconv.lab.bench.workloads import ALL, SCALES, at_sizes, suites, workloads
from tritonconv.lab.commands.common import (
    DTYPES,
    INTERRUPTED,
    OK,
    RESULTS,
    WRONG,
    add_compiled,
    add_device,
    add_variant_files,
    layer_lines,
    load_variant_files,
    scale_for,
    use_compiled,
)
from tritonconv.lab.commands.common import device as device_of
from tritonconv.problem import LAYOUTS

HELP = "time the layers beside torch"
DESCRIPTION = (
    "Times tritonconv beside torch.nn.functional.conv_transpose3d, interleaved, each output checked\n"
    "against float64 first. One new results file (JSON Lines) per run; every finished row is kept\n"
    "whatever ends the run.\n\n"
    + "\n".join(f"scale {name}: {rule}" for name, rule in SCALES.items())
    + "\n\nsuites:\n"
    + "\n".join(f"  {name:12} {what}" for name, what in suites().items())
)


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.epilog = "example: tritonconv bench --suite unet --only monai --passes forward --layout ndhwc --seconds 20"
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
    add_device(parser)
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the results (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=flags.seed, default=0, metavar="N", help="seed of the random inputs (default: 0)"
    )
    add_variant_files(parser)
    add_compiled(parser)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="time torch.compile too (default: on a GPU only)"
    )
    parser.add_argument(
        "--sizes",
        type=flags.counts,
        metavar="N[,N]",
        help="also measure each layer at these cubic input sizes, batch 1: how time grows with work",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--list", action="store_true", help="list the layers that would run, and stop")


def run(options: argparse.Namespace) -> int:
    device = device_of(options.device)
    scale = scale_for(options.scale, device)
    added = load_variant_files(options)
    layers = workloads(options.suite or ALL, options.only)
    if options.sizes:
        layers = tuple(each for layer in layers for each in (layer, *at_sizes(layer, options.sizes)))
    if options.list:
        print("\n".join(layer_lines(layers, scale)))
        return OK
    passes = flags.once(options.passes, ("forward", FORWARD_BACKWARD))
    wanted = Options(
        layers=layers,
        passes=passes,
        dtypes=tuple(getattr(torch, name) for name in flags.once(options.dtype, ("float32",))),
        layouts=flags.once(options.layout, tuple(LAYOUTS)),
        variants=(*_variants(flags.once(options.variants, ()), passes), *added),
        compiled=device.type == "cuda" if options.compile is None else options.compile,
        scale=scale,
        seconds=options.seconds,
        device=device,
        seed=options.seed,
        command=("tritonconv", *options.given),
    )
    use_compiled(options, device)
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
