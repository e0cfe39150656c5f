"""The table of an inspection in a Markdown file: one section per Triton version, each replaced on its own."""

from __future__ import annotations

import re
from pathlib import Path

from tritonconv.lab import markdown
from tritonconv.lab.inspection.jobs import SAMPLE_LAYERS
from tritonconv.lab.inspection.records import Inspection, Record, faults, grouped, heaviest
from tritonconv.lab.inspection.report import class_of, matrix
from tritonconv.precision import PRECISIONS

COMMAND = "inspect"
HEAD = (
    "variant", "layer", "target", "matrix", "registers", "spills B", "shared KiB", "blocks", "threads", "bulk", "async",
    "local", "loop", "narrow", "kernels", "most registers", "most shared KiB", "faults",
)  # fmt: skip
TEXTS = 4
# What a row shows in full: the first of these that the run has.
LAYOUTS = ("ndhwc", "ncdhw")


def section(inspection: Inspection) -> str:
    """The table of one Triton version: a row per variant and target, in the order of the run."""
    records = [record for record in inspection.records if record.default]
    rows = [_row(group) for group in grouped(records, "variant", "target").values()]
    return f"{_caption(inspection, records)}\n\n{markdown.table(HEAD, rows, TEXTS)}\n"


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
    shown = ["does not compile", *[""] * 10] if one.error is not None else _measured(one)
    return [
        one.variant,
        f"{class_of(one)} {one.precision} {one.layout}",
        one.target,
        *shown,
        str(len(records)),
        str(max((record.registers for record in compiled), default=0)),
        _kib(max((record.shared_bytes for record in compiled), default=0)),
        str(sum(bool(faults(record)) for record in records)),
    ]


def _measured(record: Record) -> list[str]:
    return [
        matrix(record),
        str(record.registers),
        str(record.spill_store_bytes + record.spill_load_bytes),
        _kib(record.shared_bytes),
        str(record.blocks),
        f"{record.occupancy:.0%}",
        str(record.bulk_copies),
        str(record.async_copies),
        str(record.local_accesses),
        str(record.loop_instructions),
        str(record.narrow_loads),
    ]


def _kib(size: int) -> str:
    return f"{size / 1024:.3g}"


def representative(records: list[Record]) -> Record:
    """The kernel that stands for a variant: of the first class of layers, in the preferred precision and layout."""
    order = list(SAMPLE_LAYERS)

    def place(record: Record) -> tuple[int, int, int]:
        name = class_of(record)
        return (
            order.index(name) if name in order else len(order),
            list(PRECISIONS).index(record.precision),
            LAYOUTS.index(record.layout),
        )

    first = min(map(place, records))
    return heaviest([record for record in records if place(record) == first])


def check(path: Path) -> None:
    """Raises ArgumentError where the file is not one that :func:`update` can write into."""
    markdown.parts(path, COMMAND)


def update(inspection: Inspection, path: Path) -> None:
    """Replaces the section of this Triton version between the markers of the file; the newest version stands first."""
    markdown.update(path, COMMAND, f"Triton {inspection.triton}", section(inspection), _version, newest_first=True)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
