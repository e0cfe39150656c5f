"""A table as text: in aligned columns for the terminal, or in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def lines(rows: Sequence[Sequence[str]], numbers: int, markdown: bool = False) -> list[str]:
    """The last ``numbers`` columns are flush right. In Markdown the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = len(widths) - numbers
    if markdown:
        head, *body = rows
        rule = ["---"] * texts + ["---:"] * numbers
        return [f"| {' | '.join(row)} |" for row in (head, rule, *body)]
    sides = "<" * texts + ">" * numbers
    cells = (zip(row, sides, widths, strict=True) for row in rows)
    return ["  ".join(f"{cell:{side}{width}}" for cell, side, width in row).rstrip() for row in cells]
