"""Reads nvdisasm's listing of a kernel: its instructions, and where its branches lead."""

from __future__ import annotations

import re
from typing import NamedTuple

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_LINE = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/\s+)?(?:(@!?U?P\w+)\s+)?([A-Z][^\s;]*)\s*(.*?);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


class Instruction(NamedTuple):
    guard: str  # the predicate in front, such as @!P0
    name: str  # with its modifiers, such as LDG.E.128
    text: str  # the operands
    target: int | None  # the place of the instruction behind the label that the operands name


def instructions(code: str) -> list[Instruction]:
    """All instructions in the order of the text."""
    lines: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif word := _LINE.match(line):
            lines.append((word[1] or "", word[2], word[3]))
    named = [_TARGET.search(text) for _, _, text in lines]
    return [
        Instruction(*line, labels.get(label[1]) if label else None) for line, label in zip(lines, named, strict=True)
    ]
