"""``tritonconv bench``: times layers beside torch, or another of its measurements (``measurements``)."""

from __future__ import annotations

import argparse
import textwrap

from tritonconv.lab.bench.layer_sizes import SCALES
from tritonconv.lab.bench.workloads import suites
from tritonconv.lab.commands.common import device_of
from tritonconv.lab.commands.measurements import add_measurements, asked_for, measurements

HELP = "time layers beside torch; or the overhead of a call; the device's roofs; a CPU's formulations; slabs"
EXAMPLE = "tritonconv bench --suite unet --only monai --passes forward --layout ndhwc --seconds 20"
DESCRIPTION = "\n\n".join([
    "Times tritonconv beside torch.nn.functional.conv_transpose3d, call by call in turns. Each output is\n"
    "first checked against float64. Each run writes a new results file (JSON Lines). Finished rows are\n"
    "kept, whatever ends the run.",
    *(each.SAID for each in measurements().values()),
    "\n".join(textwrap.fill(f"scale {name}: {rule}", 100, subsequent_indent="  ") for name, rule in SCALES.items()),
    "suites:\n" + "\n".join(f"  {name:12} {text}" for name, text in suites().items()),
])  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    add_measurements(parser)


def run(options: argparse.Namespace) -> int:
    measurement = asked_for(options)
    return measurement.run(options, device_of(options.device))
