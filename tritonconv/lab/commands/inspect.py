"""``tritonconv inspect``: compiles the Triton kernels for GPUs that are not here, and looks."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tritonconv.autotune.sources import revision
from tritonconv.errors import ArgumentError
from tritonconv.kernels.registry import triton_fault, variants
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.variant import Variant
from tritonconv.lab import flags
from tritonconv.lab.bench.environment import version
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.commands.common import OK, WRONG
from tritonconv.lab.inspection import jobs, readme, records, report, verdicts
from tritonconv.lab.inspection.compiling import Job, check_compiler, compile_job
from tritonconv.lab.inspection.records import Inspection, Record
from tritonconv.precision import PRECISIONS
from tritonconv.problem import LAYOUTS

HELP = "compile the Triton kernels for GPUs that are not here, and look"
DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100")
DEFAULT_PRECISIONS = ("bfloat16", "tf32")
CONFIGS = ("default", "all")
FEW, ALL = "few", "all"
MOST_PROCESSES = 8  # each holds torch and a compiler: about 0.7 GB

DESCRIPTION = f"""\
Compiles the Triton kernels for the named targets, without a GPU, and shows what the compiler made: registers, spills,
shared memory, occupancy, matrix and copy instructions. Each variant is compiled as it is launched for real layers.

A fault of a default config makes the exit code 1: it does not compile, it spills, it needs more shared memory than the
target has, its tl.dot has no matrix instruction, or it writes a register that a product in flight may read. Candidate
configs (--configs all) only warn.

layers:
{chr(10).join(f"  {name:13} {layer}" for name, layer in jobs.SAMPLE_LAYERS.items())}

products: tf32 and ieee are float32 with torch.backends.cudnn.conv.fp32_precision at that value
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.description = DESCRIPTION
    parser.epilog = "example: tritonconv inspect forward_phases --targets sm_90 --layers k3s2,k4s2 --configs all"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="variants (default: every Triton variant)")
    flags.add_choice(parser, "--targets", TARGETS, f"{', '.join(TARGETS)} (default: {','.join(DEFAULT_TARGETS)})")
    flags.add_choice(
        parser, "--dtypes", PRECISIONS, f"{', '.join(PRECISIONS)} (default: {','.join(DEFAULT_PRECISIONS)})"
    )
    flags.add_choice(parser, "--layouts", LAYOUTS, f"{', '.join(LAYOUTS)} (default: both)")
    flags.add_choice(
        parser,
        "--layers",
        (*jobs.SAMPLE_LAYERS, FEW, ALL),
        f"layers (default: {FEW}, the first {jobs.FEW} a variant serves)",
    )
    parser.add_argument(
        "--configs", choices=CONFIGS, default=CONFIGS[0], help="all: the candidates of the tuner too (default: default)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every record here")
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="replace the table of this Triton version between the markers here",
    )
    parser.add_argument(
        "--verdicts", type=Path, metavar="DIR",
        help="instead compile the pruned spaces for sm_90, look for registers that are written while a product may "
        "read them, and keep what was found in DIR",
    )  # fmt: skip
    parser.add_argument(
        "--sample", type=flags.count, metavar="N",
        help="with --verdicts: keep nothing, and compile N configs of each variant that changed since, N of the others",
    )  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--jobs", type=flags.processes, default=min(cores, MOST_PROCESSES), metavar="N",
        help="processes that compile; with 1 a crash of the compiler ends the run (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(options: argparse.Namespace) -> int:
    """1 where a default config is not in order."""
    chosen = triton_variants(options.variants)
    if options.markdown is not None:
        readme.check(options.markdown)
    if options.json is not None and not options.json.parent.is_dir():
        raise ArgumentError(f"argument --json: there is no folder {options.json.parent}")
    if options.sample is not None and options.verdicts is None:
        raise ArgumentError("argument --sample: it is of --verdicts")
    check_compiler()
    if options.verdicts is not None:
        return _verdicts(options, chosen)
    plan = jobs.job_list(
        chosen,
        targets=flags.once(options.targets, DEFAULT_TARGETS),
        precisions=flags.once(options.dtypes, DEFAULT_PRECISIONS),
        layouts=flags.once(options.layouts, tuple(LAYOUTS)),
        classes=wanted_classes(options.layers),
        candidates=options.configs == ALL,
    )
    for name, why in plan.left_out:
        print(f"tritonconv inspect: {name} serves none of the layers ({why})", file=sys.stderr)
    if not plan.jobs:
        raise ArgumentError("no variant serves any of the layers asked for: see --layers, --dtypes and --layouts")
    found = _compiled(plan.jobs, options)
    command = shlex.join(("tritonconv", *options.given))
    inspection = Inspection(version("triton") or "none", torch.__version__, command, tuple(found))
    report.show(inspection)
    print(f"\n{report.verdict(inspection)}")
    if options.json is not None:
        records.write(inspection, options.json)
    if options.markdown is not None:
        readme.update(inspection, options.markdown)
    return WRONG if inspection.failures() else OK


def _compiled(
    wanted: Sequence[Job], options: argparse.Namespace, compiled: Callable[[Job], list[Record]] = compile_job
) -> list[Record]:
    shown = progress(options.quiet, unit="launches", first="starting the compilers")
    try:
        shown.begin(len(wanted))
        return jobs.run(wanted, options.jobs, shown.step, compiled)
    finally:
        shown.close()


def _verdicts(options: argparse.Namespace, chosen: Sequence[Variant]) -> int:
    """1 where a config that may be chosen is unsafe or does not compile."""
    triton = version("triton") or "none"
    path = verdicts.path_of(options.verdicts, triton)
    known = verdicts.read(path)
    if options.sample is None:
        wanted = [job for record in chosen for job in verdicts.jobs_of(record)]
    else:
        wanted = verdicts.sample(chosen, known, options.sample)
    revisions = {record.name: revision(record) for record in chosen}
    found = verdicts.verdicts(_compiled(wanted, options, verdicts.check), revisions)
    unsafe, broken = (verdicts.configs_of(found, said) for said in (verdicts.UNSAFE, verdicts.BROKEN))
    for said, configs in ((verdicts.UNSAFE, unsafe), (verdicts.BROKEN, broken)):
        for name, kind, config in configs:
            print(f"{said}: {name} on {kind}: {dict(config)}")
    print(
        f"{len(wanted)} launches with Triton {triton} for {verdicts.TARGET}: {len(unsafe)} are unsafe, "
        f"{len(broken)} do not compile"
    )
    if options.sample is None:
        verdicts.write(path, triton, {**known, **found})
    return WRONG if unsafe or broken else OK


def triton_variants(names: list[str]) -> tuple[Variant, ...]:
    known = tuple(record for record in variants() if record.backend == "triton")
    if not names:
        return known
    found = []
    for name in dict.fromkeys(names):
        record = next((each for each in known if each.name == name), None)
        if record is None:
            if triton_fault() is not None:
                raise ArgumentError(f"argument VARIANT: {triton_fault()}")
            what = "computed by torch" if any(name == each.name for each in variants()) else "unknown"
            there_are = ", ".join(each.name for each in known)
            raise ArgumentError(f"argument VARIANT: {name!r} is {what}; the Triton variants are: {there_are}")
        found.append(record)
    return tuple(found)


def wanted_classes(given: list[str] | None) -> tuple[str, ...] | None:
    wanted = flags.once(given, (FEW,))
    if ALL in wanted:
        return tuple(jobs.SAMPLE_LAYERS)
    return None if FEW in wanted else wanted
