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
from tritonconv.lab.bench.calls import work
from tritonconv.lab.bench.layer_sizes import SCALES
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.bench.recording import recording
from tritonconv.lab.bench.results import BASELINE, OURS
from tritonconv.lab.bench.rows import versions_of
from tritonconv.lab.bench.workloads import ALL, workloads
from tritonconv.lab.campaign import STORE, store_of
from tritonconv.lab.commands.common import (
    AUTO,
    OK,
    RESULTS,
    WRONG,
    add_flags,
    device_of,
    layouts_of,
    load_variant_files,
)
from tritonconv.lab.profiling import ncu
from tritonconv.lab.profiling.cells import ProfiledCell, combinations, head, worst_of

HELP = "read the hardware counters of slow layers' kernels with ncu"
EXAMPLE = "tritonconv profile --only vnet_up3 --passes forward --contestants forward_shuffle,torch"
DESCRIPTION = """\
Runs calls under NVIDIA's Nsight Compute (ncu) and shows for each kernel its time, the bytes that it moved, how busy the
multiprocessors, the caches and the memory were, and the occupancy that it reached.

With RESULTS, a file or folder of tritonconv bench or campaign, it chooses cells of every class of layers, pass and
dtype. Cells slower than the best torch come first, with torch's own kernels beside them; then those furthest from their
roof. The choices of a campaign are used. tritonconv report RESULTS shows the counters.

Without RESULTS it takes the layers that --only names, with --dtype, --layout and --contestants.

Each cell is a process of its own and takes about ten seconds. ncu counts at the clock that the GPU has
(--clock-control none) and with cold caches.
"""
LEAST_SECONDS = 5.0  # in which no cell is begun any more
MOST_SECONDS = 120.0  # of one cell
OURS_AND_TORCHS = (OURS, BASELINE)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="?", type=Path, metavar="RESULTS", help="results to choose cells from")
    parser.add_argument(
        "--worst", type=flags.count, default=1, metavar="N",
        help="with RESULTS: how many cells of each class, pass and dtype (default: %(default)s)",
    )  # fmt: skip
    add_flags(parser, "only", passes="forward; of RESULTS all", dtype="bfloat16", layout="both", scale="full")
    parser.add_argument(
        "--contestants", type=flags.any_names, action="extend", metavar="NAME[,NAME]",
        help=f"{OURS} (the choice that a call makes), {BASELINE}, or variants (default: {','.join(OURS_AND_TORCHS)})",
    )  # fmt: skip
    add_flags(parser, "seconds", "variant-file", "quiet", output=f"that of RESULTS, else {RESULTS}")
    parser.add_argument(
        "--ncu", default="ncu", metavar="PATH", help="the program ncu (default: %(default)s on the PATH)"
    )


def run(options: argparse.Namespace) -> int:
    """1 where a cell could not be looked into."""
    device = device_of(AUTO)
    if device.type != "cuda":
        raise ArgumentError("profile: a CPU has no counters that ncu reads, and torch sees no GPU")
    if shutil.which(options.ncu) is None:
        raise ArgumentError(f"argument --ncu: no program {options.ncu!r}; it comes with NVIDIA's Nsight Compute")
    load_variant_files(options)
    cells, folder = _cells(options), options.results or RESULTS
    folder = folder if folder.suffix != ".jsonl" else folder.parent
    own = store_of(folder) if options.results and (folder / STORE).is_dir() else contextlib.nullcontext()
    facts = {"scale": cells[0].scale, "scale_rule": SCALES[cells[0].scale]}
    target = options.output or folder
    with (
        progress(options.quiet, unit="cells", first="starting ncu") as shown,
        own,
        recording(target, results.PROFILE, device, options.command, 0, **facts) as writer,
    ):
        failed, reason = _all(cells, options, writer, versions_of(device), shown)
        writer.end = {"reason": reason}
    print(f"\nresults: {writer.path}")
    return WRONG if failed else OK


def _cells(options: argparse.Namespace) -> list[ProfiledCell]:
    files = tuple(str(path.absolute()) for path in options.variant_files)
    if options.results is None:
        if not options.only:
            raise ArgumentError("arguments RESULTS, --only: one of them is needed")
        return combinations(
            workloads(ALL, options.only),
            flags.once(options.passes, ("forward",)),
            flags.once(options.dtype, ("bfloat16",)),
            layouts_of(options),
            flags.once(options.contestants, OURS_AND_TORCHS),
            options.scale or "full",
            files,
        )
    for name in ("dtype", "layout", "contestants"):
        if getattr(options, name) is not None:
            raise ArgumentError(f"argument --{name}: the rows of RESULTS say it; --only and --passes select among them")
    run = results.load(options.results)
    cells = worst_of(run, options.worst, flags.once(options.passes, ()), options.only)
    if not cells:
        raise ResultsError(f"{options.results}: no such layer was timed beside torch in the passes that were asked for")
    return cells


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
                writer.write("profile", {**first, "kernel": launch.kernel, "launch": index,
                                         "duration_us": launch.duration_us, "counters": launch.counters})
                for index, launch in enumerate(launches)
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
    title = f"{cell.layer}, {cell.pass_name}, {cell.dtype}, {cell.layout}: {cell.contestant} {config}".rstrip()
    return f"{title} ({cell.about})" if cell.about else title
