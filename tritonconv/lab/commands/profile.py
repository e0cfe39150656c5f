"""``tritonconv profile``: the hardware counters of the kernels of slow layers, read by NVIDIA's ncu."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from pathlib import Path
from time import perf_counter

from tritonconv.errors import ArgumentError, ResultsError
from tritonconv.lab import flags
from tritonconv.lab.bench import counters, results
from tritonconv.lab.bench.calls import ALL_PASSES, work
from tritonconv.lab.bench.environment import environment
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.bench.results import BASELINE, OURS
from tritonconv.lab.bench.rows import versions_of
from tritonconv.lab.bench.workloads import ALL, SCALES, workloads
from tritonconv.lab.campaign import STORE, store_of
from tritonconv.lab.commands import common
from tritonconv.lab.commands.common import DTYPES, INTERRUPTED, OK, RESULTS, WRONG
from tritonconv.lab.profiling import ncu
from tritonconv.lab.profiling.cells import ProfiledCell, combinations, head, worst_of
from tritonconv.problem import LAYOUTS

HELP = "read the hardware counters of slow layers' kernels with ncu"
DESCRIPTION = """\
Runs calls under NVIDIA's Nsight Compute (ncu) and shows of each kernel: its time, the bytes it moved, how busy the
multiprocessors, the caches and the memory were, and what occupancy it reached.

With RESULTS, a folder or file of tritonconv campaign or bench: the cells of it to look into first, of each class of
layers, pass and dtype. Those slower than the best torch come first, with torch's own kernels beside them, then those
furthest from their roof. A campaign's tuned choices are used. tritonconv report RESULTS shows what was counted.

Without RESULTS: the layers whose names contain what --only says, with --dtype, --layout and --contestants.

Each cell is a process of its own: ten seconds or so. ncu counts at the clock that the GPU has (--clock-control none)
and with cold caches.
"""
LEAST_SECONDS = 5.0  # in which no cell is begun any more
MOST_SECONDS = 120.0  # of one cell
OURS_AND_TORCHS = (OURS, BASELINE)


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.epilog = "example: tritonconv profile --only vnet_up3 --passes forward --contestants forward_shuffle,torch"
    parser.add_argument("results", nargs="?", type=Path, metavar="RESULTS", help="what was measured before")
    parser.add_argument(
        "--worst", type=flags.count, default=1, metavar="N",
        help="with RESULTS: cells of each class, pass and dtype (default: %(default)s)",
    )  # fmt: skip
    flags.add_choice(parser, "--passes", ALL_PASSES, f"{', '.join(ALL_PASSES)} (default: forward; of RESULTS all)")
    parser.add_argument("--only", metavar="TEXT", help="layers whose name contains TEXT")
    flags.add_choice(parser, "--dtype", DTYPES, f"{', '.join(DTYPES)} (default: bfloat16)")
    flags.add_choice(parser, "--layout", LAYOUTS, f"{', '.join(LAYOUTS)} (default: both)")
    parser.add_argument(
        "--contestants", type=flags.any_names, action="extend", metavar="NAME[,NAME]",
        help=f"{OURS} (what dispatch chooses), {BASELINE}, variants (default: {','.join(OURS_AND_TORCHS)})",
    )  # fmt: skip
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="(default: %(default)s)")
    parser.add_argument(
        "--seconds", type=flags.seconds, metavar="S", help="budget: no cell is begun that might not end in it"
    )
    common.add_variant_files(parser)
    parser.add_argument("--ncu", default="ncu", metavar="PATH", help="the tool (default: %(default)s on the PATH)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"folder of the new file (default: that of RESULTS, else {RESULTS})"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(options: argparse.Namespace) -> int:
    """1 where a cell could not be looked into."""
    device = common.device(common.AUTO)
    if device.type != "cuda":
        raise ArgumentError("profile: a CPU has no counters that ncu reads, and torch sees no GPU")
    if shutil.which(options.ncu) is None:
        raise ArgumentError(f"argument --ncu: no program {options.ncu!r}; it comes with NVIDIA's Nsight Compute")
    common.load_variant_files(options)
    cells, folder = _cells(options), options.results or RESULTS
    folder = folder if folder.suffix != ".jsonl" else folder.parent
    shown = progress(options.quiet, unit="cells", first="starting ncu")
    own = store_of(folder) if options.results and (folder / STORE).is_dir() else contextlib.nullcontext()
    try:
        with own, results.Writer(options.output or folder, results.PROFILE) as writer:
            facts = environment(device, ("tritonconv", *options.given), 0)
            scale = cells[0].scale
            writer.write("environment", {"schema": results.SCHEMA, "run": writer.run, **facts, "scale": scale,
                                         "scale_rule": SCALES[scale]})  # fmt: skip
            try:
                failed, reason = _all(cells, options, writer, versions_of(device), shown)
            except KeyboardInterrupt:
                failed, reason = 0, "interrupted"
            writer.write("end", {"reason": reason})
    finally:
        shown.close()
    print(f"\nresults: {writer.path}")
    if reason == "interrupted":
        return INTERRUPTED
    return WRONG if failed else OK


def _cells(options: argparse.Namespace) -> list[ProfiledCell]:
    files = tuple(str(path.absolute()) for path in options.variant_files)
    if options.results is None:
        if options.only is None:
            raise ArgumentError("arguments RESULTS, --only: one of them must say what to look into")
        return combinations(
            workloads(ALL, options.only),
            flags.once(options.passes, ("forward",)),
            flags.once(options.dtype, ("bfloat16",)),
            flags.once(options.layout, tuple(LAYOUTS)),
            flags.once(options.contestants, OURS_AND_TORCHS),
            options.scale,
            files,
        )
    for name in ("dtype", "layout", "contestants"):
        if getattr(options, name) is not None:
            raise ArgumentError(f"argument --{name}: with RESULTS its rows say so; --only and --passes select of them")
    run = results.load(options.results)
    found = worst_of(run, options.worst, flags.once(options.passes, ()), options.only or "")
    if not found:
        raise ResultsError(f"{options.results}: no such layer was timed beside torch in the passes that were asked for")
    return found


def _all(cells, options, writer, versions, shown) -> tuple[int, str]:
    """How many cells could not be looked into, and why the run ended."""
    begin, failed = perf_counter(), 0
    shown.begin(len(cells))
    for cell in cells:
        left = float("inf") if options.seconds is None else options.seconds - (perf_counter() - begin)
        if left < LEAST_SECONDS:
            return failed, "budget"
        first = {**head(cell), "versions": versions}
        try:
            launches = ncu.count(options.ncu, cell.command(), min(left, MOST_SECONDS))
            rows = [
                writer.write("profile", {**first, "kernel": each.kernel, "launch": index,
                                         "duration_us": each.duration_us, "counters": each.counters})
                for index, each in enumerate(launches)
            ]  # fmt: skip
            _show(cell, rows)
        except ResultsError as error:
            failed += 1
            writer.write("error", {**first, "status": "error", "message": str(error)})
            print(f"\n{_title(cell)}\n{error}")
        shown.step(f"{cell.layer} {cell.pass_name} {cell.contestant}")
    return failed, "complete"


def _show(cell: ProfiledCell, rows: list[dict]) -> None:
    flops, least = work(cell.problem, cell.pass_name)
    whole = sum(row["duration_us"] for row in rows)
    print(f"\n{_title(cell)}")
    print(f"{whole:.4g} us in {len(rows)} kernels; {flops / 1e9:.4g} GFLOP; at least {least / 1e6:.4g} MB")
    print("\n".join(counters.lines(rows)))


def _title(cell: ProfiledCell) -> str:
    config = " ".join(f"{key}={value}" for key, value in cell.config or ())
    said = f"{cell.layer}, {cell.pass_name}, {cell.dtype}, {cell.layout}: {cell.contestant} {config}".rstrip()
    return f"{said} ({cell.about})" if cell.about else said
