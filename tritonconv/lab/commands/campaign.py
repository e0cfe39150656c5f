"""``tritonconv campaign``: verify, measure the roofs, tune and benchmark, within one budget."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import NoReturn

import torch

from tritonconv.autotune import store
from tritonconv.autotune.key import device_name
from tritonconv.lab import flags
from tritonconv.lab.bench import results, spent
from tritonconv.lab.bench.calls import ALL_PASSES, FORWARD_BACKWARD
from tritonconv.lab.bench.failures import context_is_lost, one_line
from tritonconv.lab.bench.options import Options
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.bench.summary import columns, summary
from tritonconv.lab.bench.workloads import SCALES, at_sizes, suites, workloads
from tritonconv.lab.campaign import STORE, Campaign, install
from tritonconv.lab.commands.common import (
    DTYPES,
    INTERRUPTED,
    OK,
    WRONG,
    add_compiled,
    add_device,
    add_variant_files,
    load_variant_files,
    model_suites,
    scale_for,
    use_compiled,
)
from tritonconv.lab.commands.common import device as device_of
from tritonconv.problem import LAYOUTS

HELP = "verify, roofs, tune and bench in one budget; run again, it goes on"
# Layers of different classes that are also measured at several sizes: how time grows with work.
FAMILIES = ("segresnet_deconv_up0", "psmnet_train_64_32", "mednext_k3_dw_128", "monai_unet_spleen_32_2")
LEAST_SECONDS = 30.0  # for which a new process is worth starting
SIZES = {"cpu": (4, 6, 8, 12, 16, 24), "gpu": (8, 16, 32, 64, 128)}


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.description = (
        "In the order of value: variants are held against float64 on one layer per class; the device's roofs are "
        "measured; the layers are tuned, a dozen that a reader knows first; then benchmarked with what was found, and "
        "on a GPU those few beside torch.compile; the overhead of a call is measured; layers of some classes are "
        "benchmarked at several sizes. Everything is kept when the budget ends, and the same command goes on from "
        "there. Where a kernel loses the GPU, a new process does so, behind that kernel. At the end it says where the "
        "seconds went. tritonconv report DIR renders it."
    )
    parser.add_argument(
        "--seconds",
        type=flags.seconds,
        required=True,
        metavar="S",
        help="budget for all of it, from when torch is imported and the device is there",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results and of the store")
    flags.add_choice(parser, "--suite", suites(), "suites (default: those of models)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only layers whose name contains TEXT")
    flags.add_choice(parser, "--dtype", DTYPES, "dtypes (default: float32 on a CPU, bfloat16 on a GPU)")
    flags.add_choice(parser, "--layout", LAYOUTS, f"{', '.join(LAYOUTS)} (default: both)")
    flags.add_choice(parser, "--passes", ALL_PASSES, f"passes of the bench (default: forward,{FORWARD_BACKWARD})")
    parser.add_argument("--scale", choices=tuple(SCALES), help="(default: cpu on a CPU, else full)")
    add_device(parser)
    add_variant_files(parser)
    add_compiled(parser)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction,
        help="time torch.compile too, of the dozen layers that come first, or of those asked for where none of them is "
        "among these (default: on a GPU only)",
    )  # fmt: skip
    parser.add_argument(
        "--install", action=argparse.BooleanOptionalAction, default=True,
        help="at the end put the choices into your store, where calls look (default); --no-install keeps them in DIR",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(options: argparse.Namespace) -> int:
    added = load_variant_files(options)
    device = device_of(options.device)
    gpu = device.type == "cuda"
    layers = workloads(options.suite or model_suites(), options.only)
    families = (each for each in layers if each.name in FAMILIES)
    wanted = Options(
        layers=(*layers, *(each for family in families for each in at_sizes(family, SIZES["gpu" if gpu else "cpu"]))),
        passes=flags.once(options.passes, ("forward", FORWARD_BACKWARD)),
        dtypes=tuple(
            getattr(torch, name) for name in flags.once(options.dtype, ("bfloat16",) if gpu else ("float32",))
        ),
        layouts=flags.once(options.layout, tuple(LAYOUTS)),
        variants=added,
        scale=scale_for(options.scale, device),
        seconds=options.seconds,
        device=device,
        command=("tritonconv", *options.given),
        compiled=gpu if options.compile is None else options.compile,
    )
    use_compiled(options, device)
    begin, shown = perf_counter(), progress(options.quiet, unit="steps", first="verifying")
    try:
        outcome = Campaign(wanted, options.out, shown).run()
    except Exception as error:
        left = options.seconds - (perf_counter() - begin)
        if not context_is_lost(error) or left < LEAST_SECONDS:
            raise
        shown.close()
        print(f"the GPU is lost to this process, and a new one goes on: {one_line(error)}", file=sys.stderr)
        _go_on(options.given, left)
    finally:
        shown.close()
    print(summary(results.load(options.out)))
    print("\n" + "\n".join(outcome.steps))
    print("\nwhere the seconds went:\n\n" + "\n".join(columns(spent.lines(outcome.spent), numbers=1)))
    print(f"\nresults: {outcome.path}")
    print(_installed(options, device))
    if outcome.reason == "budget":
        print("the budget was used up; the same command goes on from here")
    if outcome.reason == "interrupted":
        return INTERRUPTED
    return WRONG if outcome.errors else OK


def _installed(options: argparse.Namespace, device: torch.device) -> str:
    """What became of the choices, in words. Raises StoreError where the user's store cannot be written."""
    if not options.install:
        return f"choices: in {options.out / STORE} alone; TRITONCONV_CACHE={options.out / STORE} takes them into use"
    return f"choices: {install(options.out, device)} in your store, {store.path_of(device_name(device))}"


def _go_on(given: Sequence[str], seconds: float) -> NoReturn:
    """The same command in the place of this process, which gives the GPU's memory back, with so many seconds.

    What lost the GPU is in the results: the new process passes it over.
    """
    sys.stdout.flush()
    for file in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # the one of the listing
            os.set_inheritable(int(file), int(file) <= 2)
    os.execv(sys.executable, [sys.executable, "-m", "tritonconv", *given, "--seconds", f"{seconds:.1f}"])
