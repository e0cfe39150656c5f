"""The times of candidates: each beside torch's own in the same rounds, each stored at once, the best of them right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from tritonconv.autotune import model
from tritonconv.autotune.ceilings import Ceilings
from tritonconv.autotune.choose import Selection
from tritonconv.autotune.sources import revision
from tritonconv.autotune.tuning.candidates import Candidate
from tritonconv.autotune.tuning.journal import FAILED, OK, SCREEN, WRONG, Journal, Timing
from tritonconv.dispatch import Plan, plan_of
from tritonconv.lab.bench import gate, measure, nulls, spent
from tritonconv.lab.bench.calls import TensorCall
from tritonconv.lab.bench.case import CHANGED, Case
from tritonconv.lab.bench.clock import cpu_stopwatch, first_column, gpu_clock
from tritonconv.lab.bench.conduct import Operands
from tritonconv.lab.bench.failures import context_is_lost, disqualifies, one_line
from tritonconv.lab.bench.measure import Watch
from tritonconv.lab.bench.results import BASELINE
from tritonconv.lab.bench.timing import Call, Times

# A first call so many times slower than torch's second is not timed again.
HOPELESS = 8.0
FINALISTS = 3  # of a pass, whose answers must be right
CACHED_BYTES = 64 << 20  # what a CPU may keep in its caches
OVERTIME = 2.0  # overrun factor after which a screening leaves out the remaining configs


Members = Sequence[tuple[str, Candidate]]  # the candidates of one call, each with the pass it is for


class OutOfTime(Exception):
    """The budget is used up; everything measured is stored."""


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
    mistakes: set[str] = field(default_factory=set)  # identities of timings whose candidate raised no lack of memory
    reused: int = 0

    def __post_init__(self) -> None:
        self.clock = gpu_clock(self.case.device)
        self.watch: Watch = self.clock or cpu_stopwatch
        self._baseline_ms: dict[str, float] = {}
        self._readings: Mapping[str, Any] = {}  # the clock's, of the last rounds

    def screen(self, pass_name: str, candidates: Sequence[Candidate], seconds: float) -> list[tuple[Candidate, Timing]]:
        """The candidates that ran, in about ``seconds``, fastest against torch first; of these FINALISTS are right.

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
        return self._right(pass_name, sorted(ran, key=lambda pair: -(pair[1].speedup or 0.0)))

    def _right(self, pass_name: str, ran: list[tuple[Candidate, Timing]]) -> list[tuple[Candidate, Timing]]:
        """Without those of the fastest whose answer or conduct is wrong: none takes the place of a right one."""
        judge = self.case.judge(pass_name)
        found: list[tuple[Candidate, Timing]] = []
        for each, timing in ran:
            if len(found) < FINALISTS:
                wrong = self.fault([(pass_name, each)], lambda plan: judge.at_size(self.case.call(plan, pass_name)))
                if wrong is not None:
                    self.keep(pass_name, each, SCREEN, message=wrong, status=WRONG)
                    continue
            found.append((each, timing))
        return found

    @property
    def memory_rate(self) -> float | None:
        """Bytes/s of the memory that the data fits in; None on a CPU whose roofs were not measured."""
        rates, device = self.ceilings, self.case.device
        if device.type == "cpu" and not rates.measured:
            return None
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        near = self.case.problem.bytes() <= max(CACHED_BYTES, l2)
        return max(rates.cache, rates.memory) if near else rates.memory

    def fault(self, members: Members, verdict: Callable[[Plan], gate.Verdict], **more: Selection) -> str | None:
        """Why the plan of the members, and of ``more`` in other passes, is not taken: its verdict, or what it raised.

        None where it is right. Raises where it lost the GPU.
        """
        chosen = {name: each.selection for name, each in members}
        try:
            with spent.on(spent.GATE):
                found = verdict(plan_of(self.case.problem, self.case.device, **more, **chosen))
        except Exception as error:
            if context_is_lost(error):
                self.keep_loss(members, error)
                raise
            return one_line(error)
        return None if found.ok else str(found)

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
            self._time_baseline(pass_name, base)
            made = True
            calls = {BASELINE: base, candidate.label: call}
            times = self._pair(pass_name, calls, candidate.label, seconds)
            timing = self._timing(pass_name, candidate, SCREEN, times)
        except Exception as error:
            timing = self._timing(pass_name, candidate, SCREEN, message=one_line(error))
            if context_is_lost(error):
                self._keep(timing, candidate)  # the next run passes it over
                raise
            if not disqualifies(error):
                if not made:
                    raise
                self.mistakes.add(timing.identity)
        changed = self.case.put_back()
        if changed:
            timing = self._timing(pass_name, candidate, SCREEN, message=CHANGED.format(changed), status=WRONG)
        if made:  # else there was no memory for the tensors, which says nothing of the candidate
            self._keep(timing, candidate)
        return timing

    def _time_baseline(self, pass_name: str, base: TensorCall) -> None:
        if pass_name not in self._baseline_ms:
            with spent.on(spent.TRIALS):
                self.watch(base)
            self._baseline_ms[pass_name] = self.watch(base)

    def _pair(self, pass_name: str, calls: dict[str, TensorCall], label: str, seconds: float) -> Times:
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
        """Interleaved, on a GPU behind a warm-up and with the host's times; operands change from round to round."""
        clock = self.clock
        how = {"few_rounds": few_rounds, "min_rounds": min_rounds, "max_rounds": max_rounds}
        how |= {} if clock is None else {"host": lambda: clock.host_ms}
        with Operands(self.case.tensors) as operands:
            times, self._readings = measure.rounds(calls, watch, clock, seconds, before=operands.change, **how)
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
        """In the place of an earlier timing of the same."""
        self.journal.add(timing)
        self.measured = [pair for pair in self.measured if pair[0].identity != timing.identity]
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
