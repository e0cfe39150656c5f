"""``tritonconv bench --kernelbench``: KernelBench's layers beside the published figures."""

from __future__ import annotations

import argparse

import torch

from tritonconv.errors import ArgumentError
from tritonconv.lab import flags
from tritonconv.lab.bench import kernelbench
from tritonconv.lab.commands.measurements import layers
from tritonconv.lab.inspection.compiling import products_in
from tritonconv.precision import IEEE, TF32

FLAG = {"nargs": "?", "const": TF32, "choices": (TF32, IEEE), "help": "measure KernelBench's layers instead"}
SAID = (
    "--kernelbench measures KernelBench's transposed 3-D convolutions as it defines them (float32, NCDHW, the\n"
    "forward), and prints geometric mean and fast_p of levels 1 and 2 beside the published figures. TF32 is\n"
    "torch's switch, set for both sides; `--kernelbench ieee` sets it off."
)
OWN = ()
TOO = ("only", "scale", "compiled", "compile", "seed", "variants", "variant_files", "copies", "cudnn_graph")


def add(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace, device: torch.device) -> int:
    if flags.once(options.dtype, ("float32",)) != ("float32",):
        raise ArgumentError("argument --dtype: KernelBench's problems are float32")
    options.suite, options.passes, options.layout = [kernelbench.SUITE], ["forward"], ["ncdhw"]
    options.dtype = ["float32"]
    with products_in(options.kernelbench):
        return layers.run(options, device)
