"""``tritonconv inspect``: compiles the Triton kernels for GPUs that need not be here, and shows the result."""

from __future__ import annotations

import argparse
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
from tritonconv.lab import flags, text_table
from tritonconv.lab.bench.environment import version
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.commands.common import FLAGS, OK, WRONG, add_flags, folder, layouts_of, listed
from tritonconv.lab.inspection import accesses, interpreted, jobs, records, tables, verdicts
from tritonconv.lab.inspection.compiling import Job, check_compiler, compile_job
from tritonconv.lab.inspection.records import Inspection, Record
from tritonconv.precision import PRECISIONS

HELP = "compile the Triton kernels for any GPU, and show registers, spills, instructions"
EXAMPLE = "tritonconv inspect forward_phases --target sm_90 --layers k3s2,k4s2 --configs all"
DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100")
DEFAULT_PRECISIONS = ("bfloat16", "tf32")
CONFIGS = ("default", "all")
FEW, ALL = "few", "all"
# Of the loads and stores: the share of the sectors that their bytes need, below which an access is shown.
POOR = 0.7
ACCESS_TARGET, ACCESS_PRECISION = "sm_90", "float16"

DESCRIPTION = f"""\
Compiles the Triton kernels for the target GPUs, which need not be here, and shows the result: registers, spills, shared
memory, occupancy, matrix and copy instructions. Each variant is compiled as real layers launch it.

The exit code is 1 where a default config has a fault: it does not compile, it spills, it needs more shared memory than
the target has, its tl.dot has no matrix instruction, or it writes a register that a product in flight may read. Faults
of other configs (--configs all) are warnings.

--accesses shows instead how well loads and stores are coalesced: it runs one program of each kernel in Triton's
interpreter, and counts the 32-byte sectors that the lanes of a warp touch. Efficiency is the share of these that the
bytes need. A request is one instruction of one warp. Loads that only a cache makes cheap, as of a small weight, are
shown too.

layers:
{chr(10).join(f"  {name:13} {layer}" for name, layer in jobs.SAMPLE_LAYERS.items())}

products: tf32 and ieee are float32 with torch.backends.cudnn.conv.fp32_precision at that value
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="variants (default: every Triton variant)")
    parser.add_argument(
        "--target", **{**FLAGS["target"], "help": f"{', '.join(TARGETS)} (default: {','.join(DEFAULT_TARGETS)}; "
                       f"with --accesses {ACCESS_TARGET})"},
    )  # fmt: skip
    default = f"default: {','.join(DEFAULT_PRECISIONS)}; with --accesses {ACCESS_PRECISION}"
    parser.add_argument("--dtype", **listed(PRECISIONS, f"{', '.join(PRECISIONS)} ({default})"))
    add_flags(parser, layout="both")
    parser.add_argument(
        "--layers", **listed((*jobs.SAMPLE_LAYERS, FEW, ALL), f"of the layers below; or {ALL} (default: {FEW}, the "
                             f"first {jobs.FEW} that a variant serves)"),
    )  # fmt: skip
    parser.add_argument(
        "--configs", choices=CONFIGS, default=CONFIGS[0], help="all: the candidates of the tuner too (default: default)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every record into this file")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE",
        help="replace the table of this Triton version between the markers of this file",
    )  # fmt: skip
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--accesses", action="store_true",
        help=f"show the loads and stores that are badly coalesced (efficiency below {POOR}) instead",
    )  # fmt: skip
    instead.add_argument(
        "--verdicts",
        **folder("instead compile for sm_90 every config that the tuner may try, look for registers that are written "
                 "while a product may read them, and keep the verdicts in DIR"),
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="with --accesses: show every load and store")
    parser.add_argument(
        "--sample", type=flags.count, metavar="N",
        help="with --verdicts: compile N configs of each variant that changed and N of all others, and keep nothing",
    )  # fmt: skip
    add_flags(parser, "jobs", "quiet")


def run(options: argparse.Namespace) -> int:
    """1 where a default config is not in order."""
    chosen = _triton_variants(options.variants)
    if options.markdown is not None:
        tables.check(options.markdown)
    if options.json is not None and not options.json.parent.is_dir():
        raise ArgumentError(f"argument --json: there is no folder {options.json.parent}")
    if options.sample is not None and options.verdicts is None:
        raise ArgumentError("argument --sample: goes with --verdicts")
    if options.all and not options.accesses:
        raise ArgumentError("argument --all: goes with --accesses")
    check_compiler()
    if options.verdicts is not None:
        return _verdicts(options, chosen)
    if options.accesses:
        return _accesses(options, chosen)
    wanted = _plan(options, chosen, flags.once(options.target, DEFAULT_TARGETS), DEFAULT_PRECISIONS)
    rows = _compiled(wanted, options)
    command = shlex.join(options.command)
    inspection = Inspection(version("triton") or "none", torch.__version__, command, tuple(rows))
    tables.show(inspection)
    print(f"\n{tables.verdict(inspection)}")
    if options.json is not None:
        records.write(inspection, options.json)
    if options.markdown is not None:
        tables.update(inspection, options.markdown)
    return WRONG if inspection.failures() else OK


def _plan(
    options: argparse.Namespace, chosen: Sequence[Variant], targets: Sequence[str], precisions: tuple[str, ...]
) -> Sequence[Job]:
    """The launches to compile. Says on stderr which variants have none; raises ArgumentError where there is none."""
    launches, left_out = jobs.job_list(
        chosen,
        targets=tuple(targets),
        precisions=flags.once(options.dtype, precisions),
        layouts=layouts_of(options),
        classes=_wanted_classes(options.layers),
        candidates=options.configs == ALL,
    )
    for name, why in left_out.items():
        print(f"tritonconv inspect: {name} serves none of the layers ({why})", file=sys.stderr)
    if not launches:
        raise ArgumentError("no variant serves any of the chosen layers: see --layers, --dtype and --layout")
    return launches


def _accesses(options: argparse.Namespace, chosen: Sequence[Variant]) -> int:
    for target in flags.once(options.target, (ACCESS_TARGET,)):
        launches = _plan(options, chosen, (target,), (ACCESS_PRECISION,))
        measured = interpreted.measure(launches)
        poor = [each for each in measured if each.efficiency < POOR]
        rows = [each.cells() for each in (measured if options.all else poor)]
        if rows:
            print("\n".join(text_table.lines([accesses.HEAD, *rows], numbers=3)))
        print(f"\n{len(measured)} accesses of {len(launches)} launches for {target}, {len(poor)} below {POOR}")
    return OK


def _compiled(
    wanted: Sequence[Job], options: argparse.Namespace, compiled: Callable[[Job], list[Record]] = compile_job
) -> list[Record]:
    with progress(options.quiet, unit="launches", first="starting the compilers") as shown:
        shown.begin(len(wanted))
        return jobs.run(wanted, options.jobs, shown.step, compiled)


def _verdicts(options: argparse.Namespace, chosen: Sequence[Variant]) -> int:
    """1 where a config that may be chosen is unsafe or does not compile."""
    triton = version("triton") or "none"
    path = verdicts.path_of(options.verdicts, triton)
    stored = verdicts.read(path)
    if options.sample is None:
        wanted = [job for record in chosen for job in verdicts.jobs_of(record)]
    else:
        wanted = verdicts.sample(chosen, stored, options.sample)
    revisions = {record.name: revision(record) for record in chosen}
    fresh = verdicts.verdicts(_compiled(wanted, options, verdicts.check), revisions)
    unsafe, broken = (verdicts.configs_of(fresh, verdict) for verdict in (verdicts.UNSAFE, verdicts.BROKEN))
    for verdict, configs in ((verdicts.UNSAFE, unsafe), (verdicts.BROKEN, broken)):
        for name, kind, config in configs:
            print(f"{verdict}: {name} on {kind}: {dict(config)}")
    print(
        f"{len(wanted)} launches with Triton {triton} for {verdicts.TARGET}: {len(unsafe)} are unsafe, "
        f"{len(broken)} do not compile"
    )
    if options.sample is None:
        verdicts.write(path, triton, {**stored, **fresh})
    return WRONG if unsafe or broken else OK


def _triton_variants(names: list[str]) -> tuple[Variant, ...]:
    kernels = {record.name: record for record in variants() if record.backend == "triton"}
    if not kernels:
        raise ArgumentError(f"there is no Triton variant: {triton_fault()}")
    for name in names:
        if name not in kernels:
            if triton_fault() is not None:
                raise ArgumentError(f"argument VARIANT: {triton_fault()}")
            kind = "computed by torch" if any(name == each.name for each in variants()) else "unknown"
            raise ArgumentError(f"argument VARIANT: {name!r} is {kind}; the Triton variants are: {', '.join(kernels)}")
    return tuple(kernels[name] for name in dict.fromkeys(names or kernels))


def _wanted_classes(given: list[str] | None) -> tuple[str, ...] | None:
    wanted = flags.once(given, (FEW,))
    if ALL in wanted:
        return tuple(jobs.SAMPLE_LAYERS)
    return None if FEW in wanted else wanted
