"""The candidates of a pass, and their times: each beside torch's own in the same rounds, each stored at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch

from tritonconv.autotune import model
from tritonconv.autotune.ceilings import Ceilings
from tritonconv.autotune.choose import Selection
from tritonconv.autotune.sources import revision
from tritonconv.autotune.tuning.journal import FAILED, OK, SCREEN, Journal, Timing
from tritonconv.dispatch import plan_of
from tritonconv.kernels.registry import variants
from tritonconv.kernels.variant import Config, Variant
from tritonconv.lab.bench import measure, nulls, spent
from tritonconv.lab.bench.calls import TensorCall
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.clock import cpu_stopwatch, first_column, gpu_clock
from tritonconv.lab.bench.contestants import why_not
from tritonconv.lab.bench.failures import context_is_lost, disqualifies, one_line
from tritonconv.lab.bench.measure import Watch
from tritonconv.lab.bench.results import BASELINE
from tritonconv.lab.bench.timing import Call, Times
from tritonconv.problem import Problem

# A first call so many times slower than torch's second is not timed again.
HOPELESS = 8.0
OVERTIME = 2.0  # overrun factor after which a screening leaves out the remaining configs


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

    @property
    def is_kernel(self) -> bool:
        """A Triton kernel, which must be compiled."""
        return self.selection.variant.backend == "triton"


Ranked = list[tuple[Config, model.Estimate]]
WasCompiled = Callable[[Variant, Config], bool]  # the launch of a config was compiled ahead
Members = Sequence[tuple[str, Candidate]]  # the candidates of one call, each with the pass it is for


class Effort(NamedTuple):
    """How many candidates a problem has: at most ``configs`` of a variant's form, in about ``seconds`` in all.

    A Triton kernel must be compiled, so a variant takes part if the model expects at most ``far`` times the time of the
    best kernel, and a further config of it if the model expects at most ``near`` times that. The same holds for
    formulations in torch's operations on a GPU, where cuDNN tries its algorithms for each of their convolutions; if
    ``formulations`` is false, none takes part. With ``ahead``, in a pass that has kernels compiled ahead, only those
    take part.
    """

    configs: int
    near: float
    far: float
    seconds: float
    formulations: bool = True
    ahead: bool = False


def candidates(
    problem: Problem,
    device: torch.device,
    pass_name: str,
    ceilings: Ceilings,
    effort: Effort,
    was_compiled: WasCompiled | None = None,
) -> list[Candidate]:
    """The candidates from every variant that serves the problem: first each one's best by the model.

    ``was_compiled`` tells which configs were compiled ahead; None where nothing was.
    """
    records = [record for record in variants(pass_name) if why_not(record, problem, device) is None]
    best = (
        _compiled_ahead(records, problem, device, ceilings, effort, was_compiled)
        if effort.ahead and was_compiled is not None
        else {}
    )
    if not best:
        best = {record: model.candidates(record, problem, device, ceilings, effort.configs) for record in records}
    found = [
        (place, Candidate(Selection(record, config, "candidate"), guess.ms))
        for record, pairs in best.items()
        for place, (config, guess) in _placed(record, pairs)
    ]
    kernels = [each.predicted_ms for _, each in found if each.is_kernel]
    if kernels:  # on a CPU there are none, and each formulation takes part
        found = [
            (place, each)
            for place, each in found
            if (each.is_kernel or effort.formulations)
            and each.predicted_ms <= (effort.near if place else effort.far) * min(kernels)
        ]
    return [each for _, each in sorted(found, key=lambda pair: (pair[0], pair[1].predicted_ms))]


def _compiled_ahead(
    records: Sequence[Variant], problem: Problem, device: torch.device, ceilings: Ceilings, effort: Effort, was_compiled
) -> dict[Variant, Ranked]:
    """The best configs of kernels that were compiled ahead; empty where none was.

    The rates of this device may rank the configs in another order than the rates that chose what to compile, so this
    looks at all configs.
    """
    found = {}
    for record in records:
        if record.backend == "triton":
            ranked = model.candidates(record, problem, device, ceilings, model.MOST_CANDIDATES)
            mine = [pair for pair in ranked if was_compiled(record, pair[0])]
            mine = [pair for place, pair in _placed(record, mine) if place < effort.configs]
            if mine:
                found[record] = mine
    return found


def _placed(
    record: Variant, ranked: list[tuple[Config, model.Estimate]]
) -> Iterator[tuple[int, tuple[Config, model.Estimate]]]:
    """Each with its place among those of its form."""
    before: Counter[str] = Counter()
    for pair in ranked:
        form = model.form(record, pair[0])
        yield before[form], pair
        before[form] += 1


@dataclass
class Contest:
    """Times candidates of one case. A time depends on ``versions``; ``deadline`` is of perf_counter."""

    case: Case
    journal: Journal
    ceilings: Ceilings
    versions: Mapping[str, str | None]
    deadline: float = float("inf")
    again: bool = False
    measured: list[tuple[Timing, float]] = field(default_factory=list)
    reused: int = 0

    def __post_init__(self) -> None:
        self.clock = gpu_clock(self.case.device)
        self.watch: Watch = self.clock or cpu_stopwatch
        self._baseline_ms: dict[str, float] = {}
        self._readings: Mapping[str, Any] = {}  # the clock's, of the last rounds

    def screen(self, pass_name: str, candidates: Sequence[Candidate], seconds: float) -> list[tuple[Candidate, Timing]]:
        """The candidates that ran, in about ``seconds``, fastest against torch first.

        When the time is over, only the best config by the model of each variant's form is still tried. Raises OutOfTime
        at the deadline.
        """
        begin, timed = perf_counter(), []
        tried = set()
        for each in candidates:
            late = perf_counter() - begin > OVERTIME * seconds  # slow to compile
            form = model.form(each.selection.variant, each.selection.config)
            if not late or form not in tried:
                timed.append((each, self._screen_one(pass_name, each, seconds / len(candidates))))
            tried.add(form)
        ran = [(each, timing) for each, timing in timed if timing.status == OK]
        return sorted(ran, key=lambda pair: -(pair[1].speedup or 0.0))

    def _screen_one(self, pass_name: str, candidate: Candidate, seconds: float) -> Timing:
        like = self._timing(pass_name, candidate, SCREEN)
        known = None if self.again else self.journal.find(like)
        if known is not None:
            self.reused += 1
            return known
        if perf_counter() >= self.deadline:
            raise OutOfTime
        plan = plan_of(self.case.problem, self.case.device, **{pass_name: candidate.selection})
        made, self._readings = False, {}
        try:
            call, base = self.case.call(plan, pass_name), self.case.baseline(pass_name)
            made = True
            calls = {BASELINE: base, candidate.label: call}
            times = self._pair(pass_name, calls, candidate.label, seconds)
            timing = self._timing(pass_name, candidate, SCREEN, times)
        except Exception as error:
            timing = self._timing(pass_name, candidate, SCREEN, message=one_line(error))
            if context_is_lost(error):
                self._keep(timing, candidate)  # the next run passes it over
            if not disqualifies(error):
                raise
        if made:  # else there was no memory for the tensors, which says nothing of the candidate
            self._keep(timing, candidate)
        return timing

    def _pair(self, pass_name: str, calls: dict[str, TensorCall], label: str, seconds: float) -> Times:
        if pass_name not in self._baseline_ms:
            with spent.on(spent.TRIALS):
                self.watch(calls[BASELINE])
            self._baseline_ms[pass_name] = self.watch(calls[BASELINE])
        with spent.on(spent.COMPILING):
            first = self.watch(calls[label])  # compiles, where there is something to compile
        if first > HOPELESS * self._baseline_ms[pass_name]:
            first = self.watch(calls[label])
        if first > HOPELESS * self._baseline_ms[pass_name]:
            return Times({BASELINE: [self._baseline_ms[pass_name]], label: [first]})
        return self._rounds(calls, self.watch, seconds, few_rounds=2, min_rounds=3, max_rounds=60)

    def _rounds(
        self, calls: Mapping[str, Call], watch: Watch, seconds: float, few_rounds=3, min_rounds=7, max_rounds=200
    ) -> Times:
        """Interleaved, on a GPU behind a warm-up and with the host's times."""
        clock = self.clock
        how = {"few_rounds": few_rounds, "min_rounds": min_rounds, "max_rounds": max_rounds}
        how |= {} if clock is None else {"host": lambda: clock.host_ms}
        times, self._readings = measure.rounds(calls, watch, clock, seconds, **how)
        return times

    def null_rows(self, seconds: float) -> list[dict[str, object]]:
        """The fields of the null rows (``nulls.py``), timed beside torch in the forward."""
        calls = {BASELINE: self.case.baseline("forward")}
        with spent.on(spent.TRIALS):
            calls |= nulls.calls(self.case, "forward")
        times = self._rounds(calls, self.watch, seconds)
        measured = measure.Measured({first_column(self.case.device): times}, {})
        return [nulls.fields(name, measured) for name in calls if name != BASELINE]

    def final(self, calls: Mapping[str, TensorCall], finalists: Mapping[str, Members], seconds: float) -> Times:
        """The finalists together, by label, beside torch's own; all are warm.

        Raises OutOfTime. Where the GPU is lost, those in the call that lost it are remembered (:meth:`keep_loss`).
        """
        if perf_counter() >= self.deadline:
            raise OutOfTime
        running: Call = calls[BASELINE]

        def watch(call: Call) -> float:  # it waits for the call, so what raises is what was called
            nonlocal running
            running = call
            return self.watch(call)

        try:
            return self._rounds(calls, watch, seconds)
        except Exception as error:
            if context_is_lost(error):
                label = next(label for label, call in calls.items() if call is running)
                self.keep_loss(finalists.get(label, ()), error)
            raise

    def refuses(self, pass_name: str, candidate: Candidate) -> bool:
        """The candidate is known to be wrong, to be refused or to lose the GPU on this problem."""
        return not self.again and self.journal.refuses(self._timing(pass_name, candidate, SCREEN))

    def keep_loss(self, members: Members, error: Exception) -> None:
        """Stores that a call of these candidates lost the GPU, so that the next run passes them over.

        It cannot be known which of several did it; torch's own operations are suspected only where they are alone.
        """
        kernels = [each for each in members if each[1].is_kernel]
        for pass_name, candidate in kernels or members:
            self.keep(pass_name, candidate, SCREEN, message=one_line(error))

    def keep(
        self, pass_name: str, candidate: Candidate, stage: str, times: Times | None = None, **failure: str
    ) -> None:
        """Stores a candidate's times, or the ``message`` and the ``status`` of its failure."""
        self._keep(self._timing(pass_name, candidate, stage, times, **failure), candidate)

    def _keep(self, timing: Timing, candidate: Candidate) -> None:
        self.journal.add(timing)
        self.measured.append((timing, candidate.predicted_ms))

    def _timing(self, pass_name, candidate, stage, times=None, message="", status=FAILED) -> Timing:
        record, config = candidate.selection.variant, candidate.selection.config
        head = (str(self.case.problem), pass_name, record.name, dict(config), revision(record), stage, self.versions)
        if times is None:
            return Timing(*head, status=status, message=message)
        spread = times.spread(candidate.label)
        return Timing(
            *head,
            median_ms=spread.median,
            p20_ms=spread.p20,
            p80_ms=spread.p80,
            n_runs=spread.runs,
            speedup=times.speedup(candidate.label, BASELINE).median,
            torch_ms=times.spread(BASELINE).median,
            sm_mhz=self._readings.get("sm_mhz"),
            late_samples=self._readings.get("late_samples", 0),
            host_ms=times.host_ms(candidate.label),
        )
