"""``tritonconv bench``: layers beside torch."""

from __future__ import annotations

import argparse
import sys

import torch

from tritonconv.errors import ArgumentError
from tritonconv.kernels.registry import variant, variants
from tritonconv.kernels.variant import Variant
from tritonconv.lab import flags
from tritonconv.lab.bench import cudnn_graph, memory, results
from tritonconv.lab.bench.calls import FORWARD_BACKWARD
from tritonconv.lab.bench.layer_sizes import at_sizes
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.bench.runner import bench
from tritonconv.lab.bench.stages import PASSES, with_epilogue
from tritonconv.lab.bench.summary import summary
from tritonconv.lab.bench.workloads import ALL, workloads
from tritonconv.lab.commands.common import (
    INTERRUPTED,
    OK,
    RESULTS,
    WRONG,
    add_flags,
    epilogue_of,
    layer_lines,
    load_variant_files,
    passes_of,
    run_of,
    scale_for,
    use_compiled,
)

FLAG = None
SAID = (
    "The summary of a GPU's layers says how much memory a call takes at its peak beside torch's, and which\n"
    f"layers take more than {memory.MOST:g} of it; a CPU has no count of it.\n\n"
    "--activation, --residual, --rounding and --concat time the forward and the training step with what stands\n"
    "behind the layer: one call of ours beside torch's separate operations. The suite stages has named layers so."
)
OWN = ("suite", "only", "passes", "layout", "scale", "variants", "variant_files", "compiled", "compile", "sizes",
       "seed", "list", "copies", "cudnn_graph", "activation", "residual", "rounding", "concat")  # fmt: skip
TOO = ()


def add(parser: argparse.ArgumentParser) -> None:
    add_flags(
        parser, "only", suite="all", passes=f"forward,{FORWARD_BACKWARD}", layout="both",
        scale="cpu on a CPU, else full", dtype="float32; with --roofs all but float64",
        seconds="0.5 s a cell; 6 s with --overhead or --roofs; 60 s a model",
    )  # fmt: skip
    parser.add_argument(
        "--variants", type=flags.any_names, action="extend", metavar="NAME[,NAME]",
        help="also time each of these variants by itself, in the cells of its own pass; or 'all'",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=flags.counts, metavar="N[,N]",
        help="also time each layer at these cubic input sizes, batch 1: how time grows with work",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=flags.seed, metavar="N", help="seed of the random inputs, and of the suite random (default: 0)"
    )
    add_flags(parser, "activation", "residual", "rounding")
    parser.add_argument("--concat", action="store_true", help="with a concatenation with a skip of the output's shape")
    add_flags(parser, "device", "variant-file", "compiled", "quiet", compile="on a GPU only", output=str(RESULTS))
    parser.add_argument(
        "--copies", action="store_true", help="also time a copy that moves the bytes of each pass, as a yardstick"
    )
    parser.add_argument(
        "--cudnn-graph", action="store_true",
        help=f"also time cuDNN's graph with the bias fused, forward, on a GPU; needs {cudnn_graph.PACKAGE}",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the layers that would run, and stop")


def run(options: argparse.Namespace, device: torch.device) -> int:
    added = load_variant_files(options)
    layers = workloads(options.suite or ALL, options.only, options.seed or 0)
    if options.sizes:
        layers = tuple(each for layer in layers for each in (layer, *at_sizes(layer, options.sizes)))
    layers = with_epilogue(layers, epilogue_of(options))
    if not set(options.passes or PASSES) <= set(PASSES) and any(layer.epilogue is not None for layer in layers):
        raise ArgumentError(f"argument --passes: of a layer with an epilogue only {' and '.join(PASSES)} are measured")
    if options.list:
        print("\n".join(layer_lines(layers, scale_for(options.scale, device))))
        return OK
    chosen = chosen_variants(flags.once(options.variants, ()), passes_of(options))
    wanted = run_of(options, device, layers, "float32", (*chosen, *added))
    use_compiled(options, device)
    with progress(options.quiet) as shown:
        outcome = bench(wanted, options.output or RESULTS, shown)
    found = results.read(outcome.path)
    print(summary(found))
    print(f"\nresults: {outcome.path}")
    if outcome.reason == "interrupted":
        return INTERRUPTED
    if not found.results:
        why = "the budget was used up" if outcome.reason == "budget" else "what failed and what was left out is above"
        print(f"tritonconv bench: nothing was measured: {why}", file=sys.stderr)
        return WRONG
    return WRONG if outcome.errors else OK


def chosen_variants(names: tuple[str, ...], passes: tuple[str, ...]) -> tuple[Variant, ...]:
    """The variants of --variants. Raises ArgumentError for one that is none, or of a pass that is not measured."""
    if names == (ALL,):
        return tuple(record for record in variants() if record.pass_name in passes)
    records = []
    for name in names:
        try:
            record = variant(name)
        except ArgumentError as error:
            raise ArgumentError(f"argument --variants: {error}") from None
        if record.pass_name not in passes:
            raise ArgumentError(
                f"argument --variants: {name} computes {record.pass_name}, --passes has {','.join(passes)}"
            )
        records.append(record)
    return tuple(records)
