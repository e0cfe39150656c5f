"""``tritonconv list``: the variants, or the layers."""

from __future__ import annotations

import argparse

from tritonconv.kernels.registry import triton_fault, variants
from tritonconv.lab.bench.workloads import ALL, workloads
from tritonconv.lab.commands.common import OK, add_flags, layer_lines

HELP = "list the variants or the layers"
EXAMPLE = "tritonconv list --layers --suite unet"
DESCRIPTION = (
    "Lists the variants, each with its idea; with --layers the layers, with their sizes and where they are used."
)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", action="store_true", help="list the layers instead of the variants")
    add_flags(parser, suite="all", scale="full")


def run(options: argparse.Namespace) -> int:
    if options.layers:
        print("\n".join(layer_lines(workloads(options.suite or ALL), options.scale or "full")))
        return OK
    for record in variants():
        varies = "" if record.deterministic else " (may differ from run to run on a GPU)"
        print(f"{record.name}\n    {record.idea}{varies}")
    fault = triton_fault()
    if fault is not None:
        print(f"no Triton variant: {fault}")
    return OK
