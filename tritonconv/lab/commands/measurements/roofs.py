"""``tritonconv bench --roofs``: the most that the device can copy, multiply and launch."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch

from tritonconv import dispatch
from tritonconv.autotune.ceilings import from_roofs
from tritonconv.autotune.tuning import calibrate
from tritonconv.lab import text_table
from tritonconv.lab.bench import bias_rates, roofs
from tritonconv.lab.bench.recording import recording
from tritonconv.lab.commands.common import OK, RESULTS, check_store, dtypes_of, folder

FLAG = {"action": "store_true", "help": "measure the device's roofs instead of the layers"}
SAID = (
    "--roofs measures the device instead: copies (read and written bytes count), matrix products of each\n"
    "dtype (on a GPU float32 with and without TF32) and one launch, each with torch's own routines. The\n"
    "best of many runs counts. The store keeps them, and the cost model uses them from then on. ATen's bias\n"
    "add and bias gradient, passes that a fused kernel does not make, come with them."
)
OWN, TOO = ("store",), ()
SECONDS = 6.0
DTYPES = ("float32", "bfloat16", "float16")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", **folder("with --roofs: folder of the store that keeps them (default: the user's)"))


def run(options: argparse.Namespace, device: torch.device) -> int:
    check_store(device, options.store)
    dtypes, target = dtypes_of(options, *DTYPES), options.output or RESULTS
    seconds = (options.seconds or SECONDS) / (2 + 6 * len(dtypes))
    with recording(target, "roofs-", device, options.command, scale="given", scale_rule="no layers") as writer:
        measured_rows = itertools.chain(*(each.measure(device, dtypes, seconds) for each in (roofs, bias_rates)))
        rows: list[dict[str, Any]] = [writer.write("roof", {**row, "when": "start"}) for row in measured_rows]
    lines = [["roof", "best", "median", "unit"]]
    for row in rows:
        factor, unit = (1e-9, f"G{row['unit']}") if row["unit"] != "us" else (1, "us per launch")
        lines.append([row["what"], f"{row['value'] * factor:.4g}", f"{row['median'] * factor:.4g}", unit])
    print("\n".join(text_table.lines(lines, numbers=3)))
    ceilings = from_roofs(rows, writer.environment, device)
    if ceilings is not None:
        calibrate.keep(ceilings, device, options.store)
        dispatch.forget()
    print(f"\nresults: {writer.path}")
    return OK
