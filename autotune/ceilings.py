"""The highest rates of a device, by which the cost model divides.

Measured ones come from the roof rows of a results file. Where none was measured, and for sizes of caches and register
files, which no roof measures, the data sheet's figure stands in; ``measured`` is then False.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tritonconv.autotune.serving import Part
from tritonconv.kernels.registry import RENAMED
from tritonconv.kernels.targets import NVIDIA, G
from tritonconv.kernels.variant import COPY

COPIES = " copied"  # behind a variant's name: the kind of its configs that copy operands first
# Names of roof rows (bench/roofs.py measures them).
COPY_CACHE, COPY_MEMORY, COPY_L2, MATMUL, LAUNCH = "copy_cache", "copy_memory", "copy_l2", "matmul", "launch"


@dataclass(frozen=True)
class Ceilings:
    """Rates in FLOP/s (``matrix`` by dtype, ``vector`` for FMAs) and bytes/s (``memory``, ``cache``); sizes in bytes,
    of shared memory and registers per multiprocessor; ``launch_us`` is the time of one launch. ``factors``: measured
    over predicted time by kind of kernel; ``host_ms``: the host's time for a call, by formulation and by pass
    and backend (``calibrate.py``).
    """

    device: str
    matrix: Mapping[str, float]
    vector: float
    memory: float
    cache: float
    multiprocessors: int
    shared_bytes: int
    registers: int
    launch_us: float
    measured: bool = False
    factors: Mapping[str, float] = field(default_factory=dict)
    host_ms: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


UNKNOWN = (9, 0)
GPU_LAUNCH_US = 4.0  # the order of magnitude of a launch; measured by ``tritonconv bench --roofs``
# The share of the memory's bandwidth that a copy reaches: 4.25 of 4.8 TB/s on an H200, 2026-11-28.
COPIED = 0.88
# A core of any recent server: these rates only rank formulations against each other until roofs are measured.
_CPU = Ceilings("a CPU", {"float32": 100 * G}, 25 * G, 10 * G, 30 * G, 1, 1 << 20, 1 << 16, 5.0)


def nominal(device: torch.device) -> Ceilings:
    """Data-sheet rates of a GPU with the device's compute capability (an H100's for an unknown one), or of a CPU."""
    if device.type != "cuda":
        return _CPU
    return of_capability(torch.cuda.get_device_capability(device) if torch.cuda.is_available() else UNKNOWN)


def of_capability(capability: tuple[int, int]) -> Ceilings:
    """Data-sheet rates of a GPU with this compute capability; an H100's for one that is not listed."""
    target = NVIDIA.get(10 * capability[0] + capability[1])
    if target is None or target.sheet is None:
        return of_capability(UNKNOWN)
    part, vector, tf32, half, memory, count = target.sheet
    matrix = {"float32": vector, "tf32": tf32, "bfloat16": half, "float16": half}
    # L2 bandwidth is on no data sheet: twice the memory's is assumed until it is measured.
    return Ceilings(part, matrix, vector, memory, 2 * memory, count, target.shared, target.registers, GPU_LAUNCH_US)


def scale_to(base: Ceilings, gpu: Part) -> Ceilings:
    """The rates of a GPU, scaled from those of another of its compute capability, ``base``, whose factors are kept.

    The multiprocessors, and L2 with them, go by their number; memory by its bandwidth where torch says it, else by the
    data sheet's per multiprocessor. ``base`` itself for the GPU that it is of.
    """
    if gpu.name == base.device:
        return base
    part, sheet = gpu.multiprocessors / base.multiprocessors, of_capability(gpu.capability)
    peak = gpu.bandwidth or sheet.memory * gpu.multiprocessors / sheet.multiprocessors
    return replace(
        base,
        device=gpu.name,
        matrix={name: rate * part for name, rate in base.matrix.items()},
        vector=base.vector * part,
        memory=COPIED * peak,
        cache=max(base.cache * part, COPIED * peak),
        multiprocessors=gpu.multiprocessors,
        shared_bytes=gpu.shared_bytes or base.shared_bytes,
        registers=gpu.registers or base.registers,
        measured=False,
    )


def from_roofs(rows: Iterable[Mapping], environment: Mapping, device: torch.device) -> Ceilings | None:
    """From the roof rows of a results file and its environment row; None where neither a copy nor a product is there.

    The best of several measurements of a roof counts; for the launch that is the fastest.
    """
    rows = list(rows)
    base = nominal(device)
    best: dict[str, float] = {}
    matrix: dict[str, float] = {}
    for row in rows:
        name, value = row["name"], float(row["value"])
        if name == MATMUL and row["dtype"]:
            matrix[row["dtype"]] = max(value, matrix.get(row["dtype"], 0.0))
        elif name == LAUNCH:
            best[name] = min(value, best.get(name, value))
        else:
            best[name] = max(value, best.get(name, 0.0))
    if COPY_MEMORY not in best or not matrix:
        return None
    caches = [best[name] for name in (COPY_CACHE, COPY_L2) if name in best]
    ceilings = replace(
        base,
        device=environment["device_name"],
        matrix={**({} if device.type == "cpu" else base.matrix), **matrix},
        memory=best[COPY_MEMORY],
        cache=max(*caches, best[COPY_MEMORY]) if caches else 2 * best[COPY_MEMORY],
        multiprocessors=environment.get("gpu_multiprocessors") or base.multiprocessors,
        launch_us=best.get(LAUNCH, base.launch_us),
        measured=True,
    )
    if device.type == "cpu":  # an FMA loop of torch's reaches about a quarter of the matrix rate
        return replace(ceilings, vector=max(matrix.values()) / 4)
    return ceilings


def _renamed(kind: str) -> str:
    """A kind of today for one whose variant was merged into another."""
    name, *more = kind.split(" ", 1)
    new, keys = RENAMED.get(name, (name, {}))
    return " ".join([new + (COPIES if keys.get(COPY) else ""), *more])


def from_json(data: Mapping[str, Any]) -> Ceilings | None:
    """The inverse of :meth:`Ceilings.to_json`; None for anything else."""
    try:
        ceilings = Ceilings(**data)
        ceilings = replace(ceilings, factors={_renamed(kind): factor for kind, factor in ceilings.factors.items()})
        rates = (ceilings.vector, ceilings.memory, ceilings.cache, ceilings.multiprocessors, *ceilings.matrix.values())
        rates += (*ceilings.factors.values(), *ceilings.host_ms.values())
        return ceilings if ceilings.matrix and all(rate > 0 for rate in rates) else None
    except (TypeError, AttributeError):
        return None
