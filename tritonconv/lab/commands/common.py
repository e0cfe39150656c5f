"""The flags, exit codes and tables that several commands share."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tritonconv.autotune import store
from tritonconv.autotune.key import device_name
from tritonconv.epilogue import NAMES, Epilogue
from tritonconv.errors import ArgumentError, ArgumentTypeError, StoreError
from tritonconv.kernels import registry, triton_compiled
from tritonconv.kernels.registry import triton_fault
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.triton_compiled import VARIABLE, CompiledFolder
from tritonconv.kernels.variant import Variant
from tritonconv.lab import flags, text_table
from tritonconv.lab.bench.calls import ALL_PASSES, FORWARD_BACKWARD
from tritonconv.lab.bench.layer_sizes import RANDOM, SCALES, Workload
from tritonconv.lab.bench.options import Options
from tritonconv.lab.bench.stages import SUITE, of_words
from tritonconv.lab.bench.workloads import ALL, OF_HEROES, suites
from tritonconv.lab.inspection.launches import launches_of
from tritonconv.problem import LAYOUTS

OK, WRONG, USAGE, INTERRUPTED = 0, 1, 2, 130
DTYPES = ("float32", "float16", "bfloat16", "float64")
AUTO, DEVICE = "auto", re.compile(r"cpu|cuda(:\d+)?")
RESULTS = Path("results")
OTHER_SUITES = ("kernelbench", RANDOM, SUITE)  # not layers of models: asked for by name
MOST_PROCESSES = 8  # each holds torch and a compiler: about 0.7 GB


def listed(allowed: Iterable[str], noun: str = "") -> dict[str, Any]:
    """The arguments of a flag that takes comma lists of the allowed names and may be repeated."""
    names = tuple(allowed)
    return {"type": flags.names(names), "action": "extend", "metavar": "NAME[,NAME]", "help": noun or ", ".join(names)}


def folder(text: str) -> dict[str, Any]:
    """The arguments of a flag that names a folder."""
    return {"type": Path, "metavar": "DIR", "help": text}


def _device_name(text: str) -> str:
    if text != AUTO and DEVICE.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {AUTO}, cpu, cuda or cuda:N")
    return text


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Each flag that several commands have. Its default stands where it is used, and in the command's help.
FLAGS: dict[str, dict[str, Any]] = {
    "suite": listed(suites(), "suites of layers"),
    "only": {"default": "", "metavar": "TEXT", "help": "only layers whose name contains TEXT"},
    "passes": listed(ALL_PASSES),
    "dtype": listed(DTYPES),
    "layout": listed(LAYOUTS),
    "scale": {"choices": tuple(SCALES), "help": "sizes of the layers"},
    "target": listed(TARGETS, f"GPUs to compile for: {', '.join(TARGETS)}"),
    "device": {"type": _device_name, "default": AUTO, "metavar": "NAME",
               "help": "cpu, cuda (the current GPU) or cuda:N (default: cuda if there is a GPU)"},
    "seconds": {"type": flags.seconds, "metavar": "S", "help": "budget: the run ends there and keeps what is finished"},
    "output": folder("folder of the results file"),
    "store": folder("folder of the store of choices"),
    "quiet": {"action": "store_true", "help": "no progress on stderr"},
    "variant-file": {"type": Path, "action": "append", "default": [], "dest": "variant_files", "metavar": "FILE",
                     "help": "a Python file with a VARIANT record, which joins the project's variants for this run; "
                     "may be repeated"},
    "compiled": folder(f"take kernels from this folder, which tritonconv compile filled, and compile only those that "
                       f"it lacks (default: ${VARIABLE})"),
    "compile": {"action": argparse.BooleanOptionalAction, "help": "time torch.compile too"},
    "activation": {"metavar": "NAME[:X]", "help": f"with this activation behind the layer: {', '.join(NAMES)}; "
                   "leaky_relu:0.2, gelu:tanh"},
    "residual": {"action": "store_true", "help": "with a residual that is added to the output"},
    "rounding": {"choices": ("torch",), "help": "with the roundings of torch's separate operations"},
    "jobs": {"type": flags.processes, "default": min(CORES, MOST_PROCESSES), "metavar": "N",
             "help": "processes that compile (default: %(default)s)"},
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser, *names: str, **defaults: str) -> None:
    """Adds shared flags: those of ``names``, and those of ``defaults``, whose default --help then says so."""
    for name in (*names, *defaults):
        flag = FLAGS[name]
        text = flag["help"] + (f" (default: {defaults[name]})" if name in defaults else "")
        parser.add_argument(f"--{name}", **{**flag, "help": text})


def epilogue_of(options: argparse.Namespace) -> Epilogue | None:
    """That of --activation, --residual, --rounding and --concat, where the command has them; None without any.

    Raises ArgumentError for an activation that is none.
    """
    concat, activation = getattr(options, "concat", False), options.activation
    if concat and (activation or options.residual or options.rounding):
        raise ArgumentError("argument --concat: no other epilogue goes with it")
    try:
        return of_words(activation, options.residual, options.rounding, concat)
    except (ArgumentError, ArgumentTypeError) as error:
        raise ArgumentError(f"argument --activation: {error}") from None


def dtypes_of(options: argparse.Namespace, *default: str) -> tuple[torch.dtype, ...]:
    """Those of --dtype."""
    return tuple(getattr(torch, name) for name in flags.once(options.dtype, default))


def layouts_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Those of --layout; without it both."""
    return flags.once(options.layout, tuple(LAYOUTS))


def device_of(name: str) -> torch.device:
    """The device; one of several GPUs is the current one of the process from here on."""
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"argument --device: got {name!r}, and torch {torch.__version__} sees only the CPU")
    if device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise ArgumentError(f"argument --device: got {name!r}, and there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    return device


def passes_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Those of --passes; without it forward, and forward with backward."""
    return flags.once(options.passes, ("forward", FORWARD_BACKWARD))


def run_of(
    options: argparse.Namespace,
    device: torch.device,
    layers: tuple[Workload, ...],
    dtype: str,
    variants: Iterable[Variant],
) -> Options:
    """The run of the benchmark that the flags ask for; ``dtype`` is the default of --dtype."""
    return Options(
        layers=layers,
        passes=passes_of(options),
        dtypes=dtypes_of(options, dtype),
        layouts=layouts_of(options),
        variants=tuple(variants),
        scale=scale_for(options.scale, device),
        seconds=options.seconds,
        device=device,
        seed=getattr(options, "seed", None) or 0,
        command=options.command,
        compiled=device.type == "cuda" if options.compile is None else options.compile,
        copies=getattr(options, "copies", False),
        cudnn_graph=getattr(options, "cudnn_graph", False),
    )


def model_suites() -> tuple[str, ...]:
    """The suites whose layers are those of models."""
    return tuple(name for name in suites() if name not in (*OTHER_SUITES, ALL, OF_HEROES))


def scale_for(given: str | None, device: torch.device) -> str:
    """The scale asked for, else what fits the device: shrunk layers on a CPU."""
    return given or ("cpu" if device.type == "cpu" else "full")


def layer_lines(layers: Iterable[Workload], scale: str) -> list[str]:
    rows = [["layer", "suite", "sizes", "used in", "source"]]
    for layer in layers:
        sizes = str(layer.problem(scale=scale)).replace(" float32 ncdhw", "")
        rows.append([layer.name, layer.suite, sizes, layer.used_in, layer.source])
    return text_table.lines(rows, numbers=0)


def load_variant_files(options: argparse.Namespace) -> tuple[Variant, ...]:
    """The records of --variant-file, registered. Raises ArgumentError that names the file."""
    return tuple(record for path in options.variant_files for record in registry.load(path))


def check_store(device: torch.device, folder: Path | None = None, instead: str = "--store") -> None:
    """Raises ArgumentError where a store cannot be written: before anything is measured for it."""
    try:
        store.merge(store.Table(device_name(device)), folder)
    except StoreError as error:
        raise ArgumentError(f"{error}; TRITONCONV_CACHE or {instead} names another folder") from None


def use_compiled(options: argparse.Namespace, device: torch.device) -> None:
    """Has this process, and those that it starts, take kernels from the folder of --compiled; says on stderr how many.

    They take them from no other folder: where this one does not fit, that of the environment is not taken either.
    Raises ArgumentError for a folder that is not one of compiled kernels.
    """
    if options.compiled is None:
        return
    triton_compiled.remove()
    try:
        folder = CompiledFolder.read(options.compiled)
        content = _taken(folder, device)
    except ArgumentError as error:
        raise ArgumentError(f"argument --compiled: {error}") from None
    print(f"tritonconv {options.name}: {folder.path}: {content}", file=sys.stderr)


def _taken(folder: CompiledFolder, device: torch.device) -> str:
    """Installs the folder where it may serve, and says what it holds for the device."""
    if device.type != "cuda":
        return f"kernels for {', '.join(folder.targets)} serve no {device.type}"
    fault = triton_fault()
    if fault is not None:
        return f"{fault}: none of its kernels is used"
    from tritonconv.kernels.triton_target import INTERPRETED, target_name  # needs Triton

    if INTERPRETED:
        return "Triton's interpreter takes no compiled kernels"
    if folder.misfit is not None:
        return f"{folder.misfit}: none of its kernels is used"
    launches = launches_of(folder)
    os.environ[VARIABLE] = str(folder.path)
    triton_compiled.install(folder)
    mine = [launch for launch in launches if launch.target == target_name()]
    fresh = [launch for launch in mine if not any(map(launches.edited, launch.kernels))]
    whole, edited = sum(map(launches.whole, fresh)), len(mine) - len(fresh)
    content = f"{whole} launches for {target_name()}"
    if edited:
        content += f"; {edited} more are of other sources of the kernels, and not used"
    if whole < len(fresh):
        content += f"; of {len(fresh) - whole} more the folder lacks files"
    return content
