"""The table of an inspection in a Markdown file: one section per Triton version, each replaced on its own."""

from __future__ import annotations

import re
from pathlib import Path

from tritonconv.errors import ArgumentError
from tritonconv.inspection.jobs import CLASSES
from tritonconv.inspection.records import Inspection, Record, faults, grouped, heaviest
from tritonconv.inspection.report import class_of, matrix

BEGIN, END = "<!-- tritonconv inspect: begin -->", "<!-- tritonconv inspect: end -->"
HEADING = "### Triton "
HEAD = (
    "variant", "layer", "target", "matrix", "registers", "spills B", "shared KiB", "blocks", "threads", "bulk", "async",
    "local", "kernels", "most registers", "most shared KiB", "faults",
)  # fmt: skip
TEXTS = 4
# What a row shows in full: the first of these that the run has.
PRECISIONS = ("bfloat16", "float16", "tf32", "ieee")
LAYOUTS = ("ndhwc", "ncdhw")


def section(inspection: Inspection) -> str:
    """The table of one Triton version: a row per variant and target, in the order of the run."""
    records = [record for record in inspection.records if record.default]
    rows = [_row(group) for group in grouped(records, "variant", "target").values()]
    rule = ["---" if index < TEXTS else "---:" for index in range(len(HEAD))]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (HEAD, rule, *rows))
    return f"{HEADING}{inspection.triton}\n\n{_caption(inspection, records)}\n\n{table}\n"


def _caption(inspection: Inspection, records: list[Record]) -> str:
    def listed(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(record, name)) for record in records))

    classes = ", ".join(name for name in CLASSES if any(class_of(record) == name for record in records))
    return (
        f"{len(records)} kernels, default configs, for {listed('target')}; {listed('precision')} in "
        f"{listed('layout')}; layers {classes}; torch {inspection.torch.split('+')[0]}."
    )


def _row(records: list[Record]) -> list[str]:
    one = representative(records)
    compiled = [record for record in records if record.error is None]
    shown = ["does not compile", *[""] * 8] if one.error is not None else _measured(one)
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
    ]


def _kib(size: int) -> str:
    return f"{size / 1024:.3g}"


def representative(records: list[Record]) -> Record:
    """The kernel that stands for a variant: of the first class of layers, in the preferred precision and layout."""
    order = list(CLASSES)

    def place(record: Record) -> tuple[int, int, int]:
        name = class_of(record)
        return (
            order.index(name) if name in order else len(order),
            PRECISIONS.index(record.precision),
            LAYOUTS.index(record.layout),
        )

    first = min(map(place, records))
    return heaviest([record for record in records if place(record) == first])


def check(path: Path) -> None:
    """Raises ArgumentError where the file is not one that :func:`update` can write into."""
    _parts(path)


def _parts(path: Path) -> tuple[str, str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"argument --markdown: cannot read {path}: {error.strerror}") from None
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise ArgumentError(f"argument --markdown: {path} needs the lines {BEGIN!r} and {END!r}, in this order")
    begin += len(BEGIN)
    return text[:begin], text[begin:end], text[end:]


def update(inspection: Inspection, path: Path) -> None:
    """Replaces the section of this Triton version between the markers of the file; the newest version stands first."""
    before, middle, after = _parts(path)
    found = {part.split("\n", 1)[0].strip(): f"{HEADING}{part}" for part in middle.split(HEADING)[1:]}
    found[inspection.triton] = section(inspection)
    newest_first = sorted(found, key=_version, reverse=True)
    text = "\n\n".join(found[version].strip() for version in newest_first)
    path.write_text(f"{before}\n\n{text}\n\n{after}", encoding="utf-8")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
