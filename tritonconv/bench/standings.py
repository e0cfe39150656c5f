"""Each layer against the best torch: what a user who is free to choose the memory format gains.

The best torch is the fastest of ``torch`` and ``torch.compile`` in any memory format, ours the best of its formats. The
two medians come from different rounds of one run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from tritonconv.bench.results import BASELINE, COMPILED, OURS

TORCHS_OWN = "_torch_native"  # how the variants that are torch's own call are named


@dataclass(frozen=True)
class Standing:
    """One layer in one pass and dtype: the row of the best torch and of our best."""

    torch: Mapping
    ours: Mapping

    @property
    def ratio(self) -> float:
        """How many times faster than the best torch."""
        return self.torch["median_ms"] / self.ours["median_ms"]

    @property
    def torch_chosen(self) -> bool:
        """What runs is torch's own call."""
        chosen = (self.ours.get("chosen") or {}).values()
        return bool(chosen) and all(name.endswith(TORCHS_OWN) for name in chosen)


def standings(rows: Iterable[Mapping]) -> list[Standing]:
    """Of the result rows, one per layer, pass and dtype that both sides were timed in, in the order of the rows."""
    best: dict[tuple, dict[str, Mapping]] = {}
    for row in rows:
        side = "torch" if row["variant"] in (BASELINE, COMPILED) else "ours" if row["variant"] == OURS else None
        if side is not None:
            mine = best.setdefault((row["pass"], row["dtype"], row["layer"]), {})
            if side not in mine or row["median_ms"] < mine[side]["median_ms"]:
                mine[side] = row
    return [Standing(**sides) for sides in best.values() if len(sides) == 2]


def by_pass(found: Iterable[Standing]) -> dict[tuple[str, str], list[Standing]]:
    """By (pass, dtype)."""
    groups: dict[tuple[str, str], list[Standing]] = {}
    for each in found:
        groups.setdefault((each.ours["pass"], each.ours["dtype"]), []).append(each)
    return groups


def mean(found: Sequence[Standing]) -> float:
    """The geometric mean of the ratios."""
    return geometric_mean(each.ratio for each in found)
