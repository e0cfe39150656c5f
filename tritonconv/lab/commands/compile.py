"""``tritonconv compile``: compiles kernels for a GPU that is not here into a folder that its machine then takes."""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

import torch

from tritonconv.autotune.tuning.compiled_ahead import CONFIGS, jobs_of, with_reduced
from tritonconv.autotune.tuning.tasks import with_plain
from tritonconv.errors import ArgumentError
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.triton_compiled import VARIABLE, CompiledFolder
from tritonconv.lab import flags
from tritonconv.lab.bench.progress import progress
from tritonconv.lab.commands.common import OK, WRONG, add_flags, dtypes_of, layouts_of, load_variant_files
from tritonconv.lab.commands.problems import add_problems, tasks_asked_for
from tritonconv.lab.inspection.ahead import Filled, compile_into, open_folder
from tritonconv.lab.inspection.compiling import GPU, check_compiler, compiling_for
from tritonconv.lab.inspection.launches import Launches, why_not_found
from tritonconv.lab.inspection.precompile import Request
from tritonconv.lab.inspection.workers import GIVEN_UP
from tritonconv.lab.verification import checks_of

HELP = "compile the tuner's candidates ahead, for a GPU that is not here"
EXAMPLE = "tritonconv compile --target sm_90 --suite unet --output compiled"
DESCRIPTION = f"""\
Compiles the kernels that the tuner would try for layers, for a model or for one problem, and keeps them in a folder.
This needs no GPU. Without flags it compiles for the problems of a campaign on a GPU: bfloat16, the suites of models. On
the machine with the GPU, tune, bench and campaign take kernels from the folder with --compiled DIR, and each call takes
them from the folder that {VARIABLE} names. Kernels of the folder are not compiled there again.

Both machines must have the same Triton, the same version of Python and the same sources of the kernels. On either
machine, tritonconv compile --check DIR prints how many launches of the folder that machine can use, and why it cannot
use the others.

A run that was cut off leaves a usable folder, and the same command goes on. The folder can be moved, and its users only
read it. It holds code that runs: take only a folder whose origin you trust.
"""
DTYPE = "bfloat16"  # as a campaign on a GPU
MOST_SHOWN = 10  # failures and launches that are not found, each with its reason


def add(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, "target")
    text = "the folder to fill; one that the same Triton filled before may be given again"
    parser.add_argument("--output", "--out", type=Path, metavar="DIR", help=text)
    parser.add_argument("--check", type=Path, metavar="DIR", help="print how many launches of DIR this machine can use")
    add_problems(parser, scale="full", dtype=DTYPE, of_models=True)
    parser.add_argument(
        "--candidates", type=flags.count, default=CONFIGS, metavar="N",
        help="configs of each variant, for each pass of a problem (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also compile the kernels that a campaign verifies first: the default config of every variant",
    )
    add_flags(parser, "variant-file", "jobs", "seconds", "quiet")


def run(options: argparse.Namespace) -> int:
    if options.check is not None and (options.target or options.output):
        raise ArgumentError("arguments --check and --target or --output: choose one")
    if options.check is None and not (options.target and options.output):
        raise ArgumentError("arguments --target and --output are needed: the GPU, and the folder to fill")
    load_variant_files(options)
    check_compiler()
    if options.check is not None:
        return _check(options.check, options.quiet)
    tasks, _ = tasks_asked_for(options, torch.device("cpu"), options.scale or "full")
    asked = (task.problem for task in with_plain(tasks) if task.problem.n and task.problem.c_out)
    problems = list(dict.fromkeys(asked))
    begin, filled = perf_counter(), []
    for target in flags.once(options.target, ()):
        with _about(options.output):
            folder = open_folder(options.output, target)
        jobs = jobs_of(problems, target, options.candidates) + (_verified(options, target) if options.verify else [])
        if not jobs:
            raise ArgumentError(f"no Triton variant serves any of the problems on {target}")
        left = None if options.seconds is None else max(0.0, options.seconds - (perf_counter() - begin))
        with progress(options.quiet, unit="launches", first="starting the compilers") as shown, _about(options.output):
            filled.append(compile_into(folder, jobs, target, options.jobs, left, shown))
        _report(target, filled[-1])
    with _about(options.output):
        size = _size(folder, sum(each.compiled for each in filled), perf_counter() - begin)
    print(size)
    nothing = not any(each.compiled or each.known for each in filled)
    return WRONG if nothing or any(each.faults or each.given_up for each in filled) else OK


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """A file that cannot be read or written inside the block is an error of --output; a closed stderr is none."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(f"argument --output: {error}") from None
    except BrokenPipeError:
        raise
    except OSError as error:  # that of a full disk names no file
        reason = f"{error.filename or path}: {error.strerror or error}"
        raise ArgumentError(f"argument --output: {reason}; launches that are in {path} stay, and the same command "
                            "compiles the others") from None  # fmt: skip


def _verified(options: argparse.Namespace, target: str) -> list[Request]:
    with compiling_for(TARGETS[target]):
        return with_reduced(
            (chosen.variant.name, task.problem, chosen.config)
            for task, chosen in checks_of(dtypes_of(options, DTYPE), layouts_of(options), GPU)
            if chosen.variant.backend == "triton"
        )


def _report(target: str, filled: Filled) -> None:
    print(
        f"{target}: {filled.compiled} launches compiled, {filled.known} known before, "
        f"{len(filled.failed)} cannot be compiled, {filled.left + filled.given_up} left"
    )
    _show([f"{name} {dict(config)} on {problem}: {why}" for (name, problem, config), why in filled.failed])
    if filled.given_up:
        print(f"{filled.given_up} {GIVEN_UP}")
    if filled.left:
        print("the budget was used up; the same command goes on from here")


def _show(lines: Sequence[str]) -> None:
    for line in lines[:MOST_SHOWN]:
        print(f"  {line}")
    if len(lines) > MOST_SHOWN:
        print(f"  and {len(lines) - MOST_SHOWN} more")


def _size(folder: CompiledFolder, compiled: int, seconds: float) -> str:
    launches = Launches(folder)
    whole = [launch for launch in launches if launches.whole(launch)]
    kernels = {kernel.key for launch in whole for kernel in launch.kernels}
    size = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
    each = f", {seconds / compiled:.2f} s a launch" if compiled else ""
    content = f"{len(whole)} launches of {len(kernels)} kernels, {size / 1e6:.1f} MB; {seconds:.1f} s{each}"
    lacking = len(launches) - len(whole)
    return f"{folder.path}: {content}" + (f"; of {lacking} more the folder lacks files" if lacking else "")


def _check(path: Path, quiet: bool) -> int:
    try:
        folder = CompiledFolder.read(path)
        launches = Launches(folder)
    except ArgumentError as error:
        raise ArgumentError(f"argument --check: {error}") from None
    with progress(quiet, unit="launches", first="working out the keys") as shown:
        shown.begin(len(launches))
        lacking = []
        for launch in launches:
            if (why := why_not_found(launches, launch)) is not None:
                lacking.append((launch, why))
            shown.step(launch.label)
    if folder.difference is not None:
        print(folder.difference)
    else:
        for why, count in Counter(why for _, why in lacking).most_common():
            print(f"{count} not found: {why}")
        _show([f"{launch.label}: {why}" for launch, why in lacking])
    print(f"{len(launches) - len(lacking)} of {len(launches)} launches found")
    return WRONG if lacking or not len(launches) else OK
