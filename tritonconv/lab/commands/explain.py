"""``tritonconv explain``: which variant serves a layer, and why."""

from __future__ import annotations

import argparse

import torch

from tritonconv.explain import explain_problem
from tritonconv.lab import flags
from tritonconv.lab.bench.workloads import SCALES, workload
from tritonconv.lab.commands.common import DTYPES, OK, add_device, add_variant_files, load_variant_files
from tritonconv.lab.commands.common import device as device_of
from tritonconv.problem import LAYOUTS

HELP = "say which variant serves a layer, and why"


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.add_argument("layer", help="a layer's name (tritonconv list --layers)")
    flags.add_choice(parser, "--layout", LAYOUTS, "layouts (default: ncdhw)")
    flags.add_choice(parser, "--dtype", DTYPES, "dtypes (default: float32)")
    parser.add_argument(
        "--scale", choices=tuple(SCALES), default="full", help="sizes to explain (default: %(default)s)"
    )
    add_device(parser)
    add_variant_files(parser)


def run(options: argparse.Namespace) -> int:
    load_variant_files(options)
    device = device_of(options.device)
    layer = workload(options.layer)
    for dtype in flags.once(options.dtype, ("float32",)):
        for layout in flags.once(options.layout, ("ncdhw",)):
            explain_problem(layer.problem(getattr(torch, dtype), layout, options.scale), device)
    print(f"{layer.name}, suite {layer.suite}, scale {options.scale} ({SCALES[options.scale]}); source: {layer.source}")
    return OK
