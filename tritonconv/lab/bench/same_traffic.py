"""A copy that moves the bytes of a pass: the yardstick that needs no roofline. It runs among the cell's contestants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import geometric_mean

import torch

from tritonconv.lab.bench.calls import TensorCall, work
from tritonconv.lab.bench.measure import Measured
from tritonconv.lab.bench.results import BASELINE, OURS, Run
from tritonconv.lab.bench.standings import grouped
from tritonconv.problem import Problem

NAME = "same_traffic_copy"
WORD = 4  # bytes of an element


def call(problem: Problem, device: torch.device, pass_name: str) -> TensorCall:
    """A copy that reads half of the compulsory bytes of the pass and writes as many; warm."""
    _, moved = work(problem, pass_name)
    source = torch.ones(max(1, moved // 2 // WORD), dtype=torch.float32, device=device)
    target = torch.zeros_like(source)

    def copy() -> tuple[torch.Tensor]:
        return (target.copy_(source),)

    copy()
    return copy


def fields(name: str, measured: Measured) -> dict[str, object]:
    """The copy's time (ms, in the device's first column), and its share of the contestant's in the same rounds."""
    times = measured.times[measured.first]
    share = times.speedup(name, NAME).median
    return {"copy_ms": times.spread(NAME).median, "percent_of_copy": 100 * share}


def lines(run: Run) -> list[str]:
    """Geometric means of that share by pass and dtype, torch's beside ours; nothing where no copy ran."""
    rows = [row for row in run.of_models() if row.get("percent_of_copy")]
    found = []
    for key, mine in grouped(rows, "pass", "dtype").items():
        shares = {name: _mean(row for row in mine if row["variant"] == name) for name in (BASELINE, OURS)}
        said = ", ".join(f"{name} {share:.0f} %" for name, share in shares.items() if share)
        found.append(f"as fast as a copy of the same bytes, {' '.join(map(str, key))}: {said}")
    return found


def _mean(rows: Iterable[Mapping]) -> float | None:
    shares = [row["percent_of_copy"] for row in rows]
    return geometric_mean(shares) if shares else None
