"""``tritonconv bench``: times layers beside torch, the overhead of a call, or what the device can do at most."""

from __future__ import annotations

import argparse
import itertools
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tritonconv import dispatch
from tritonconv.autotune.ceilings import from_roofs
from tritonconv.autotune.tuning import calibrate
from tritonconv.errors import ArgumentError, VariantNotApplicable
from tritonconv.kernels.registry import variant, variants
from tritonconv.kernels.variant import Variant
from tritonconv.lab import flags, text_table
from tritonconv.lab.bench import (
    bias_rates,
    call_overhead,
    cudnn_graph,
    formulations,
    kernelbench,
    memory,
    results,
    roofs,
    slab_times,
)
from tritonconv.lab.bench.calls import FORWARD_BACKWARD
from tritonconv.lab.bench.layer_sizes import SCALES, at_sizes
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.bench.recording import recording
from tritonconv.lab.bench.runner import bench
from tritonconv.lab.bench.stages import PASSES, with_epilogue
from tritonconv.lab.bench.summary import summary
from tritonconv.lab.bench.workloads import ALL, suites, workloads
from tritonconv.lab.commands.common import (
    INTERRUPTED,
    OK,
    RESULTS,
    WRONG,
    add_flags,
    check_store,
    device_of,
    dtypes_of,
    epilogue_of,
    folder,
    layer_lines,
    load_variant_files,
    passes_of,
    run_of,
    scale_for,
    use_compiled,
)
from tritonconv.lab.commands.model_steps import measure_models
from tritonconv.lab.inspection.compiling import products_in
from tritonconv.lab.models.factories import BUILT_IN, described
from tritonconv.precision import IEEE, TF32

HELP = "time layers beside torch; or the overhead of a call; the device's roofs; a CPU's formulations; slabs"
EXAMPLE = "tritonconv bench --suite unet --only monai --passes forward --layout ndhwc --seconds 20"
SLAB_COLUMNS = ["layer", "pass", "dtype", "layout", "scaling", "ranks", "total ms", "exchange ms", "compute ms",
                "efficiency", "bytes"]  # fmt: skip
ROOF_DTYPES = ("float32", "bfloat16", "float16")
DEVICE_SECONDS = 6.0  # of --overhead and --roofs
DESCRIPTION = (
    "Times tritonconv beside torch.nn.functional.conv_transpose3d, call by call in turns. Each output is\n"
    "first checked against float64. Each run writes a new results file (JSON Lines). Finished rows are\n"
    "kept, whatever ends the run.\n\n"
    "--overhead times the layer of tritonconv and torch's on a tiny layer instead: what a call costs\n"
    "besides the work. The exit code is 1 where ours takes more than --limit microseconds longer.\n\n"
    "--roofs measures the device instead: copies (read and written bytes count), matrix products of each\n"
    "dtype (on a GPU float32 with and without TF32) and one launch, each with torch's own routines. The\n"
    "best of many runs counts. The store keeps them, and the cost model uses them from then on. ATen's bias\n"
    "add and bias gradient, passes that a fused kernel does not make, come with them.\n\n"
    "The summary of a GPU's layers says how much memory a call takes at its peak beside torch's, and which\n"
    f"layers take more than {memory.MOST:g} of it; a CPU has no count of it.\n\n"
    "--activation, --residual, --rounding and --concat time the forward and the training step with what stands\n"
    "behind the layer: one call of ours beside torch's separate operations. The suite stages has named layers so.\n\n"
    "--formulations measures the torch formulations of each pass on the layers instead, on a CPU, into a\n"
    "file such as autotune/formulations_authenticamd.json: rows from which layers without a tuned choice\n"
    "have theirs on that vendor's CPUs.\n\n"
    "--kernelbench measures KernelBench's transposed 3-D convolutions as it defines them (float32, NCDHW, the\n"
    "forward), and prints geometric mean and fast_p of levels 1 and 2 beside the published figures. TF32 is\n"
    "torch's switch, set for both sides; `--kernelbench ieee` sets it off.\n\n"
    "--model measures whole models instead: the operations of one training step with torch's layers, each\n"
    "transposed convolution by itself beside ours, and the step, torch's layers against convert(model),\n"
    "eager and (--compile) compiled. A half dtype is that of autocast. The models are module:factory, a\n"
    "function without arguments or a module, with --input; or\n"
    + "\n".join(textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="    ") for line in described())
    + "\n\n"
    "--slabs times tritonconv.distributed on the layers instead, on each rank that torchrun started: the\n"
    "volume in slabs on 1, 2, 4 ... ranks, the exchange and the products apart, strong and weak scaling.\n\n"
    + "\n".join(textwrap.fill(f"scale {name}: {rule}", 100, subsequent_indent="  ") for name, rule in SCALES.items())
    + "\n\nsuites:\n"
    + "\n".join(f"  {name:12} {text}" for name, text in suites().items())
)
# The flags that go with --overhead alone, with --roofs alone, with the layers; and those that --formulations lacks.
OF_OVERHEAD, OF_ROOFS = ("use", "limit"), ("store",)
OF_LAYERS = ("suite", "only", "passes", "layout", "scale", "variants", "variant_files", "compiled", "compile", "sizes",
             "seed", "list", "copies", "cudnn_graph", "activation", "residual", "rounding", "concat")  # fmt: skip
OF_FORMULATIONS, OF_SLABS = ("suite", "only", "seed"), ("suite", "only", "layout", "scale", "seed")
OF_KERNELBENCH = ("only", "scale", "compiled", "compile", "seed", "variants", "variant_files", "copies",
                  "cudnn_graph")  # fmt: skip
OF_MODEL, OF_MODEL_TOO = ("input",), ("layout", "scale", "compiled", "compile", "seed")
FORMULATIONS_SECONDS = 180.0
SLABS_SECONDS = 3.0  # of a layer


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
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--overhead", action="store_true", help="time the overhead of a call instead of the layers")
    instead.add_argument("--roofs", action="store_true", help="measure the device's roofs instead of the layers")
    instead.add_argument(
        "--formulations", type=Path, metavar="FILE", help="measure a CPU's torch formulations into this file instead"
    )
    instead.add_argument(
        "--kernelbench", nargs="?", const=TF32, choices=(TF32, IEEE), help="measure KernelBench's layers instead",
    )  # fmt: skip
    instead.add_argument(
        "--model", type=flags.any_names, metavar="NAME[,NAME]",
        help=f"measure whole models instead: {', '.join(BUILT_IN)} or module:factory",
    )  # fmt: skip
    instead.add_argument(
        "--slabs", action="store_true", help="under torchrun: time the layers in slabs on the ranks instead"
    )
    parser.add_argument(
        "--input", type=flags.shapes, metavar="SHAPE[,SHAPE]",
        help="with --model: the tensors that its forward takes, such as 1x1x96x96x96",
    )  # fmt: skip
    parser.add_argument(
        "--use", type=flags.any_names, metavar="NAME[,NAME]", help="with --overhead: force these variants in our layer"
    )
    parser.add_argument(
        "--limit", type=flags.microseconds, metavar="US",
        help=f"with --overhead: the microseconds allowed over torch's layer (default: {call_overhead.LIMIT_US:g})",
    )  # fmt: skip
    parser.add_argument("--store", **folder("with --roofs: folder of the store that keeps them (default: the user's)"))


def run(options: argparse.Namespace) -> int:
    _check(options)
    device = device_of(options.device)
    if options.overhead:
        return _overhead(options, device)
    if options.roofs:
        return _roofs(options, device)
    if options.formulations:
        return _formulations(options, device)
    if options.model:
        return measure_models(options, device)
    if options.kernelbench:
        if flags.once(options.dtype, ("float32",)) != ("float32",):
            raise ArgumentError("argument --dtype: KernelBench's problems are float32")
        options.suite, options.passes, options.layout = [kernelbench.SUITE], ["forward"], ["ncdhw"]
        options.dtype = ["float32"]
        with products_in(options.kernelbench):
            return _layers(options, device)
    if options.slabs:
        return _slabs(options, device)
    return _layers(options, device)


def _check(options: argparse.Namespace) -> None:
    """Raises ArgumentError for a flag of another measurement than the one that is asked for."""
    named = ("overhead", "roofs", "formulations", "kernelbench", "model", "slabs")
    chosen = next((f"--{name}" for name in named if getattr(options, name)), "the layers")
    too = {"--formulations": OF_FORMULATIONS, "--kernelbench": OF_KERNELBENCH, "--model": OF_MODEL_TOO,
           "--slabs": OF_SLABS}  # fmt: skip
    allowed = too.get(chosen, ())
    goes = {"--overhead": OF_OVERHEAD, "--roofs": OF_ROOFS, "--model": OF_MODEL, "the layers": OF_LAYERS}
    for about, names in goes.items():
        for name in names:
            if about != chosen and name not in allowed and getattr(options, name) not in (None, "", False, []):
                flag = name.replace("_files", "-file").replace("_", "-")
                raise ArgumentError(f"argument --{flag}: goes with {about}, not with {chosen}")


def _layers(options: argparse.Namespace, device: torch.device) -> int:
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
    chosen = _variants(flags.once(options.variants, ()), passes_of(options))
    wanted = run_of(options, device, layers, "float32", (*chosen, *added))
    use_compiled(options, device)
    with progress(options.quiet) as shown:
        outcome = bench(wanted, options.output or RESULTS, shown)
    found = results.read(outcome.path)
    print(kernelbench.text(found) if options.kernelbench else summary(found))
    print(f"\nresults: {outcome.path}")
    if outcome.reason == "interrupted":
        return INTERRUPTED
    if not found.results:
        why = "the budget was used up" if outcome.reason == "budget" else "what failed and what was left out is above"
        print(f"tritonconv bench: nothing was measured: {why}", file=sys.stderr)
        return WRONG
    return WRONG if outcome.errors else OK


def _variants(names: tuple[str, ...], passes: tuple[str, ...]) -> tuple[Variant, ...]:
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


def _overhead(options: argparse.Namespace, device: torch.device) -> int:
    dtypes, target = dtypes_of(options, "float32"), options.output or RESULTS
    worst, lines = 0.0, [["pass", "dtype", "torch us", "tritonconv us", "difference us"]]
    rule = f"one tiny layer: {call_overhead.LAYER}"
    with recording(target, "overhead-", device, options.command, scale="given", scale_rule=rule) as writer:
        for dtype in dtypes:
            seconds = (options.seconds or DEVICE_SECONDS) / len(dtypes)
            measured = call_overhead.measure(device, dtype, seconds, options.use or ())
            try:
                rows = [writer.write("overhead", row) for row in measured]
            except (ArgumentError, VariantNotApplicable) as error:
                raise ArgumentError(f"argument --use: {error}") from None
            for name, difference in call_overhead.excess(rows).items():
                cells = [f"{row['median_us']:.1f} ({row['p20_us']:.1f} to {row['p80_us']:.1f})"
                         for row in rows if row["pass"] == name]  # fmt: skip
                lines.append([name, str(rows[0]["dtype"]), *cells, f"{difference:+.1f}"])
                worst = max(worst, difference)
    print("\n".join(text_table.lines(lines, numbers=3)))
    print(f"\nresults: {writer.path}")
    return WRONG if worst > (options.limit or call_overhead.LIMIT_US) else OK


def _roofs(options: argparse.Namespace, device: torch.device) -> int:
    check_store(device, options.store)
    dtypes, target = dtypes_of(options, *ROOF_DTYPES), options.output or RESULTS
    seconds = (options.seconds or DEVICE_SECONDS) / (2 + 6 * len(dtypes))
    with recording(target, "roofs-", device, options.command, scale="given", scale_rule="no layers") as writer:
        measured_rows = itertools.chain(*(each.measure(device, dtypes, seconds) for each in (roofs, bias_rates)))
        rows: list[dict[str, Any]] = [writer.write("roof", {**row, "when": "start"}) for row in measured_rows]
    lines = [["roof", "best", "median", "unit"]]
    for row in rows:
        factor, unit = (1e-9, f"G{row['unit']}") if row["unit"] != "us" else (1, "us per launch")
        lines.append([row["what"], f"{row['value'] * factor:.4g}", f"{row['median'] * factor:.4g}", unit])
    print("\n".join(text_table.lines(lines, numbers=3)))
    ceilings = from_roofs(rows, writer.environment, device)
    if ceilings is not None:
        calibrate.keep(ceilings, device, options.store)
        dispatch.forget()
    print(f"\nresults: {writer.path}")
    return OK


def _slabs(options: argparse.Namespace, device: torch.device) -> int:
    layers = workloads(options.suite or ALL, options.only, options.seed or 0)
    scale, layouts = scale_for(options.scale, device), flags.once(options.layout, ("ncdhw",))
    kinds = [(dtype, layout) for dtype in dtypes_of(options, "float32") for layout in layouts]
    cells = [(layer, layer.problem(*kind, scale)) for layer in layers for kind in kinds]
    seconds = SLABS_SECONDS if options.seconds is None else options.seconds / len(cells)
    with slab_times.ranks(device) as (own, groups):
        first = max(groups) == 1 or dist.get_rank() == 0
        if not first:
            for _, problem in cells:
                for _ in slab_times.measure(problem, own, seconds, groups):
                    pass
            return OK
        lines = [SLAB_COLUMNS]
        facts = {"scale": scale, "scale_rule": SCALES[scale], "ranks": max(groups)}
        with recording(options.output or RESULTS, "slabs-", own, options.command, options.seed or 0, **facts) as writer:
            for layer, problem in cells:
                named = {"layer": layer.name, "suite": layer.suite}
                rows = [writer.write("slab", {**named, **row})
                        for row in slab_times.measure(problem, own, seconds, groups)]  # fmt: skip
                lines += _slab_lines(rows)
    print("\n".join(text_table.lines(lines, numbers=6)))
    print(f"\nresults: {writer.path}")
    return OK


def _slab_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for the three parts of a pass, which follow each other."""
    lines = []
    for whole, exchange, compute in zip(*[iter(rows)] * 3, strict=True):
        facts = [whole["layer"], whole["pass"], whole["dtype"], whole["layout"], whole["scaling"], str(whole["ranks"])]
        times = [f"{row['median_ms']:.3g}" for row in (whole, exchange, compute)]
        lines.append([*facts, *times, f"{whole['efficiency']:.2f}", str(whole["exchanged_bytes"])])
    return lines


def _formulations(options: argparse.Namespace, device: torch.device) -> int:
    if device.type != "cpu":
        raise ArgumentError(f"argument --formulations: measures a CPU, --device names {device}")
    layers, count = workloads(options.suite or ALL, options.only, options.seed or 0), 0
    with progress(options.quiet) as shown:
        for dtype in dtypes_of(options, "float32"):
            seconds = options.seconds or FORMULATIONS_SECONDS
            count += formulations.extend(options.formulations, layers, dtype, seconds, shown)
    print(f"{count} rows measured: {options.formulations}")
    return OK
