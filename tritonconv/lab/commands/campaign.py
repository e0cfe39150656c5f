"""``tritonconv campaign``: verify, measure the roofs, tune and benchmark, within one budget."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import NoReturn

import torch

from tritonconv.autotune import store
from tritonconv.autotune.key import device_name
from tritonconv.lab import flags, text_table
from tritonconv.lab.bench import results, spent
from tritonconv.lab.bench.calls import FORWARD_BACKWARD
from tritonconv.lab.bench.failures import context_is_lost, one_line
from tritonconv.lab.bench.layer_sizes import at_sizes
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.bench.summary import summary
from tritonconv.lab.bench.workloads import workloads
from tritonconv.lab.campaign import STORE, Campaign, install
from tritonconv.lab.commands.common import (
    INTERRUPTED,
    OK,
    WRONG,
    add_flags,
    check_store,
    device_of,
    folder,
    load_variant_files,
    model_suites,
    run_of,
    use_compiled,
)

HELP = "verify, tune and time everything within one budget; the same command goes on"
EXAMPLE = "tritonconv campaign --suite unet --seconds 540 --output results"
# Layers of different classes that are also measured at several sizes: how time grows with work.
FAMILIES = ("segresnet_deconv_up0", "psmnet_train_64_32", "mednext_k3_dw_128", "monai_unet_spleen_32_2")
LEAST_SECONDS = 30.0  # for which a new process is worth starting
SIZES = {"cpu": (4, 6, 8, 12, 16, 24), "gpu": (8, 16, 32, 64, 128)}
DESCRIPTION = """\
Takes these steps, the most valuable first. It holds every variant against float64, on one layer of each class. It
measures the device's roofs. It tunes the layers; a dozen well-known ones come first. It times the layers with the
choices that it found, on a GPU the dozen beside torch.compile too. It measures the overhead of a call. It times
layers of some classes at several sizes. The results stay when the budget ends, and the same command goes on from
there. Where a kernel makes the GPU unusable, a new process goes on without that kernel. The end of the output says
where the seconds went; tritonconv report DIR draws the results.
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds",
        type=flags.seconds,
        required=True,
        metavar="S",
        help="budget for all steps; it begins when torch is imported and the device is found",
    )
    parser.add_argument("--output", "--out", required=True, **folder("folder of the results and of the store"))
    add_flags(
        parser, "only", suite="those of models", dtype="float32 on a CPU, bfloat16 on a GPU", layout="both",
        passes=f"forward,{FORWARD_BACKWARD}", scale="cpu on a CPU, else full",
    )  # fmt: skip
    add_flags(parser, "device", "variant-file", "compiled", "quiet")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction,
        help="time torch.compile too: on the dozen well-known layers, or on all where none of these is asked for "
        "(default: on a GPU only)",
    )  # fmt: skip
    parser.add_argument(
        "--install", action=argparse.BooleanOptionalAction, default=True,
        help="at the end put the choices into your store, from which calls take them (default); --no-install keeps "
        "them in DIR alone",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    added = load_variant_files(options)
    device = device_of(options.device)
    kind = "gpu" if device.type == "cuda" else "cpu"
    layers = workloads(options.suite or model_suites(), options.only)
    sized = (each for layer in layers if layer.name in FAMILIES for each in at_sizes(layer, SIZES[kind]))
    wanted = run_of(options, device, (*layers, *sized), "bfloat16" if kind == "gpu" else "float32", added)
    use_compiled(options, device)
    if options.install:
        check_store(device, instead="(with --no-install) --output")
    begin, shown = perf_counter(), progress(options.quiet, unit="steps", first="verifying")
    try:
        outcome = Campaign(wanted, options.output, shown).run()
    except Exception as error:
        left = options.seconds - (perf_counter() - begin)
        if not context_is_lost(error) or left < LEAST_SECONDS:
            raise
        shown.close()
        print(f"the GPU is lost to this process, and a new one goes on: {one_line(error)}", file=sys.stderr)
        _go_on(options.given, left)
    finally:
        shown.close()
    found = results.load(options.output)
    print(summary(found))
    print("\n" + "\n".join(outcome.steps))
    print("\nwhere the seconds went:\n\n" + "\n".join(text_table.lines(spent.lines(outcome.spent), numbers=1)))
    print(f"\nresults: {outcome.path}")
    print(_installed(options, device))
    if outcome.reason == "budget":
        print("the budget was used up; the same command goes on from here")
    if outcome.reason == "interrupted":
        return INTERRUPTED
    if not (found.results or found.tuned or found.checks):
        print(f"tritonconv campaign: nothing was measured in {options.seconds:g} s", file=sys.stderr)
        return WRONG
    return WRONG if outcome.errors else OK


def _installed(options: argparse.Namespace, device: torch.device) -> str:
    """A line that says where the choices are now. Raises StoreError where the user's store cannot be written."""
    if not options.install:
        return (
            f"choices: in {options.output / STORE} alone; TRITONCONV_CACHE={options.output / STORE} takes them into use"
        )
    return f"choices: {install(options.output, device)} in your store, {store.path_of(device_name(device))}"


def _go_on(given: Sequence[str], seconds: float) -> NoReturn:
    """The same command in the place of this process, which gives the GPU's memory back, with so many seconds.

    The results name the candidate that lost the GPU: the new process passes it over.
    """
    sys.stdout.flush()
    for file in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # the one of the listing
            os.set_inheritable(int(file), int(file) <= 2)
    os.execv(sys.executable, [sys.executable, "-m", "tritonconv", *given, "--seconds", f"{seconds:.1f}"])
