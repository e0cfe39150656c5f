"""``tritonconv bench --overhead``: the cost of a call besides the work."""

from __future__ import annotations

import argparse

import torch

from tritonconv.errors import ArgumentError, VariantNotApplicable
from tritonconv.lab import flags, text_table
from tritonconv.lab.bench import call_overhead
from tritonconv.lab.bench.recording import recording
from tritonconv.lab.commands.common import OK, RESULTS, WRONG, dtypes_of

FLAG = {"action": "store_true", "help": "time the overhead of a call instead of the layers"}
SAID = (
    "--overhead times the layer of tritonconv and torch's on a tiny layer instead: what a call costs\n"
    "besides the work. The exit code is 1 where ours takes more than --limit microseconds longer."
)
OWN, TOO = ("use", "limit"), ()
SECONDS = 6.0


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--use", type=flags.any_names, metavar="NAME[,NAME]", help="with --overhead: force these variants in our layer"
    )
    parser.add_argument(
        "--limit", type=flags.microseconds, metavar="US",
        help=f"with --overhead: the microseconds allowed over torch's layer (default: {call_overhead.LIMIT_US:g})",
    )  # fmt: skip


def run(options: argparse.Namespace, device: torch.device) -> int:
    dtypes, target = dtypes_of(options, "float32"), options.output or RESULTS
    worst, lines = 0.0, [["pass", "dtype", "torch us", "tritonconv us", "difference us"]]
    rule = f"one tiny layer: {call_overhead.LAYER}"
    with recording(target, "overhead-", device, options.command, scale="given", scale_rule=rule) as writer:
        for dtype in dtypes:
            seconds = (options.seconds or SECONDS) / len(dtypes)
            measured = call_overhead.measure(device, dtype, seconds, options.use or ())
            try:
                rows = [writer.write("overhead", row) for row in measured]
            except (ArgumentError, VariantNotApplicable) as error:
                raise ArgumentError(f"argument --use: {error}") from None
            for name, difference in call_overhead.excess(rows).items():
                cells = [f"{row['median_us']:.1f} ({row['p20_us']:.1f} to {row['p80_us']:.1f})"
                         for row in rows if row["pass"] == name]  # fmt: skip
                lines.append([name, str(rows[0]["dtype"]), *cells, f"{difference:+.1f}"])
                worst = max(worst, difference)
    print("\n".join(text_table.lines(lines, numbers=3)))
    print(f"\nresults: {writer.path}")
    return WRONG if worst > (options.limit or call_overhead.LIMIT_US) else OK
