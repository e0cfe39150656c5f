"""``tritonconv tune``: finds and stores the fastest variants for layers, for a model, or for one problem."""

from __future__ import annotations

import argparse
import sys

from tritonconv.autotune.tuning.session import Session
from tritonconv.autotune.tuning.tasks import BUDGET
from tritonconv.lab.bench.failures import disqualifies, one_line
from tritonconv.lab.bench.layer_sizes import SCALES
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.bench.recording import recording
from tritonconv.lab.bench.workloads import ALL
from tritonconv.lab.commands.common import (
    OK,
    RESULTS,
    WRONG,
    add_flags,
    check_store,
    device_of,
    load_variant_files,
    scale_for,
    use_compiled,
)
from tritonconv.lab.commands.problems import add_problems, tasks_asked_for

HELP = "find the fastest variants on this machine and store them"
EXAMPLE = "tritonconv tune --suite unet --seconds 120"
DESCRIPTION = """\
Times the variants beside torch's own on this machine, and stores the fastest one for each kind of problem. Calls use it
from then on. torch's own is a candidate too, so a tuned layer is not slower than torch. Each timing and each choice is
stored at once: the same command goes on where a killed run ended. A layer may fail, for example for lack of memory. The
others are tuned all the same; the end of the output names those that failed, and the exit code is 1.

The problems are the layers of suites (--suite), the layers of your model (--model module:factory --input
1x1x96x96x96), or one problem (--x 1x64x16x16x16 --weight 64x32x2x2x2 --stride 2).

With --activation, --residual or --rounding the forward is tuned with the epilogue. Its gradients are the plain layer's
and take its choice: where that has none yet, the plain layer is tuned too.

The store is the folder that TRITONCONV_CACHE names, else one in the XDG cache directory. Where the store has no choice,
calls look into the tables that come with tritonconv.
"""


def add(parser: argparse.ArgumentParser) -> None:
    add_problems(parser, scale="cpu on a CPU, else full")
    add_flags(
        parser, "device", "variant-file", "compiled", "quiet", store="see above", output=str(RESULTS),
        seconds="4 s a problem; the same command goes on",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="also measure what is stored already")


def run(options: argparse.Namespace) -> int:
    load_variant_files(options)
    device = device_of(options.device)
    tasks, scale = tasks_asked_for(options, device, scale_for(options.scale, device))
    use_compiled(options, device)
    check_store(device, options.store)
    failed: dict[str, object] = {}
    rule = SCALES.get(scale, "the sizes that were given")
    with (
        progress(options.quiet, unit="problems", first="looking at what is stored") as shown,
        recording(options.output or RESULTS, "tune-", device, options.command, scale=scale, scale_rule=rule) as writer,
    ):

        def write(kind: str, row: dict[str, object]) -> None:
            writer.write(kind, row)
            if kind == "error" and row["variant"] == ALL:  # the whole problem
                failed[f"{row['layer']} {row['layout']} {row['dtype']}"] = row["message"]

        session = Session(device, options.store, options.seconds, options.again, write, goes_on=len(tasks) > 1)
        try:
            report = session.run(tasks, shown)
            writer.end = {"reason": report.reason}
        except Exception as error:
            if not disqualifies(error):
                raise
            writer.end = {"reason": "error", "message": one_line(error)}
            report = session.report
    print(report)
    for name, message in failed.items():
        print(f"failed: {name}: {message}")
    print(f"results: {writer.path}")
    if not (report.winners or report.known or failed):
        why = "the budget was used up" if report.reason == BUDGET else "there is nothing to time"
        print(f"tritonconv tune: nothing was tuned: {why}", file=sys.stderr)
        return WRONG
    return WRONG if failed else OK
