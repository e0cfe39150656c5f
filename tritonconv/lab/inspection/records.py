"""A record of one compiled kernel, its faults, and the JSON file of a whole run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tritonconv.errors import ResultsError
from tritonconv.kernels.targets import TARGETS, TENSOR_MEMORY_COLUMNS

SCHEMA = 1
NO_KERNEL = ""
ASYNC, BULK, THROUGH_REGISTERS = "async", "bulk", "registers"  # the ways of a load from global memory


@dataclass(frozen=True)
class Record:
    """One kernel of one launch, compiled for one target; or, with ``error``, a launch that did not compile.

    Bytes of spills are summed over the instructions of the program text, as ptxas does. ``dot`` is the product that the
    source asks for: ``"matrix"``, ``"fma"`` (float32 products in IEEE precision, which NVIDIA's matrix units do not
    have) or ``""`` (no ``tl.dot``).

    The ``loop_`` fields and ``products_in_flight`` are of the innermost loop that multiplies matrices, and of NVIDIA's
    alone. ``loop_loads`` counts its loads from global memory by way and bytes per thread: asynchronous copies
    (``"async 16"``), bulk copies (``"bulk"``), loads through registers (``"registers 2"``).
    """

    variant: str
    layer: str
    problem: str
    dtype: str  # of the tensors
    precision: str  # of the products: the dtype, or tf32 or ieee
    layout: str
    target: str
    config: Mapping[str, int]
    default: bool  # whether the config is the variant's default for the problem
    kernel: str = NO_KERNEL
    error: str | None = None
    seconds: float | None = None  # of compilation; None where Triton's cache had the kernel
    dot: str = ""
    warps: int = 0
    registers: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    tensor_memory_columns: int = 0
    blocks: int = 0  # resident per multiprocessor
    occupancy: float = 0.0  # part of the multiprocessor's threads, 0 to 1
    instructions: int = 0
    matrix: Mapping[str, int] = field(default_factory=dict)  # matrix instructions by name
    bulk_copies: int = 0
    async_copies: int = 0
    local_accesses: int = 0
    stores: Mapping[str, int] = field(default_factory=dict)  # to global memory, by bytes per thread; NVIDIA's alone
    loop_instructions: int = 0
    loop_loads: Mapping[str, int] = field(default_factory=dict)
    products_in_flight: int | None = None  # that the loop's waits leave at least; None where none waits (sm_90 does)
    early_write: str = ""  # the first instruction that writes a register which a product in flight may read


def faults(record: Record) -> tuple[str, ...]:
    """The faults that a default config must not have: an error, a spill, more memory than there is, a dot without its
    unit, a register written too early.
    """
    if record.error is not None:
        return (f"does not compile: {record.error.splitlines()[0]}",)
    target = TARGETS[record.target]
    reasons = []
    if record.spill_store_bytes or record.spill_load_bytes or record.local_accesses:
        reasons.append(
            f"spills: {record.spill_store_bytes} bytes stored, {record.spill_load_bytes} loaded by "
            f"{record.local_accesses} local-memory instructions"
        )
    if record.stack_bytes:
        reasons.append(f"uses a stack of {record.stack_bytes} bytes")
    if record.shared_bytes > target.shared_per_block:
        reasons.append(
            f"asks for {record.shared_bytes} bytes of shared memory, {target.name} has {target.shared_per_block}"
        )
    if record.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
        reasons.append(
            f"asks for {record.tensor_memory_columns} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}"
        )
    if record.blocks == 0 and not reasons:
        reasons.append(f"{record.warps} warps with {record.registers} registers do not fit a multiprocessor")
    if record.dot == "matrix" and not record.matrix:
        reasons.append(f"has a tl.dot and no matrix instruction ({target.matrix} expected)")
    if record.early_write:
        reasons.append(f"writes a register that a product in flight may read (triton #9433): {record.early_write}")
    return tuple(reasons)


def remarks(record: Record) -> tuple[str, ...]:
    """Remarks that are no faults: the matrix instruction is of an older generation."""
    newest = TARGETS[record.target].matrix
    if record.matrix and newest not in record.matrix:
        return (f"its matrix instruction is {', '.join(record.matrix)}, {record.target} has {newest}",)
    return ()


@dataclass(frozen=True)
class Inspection:
    """A whole run: the versions and the command it was made with, and its records."""

    triton: str
    torch: str
    command: str
    records: tuple[Record, ...]

    def failures(self) -> list[tuple[Record, str]]:
        return [(record, why) for record in self.records if record.default for why in faults(record)]

    def warnings(self) -> list[tuple[Record, str]]:
        bad = [(record, why) for record in self.records if not record.default for why in faults(record)]
        return bad + [(record, why) for record in self.records for why in remarks(record)]


def write(inspection: Inspection, path: Path) -> None:
    """Writes a run as JSON. Raises ResultsError where the file cannot be written."""
    text = json.dumps({"schema": SCHEMA, **asdict(inspection)}, indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error}") from None


def grouped(records: Iterable[Record], *names: str) -> dict[tuple, list[Record]]:
    """Records by the values of these fields, in the order in which they first come."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(getattr(record, name) for name in names), []).append(record)
    return groups
