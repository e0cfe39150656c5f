"""``tritonconv overhead``: the Python and launch overhead of a call of the layer, beside torch's own."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tritonconv.lab import flags
from tritonconv.lab.bench import results
from tritonconv.lab.bench.environment import environment
from tritonconv.lab.bench.overhead import LAYER, LIMIT_US, PASSES, excess, measure
from tritonconv.lab.bench.summary import columns
from tritonconv.lab.commands.common import DTYPES, OK, RESULTS, WRONG, add_device
from tritonconv.lab.commands.common import device as device_of

HELP = "measure what a call costs besides the work, beside torch's layer"


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.description = (
        f"Times torch.nn.ConvTranspose3d and tritonconv.ConvTranspose3d in turns on a tiny layer ({LAYER}): forward "
        "without gradients, forward that autograd records, forward + backward. Exit code 1 where ours takes more than "
        "--limit microseconds longer."
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument(
        "--use", type=flags.any_names, default=(), metavar="NAME[,NAME]", help="force these variants in ours"
    )
    parser.add_argument("--seconds", type=flags.seconds, default=6.0, metavar="S", help="(default: %(default)s)")
    parser.add_argument(
        "--limit", type=flags.microseconds, default=LIMIT_US, metavar="US", help="microseconds (default: %(default)s)"
    )
    add_device(parser)
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the results file (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    device = device_of(options.device)
    with results.Writer(options.output, "overhead-") as writer:
        writer.write("environment", {"schema": results.SCHEMA, "run": writer.run,
                                     **environment(device, ("tritonconv", *options.given), 0),
                                     "scale": "given", "scale_rule": f"one tiny layer: {LAYER}"})  # fmt: skip
        measured = measure(device, getattr(torch, options.dtype), options.seconds, options.use)
        rows = [writer.write("overhead", row) for row in measured]
        writer.write("end", {"reason": "complete"})
    print("\n".join(table(rows)))
    print(f"\nresults: {writer.path}")
    return WRONG if max(excess(rows).values()) > options.limit else OK


def table(rows: list[dict]) -> list[str]:
    """Microseconds per call, a line per pass."""
    by_pass = {name: {row["variant"]: row for row in rows if row["pass"] == name} for name in PASSES}
    lines = [["pass", "torch us", "tritonconv us", "difference us"]]
    for name, found in by_pass.items():
        cells = [f"{row['median_us']:.1f} ({row['p20_us']:.1f} to {row['p80_us']:.1f})" for row in found.values()]
        lines.append([name, *cells, f"{excess(rows)[name]:+.1f}"])
    return columns(lines, numbers=3)
