"""Tunes many problems within one budget: passes over the stored ones and stores each decision at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from time import perf_counter

import torch

from tritonconv import dispatch
from tritonconv.autotune import ceilings, model, serving, store
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.sources import revision
from tritonconv.autotune.store import Entry, Table
from tritonconv.autotune.tuning import calibrate
from tritonconv.autotune.tuning.candidates import Candidate, Effort, candidates, joined, stored
from tritonconv.autotune.tuning.compiled_ahead import compiled_first, was_compiled
from tritonconv.autotune.tuning.contest import Contest, OutOfTime
from tritonconv.autotune.tuning.journal import OK, SCREEN, WRONG, Journal, Timing
from tritonconv.autotune.tuning.tasks import BUDGET, Report, Task
from tritonconv.autotune.tuning.tuner import GRADIENTS, ProblemTuner, Winner
from tritonconv.device import current
from tritonconv.errors import ArgumentError
from tritonconv.kernels.registry import variant
from tritonconv.kernels.variant import Variant
from tritonconv.lab.bench import gpu, rows, spent
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.failures import context_is_lost, disqualifies, one_line
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.bench.results import BASELINE
from tritonconv.lab.bench.rows import sizes_of, versions_of
from tritonconv.lab.bench.workloads import ALL
from tritonconv.lab.inspection.precompile import Precompiler, Request, ensure_compiler, target_of
from tritonconv.problem import Problem

PROBLEM_SECONDS = 4.0  # for a problem without a budget
# Within a budget a run goes through a GPU's problems several times, each time deeper: kernels must be compiled, and
# every problem should have its likely candidates tried before any has all of them. Nothing is timed twice.
EFFORTS = (Effort(2, 1.5, 4.0, 0.9, formulations=False, ahead=True), Effort(4, 1.5, 4.0, 2.0))
WHOLE = Effort(model.MOST_CANDIDATES, 3.0, 12.0, 20.0)
# Problems whose kernels are being compiled while one is timed, and how long one waits for its own.
AHEAD, COMPILING_SECONDS = 3, 120.0

# The model chooses the candidates, and timings correct it. A problem is tuned again if the number of its candidates has
# grown by this factor.
MORE = 1.25

# Null rows: of the first problems, then of every NULLS_EVERY-th one, in so many seconds.
FIRST_NULLS, NULLS_EVERY, NULL_SECONDS = 3, 12, 0.15
LEAST_SHARE = 0.1  # seconds: the least time for the timings of a problem

Write = Callable[[str, dict[str, object]], object]


@dataclass
class Session:
    """One tuning run on one device. ``folder`` None is the user's store; ``write`` takes (kind, row) of a results file.

    ``again`` also measures problems that are stored. With ``goes_on`` a problem that raises becomes an error row, and
    the run goes on as long as the GPU answers. ``compiler`` is one that runs already.
    """

    device: torch.device
    folder: Path | None = None
    seconds: float | None = None
    again: bool = False
    write: Write = lambda kind, row: None
    goes_on: bool = False
    compiler: Precompiler | None = None
    factors: dict[str, float] = field(default_factory=dict, init=False)  # of the cost model, from what was timed
    beside: list[float] = field(default_factory=list, init=False)  # seconds of each problem besides the timing
    ranked: dict[Problem, dict[str, list[Candidate]]] = field(default_factory=dict, init=False)
    # Errors of variants that are no candidates for it, by pass and variant; each is told once in a run.
    mistakes: dict[Problem, dict[tuple[str, str], str]] = field(default_factory=dict, init=False)
    told: set[tuple[Problem, str, str]] = field(default_factory=set, init=False)

    def run(self, tasks: Iterable[Task], progress: Progress) -> Report:
        """Raises StoreError before anything is measured where the store cannot be written."""
        with current(self.device):
            return self._run(tasks, progress)

    def _run(self, tasks: Iterable[Task], progress: Progress) -> Report:
        name = device_name(self.device)
        store.merge(Table(name), self.folder)
        waiting, gradients = self._distinct(tasks)
        self.served, self.beside = 0, []
        self.begin, self.journal = perf_counter(), Journal.open(name, self.folder)
        self.versions, self.ceilings = versions_of(self.device), self._ceilings(name)
        self.report = Report(name, table=store.path_of(name, self.folder), gradients=gradients)
        self.deadline = float("inf") if self.seconds is None else self.begin + self.seconds
        efforts = self._efforts()
        progress.begin(len(waiting) * len(efforts))
        try:
            with gpu.cudnn_benchmark(self.device), ensure_compiler(self.compiler, self.device) as compiler:
                for self.effort in efforts:
                    self.report.known, self.ranked = [], {}
                    self._calibrate(waiting)
                    if not self._all(waiting, compiler, progress):
                        break
        finally:
            self._calibrate(waiting)
            calibrate.keep_factors(self.factors, self.device, self.folder, self._hosts(waiting))
        dispatch.forget()
        return self.report

    def _calibrate(self, tasks: list[Task]) -> None:
        """Corrects the model by the timings so far, so that it chooses the next candidates better."""
        if self.device.type == "cuda":  # on a CPU each variant has one config, and all of them are timed
            plain = [task.problem for task in tasks if task.problem.epilogue is None]
            timed = calibrate.samples(self.journal.timings.values(), plain, self.versions)
            self.factors |= calibrate.factors(calibrate.counts(timed, self.ceilings), self.ceilings)
            self.ceilings = replace(self.ceilings, factors={**self.ceilings.factors, **self.factors})

    def _hosts(self, tasks: list[Task]) -> dict[str, float]:
        """The host's times for calls of the plain layers: an epilogue has operations of its own beside torch's."""
        plain = {str(task.problem) for task in tasks if task.problem.epilogue is None}
        timings = [each for each in self.journal.timings.values() if each.problem in plain]
        return calibrate.host_times(timings, self.versions)

    def _efforts(self) -> tuple[Effort, ...]:
        by_degrees = self.device.type == "cuda" and self.seconds is not None and not self.again
        return (*EFFORTS, WHOLE) if by_degrees else (WHOLE,)

    def _all(self, waiting: list[Task], compiler: Precompiler, progress: Progress) -> bool:
        """Goes through the problems once with the present effort; False where the budget is used up."""
        ahead = [compiler.start(self._jobs(task)) for task in waiting[:AHEAD]]
        for index, task in enumerate(waiting):
            ahead += [compiler.start(self._jobs(each)) for each in waiting[index + AHEAD : index + AHEAD + 1]]
            with spent.on(spent.COMPILING):
                compiler.finish(ahead[index], max(0.0, min(COMPILING_SECONDS, self.deadline - perf_counter())))
            if not self._one(task, len(waiting) - index):
                return False
            progress.step(_progress_line(task, self.report))
        return True

    def _one(self, task: Task, left: int) -> bool:
        """Tunes one problem, with ``left`` to go; False where the budget is used up."""
        share = self._share(left)
        begin, known = perf_counter(), len(self.report.known)
        case = Case(task.problem, self.device)
        contest = Contest(case, self.journal, self.ceilings, self.versions, self.deadline, self.again)
        try:
            self._problem(task, contest, share)
        except OutOfTime:
            self.report.reason, self.report.left = BUDGET, left
            self.report.round = 1 + self._efforts().index(self.effort), len(self._efforts())
            return False
        except Exception as error:
            self._error(task, ALL, ALL, one_line(error))
            if not self.goes_on or context_is_lost(error):
                raise
        finally:
            self._rows(task, contest)
        if len(self.report.known) == known:
            self.beside.append(max(0.0, perf_counter() - begin - share))
        return True

    def _share(self, left: int) -> float:
        """Seconds for the timings of the next problem: an even part of the time left, less the mean time that a problem
        took for the gate, cuDNN's trials and the ranking. 0 or less at the end of the budget."""
        if self.seconds is None:
            return PROBLEM_SECONDS
        even = (self.deadline - perf_counter()) / left
        beside = fmean(self.beside) if self.beside else 0.0
        return min(even, max(even - beside, LEAST_SHARE), self.effort.seconds)

    def _jobs(self, task: Task) -> list[Request]:
        """The launches to compile for a problem; none for one that is known."""
        if target_of(self.device) is None:
            return []
        table = store.read(self.report.device, self.folder)
        return [
            (each.selection.variant.name, task.problem, each.selection.config)
            for name, field in self._fields(task.problem).items()
            if not self._stored(table, task.problem, name, len(field))
            for each in field
            if each.is_kernel
        ]

    def _fields(self, problem: Problem) -> dict[str, list[Candidate]]:
        """The candidates by pass, ranked once for each effort."""
        if problem not in self.ranked:
            ahead = was_compiled(problem, self.device)
            mistakes = self.mistakes.setdefault(problem, {})

            def raised(record: Variant, error: Exception) -> None:
                mistakes.setdefault((record.pass_name, record.name), one_line(error))

            tables = self._tables()
            found = {
                name: joined(
                    chain(*stored(problem, self.device, (name,), tables, self.ceilings)),
                    candidates(problem, self.device, name, self.ceilings, self.effort, ahead, raised),
                )
                for name in problem.passes
            }
            self.ranked[problem] = {name: compiled_first(each, ahead) for name, each in found.items()}
        return self.ranked[problem]

    def _tables(self) -> list[Table]:
        """Those that serve the device, this run's own first."""
        gpu = serving.part(self.device)
        others = [serving.table_for(gpu)] if gpu is not None else []
        own = store.read(self.report.device, self.folder)
        return [own, *(store.shipped_table(each) for each in others if each not in (None, own.device))]

    def _problem(self, task: Task, contest: Contest, share: float) -> None:
        table = store.read(self.report.device, self.folder)
        fields = self._fields(task.problem)
        found = {name: self._stored(table, task.problem, name, len(fields[name])) for name in task.problem.passes}
        if all(found.values()):
            self.report.known.append(task)
            return
        if share <= 0:
            raise OutOfTime
        self._nulls(task, contest)
        noise = self.report.noise
        pairs = stored(task.problem, self.device, GRADIENTS, self._tables(), self.ceilings)
        tuner = ProblemTuner(contest, fields, share, noise.noise if noise else 1.0, pairs)
        known = found["forward"]
        forward = tuner.forward() if known is None else Winner.stored("forward", known)
        if known is None and forward is not None:
            self._keep(task, forward)
        for winner in tuner.gradients(forward) if task.problem.epilogue is None else ():
            self._keep(task, winner)

    def _nulls(self, task: Task, contest: Contest) -> None:
        """Null rows, of the first problems and of every NULLS_EVERY-th that torch serves."""
        if contest.case.torch_serves:
            if self.served < FIRST_NULLS or self.served % NULLS_EVERY == 0:
                try:
                    fields = contest.null_rows(NULL_SECONDS)
                except Exception as error:  # such as a lack of memory, which the candidates will tell
                    if not disqualifies(error):
                        raise
                    return
                self.report.null_rows += fields
                for row in fields:
                    self.write("null", {**head(task, "forward"), **row})
            self.served += 1

    def _stored(self, table: Table, problem: Problem, pass_name: str, rivals: int) -> Entry | None:
        """The stored entry, if this run would only make it again: it had about as many candidates."""
        entry = None if self.again else table.find(Key.of(problem, pass_name))
        if entry is None or dict(entry.versions) != self.versions or MORE * entry.rivals < rivals:
            return None
        if self.device.type == "cuda" and entry.host_ms is None:  # from before the choice for eager calls
            return None
        both = entry.choices(graphs=True)
        try:
            known = all(revision(variant(each.variant)) == each.source for each in both)
        except ArgumentError:
            return None
        failed = any(self._failed_since(each, pass_name, problem) for each in both)
        return entry if known and not failed else None

    def _failed_since(self, entry: Entry, pass_name: str, problem: Problem) -> bool:
        """A later final lost the GPU to the stored choice, on this problem or on that of the entry."""
        return any(
            self.journal.refuses(
                Timing(text, pass_name, entry.variant, entry.config, entry.source, SCREEN, entry.versions)
            )
            for text in {entry.problem, str(problem)}
        )

    def _keep(self, task: Task, winner: Winner) -> None:
        entry, report = winner.entry(task.problem, self.versions), self.report
        key = str(Key.of(task.problem, winner.pass_name))
        store.merge(Table(report.device, {key: entry}), self.folder)
        report.winners = [each for each in report.winners if each[0] != task or each[1].pass_name != winner.pass_name]
        report.winners.append((task, winner))
        fields = {"variant": entry.variant, "config": entry.config, "median_ms": entry.ms, "torch_ms": entry.torch_ms}
        fields |= {name: value for name, value in entry.to_json().items() if name in ("host_ms", "eager")}
        fields |= {"warning": winner.warning} if winner.warning else {}
        self.write("tuned", {**head(task, winner.pass_name), **fields, "candidates": winner.candidates, "key": key})

    def _error(self, task: Task, pass_name: str, name: str, message: str) -> None:
        self.report.errors += name == ALL
        self._tell(task, pass_name, name, message)
        self.write("error", {**head(task, pass_name), "variant": name, "status": "error", "message": message})

    def _tell(self, task: Task, pass_name: str, name: str, message: str) -> None:
        self.report.faults.append(f"{name} on {task.layer} {task.problem.layout} ({pass_name}): {message}")

    def _rows(self, task: Task, contest: Contest) -> None:
        for pass_name, faults in contest.case.torch_faults.items():
            message = "; ".join(faults.values())
            self.write("error", {**head(task, pass_name), "variant": BASELINE, "status": "wrong", "message": message})
        for (pass_name, name), message in self.mistakes.get(task.problem, {}).items():
            if (task.problem, pass_name, name) not in self.told:
                self.told.add((task.problem, pass_name, name))
                self._error(task, pass_name, name, message)
        for timing, _ in contest.measured:
            if timing.status == WRONG or timing.identity in contest.mistakes:
                self._tell(task, timing.pass_name, timing.variant, timing.message)
        self.report.timings += len(contest.measured)
        self.report.reused += contest.reused
        for timing, predicted in contest.measured:
            row = {**head(task, timing.pass_name), **timing.row, "predicted_ms": predicted if predicted > 0 else None}
            self.write("timing" if timing.status == OK else "error", row)

    def _distinct(self, tasks: Iterable[Task]) -> tuple[list[Task], list[bool]]:
        """One task per problem; an empty output has nothing to time. Behind a layer with an epilogue comes the plain
        one, where its gradients have no entry: the second answer says of each whether they have one."""
        asked = {task.problem: task for task in reversed(list(tasks))}
        table, found, gradients = store.read(device_name(self.device), self.folder), {}, []
        for task in reversed(asked.values()):
            if not (task.problem.n and task.problem.c_out):
                continue
            found[task.problem] = task
            if task.problem.epilogue is None:
                continue
            plain = task.plain
            known = all(table.find(Key.of(plain.problem, name)) is not None for name in GRADIENTS)
            gradients.append(known)
            if not known and plain.problem not in asked:
                found.setdefault(plain.problem, plain)
        return list(found.values()), gradients

    def _ceilings(self, name: str) -> ceilings.Ceilings:
        stored = store.read(name, self.folder).ceilings
        return (ceilings.from_json(stored) if stored else None) or ceilings.nominal(self.device)


def head(task: Task, pass_name: str) -> dict[str, object]:
    """The fields that every row about a task begins with."""
    problem = task.problem
    whole = {"text": str(problem), "problem": sizes_of(problem)}
    return {**rows.head(task.layer, task.suite, pass_name, problem), **whole}


def tasks_of(problems: Iterable[Problem]) -> list[Task]:
    """Tasks of problems that have no names; dtype and layout are no part of a name."""

    def name(index: int, problem: Problem) -> str:
        dtype = str(problem.dtype).removeprefix("torch.")
        return f"problem {index}: {problem}".replace(f" {dtype} {problem.layout}", "", 1)

    return [Task(problem, name(index, problem), "given") for index, problem in enumerate(problems, start=1)]


def _progress_line(task: Task, report: Report) -> str:
    mine = [winner for each, winner in report.winners if each == task]
    best = max((winner.torch_ms / winner.ms for winner in mine), default=None)
    return f"{task.layer} {task.problem.layout}" + (f": best {best:.2f} x torch" if best else ": known")
