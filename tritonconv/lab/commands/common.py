"""What several commands share: exit codes, the flags for layers, and the device they name."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from tritonconv.errors import ArgumentError
from tritonconv.kernels import registry, triton_compiled
from tritonconv.kernels.registry import triton_fault
from tritonconv.kernels.triton_compiled import VARIABLE, CompiledFolder
from tritonconv.kernels.variant import Variant
from tritonconv.lab.bench.summary import columns
from tritonconv.lab.bench.workloads import ALL, Workload, suites
from tritonconv.lab.inspection.launches import Launches, install

OK, WRONG, USAGE, INTERRUPTED = 0, 1, 2, 130
DTYPES = ("float32", "float16", "bfloat16", "float64")
AUTO, DEVICE = "auto", re.compile(r"cpu|cuda(:\d+)?")
RESULTS = Path("results")
OTHER_SUITES = ("kernelbench",)  # not layers of models: asked for by name


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=_device_name, default=AUTO, metavar="NAME",
        help="cpu, cuda (the current GPU) or cuda:N (default: cuda if any)",
    )  # fmt: skip


def _device_name(text: str) -> str:
    if text != AUTO and DEVICE.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {AUTO}, cpu, cuda or cuda:N")
    return text


def device(name: str) -> torch.device:
    """The device; one of several GPUs is the current one of the process from here on."""
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.device(name)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"argument --device: got {name!r}, and torch {torch.__version__} sees only the CPU")
    if found.index is not None:
        if found.index >= torch.cuda.device_count():
            raise ArgumentError(f"argument --device: got {name!r}, and there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(found)
    return found


def model_suites() -> tuple[str, ...]:
    """The suites whose layers are those of models."""
    return tuple(name for name in suites() if name not in (*OTHER_SUITES, ALL))


def scale_for(given: str | None, device: torch.device) -> str:
    """The scale asked for, else what fits the device: shrunk layers on a CPU."""
    return given or ("cpu" if device.type == "cpu" else "full")


def layer_lines(layers: Iterable[Workload], scale: str) -> list[str]:
    rows = [["layer", "suite", "sizes", "used in", "source"]]
    for layer in layers:
        sizes = str(layer.problem(scale=scale)).replace(" float32 ncdhw", "")
        rows.append([layer.name, layer.suite, sizes, layer.used_in, layer.source])
    return columns(rows, numbers=0)


def add_variant_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant-file", type=Path, action="append", default=[], dest="variant_files", metavar="FILE",
        help="a Python file with a VARIANT record, which joins the project's variants for this run; may be repeated",
    )  # fmt: skip


def load_variant_files(options: argparse.Namespace) -> tuple[Variant, ...]:
    """The records of --variant-file, registered. Raises ArgumentError that names the file."""
    return tuple(record for path in options.variant_files for record in registry.load(path))


def add_compiled(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compiled", type=Path, metavar="DIR",
        help="take kernels from the folder that tritonconv compile filled, and compile those alone that it lacks "
        f"(default: ${VARIABLE})",
    )  # fmt: skip


def use_compiled(options: argparse.Namespace, device: torch.device) -> None:
    """Has this process, and those that it starts, take kernels from the folder of --compiled; says on stderr how many.

    From no other folder: where it does not fit, that of the environment is not taken either. Raises ArgumentError for
    a folder that is not one.
    """
    if options.compiled is None:
        return
    triton_compiled.remove()
    try:
        folder = CompiledFolder.read(options.compiled)
        said = _taken(folder, device)
    except ArgumentError as error:
        raise ArgumentError(f"argument --compiled: {error}") from None
    print(f"tritonconv {options.name}: {folder.path}: {said}", file=sys.stderr)


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
    launches = Launches(folder)
    os.environ[VARIABLE] = str(folder.path)
    install(launches)
    mine = [launch for launch in launches if launch.target == target_name()]
    fresh = [launch for launch in mine if not any(map(launches.edited, launch.kernels))]
    whole, edited = sum(map(launches.whole, fresh)), len(mine) - len(fresh)
    said = f"{whole} launches for {target_name()}"
    if edited:
        said += f"; {edited} more are of other sources of the kernels, and not used"
    if whole < len(fresh):
        said += f"; of {len(fresh) - whole} more the folder lacks files"
    return said
