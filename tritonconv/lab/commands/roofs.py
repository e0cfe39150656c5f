"""``tritonconv roofs``: measures what the device can do at most, and keeps it for the cost model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tritonconv import dispatch
from tritonconv.autotune.ceilings import from_roofs
from tritonconv.autotune.tuning import calibrate
from tritonconv.lab import flags
from tritonconv.lab.bench import results, roofs
from tritonconv.lab.bench.environment import environment
from tritonconv.lab.bench.summary import columns
from tritonconv.lab.commands.common import OK, RESULTS, add_device
from tritonconv.lab.commands.common import device as device_of

HELP = "measure the device's ceilings: copies, matrix products, a launch"
DTYPES = ("float32", "bfloat16", "float16")


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.description = (
        "Measures copies (read and written bytes count), matrix products per dtype (on a GPU float32 with and without "
        "TF32), and one launch, each with torch's own routines; the best of many runs counts. The store keeps them, "
        "and the cost model uses them from then on."
    )
    flags.add_choice(parser, "--dtype", DTYPES, f"{', '.join(DTYPES)} (default: all)")
    parser.add_argument(
        "--seconds", type=flags.seconds, default=6.0, metavar="S", help="for all of them (default: %(default)s)"
    )
    add_device(parser)
    parser.add_argument("--store", type=Path, metavar="DIR", help="folder of the store (default: the user's)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the results file (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    device = device_of(options.device)
    dtypes = [getattr(torch, name) for name in flags.once(options.dtype, DTYPES)]
    with results.Writer(options.output, "roofs-") as writer:
        facts = environment(device, ("tritonconv", *options.given), 0)
        writer.write("environment", {"schema": results.SCHEMA, "run": writer.run, **facts, "scale": "given",
                                     "scale_rule": "no layers"})  # fmt: skip
        each = options.seconds / (2 + 2 * len(dtypes))
        rows = [writer.write("roof", {**row, "when": "start"}) for row in roofs.measure(device, dtypes, each)]
        writer.write("end", {"reason": "complete"})
    print("\n".join(table(rows)))
    keep(rows, facts, device, options.store)
    print(f"\nresults: {writer.path}")
    return OK


def keep(rows: list[dict], facts: dict, device: torch.device, folder: Path | None) -> None:
    """Puts the measured ceilings into the store of the device."""
    found = from_roofs(rows, facts, device)
    if found is not None:
        calibrate.keep(found, device, folder)
        dispatch.forget()


def table(rows: list[dict]) -> list[str]:
    """A line per roof: the best and the median."""
    lines = [["roof", "best", "median", "unit"]]
    for row in rows:
        scale, unit = (1e-9, f"G{row['unit']}") if row["unit"] != "us" else (1, "us per launch")
        lines.append([row["what"], f"{row['value'] * scale:.4g}", f"{row['median'] * scale:.4g}", unit])
    return columns(lines, numbers=3)
