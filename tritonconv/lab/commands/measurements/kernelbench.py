"""``tritonconv bench --kernelbench``: KernelBench's problems beside the published figures."""

from __future__ import annotations

import argparse
import sys

import torch

from tritonconv.errors import ArgumentError
from tritonconv.lab import flags
from tritonconv.lab.bench import kernelbench, results
from tritonconv.lab.bench.layer_sizes import Workload
from tritonconv.lab.bench.progress import Progress, progress
from tritonconv.lab.bench.recording import recording
from tritonconv.lab.bench.results import KERNELBENCH, Writer
from tritonconv.lab.bench.runner import header, measure
from tritonconv.lab.bench.workloads import workloads
from tritonconv.lab.commands.common import INTERRUPTED, OK, RESULTS, WRONG, load_variant_files, run_of, use_compiled
from tritonconv.lab.commands.measurements.layers import chosen_variants
from tritonconv.lab.inspection.compiling import products_in
from tritonconv.lab.models import level2, level2_times
from tritonconv.lab.models.level2_times import Asked
from tritonconv.precision import IEEE, TF32

FLAG = {"nargs": "?", "const": TF32, "choices": (TF32, IEEE), "help": "measure KernelBench's problems instead"}
SAID = (
    "--kernelbench measures KernelBench's transposed 3-D convolutions as it defines them (float32, NCDHW, the\n"
    "forward), and prints geometric mean and fast_p of levels 1 and 2 beside the published figures. Level 2 is\n"
    "the layer and the operations behind it: ours is convert(model), and fuse(model) where that takes one of\n"
    f"them; right is a difference within {level2_times.TOLERANCE:g}, KernelBench's tolerance. TF32 is torch's switch,\n"
    "set for both sides; `--kernelbench ieee` sets it off. At scale cpu the layers of level 1 are shrunk, and of\n"
    f"level 2 the batch (to {level2.CPU_BATCH} at most); the output says so. A problem of level 2 that a CPU cannot\n"
    f"measure in {level2_times.SECONDS:g} s, or in its share of --seconds, is listed as not run."
)
OWN = ()
TOO = ("only", "scale", "compiled", "compile", "seed", "variants", "variant_files", "copies", "cudnn_graph")


def add(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace, device: torch.device) -> int:
    if flags.once(options.dtype, ("float32",)) != ("float32",):
        raise ArgumentError("argument --dtype: KernelBench's problems are float32")
    options.passes, options.layout = ["forward"], ["ncdhw"]
    found = workloads(kernelbench.SUITE, options.only, options.seed or 0)
    with products_in(options.kernelbench):
        return _measured(options, device, found)


def _measured(options: argparse.Namespace, device: torch.device, found: tuple[Workload, ...]) -> int:
    variants = (*chosen_variants(flags.once(options.variants, ()), ("forward",)), *load_variant_files(options))
    of_1 = tuple(layer for layer in found if kernelbench.level_of(layer.name) == 1)
    of_2 = [layer.name for layer in found if kernelbench.level_of(layer.name) == 2]
    share = None if options.seconds is None else options.seconds / len(found)
    if share is not None:
        options.seconds = share * len(of_1)
    layers = run_of(options, device, of_1, "float32", variants)
    use_compiled(options, device)
    asked = Asked(device, share or level2_times.SECONDS, layers.seed, layers.compiled)
    facts = header(layers)
    if of_2 and layers.scale == "cpu":
        facts["scale_rule"] = f"{facts['scale_rule']}; {level2.SCALE_RULE}"
    with (
        progress(options.quiet) as shown,
        recording(options.output or RESULTS, KERNELBENCH, device, options.command, layers.seed, **facts) as writer,
    ):
        if of_1:
            writer.end["reason"] = measure(layers, writer, shown).reason
        if of_2 and writer.end["reason"] != "interrupted":
            _level_2([level2.problem(name, layers.scale) for name in of_2], asked, writer, shown)
    run = results.read(writer.path)
    print(kernelbench.text(run))
    print(f"\nresults: {writer.path}")
    if writer.end["reason"] == "interrupted":
        return INTERRUPTED
    if not run.results and not run.problems:
        print("tritonconv bench: nothing was measured: why is above", file=sys.stderr)
        return WRONG
    return WRONG if run.errors else OK


def _level_2(problems: list[level2.Network], asked: Asked, writer: Writer, shown: Progress) -> None:
    shown.begin(len(problems))
    try:
        for each in problems:
            level2_times.measured(each, asked, writer)
            shown.step(each.name)
    except KeyboardInterrupt:  # what is measured is shown
        writer.end["reason"] = "interrupted"
