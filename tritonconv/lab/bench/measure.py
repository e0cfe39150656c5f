"""Times the contestants of a cell by each clock of the device in turn, and makes the fields of all columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from tritonconv.lab.bench import gpu, spent
from tritonconv.lab.bench.clock import GpuClock, WallClock, cpu_stopwatch, garbage_waits
from tritonconv.lab.bench.columns import GPU, GRAPH, SPEEDUP, WALL
from tritonconv.lab.bench.timing import Call, Times, interleave, warm_up

# Shares of a cell's seconds on a GPU, and of each time what the warm-up may take.
SHARES = {GPU: 0.45, GRAPH: 0.3, WALL: 0.25}
WARM = 0.2

Watch = Callable[[Call], float]


@dataclass(frozen=True)
class Measured:
    """Times by column, the first of them the device's own; ``clock`` are fields about the GPU's clock, by column."""

    times: Mapping[str, Times]
    clock: Mapping[str, Mapping[str, object]]

    @property
    def first(self) -> str:
        return next(iter(self.times))

    def fields(self, name: str, baseline: str) -> dict[str, object]:
        """Per column the times in ms and the ratio to the baseline of the same rounds; and the clocks' readings."""
        fields: dict[str, object] = {}
        for column, times in self.times.items():
            if name in times.rounds:
                mine = times.spread(name)
                ratio = times.speedup(name, baseline)[:3] if baseline in times.rounds else [None] * 3
                of_column = ("ms", "p20_ms", "p80_ms", "runs", *SPEEDUP)
                fields |= {f"{column}_{key}": value for key, value in zip(of_column, (*mine, *ratio), strict=True)}
        for column, readings in self.clock.items():
            fields |= readings if column == self.first else {f"{column}_late_samples": readings["late_samples"]}
        return fields


def rounds(
    calls: Mapping[str, Call], watch: Watch, clock: GpuClock | None, seconds: float, **how: Any
) -> tuple[Times, Mapping[str, Any]]:
    """Interleaved in about ``seconds``, on a GPU behind a warm-up, and its clock's readings meanwhile.

    ``how`` are the numbers of rounds of :func:`~tritonconv.lab.bench.timing.interleave`, and its ``before``.
    """
    with spent.on(spent.TIMING), garbage_waits():
        if clock is None:
            return interleave(calls, watch, seconds, **how), {}
        warm_up(calls, watch, WARM * seconds)
        clock.readings()  # of the warm-up
        return interleave(calls, watch, (1 - WARM) * seconds, **how), clock.readings()


def measure(
    calls: Mapping[str, Call],
    baseline: str,
    device: torch.device,
    clock: GpuClock | None,
    seconds: float,
    in_graph: Mapping[str, Call] = MappingProxyType({}),
    **how: Any,
) -> Measured:
    """Times the calls, which are warm, by every clock of the device for about ``seconds`` in all.

    ``clock`` is that of a GPU, None for a CPU; ``how`` as of :func:`rounds`. ``in_graph`` holds calls that are captured
    in the place of those of the same name. A call that cannot be captured has no
    graph column; where the baseline is such a call, none has.
    """
    if clock is None:
        return Measured({WALL: rounds(calls, cpu_stopwatch, None, seconds, **how)[0]}, {})
    times, readings = {}, {}
    times[GPU], readings[GPU] = rounds(calls, clock, clock, SHARES[GPU] * seconds, **how)
    graphs = _graphs({**calls, **in_graph}, device)
    if graphs and (baseline in graphs or baseline not in calls):
        times[GRAPH], readings[GRAPH] = rounds(graphs, clock, clock, SHARES[GRAPH] * seconds, **how)
    del graphs  # and their memory
    wall = WallClock.for_call(device, next(iter(calls.values())))
    times[WALL], _ = rounds(calls, wall, clock, SHARES[WALL] * seconds, **how)
    return Measured(times, readings)


def _graphs(calls: Mapping[str, Call], device: torch.device) -> dict[str, Call]:
    with spent.on(spent.GRAPHS):
        captured = {name: gpu.captured(call, device) for name, call in calls.items()}
    return {name: replay for name, replay in captured.items() if replay is not None}
