"""``tritonconv bench --model``: whole models, torch's layers beside the converted ones."""

from __future__ import annotations

import argparse
import itertools
import textwrap

import torch

from tritonconv.errors import ArgumentError
from tritonconv.lab import flags
from tritonconv.lab.bench import results
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.bench.recording import recording
from tritonconv.lab.bench.results import BASELINE
from tritonconv.lab.commands.common import INTERRUPTED, OK, RESULTS, WRONG, dtypes_of, scale_for, use_compiled
from tritonconv.lab.models import breakdown
from tritonconv.lab.models.factories import BUILT_IN, described, network
from tritonconv.lab.models.twins import Wanted, twins
from tritonconv.lab.models.whole_model import STEP, head_of, measured

FLAG = {"type": flags.any_names, "metavar": "NAME[,NAME]",
        "help": f"measure whole models instead: {', '.join(BUILT_IN)} or module:factory"}  # fmt: skip
SAID = (
    "--model measures whole models instead: the operations of one training step with torch's layers, each\n"
    "transposed convolution by itself beside ours, and the step, torch's layers against convert(model),\n"
    "eager and (--compile) compiled. A half dtype is that of autocast. The models are module:factory, a\n"
    "function without arguments or a module, with --input; or\n"
    + "\n".join(textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="    ") for line in described())
)
OWN, TOO = ("input",), ("layout", "scale", "compiled", "compile", "seed")
SECONDS = 60.0  # of one model in one dtype and layout


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", type=flags.shapes, metavar="SHAPE[,SHAPE]",
        help="with --model: the tensors that its forward takes, such as 1x1x96x96x96",
    )  # fmt: skip


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Measures each model in each dtype and layout, and prints the tables. Returns the exit code.

    Raises ArgumentError where a single one cannot be measured; among several it is an error row.
    """
    scale = scale_for(options.scale, device)
    if options.input and len(options.model) > 1:
        raise ArgumentError("argument --input: goes with one model")
    networks = [network(name, options.input or (), scale) for name in options.model]
    dtypes, layouts = dtypes_of(options, "float32"), flags.once(options.layout, ("ncdhw",))
    use_compiled(options, device)
    count = len(networks) * len(dtypes) * len(layouts)
    seconds = options.seconds / count if options.seconds else SECONDS
    compiled = device.type == "cuda" if options.compile is None else options.compile
    pairs, seed = itertools.product(dtypes, layouts), options.seed or 0
    ways = [Wanted(device, dtype, layout, seconds, seed, compiled) for dtype, layout in pairs]
    target, facts = options.output or RESULTS, {"scale": scale, "scale_rule": "whole models, inputs as each row says"}
    with progress(options.quiet, unit="models", first="building the model") as shown:
        # One that cannot be had leaves no file.
        made = twins(networks[0], ways[0]) if count == 1 else None
        with recording(target, results.MODEL, device, options.command, seed, **facts) as writer:
            shown.begin(count)
            try:
                for each, way in itertools.product(networks, ways):
                    try:
                        measured(each, way, writer, made)
                    except ArgumentError as error:
                        failed = {"layer": each.name, "pass": STEP, "variant": BASELINE, "status": "error"}
                        writer.write("error", {**failed, "message": str(error), **head_of(each, way)})
                    shown.step(f"{each.name} {way.layout}")
            except KeyboardInterrupt:  # what is measured is shown
                writer.end["reason"] = "interrupted"
    found = results.read(writer.path)
    print(breakdown.text(found))
    print(f"\nresults: {writer.path}")
    if writer.end.get("reason") == "interrupted":
        return INTERRUPTED
    return WRONG if found.errors or not found.steps else OK
