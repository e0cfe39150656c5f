"""``tritonconv bench --formulations``: a CPU's torch formulations of each pass."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tritonconv.errors import ArgumentError
from tritonconv.lab.bench import formulations
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.bench.workloads import ALL, workloads
from tritonconv.lab.commands.common import OK, dtypes_of

FLAG = {"type": Path, "metavar": "FILE", "help": "measure a CPU's torch formulations into this file instead"}
SAID = (
    "--formulations measures the torch formulations of each pass on the layers instead, on a CPU, into a\n"
    "file such as autotune/formulations_authenticamd.json: rows from which layers without a tuned choice\n"
    "have theirs on that vendor's CPUs."
)
OWN, TOO = (), ("suite", "only", "seed")
SECONDS = 180.0


def add(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace, device: torch.device) -> int:
    if device.type != "cpu":
        raise ArgumentError(f"argument --formulations: measures a CPU, --device names {device}")
    layers, count = workloads(options.suite or ALL, options.only, options.seed or 0), 0
    with progress(options.quiet) as shown:
        for dtype in dtypes_of(options, "float32"):
            seconds = options.seconds or SECONDS
            count += formulations.extend(options.formulations, layers, dtype, seconds, shown)
    print(f"{count} rows measured: {options.formulations}")
    return OK
