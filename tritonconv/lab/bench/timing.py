"""Interleaved timing: every round runs each candidate once, so drift of the machine hits all of them alike.

The order turns around from round to round, and begins with another candidate every second one, so that no candidate
always follows the same one. Times are milliseconds. A speed-up is the median, with the 20th and 80th
percentile, of the ratios within a round, whose two calls ran next to each other: on a machine that other programs
use too, the ratio of two medians can lie outside all the ratios that were seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tritonconv.autotune.model import eager_ms
from tritonconv.errors import ArgumentError

# At least so many rounds, and where a round is slow so few at least.
MIN_ROUNDS, FEW_ROUNDS = 5, 3
MAX_ROUNDS = 200
# Warm is a candidate whose time differs from that of the round before by less than this share.
STEADY = 0.03
MOST_WARM_ROUNDS = 10

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


def quantile(values: Sequence[float], share: float) -> float:
    """The ``share`` quantile of a non-empty sequence."""
    if not values:
        raise ArgumentError("quantile: values is empty")
    if not 0 <= share <= 1:
        raise ArgumentError(f"quantile: share expects a number from 0 to 1, got {share}")
    return float(np.quantile(values, share))


@dataclass(frozen=True)
class Times:
    """Milliseconds per round of each candidate; the lists are equally long and belong together by index.

    ``hosts`` is the host's time for the same calls, empty where the clock does not tell it apart.
    """

    rounds: Mapping[str, Sequence[float]]
    hosts: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def spread(self, name: str) -> Spread:
        """The times of one candidate in ms."""
        return Spread.of(self.rounds[name])

    def host_ms(self, name: str) -> float | None:
        """The median of the host's times for one candidate; None where they were not taken."""
        return Spread.of(self.hosts[name]).median if name in self.hosts else None

    def eager(self) -> Times:
        """The times of eager calls in each round (:func:`tritonconv.autotune.model.eager_ms`)."""
        hosts = {name: self.hosts.get(name, times) for name, times in self.rounds.items()}
        return Times({name: list(map(eager_ms, times, hosts[name])) for name, times in self.rounds.items()}, self.hosts)

    def speedup(self, name: str, baseline: str) -> Spread:
        """How many times faster than ``baseline``: of the ratios within a round."""
        return Spread.of([b / m for m, b in zip(self.rounds[name], self.rounds[baseline], strict=True)])


def interleave(
    candidates: Mapping[str, Call],
    stopwatch: Callable[[Call], float],
    seconds: float,
    *,
    few_rounds: int = FEW_ROUNDS,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    host: Callable[[], float] | None = None,
    before: Callable[[], object] = lambda: None,
) -> Times:
    """Times the candidates in turns for about ``seconds``; the candidates are expected to be warm.

    ``stopwatch`` runs a call and returns its ms, ``host`` the host's ms for the call that ran last; ``before`` is run
    before each round, outside its times. No round is started
    that would end after ``seconds``, judged by the mean round so far, but ``min_rounds`` are run as long as they would
    end within twice that, and ``few_rounds`` however long they take; never more than ``max_rounds``. Raises
    ArgumentError where there is nothing to run.
    """
    if not candidates or not 1 <= few_rounds <= min_rounds <= max_rounds:
        raise ArgumentError(
            f"interleave: needs candidates and 1 <= few_rounds <= min_rounds <= max_rounds, got {len(candidates)} "
            f"candidates, few_rounds={few_rounds}, min_rounds={min_rounds}, max_rounds={max_rounds}"
        )
    names = list(candidates)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    hosts: dict[str, list[float]] = {name: [] for name in names} if host is not None else {}
    begin = clock()
    for done in range(max_rounds):
        if done >= few_rounds:
            next_end = (clock() - begin) * (done + 1) / done
            if next_end > (seconds if done >= min_rounds else 2 * seconds):
                break
        first = done // 2 % len(names)
        order = names[first:] + names[:first]
        before()
        for name in reversed(order) if done % 2 else order:
            rounds[name].append(stopwatch(candidates[name]))
            if host is not None:
                hosts[name].append(host())
    return Times(rounds, hosts)


def warm_up(
    candidates: Mapping[str, Call],
    stopwatch: Callable[[Call], float],
    seconds: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Runs the candidates in turns, and throws the times away, until all of them are steady; at least two rounds.

    It ends after ``seconds`` or MOST_WARM_ROUNDS all the same. Returns how many rounds it were.
    """
    begin, before = clock(), {name: stopwatch(call) for name, call in candidates.items()}
    for done in range(2, MOST_WARM_ROUNDS + 1):
        now = {name: stopwatch(call) for name, call in candidates.items()}
        if all(abs(now[name] / before[name] - 1) < STEADY for name in now if before[name]) or clock() - begin > seconds:
            return done
        before = now
    return MOST_WARM_ROUNDS
