"""A CPU's choice by a program's own first calls (online tuning).

Rows of similar layers (``nearby.py``) say which of torch's formulations may be faster than torch's own operation. They
do not say it for certain, least of all for the CPUs of a vendor that has no rows. So the first calls of a layer run the
likely formulations in turns, torch's own operation among them, and are timed: no call is made for the measurement
alone. The fastest serves all later calls of the process.

The answers of the first calls may differ in their last bits. None of this happens under
``torch.use_deterministic_algorithms``, for a forced, pinned or tuned choice, and with ``TRITONCONV_TUNE=never`` in the
environment.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tritonconv.autotune import nearby
from tritonconv.autotune.rules import torchs_own
from tritonconv.bounded import remember
from tritonconv.device import cpu_vendor
from tritonconv.kernels.registry import variant
from tritonconv.private import deterministic as deterministic_algorithms
from tritonconv.problem import PASSES, Problem

VARIABLE, NEVER = "TRITONCONV_TUNE", "never"
FORWARD, GRADIENTS = "forward", "gradients"
PARTS = {FORWARD: PASSES[:1], GRADIENTS: PASSES[1:]}
# Runs of each contestant: ROUNDS, and up to MOST_ROUNDS where those together take less than ENOUGH_S. The first quarter
# is not counted: oneDNN prepares there what later calls use, and the caches fill.
ROUNDS, MOST_ROUNDS, ENOUGH_S = 4, 12, 0.010
MOST_TRIED = 4  # beside torch's own
SLOW = 1.5  # times the best: a contestant leaves after two runs
FAR_SLOWER, LONG_S = 2.0, 0.05  # times torch's own: one leaves after its first run, if that took so long
MARGIN = 0.95  # of torch's own time that a formulation must take at most
# Of host time around a formulation, which torch's own operation is called without. Between other calls, whose data
# have pushed ours out of the CPU's caches, it is several times that of a loop.
ROAD_S = {FORWARD: 25e-6, GRADIENTS: 120e-6}
# Of torch's own time for a stage, what a peak that is lower by its output is worth of our road through autograd. The
# smallest stage that it decides (128->64, 8^3; 0.70 -> 0.59 ms) saves about the road, so its step of 2 ms takes as long
# or 1 % longer with torch's gradients; in the first calls it seems to save 50 to 150 us, by what ran before.
MEMORY_SHARE = 0.1
# Expected microseconds of torch's own below which nothing is tried: a formulation's own host time is as long.
LEAST_US = {FORWARD: 200.0, GRADIENTS: 300.0}
MOST_PROBLEMS = 4096

Names = tuple[str, ...]


class Fastest(NamedTuple):
    """The variants that serve the later calls, how many times faster than torch's own they were, and by how many
    seconds."""

    names: Names
    ratio: float
    saved_s: float


class FirstCalls:
    """The times of a problem's contestants, for its forward or for both gradients.

    ``contestants[0]`` is torch's own operation, or what stands for it where that is not safe
    (:func:`~tritonconv.autotune.rules.torchs_own`), timed as a whole: its two gradients share copies. The others are
    timed part by part, so that the winner may take backward-data of one and backward-weight of another.
    """

    def __init__(self, kind: str, contestants: tuple[Names, ...]) -> None:
        self.kind, self.contestants = kind, contestants
        self.closed = self.given_up = False
        self._begin(None, frozenset())

    def _begin(self, beside: int | None, spare: frozenset[str]) -> None:
        self.seconds: list[list[tuple[float, ...]]] = [[] for _ in self.contestants]  # by contestant and run
        self.running = list(range(len(self.contestants)))
        self.of_stages = beside is not None  # of a decoder's whole stages: a formulation saves a copy and memory there
        self.spare = spare  # of a stage: the variants that take no memory beside its result
        self.others = 0  # calls of the other kind since the last one of this kind

    def is_of(self, problem: Problem, beside: int | None) -> bool:
        """Whether a call counts here: times are of plain calls alone (``beside`` None), or of stages alone, whose skip
        has so many channels. The first call says of which, and others where calls of that kind have ended."""
        if self.of_stages == (beside is not None):
            self.others = 0
            return True
        self.others += 1
        if any(self.seconds) and self.others <= MOST_ROUNDS:
            return False
        spare: frozenset[str] = frozenset()
        if beside is not None:
            rooms = {name: variant(name).takes_room for (name,) in self.contestants}
            spare = frozenset(name for name, takes in rooms.items() if takes and takes(problem, beside))
        self._begin(beside, spare)
        return True

    def turn(self) -> int:
        """The contestant that runs now. A finished trial has torch's own."""
        return min(list(self.running), key=lambda index: len(self.seconds[index]), default=0)

    def record(self, index: int, *parts: float) -> None:
        """Notes a run of a contestant, in seconds; one that is too slow leaves."""
        self.seconds[index].append(parts)
        # The first run counts here: a hiccup of the machine in the second one must not end it.
        runs, mine = len(self.seconds[index]), min(map(sum, self.seconds[index]))
        least = min(self.best(each) for each in range(len(self.contestants)) if self.seconds[each])
        if (runs == 1 and index and mine > max(LONG_S, FAR_SLOWER * self.best(0))) or (
            runs > 1 and mine > SLOW * least
        ):
            self.leave(index)
        else:
            self._close_where_done()

    def leave(self, index: int) -> None:
        """Takes a contestant out of the running; its times still count."""
        if index in self.running:
            self.running.remove(index)
        self._close_where_done()

    def give_up(self) -> None:
        """Closes the trial without an outcome."""
        self.closed = self.given_up = True

    def _close_where_done(self) -> None:
        alone = len(self.running) == 1
        self.closed |= all(alone or _enough(self.seconds[each]) for each in list(self.running))

    def best(self, index: int) -> float:
        """The fastest run of a contestant that counts; endless before its first."""
        return min(map(sum, _counted(self.seconds[index])), default=float("inf"))

    def fastest(self, paid_s: float = 0.0) -> Fastest:
        """The fastest; torch's own where nothing is faster by the margin and the host time around it, of which another
        part has paid ``paid_s``. The times of stages hold it already, and a formulation that makes its products where
        the skip will lie needs no margin there: it takes less memory."""
        own = self.best(0)
        fastest = []
        for part in range(len(PARTS[self.kind])):
            times = [
                (min(run[part] for run in _counted(runs)), names[part])
                for names, runs in zip(self.contestants[1:], self.seconds[1:], strict=True)
                if runs
            ]
            if self.of_stages:
                margins = {name: 1.0 if name in self.spare else MARGIN for _, name in times}
                times = [(seconds, name) for seconds, name in times if seconds < margins[name] * own]
            fastest.append(min(times, default=(float("inf"), "")))
        total, names = sum(seconds for seconds, _ in fastest), tuple(name for _, name in fastest)
        if total < (own if self.of_stages else MARGIN * own - max(ROAD_S[self.kind] - paid_s, 0.0)):
            return Fastest(names, own / total, own - total)
        return Fastest(self.contestants[0], 1.0, 0.0)


def _enough(runs: list[tuple[float, ...]]) -> bool:
    return len(runs) >= MOST_ROUNDS or (len(runs) >= ROUNDS and sum(map(sum, runs)) >= ENOUGH_S)


def _counted(runs: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    return runs[max(1, len(runs) // 4) :] or runs


_trials: dict[tuple[Problem, int], dict[str, FirstCalls]] = {}


def wanted() -> bool:
    """Whether a program's calls may choose now."""
    return not deterministic_algorithms() and os.environ.get(VARIABLE) != NEVER


def trials(problem: Problem) -> dict[str, FirstCalls]:
    """The trials of a problem on this CPU, by kind, with its number of threads; closed ones too, none where nothing
    is likely to be faster than torch's own."""
    key = problem, torch.get_num_threads()
    found = _trials.get(key)
    if found is None:
        found = remember(_trials, key, _opened(problem), MOST_PROBLEMS)
    return found


def _opened(problem: Problem) -> dict[str, FirstCalls]:
    if problem.n == 0 or problem.c_out == 0:
        return {}
    likely: dict[str, Sequence[Names]] = {
        FORWARD: nearby.likely_forwards(problem, cpu_vendor(), LEAST_US[FORWARD], MOST_TRIED),
        GRADIENTS: nearby.likely_gradients(problem, cpu_vendor(), LEAST_US[GRADIENTS], MOST_TRIED),
    }
    here = torch.device("cpu")
    own = {kind: tuple(torchs_own(problem, here, name)[0].name for name in PARTS[kind]) for kind in PARTS}
    return {kind: FirstCalls(kind, (own[kind], *names)) for kind, names in likely.items() if names}


def runs_so_far() -> int:
    """Runs of contestants so far in this process. A call that leaves it as it is runs what later calls will run."""
    return sum(len(runs) for found in list(_trials.values()) for each in found.values() for runs in each.seconds)


def decided(problem: Problem, pass_name: str) -> tuple[str, str, float] | None:
    """(variant, reason, seconds that its kind saves) for a pass whose trial is closed; None for every other."""
    kind = FORWARD if pass_name == PASSES[0] else GRADIENTS
    trial = _trials.get((problem, torch.get_num_threads()), {}).get(kind)
    if trial is None or not trial.closed or trial.given_up or not wanted():
        return None
    names, ratio, saved_s = trial.fastest(_paid_s(problem) if kind == GRADIENTS else 0.0)
    name, tried = names[PARTS[kind].index(pass_name)], len(trial.contestants) - 1
    if names == trial.contestants[0]:
        return name, f"torch's own: in the first calls none of {tried} others was faster", saved_s
    if kind == FORWARD and trial.of_stages and name in trial.spare:
        saved_s += MEMORY_SHARE * trial.best(0)
    because = f"{ratio:.2f} times as fast as torch's own in the first calls here, where {tried} others were tried"
    return name, because, saved_s


def _paid_s(problem: Problem) -> float:
    """Seconds that the chosen forward saves of the road through our autograd, which its gradients take with it."""
    trial = trials(problem).get(FORWARD)
    if trial is None or not trial.closed or trial.given_up:
        return 0.0
    return trial.fastest().saved_s


def forget() -> None:
    """Drops all that was measured; trials begin anew."""
    _trials.clear()
