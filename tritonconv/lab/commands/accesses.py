"""``tritonconv accesses``: how well each load and store of a Triton kernel is coalesced, with no GPU."""

from __future__ import annotations

import argparse
import sys

from tritonconv.kernels.targets import TARGETS
from tritonconv.lab import flags
from tritonconv.lab.bench.summary import columns
from tritonconv.lab.commands.common import OK
from tritonconv.lab.commands.inspect import ALL, FEW, triton_variants, wanted_classes
from tritonconv.lab.inspection import accesses, jobs
from tritonconv.lab.inspection.accesses import Access
from tritonconv.lab.inspection.compiling import check_compiler
from tritonconv.problem import LAYOUTS

HELP = "show which loads and stores of the Triton kernels are badly coalesced; needs no GPU"
POOR = 0.7
HEAD = ("variant", "layer", "layout", "access", "tile", "bytes/lane", "sectors/request", "efficiency")


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.description = (
        "Compiles each variant as it is launched for real layers, in float16, and runs one program of it in Triton's "
        "interpreter: which 32-byte sectors the lanes of a warp touch. Efficiency is the share of the sectors that the "
        "bytes need; a request is one instruction of one warp. What only the caches absorb (a small weight) shows too."
    )
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="Triton variants (default: all)")
    flags.add_choice(parser, "--layouts", LAYOUTS, f"{', '.join(LAYOUTS)} (default: both)")
    flags.add_choice(
        parser,
        "--layers",
        (*jobs.SAMPLE_LAYERS, FEW, ALL),
        f"layers (default: {FEW}, the first {jobs.FEW} a variant serves)",
    )
    parser.add_argument("--target", choices=tuple(TARGETS), default="sm_90", help="(default: %(default)s)")
    parser.add_argument("--all", action="store_true", help=f"every access, not only those below {POOR}")


def run(options: argparse.Namespace) -> int:
    chosen = triton_variants(options.variants)
    check_compiler()
    plan = jobs.job_list(
        chosen,
        targets=(options.target,),
        precisions=("float16",),
        layouts=flags.once(options.layouts, tuple(LAYOUTS)),
        classes=wanted_classes(options.layers),
        candidates=False,
    )
    for name, why in plan.left_out:
        print(f"tritonconv accesses: {name} serves none of the layers ({why})", file=sys.stderr)
    found = accesses.measure(plan.jobs)
    shown = [each for each in found if options.all or each.efficiency < POOR]
    if shown:
        print("\n".join(columns([HEAD, *map(_row, shown)], numbers=3)))
    poor = sum(each.efficiency < POOR for each in found)
    print(f"\n{len(found)} accesses of {len(plan.jobs)} launches for {options.target}, {poor} below {POOR}")
    return OK


def _row(each: Access) -> list[str]:
    return [
        each.variant,
        each.layer,
        each.layout,
        f"{each.kind}{' (async)' if each.asynchronous else ''}",
        "x".join(map(str, each.tile)),
        str(each.lane_bytes),
        f"{each.sectors / each.requests:.1f}",
        f"{each.efficiency:.2f}",
    ]
