"""Each layer against the best torch: what a user who is free to choose the memory format gains.

The best torch is the fastest of ``torch`` and ``torch.compile`` in any memory format, ours the best of its formats. The
two medians come from different rounds of one run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tritonconv.lab.bench.columns import columns_of, median
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS

TORCHS_OWN = "_torch_native"  # how the variants that are torch's own call are named


@dataclass(frozen=True)
class Standing:
    """One layer in one pass and dtype: the row of the best torch and of our best in one column; their times in ms."""

    torch: Mapping
    ours: Mapping
    torch_ms: float
    ms: float

    @property
    def ratio(self) -> float:
        """How many times faster than the best torch."""
        return self.torch_ms / self.ms

    @property
    def torch_chosen(self) -> bool:
        """Ours runs torch's own call."""
        chosen = (self.ours.get("chosen") or {}).values()
        return bool(chosen) and all(name.endswith(TORCHS_OWN) for name in chosen)


def standings(rows: Iterable[Mapping], column: str | None = None) -> list[Standing]:
    """Of the result rows, one per layer, pass and dtype that both sides were timed in, in the order of the rows.

    ``column`` None is the first that the rows have; a row without it does not count.
    """
    rows = list(rows)
    column = column or next(iter(columns_of(rows)), None)
    best: dict[tuple, dict[str, tuple[float, Mapping]]] = {}
    for row in rows:
        side = "torch" if row["variant"] in (BASELINE, COMPILED) else "ours" if row["variant"] == OURS else None
        ms = median(row, column) if column is not None else None
        if side is not None and ms is not None:
            mine = best.setdefault((row["pass"], row["dtype"], row["layer"]), {})
            if side not in mine or ms < mine[side][0]:
                mine[side] = ms, row
    both = [(sides["torch"], sides["ours"]) for sides in best.values() if len(sides) == 2]
    return [Standing(theirs, ours, torch_ms, ms) for (torch_ms, theirs), (ms, ours) in both]


def by_column(rows: Iterable[Mapping]) -> dict[str, list[Standing]]:
    """The standings in every column that the rows have, the device's own first."""
    rows = list(rows)
    return {column: standings(rows, column) for column in columns_of(rows)}


def grouped(rows: Iterable[Mapping], *names: str) -> dict[tuple, list[Mapping]]:
    """The rows by their values of these names, in the order in which each first comes."""
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def by_pass(ranked: Iterable[Standing]) -> dict[tuple[str, str], list[Standing]]:
    """By (pass, dtype)."""
    groups: dict[tuple[str, str], list[Standing]] = {}
    for standing in ranked:
        groups.setdefault((standing.ours["pass"], standing.ours["dtype"]), []).append(standing)
    return groups
