"""Each layer against the best torch: what a user who is free to choose the memory format gains.

The best torch is the fastest of ``torch`` and ``torch.compile`` in any memory format, ours the best of its formats. The
two medians come from different rounds of one run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from tritonconv.bench.results import BASELINE, COMPILED, OURS

WORK, EAGER_WORK, EAGER = "median_ms", "wall_ms", "wall"  # fields of a row, and the ``timing`` of a CPU's
TORCHS_OWN = "_torch_native"  # how the variants that are torch's own call are named


@dataclass(frozen=True)
class Standing:
    """One layer in one pass and dtype: the row of the best torch and of our best, by the field ``time``."""

    torch: Mapping
    ours: Mapping
    time: str = WORK

    @property
    def ratio(self) -> float:
        """How many times faster than the best torch."""
        return self.torch[self.time] / self.ours[self.time]

    @property
    def torch_chosen(self) -> bool:
        """What runs is torch's own call."""
        chosen = (self.ours.get("chosen") or {}).values()
        return bool(chosen) and all(name.endswith(TORCHS_OWN) for name in chosen)


def standings(rows: Iterable[Mapping], time: str = WORK) -> list[Standing]:
    """Of the result rows, one per layer, pass and dtype that both sides were timed in, in the order of the rows."""
    best: dict[tuple, dict[str, Mapping]] = {}
    for row in rows:
        side = "torch" if row["variant"] in (BASELINE, COMPILED) else "ours" if row["variant"] == OURS else None
        if side is not None:
            mine = best.setdefault((row["pass"], row["dtype"], row["layer"]), {})
            if side not in mine or row[time] < mine[side][time]:
                mine[side] = row
    return [Standing(**sides, time=time) for sides in best.values() if len(sides) == 2]


def eager(rows: Iterable[Mapping]) -> list[Standing]:
    """The same by wall time per eager call, Python and launches included; empty where times are such anyway."""
    return standings([row for row in rows if row.get("timing", EAGER) != EAGER and row.get("wall_ms")], EAGER_WORK)


def by_pass(found: Iterable[Standing]) -> dict[tuple[str, str], list[Standing]]:
    """By (pass, dtype)."""
    groups: dict[tuple[str, str], list[Standing]] = {}
    for each in found:
        groups.setdefault((each.ours["pass"], each.ours["dtype"]), []).append(each)
    return groups


def mean(found: Sequence[Standing]) -> float:
    """The geometric mean of the ratios."""
    return geometric_mean(each.ratio for each in found)
