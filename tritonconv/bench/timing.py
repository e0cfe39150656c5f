"""Interleaved timing: every round runs each candidate once, so drift of the machine hits all of them alike.

The order turns around from round to round. Times are milliseconds. A speed-up is the median, with the 20th and 80th
percentile, of the ratios within a round, whose two calls ran next to each other: on a machine that other programs
use too, the ratio of two medians can lie outside all the ratios that were seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tritonconv.errors import ArgumentError

# At least so many rounds, and where a round is slow so few at least.
MIN_ROUNDS, FEW_ROUNDS = 5, 3
MAX_ROUNDS = 200
# More than any L2 cache of the GPUs of 2025 (an H200 has 50 MiB), written before each GPU call.
FLUSH_BYTES = 256 << 20

Call = Callable[[], object]


class Spread(NamedTuple):
    """Median, 20th and 80th percentile of ``runs`` values."""

    median: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(quantile(values, 0.5), quantile(values, 0.2), quantile(values, 0.8), len(values))


class Ratio(NamedTuple):
    """How many times faster than the baseline: median, 20th and 80th percentile of the ratios within a round."""

    median: float
    p20: float
    p80: float


def quantile(values: Sequence[float], share: float) -> float:
    """The ``share`` quantile of a non-empty sequence, linear between neighbours (numpy's default)."""
    if not values:
        raise ArgumentError("quantile: values is empty")
    if not 0 <= share <= 1:
        raise ArgumentError(f"quantile: share expects a number from 0 to 1, got {share}")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Times:
    """Milliseconds per round of each candidate; the lists are equally long and belong together by index."""

    rounds: Mapping[str, Sequence[float]]

    def spread(self, name: str) -> Spread:
        """The times of one candidate in ms."""
        return Spread.of(self.rounds[name])

    def speedup(self, name: str, baseline: str) -> Ratio:
        """``name`` against ``baseline``; above 1 is faster than the baseline."""
        mine, theirs = self.rounds[name], self.rounds[baseline]
        pairs = [b / m for m, b in zip(mine, theirs, strict=True)]
        return Ratio(quantile(pairs, 0.5), quantile(pairs, 0.2), quantile(pairs, 0.8))


def interleave(
    candidates: Mapping[str, Call],
    stopwatch: Callable[[Call], float],
    seconds: float,
    *,
    few_rounds: int = FEW_ROUNDS,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Times the candidates in turns for about ``seconds``; the candidates are expected to be warm.

    ``stopwatch`` runs a call and returns its ms. No round is started that would end after ``seconds``, judged by the
    mean round so far, but ``min_rounds`` are run as long as they would end within twice that, and ``few_rounds``
    however long they take; never more than ``max_rounds``. Raises ArgumentError where there is nothing to run.
    """
    if not candidates or not 1 <= few_rounds <= min_rounds <= max_rounds:
        raise ArgumentError(
            f"interleave: needs candidates and 1 <= few_rounds <= min_rounds <= max_rounds, got {len(candidates)} "
            f"candidates, few_rounds={few_rounds}, min_rounds={min_rounds}, max_rounds={max_rounds}"
        )
    rounds: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    begin = clock()
    for done in range(max_rounds):
        if done >= few_rounds:
            next_end = (clock() - begin) * (done + 1) / done
            if next_end > (seconds if done >= min_rounds else 2 * seconds):
                break
        for name in order:
            rounds[name].append(stopwatch(candidates[name]))
        order.reverse()
    return Times(rounds)


def cpu_stopwatch(call: Call) -> float:
    """Wall time of one call in ms. The caches are as the call before left them; inputs are shared by the candidates."""
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


class CudaStopwatch:
    """GPU time of one call in ms, between two events, with the L2 cache overwritten before each call.

    Launch overhead counts where the GPU waits for the host: this is the eager time, not that of a CUDA graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def stopwatch_for(device: torch.device) -> Callable[[Call], float]:
    """The stopwatch of a device: wall clock on the CPU, events on a GPU."""
    return CudaStopwatch(device) if device.type == "cuda" else cpu_stopwatch


def method(device: torch.device) -> str:
    """How times are taken on a device, in a sentence for the results file."""
    if device.type == "cuda":
        return f"CUDA events around each eager call, {FLUSH_BYTES >> 20} MiB written before it to flush L2; interleaved"
    return "time.perf_counter around each call, caches as the previous call left them; interleaved"
