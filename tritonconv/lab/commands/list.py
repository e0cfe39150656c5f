"""``tritonconv list``: the variants, or the layers."""

from __future__ import annotations

import argparse

from tritonconv.kernels.registry import triton_fault, variants
from tritonconv.lab import flags
from tritonconv.lab.bench.workloads import ALL, SCALES, suites, workloads
from tritonconv.lab.commands.common import OK, layer_lines

HELP = "list the variants, or the layers"


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.add_argument("--layers", action="store_true", help="list the layers instead")
    flags.add_choice(parser, "--suite", suites(), "with --layers: suites (default: all)")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="sizes to list (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    if options.layers:
        print("\n".join(layer_lines(workloads(options.suite or ALL), options.scale)))
        return OK
    for record in variants():
        varies = "" if record.deterministic else " (may differ from run to run on a GPU)"
        print(f"{record.name}\n    {record.idea}{varies}")
    fault = triton_fault()
    if fault is not None:
        print(f"no Triton variant: {fault}")
    return OK
