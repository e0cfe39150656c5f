"""``tritonconv explain``: which variant serves a layer, and why."""

from __future__ import annotations

import argparse

from tritonconv.explain import explain_problem
from tritonconv.lab import flags
from tritonconv.lab.bench.layer_sizes import SCALES
from tritonconv.lab.bench.stages import with_epilogue
from tritonconv.lab.bench.workloads import workload
from tritonconv.lab.commands.common import OK, add_flags, device_of, dtypes_of, epilogue_of, load_variant_files

HELP = "say which variant serves a layer, and why"
EXAMPLE = "tritonconv explain vnet_up3 --dtype bfloat16"
DESCRIPTION = "Prints the variant that serves each pass of a layer here, and why it and no other."


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("layer", help="a layer's name (tritonconv list --layers)")
    add_flags(parser, "device", "variant-file", "activation", "residual", "rounding", layout="ncdhw", dtype="float32",
              scale="full")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    load_variant_files(options)
    device = device_of(options.device)
    (layer,) = with_epilogue((workload(options.layer),), epilogue_of(options))
    scale = options.scale or "full"
    for dtype in dtypes_of(options, "float32"):
        for layout in flags.once(options.layout, ("ncdhw",)):
            explain_problem(layer.problem(dtype, layout, scale), device)
    print(f"{layer.name}, suite {layer.suite}, scale {scale} ({SCALES[scale]}); source: {layer.source}")
    return OK
