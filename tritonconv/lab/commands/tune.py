"""``tritonconv tune``: finds and stores the fastest variants for layers, for a model, or for one problem."""

from __future__ import annotations

import argparse
from pathlib import Path

from tritonconv.autotune.tuning.session import Session
from tritonconv.lab import flags
from tritonconv.lab.bench import results
from tritonconv.lab.bench.environment import environment
from tritonconv.lab.bench.failures import disqualifies, one_line
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.bench.workloads import ALL, SCALES
from tritonconv.lab.commands.common import (
    OK,
    RESULTS,
    WRONG,
    add_compiled,
    add_device,
    add_variant_files,
    load_variant_files,
    scale_for,
    use_compiled,
)
from tritonconv.lab.commands.common import device as device_of
from tritonconv.lab.commands.problems import add_problems, tasks_asked_for

HELP = "find the fastest variants on this machine and store them"
DESCRIPTION = """\
Times the variants beside torch's own on this machine and stores the fastest per kind of problem; calls use it from then
on. torch's own is a candidate, so a tuned layer is not slower than torch. A killed run goes on where it was: each
timing is stored at once, and so is each decision. A layer that fails, as where the memory is too small for it, is told,
and the others are tuned; the exit code is then 1.

What is tuned: a suite's layers (--suite), the layers of your model (--model module:factory --input 1x1x96x96x96), or
one problem (--x 1x64x16x16x16 --weight 64x32x2x2x2 --stride 2).

The store is TRITONCONV_CACHE, else the XDG cache directory; tables that come with tritonconv stand behind it.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.epilog = "example: tritonconv tune --suite unet --seconds 120"
    add_problems(parser, scale="cpu on a CPU, else full")
    parser.add_argument(
        "--seconds", type=flags.seconds, metavar="S",
        help="budget: it ends there with everything stored, and the same command goes on (default: 4 s a problem)",
    )  # fmt: skip
    add_device(parser)
    add_variant_files(parser)
    add_compiled(parser)
    parser.add_argument("--store", type=Path, metavar="DIR", help="folder of the store (default: see above)")
    parser.add_argument("--again", action="store_true", help="also measure what is stored already")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the results file (default: %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(options: argparse.Namespace) -> int:
    load_variant_files(options)
    device = device_of(options.device)
    tasks, scale = tasks_asked_for(options, device, scale_for(options.scale, device))
    use_compiled(options, device)
    shown = progress(options.quiet, unit="problems", first="looking at what is stored")
    with results.Writer(options.output, "tune-") as writer:
        header = environment(device, ("tritonconv", *options.given), 0)
        writer.write("environment", {"schema": results.SCHEMA, "run": writer.run, **header, "scale": scale,
                                     "scale_rule": SCALES.get(scale, "the sizes that were given")})  # fmt: skip

        def write(kind: str, row: dict[str, object]) -> None:
            writer.write(kind, row)
            if kind == "error" and row["variant"] == ALL:  # the whole problem
                failed[f"{row['layer']} {row['layout']} {row['dtype']}"] = row["message"]

        failed: dict[str, object] = {}
        session = Session(device, options.store, options.seconds, options.again, write, goes_on=len(tasks) > 1)
        end = {"reason": "interrupted"}
        try:
            report = session.run(tasks, shown)
            end = {"reason": report.reason}
        except Exception as error:
            end = {"reason": "error", "message": one_line(error)}
            if not disqualifies(error):
                raise
            report = session.report
        finally:
            shown.close()
            writer.write("end", end)
    print(report)
    for name, message in failed.items():
        print(f"failed: {name}: {message}")
    print(f"results: {writer.path}")
    return WRONG if failed else OK
