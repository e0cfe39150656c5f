"""The candidates of a pass, and their times: each beside torch's own in the same rounds, each stored at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from tritonconv.autotune import model
from tritonconv.autotune.ceilings import Ceilings
from tritonconv.autotune.choose import Selection
from tritonconv.autotune.journal import FAILED, OK, WRONG, Journal, Timing
from tritonconv.autotune.sources import source_hash
from tritonconv.bench.calls import TensorCall
from tritonconv.bench.timing import Times, interleave, stopwatch_for
from tritonconv.contestants import why_not
from tritonconv.dispatch import plan_of
from tritonconv.kernels.registry import variants
from tritonconv.tuning.case import Case
from tritonconv.tuning.failures import context_is_lost, disqualifies, told

SCREEN, FINAL = "screen", "final"
TORCH = "torch"
# A first call so many times slower than torch's second is not timed again.
HOPELESS = 8.0
MOST_CONFIGS = 12


class OutOfTime(Exception):
    """The budget is used up; everything measured is stored."""


@dataclass(frozen=True)
class Candidate:
    """A variant with one config; ``predicted_ms`` is the model's."""

    selection: Selection
    predicted_ms: float

    @property
    def label(self) -> str:
        config = " ".join(f"{key}={value}" for key, value in self.selection.config.items())
        return f"{self.selection.variant.name} {config}".strip()


@dataclass
class Contest:
    """Times candidates of one case. ``versions`` are those of what a time depends on; ``deadline`` by perf_counter."""

    case: Case
    journal: Journal
    ceilings: Ceilings
    versions: Mapping[str, str | None]
    deadline: float = float("inf")
    again: bool = False
    measured: list[tuple[Timing, float]] = field(default_factory=list)
    reused: int = 0

    def __post_init__(self) -> None:
        self.watch = stopwatch_for(self.case.device)
        self._baseline_ms: dict[str, float] = {}

    def candidates(self, pass_name: str) -> list[Candidate]:
        """Every variant that serves the problem, with at most a dozen configs each; the model's best first."""
        found = []
        for record in variants(pass_name):
            if why_not(record, self.case.problem, self.case.device) is not None:
                continue
            best = model.candidates(record, self.case.problem, self.case.device, self.ceilings, MOST_CONFIGS)
            found += [Candidate(Selection(record, config, "candidate"), guess.ms) for config, guess in best]
        return sorted(found, key=lambda each: each.predicted_ms)

    def screen(self, pass_name: str, candidates: Sequence[Candidate], seconds: float) -> list[tuple[Candidate, Timing]]:
        """The candidates that ran, fastest against torch first. Raises OutOfTime."""
        timed = [(each, self._screened(pass_name, each, seconds)) for each in candidates]
        ran = [(each, timing) for each, timing in timed if timing.status == OK]
        return sorted(ran, key=lambda pair: -(pair[1].speedup or 0.0))

    def _screened(self, pass_name: str, candidate: Candidate, seconds: float) -> Timing:
        like = self._timing(pass_name, candidate, SCREEN)
        known = None if self.again else self.journal.find(like)
        if known is not None:
            self.reused += 1
            return known
        if perf_counter() >= self.deadline:
            raise OutOfTime
        plan = plan_of(self.case.problem, self.case.device, **{pass_name: candidate.selection})
        call, base = self.case.call(plan, pass_name), self.case.baseline(self.case.problem, pass_name)
        try:
            calls = {TORCH: base, candidate.label: call}
            times = self._pair(pass_name, calls, candidate.label, seconds)
            timing = self._timing(pass_name, candidate, SCREEN, times)
        except Exception as error:
            timing = self._timing(pass_name, candidate, SCREEN, message=told(error))
            if context_is_lost(error):
                self._keep(timing, candidate)  # the next run passes it over
            if not disqualifies(error):
                raise
        self._keep(timing, candidate)
        return timing

    def _pair(self, pass_name: str, calls: dict[str, TensorCall], label: str, seconds: float) -> Times:
        if pass_name not in self._baseline_ms:
            self.watch(calls[TORCH])
            self._baseline_ms[pass_name] = self.watch(calls[TORCH])
        first = self.watch(calls[label])  # compiles, where there is something to compile
        if first > HOPELESS * self._baseline_ms[pass_name]:
            first = self.watch(calls[label])
        if first > HOPELESS * self._baseline_ms[pass_name]:
            return Times({TORCH: [self._baseline_ms[pass_name]], label: [first]})
        return interleave(calls, self.watch, seconds, few_rounds=2, min_rounds=3, max_rounds=60)

    def final(self, calls: Mapping[str, TensorCall], seconds: float) -> Times:
        """The finalists together; all are warm. Raises OutOfTime."""
        if perf_counter() >= self.deadline:
            raise OutOfTime
        return interleave(calls, self.watch, seconds, few_rounds=3, min_rounds=7, max_rounds=200)

    def finished(self, pass_name: str, candidate: Candidate, times: Times) -> Timing:
        """The timing of a finalist, stored."""
        timing = self._timing(pass_name, candidate, FINAL, times)
        self._keep(timing, candidate)
        return timing

    def wrong(self, pass_name: str, candidate: Candidate, message: str) -> None:
        """Stores that a finalist's answer is wrong."""
        self._keep(self._timing(pass_name, candidate, SCREEN, message=message, status=WRONG), candidate)

    def _keep(self, timing: Timing, candidate: Candidate) -> None:
        self.journal.add(timing)
        self.measured.append((timing, candidate.predicted_ms))

    def _timing(self, pass_name, candidate, stage, times=None, message="", status=FAILED) -> Timing:
        record, config, _ = candidate.selection
        head = (str(self.case.problem), pass_name, record.name, dict(config), source_hash(record), stage, self.versions)
        if times is None:
            return Timing(*head, status=status, message=message)
        spread = times.spread(candidate.label)
        return Timing(
            *head,
            median_ms=spread.median,
            p20_ms=spread.p20,
            p80_ms=spread.p80,
            n_runs=spread.runs,
            speedup=times.speedup(candidate.label, TORCH).median,
            torch_ms=times.spread(TORCH).median,
        )
