"""The tables of an inspection: one per variant for the terminal, one per Triton version for a Markdown file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tritonconv.kernels.registry import variants
from tritonconv.lab import markdown, text_table
from tritonconv.lab.inspection.jobs import SAMPLE_LAYERS
from tritonconv.lab.inspection.records import Inspection, Record, faults, grouped
from tritonconv.precision import PRECISIONS

COMMAND = "inspect"  # of the markers in the Markdown file
LEGEND = (
    "registers per thread; spills: bytes stored and loaded by the program text; blocks per multiprocessor and the part "
    "of its threads they fill; instructions that multiply matrices, copy in bulk (TMA), copy asynchronously, touch "
    "local memory; loop: instructions of the innermost loop that multiplies; its loads by way and bytes per thread; "
    "the products that it leaves in flight (0: it waits for each; empty: products that are not asynchronous); stores "
    "by bytes per thread; seconds of compilation (empty: Triton's cache had it)"
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


def kernel(record: Record) -> str:
    """The kernel's name without its variant's; ``-`` for the variant's only one."""
    if record.error is not None:
        return "does not compile"
    return record.kernel.replace("_kernel", "").removeprefix(record.variant).lstrip("_ ") or "-"


def counted(counts: Mapping[str, int]) -> str:
    """``12 x async 16, 4 x registers 2``."""
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))


def kib(size: int) -> str:
    return f"{size / 1024:.3g}"


# The columns of a row: those of the launch, and those of measured values.
COMPILED: dict[str, Callable[[Record], object]] = {
    "layer": class_of,
    "layout": lambda record: record.layout,
    "products": lambda record: record.precision,
    "target": lambda record: record.target,
    "kernel": kernel,
    "config": lambda record: tile(record) if record.default else f"({tile(record)})",
}
MEASURED: dict[str, Callable[[Record], object]] = {
    "matrix": matrix,
    "registers": lambda record: record.registers,
    "spills B": lambda record: record.spill_store_bytes + record.spill_load_bytes,
    "stack B": lambda record: record.stack_bytes,
    "shared KiB": lambda record: kib(record.shared_bytes),
    "blocks": lambda record: record.blocks,
    "threads": lambda record: f"{record.occupancy:.0%}",
    "bulk": lambda record: record.bulk_copies,
    "async": lambda record: record.async_copies,
    "local": lambda record: record.local_accesses,
    "instructions": lambda record: record.instructions,
    "loop": lambda record: record.loop_instructions,
    "loop loads": lambda record: counted(record.loop_loads),
    "in flight": lambda record: "" if record.products_in_flight is None else record.products_in_flight,
    "stores": lambda record: counted(record.stores),
    "s": lambda record: "" if record.seconds is None else f"{record.seconds:.1f}",
}
TEXTS = len(COMPILED) + 1  # columns that are set flush left
# The Markdown file's: of the measured ones these alone, then figures of all kernels of a variant.
IN_MARKDOWN = tuple(name for name in MEASURED if name not in ("stack B", "instructions", "s"))
HEAD = ("variant", "layer", "target", *IN_MARKDOWN, "kernels", "most registers", "most shared KiB", "faults")
# A row of the Markdown file shows the first precision and layout of these that the run has.
LAYOUTS = ("ndhwc", "ncdhw")


def measured(record: Record, names: Iterable[str]) -> list[str]:
    """The cells of the measured columns; empty where nothing was compiled."""
    return ["" if record.error is not None else str(MEASURED[name](record)) for name in names]


def show(inspection: Inspection) -> None:
    """Prints a table per variant, the layers, and the meaning of the columns."""
    ideas = {record.name: record.idea for record in variants()}
    for (name,), records in grouped(inspection.records, "variant").items():
        rows = [[str(cell(record)) for cell in COMPILED.values()] + measured(record, MEASURED) for record in records]
        lines = text_table.lines([(*COMPILED, *MEASURED), *rows], numbers=len(COMPILED) + len(MEASURED) - TEXTS)
        print("\n".join([f"{name}: {ideas[name]}" if name in ideas else name, *(f"  {line}" for line in lines), ""]))
    layers = {class_of(record): record for record in inspection.records}
    rows = [[name, record.layer, record.problem.rsplit(f" {record.dtype}", 1)[0]] for name, record in layers.items()]
    if rows:
        print("\n".join(["layers:", *(f"  {line}" for line in text_table.lines(rows, numbers=0)), "", LEGEND]))


def verdict(inspection: Inspection) -> str:
    """Says how much was compiled, and which rows are wrong and why."""
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


def _lines(word: str, reasons: Iterable[tuple[Record, str]]) -> list[str]:
    """One line per variant, target and reason, with the rows it concerns."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for record, why in reasons:
        row = f"{class_of(record)} {record.precision} {record.layout}"
        if not record.default:
            row += f" ({tile(record)})"
        rows.setdefault((record.kernel or record.variant, record.target, why), []).append(row)
    return [f"{word}: {name} for {target}: {why} [{', '.join(each)}]" for (name, target, why), each in rows.items()]


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def section(inspection: Inspection) -> str:
    """The table of one Triton version: a row per variant and target, in the order of the run."""
    records = [record for record in inspection.records if record.default]
    rows = [_row(group) for group in grouped(records, "variant", "target").values()]
    lines = text_table.lines([HEAD, *rows], len(HEAD) - 4, markdown=True)
    return "\n".join([_caption(inspection, records), "", *lines, ""])


def _caption(inspection: Inspection, records: list[Record]) -> str:
    def listed(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(record, name)) for record in records))

    classes = ", ".join(name for name in SAMPLE_LAYERS if any(class_of(record) == name for record in records))
    return (
        f"{len(records)} kernels, default configs, for {listed('target')}; {listed('precision')} in "
        f"{listed('layout')}; layers {classes}; torch {inspection.torch.split('+')[0]}."
    )


def _row(records: list[Record]) -> list[str]:
    one = representative(records)
    compiled = [record for record in records if record.error is None]
    cells = measured(one, IN_MARKDOWN)
    if one.error is not None:
        cells[0] = kernel(one)
    return [
        one.variant,
        f"{class_of(one)} {one.precision} {one.layout}",
        one.target,
        *cells,
        str(len(records)),
        str(max((record.registers for record in compiled), default=0)),
        kib(max((record.shared_bytes for record in compiled), default=0)),
        str(sum(bool(faults(record)) for record in records)),
    ]


def representative(records: list[Record]) -> Record:
    """The kernel that stands for a variant: of the first class of layers, in the preferred precision and layout.

    Of the kernels of a launch the one that computes: with a dot, and then the longest.
    """
    order = list(SAMPLE_LAYERS)

    def place(record: Record) -> tuple:
        name = class_of(record)
        return (
            order.index(name) if name in order else len(order),
            list(PRECISIONS).index(record.precision),
            LAYOUTS.index(record.layout),
            record.error is None,
            not record.dot,
            -record.instructions,
        )

    return min(records, key=place)


def check(path: Path) -> None:
    """Raises ArgumentError where the file has no place for the table."""
    markdown.parts(path, COMMAND)


def update(inspection: Inspection, path: Path) -> None:
    """Replaces the section of this Triton version between the markers of the file; the newest version stands first."""
    markdown.update(path, COMMAND, f"Triton {inspection.triton}", section(inspection), _version, newest_first=True)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
