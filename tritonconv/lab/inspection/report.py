"""Shows an inspection: a table per variant, then what is wrong."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from tritonconv.kernels.registry import variants
from tritonconv.lab.bench.summary import columns
from tritonconv.lab.inspection.jobs import SAMPLE_LAYERS
from tritonconv.lab.inspection.records import Inspection, Record, faults, grouped

HEAD = (
    "layer", "layout", "products", "target", "kernel", "config", "matrix", "registers", "spills B", "stack B",
    "shared B", "blocks", "threads", "bulk", "async", "local", "instructions", "loop", "narrow", "s",
)  # fmt: skip
TEXTS = 7  # columns of text, set flush left; the others are numbers
LEGEND = (
    "registers per thread; spills: bytes stored + loaded by the program text; blocks per multiprocessor and the part "
    "of its threads they fill; instructions that multiply matrices, copy in bulk (TMA), copy asynchronously, touch "
    "local memory; loop: instructions of the innermost loop that multiplies, and its loads of 1 or 2 bytes; seconds of "
    "compilation (empty: Triton's cache had it)"
)
_SHORT = {"num_warps": "warps", "num_stages": "stages"}
_CLASS_OF = {layer: name for name, layer in SAMPLE_LAYERS.items()}


def class_of(record: Record) -> str:
    """The class that the record's layer stands for."""
    return _CLASS_OF.get(record.layer, record.layer)


def matrix(record: Record) -> str:
    """``HGMMA 8``, ``FMA`` for IEEE float32 dots, ``-`` without a dot, ``none`` where a dot lacks it."""
    if record.matrix:
        return ", ".join(f"{name} {count}" for name, count in record.matrix.items())
    return {"": "-", "fma": "FMA", "matrix": "none"}[record.dot]


def tile(record: Record) -> str:
    """The config, its BLOCK_ sizes as ``M128``."""
    parts = []
    for key, value in record.config.items():
        name = key.removeprefix("BLOCK_")
        parts.append(f"{name}{value}" if name != key and len(name) == 1 else f"{_SHORT.get(key, key)}={value}")
    return " ".join(parts)


def cells(record: Record) -> tuple[str, ...]:
    """One row of the table."""
    head = (class_of(record), record.layout, record.precision, record.target)
    config = tile(record) if record.default else f"({tile(record)})"
    if record.error is not None:
        return (*head, "does not compile", config, *("" for _ in HEAD[len(head) + 2 :]))
    return (
        *head,
        record.kernel.replace("_kernel", "").removeprefix(record.variant).lstrip("_ ") or "-",
        config,
        matrix(record),
        str(record.registers),
        f"{record.spill_store_bytes}+{record.spill_load_bytes}",
        str(record.stack_bytes),
        str(record.shared_bytes),
        str(record.blocks),
        f"{record.occupancy:.0%}",
        str(record.bulk_copies),
        str(record.async_copies),
        str(record.local_accesses),
        str(record.instructions),
        str(record.loop_instructions),
        str(record.narrow_loads),
        "" if record.seconds is None else f"{record.seconds:.1f}",
    )


def show(inspection: Inspection, out: TextIO | None = None) -> None:
    """Prints the tables to ``out`` (stdout by default): rich's on a terminal, aligned text elsewhere."""
    stream = sys.stdout if out is None else out
    fancy = stream.isatty() and importlib.util.find_spec("rich") is not None
    ideas = {record.name: record.idea for record in variants()}
    for (name,), records in grouped(inspection.records, "variant").items():
        title = f"{name}: {ideas[name]}" if name in ideas else name
        (_rich if fancy else _plain)(title, records, stream)
    shown = {class_of(record): record for record in inspection.records}
    rows = [[name, record.layer, record.problem.rsplit(f" {record.dtype}", 1)[0]] for name, record in shown.items()]
    if rows:
        print("\n".join(["layers:", *(f"  {line}" for line in columns(rows, numbers=0)), "", LEGEND]), file=stream)


def _plain(title: str, records: Sequence[Record], out: TextIO) -> None:
    rows = [HEAD, *(cells(record) for record in records)]
    print("\n".join([title, *(f"  {line}" for line in columns(rows, numbers=len(HEAD) - TEXTS)), ""]), file=out)


def _rich(title: str, records: Sequence[Record], out: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, name in enumerate(HEAD):
        table.add_column(name, justify="left" if index < TEXTS else "right")
    for record in records:
        style = ("red" if record.default else "yellow") if faults(record) else None
        table.add_row(*cells(record), style=style)
    Console(file=out).print(table)


def verdict(inspection: Inspection) -> str:
    """What was compiled, and which rows are wrong and why."""
    launches = {
        (record.variant, record.layer, record.precision, record.layout, record.target, tuple(record.config.items()))
        for record in inspection.records
    }
    lines = _lines("fault", inspection.failures()) + _lines("warning", inspection.warnings())
    compiled = len({record.variant for record in inspection.records})
    lines.append(
        f"{_count(len(inspection.records), 'kernel')} of {_count(len(launches), 'launch', 'es')} of "
        f"{_count(compiled, 'variant')} compiled with Triton {inspection.triton}: "
        f"{_count(len(inspection.failures()), 'fault')} in default configs, "
        f"{_count(len(inspection.warnings()), 'warning')}"
    )
    return "\n".join(lines)


def _lines(word: str, found: Iterable[tuple[Record, str]]) -> list[str]:
    """One line per variant, target and reason, with the rows it concerns."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for record, why in found:
        row = f"{class_of(record)} {record.precision} {record.layout}"
        if not record.default:
            row += f" ({tile(record)})"
        rows.setdefault((record.kernel or record.variant, record.target, why), []).append(row)
    return [f"{word}: {name} for {target}: {why} [{', '.join(each)}]" for (name, target, why), each in rows.items()]


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
