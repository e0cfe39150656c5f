"""Everything that a device should be asked, in the order of value, within one budget: verify, roofs, tune, bench.

A folder holds the campaign: its store of tuned choices and one results file per run. A later run goes on where the
budget ended: what was verified, tuned or benchmarked by the same sources is not done again, and a cell is benchmarked
anew where tuning has changed what it runs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch

from tritonconv import dispatch, overhead
from tritonconv.autotune import calibrate
from tritonconv.autotune.ceilings import from_roofs
from tritonconv.autotune.choose import Selection
from tritonconv.autotune.sources import source_hash
from tritonconv.bench import gate, gpu, results, roofs
from tritonconv.bench.failures import context_is_lost, told
from tritonconv.bench.results import BASELINE, COMPILED, OURS, Run, Writer
from tritonconv.bench.roofs import LAUNCH, MATMUL, TF32
from tritonconv.bench.rows import sizes_of, versions_of
from tritonconv.bench.workloads import distinct, in_turn, left_out, workload
from tritonconv.contestants import served, why_not
from tritonconv.inspection.jobs import CLASSES
from tritonconv.inspection.precompile import Precompiler, target_of
from tritonconv.kernels.registry import variant, variants
from tritonconv.runner import Options, header, measure
from tritonconv.tuning.case import Case
from tritonconv.tuning.session import Progress, Session, Task

# Shares of the budget, as far as a step has something to do; the benchmark has what the others leave.
VERIFY, ROOFS, TUNE, OVERHEAD = 0.12, 0.06, 0.42, 0.03
END = 0.02  # for what is running when a step's time is over
STORE = "store"  # the folder of a campaign's choices, in its own
CHECKED_AXES = 12  # a problem is verified at no more voxels per axis
# Of an answer that was held against float64, beside the versions.
IDENTITY = ("layer", "pass", "dtype", "layout", "variant", "source")


@dataclass(frozen=True)
class Outcome:
    """The results file of this run, why it ended, how many answers were wrong, and what each step did."""

    path: Path
    reason: str
    errors: int
    steps: tuple[str, ...]


class Campaign:
    """One run of a campaign; ``options`` say which layers, dtypes, layouts and passes, and the budget."""

    def __init__(self, options: Options, folder: Path, progress: Progress) -> None:
        assert options.seconds is not None
        self.options, self.folder, self.progress = options, folder, progress
        self.device, self.seconds = options.device, options.seconds
        self.begin = perf_counter()
        self.errors = 0
        self.said: list[str] = []

    def run(self) -> Outcome:
        """Raises ResultsError or StoreError where the folder cannot be written or holds another device's results.

        What else ends the run, such as a GPU that is lost, is in the file before it is raised.
        """
        self.earlier, self.versions = self._earlier(), versions_of(self.device)
        reason = "complete"
        here, compiling = gpu.current(self.device), Precompiler(target_of(self.device))
        with store_of(self.folder), Writer(self.folder, results.CAMPAIGN) as writer, here, compiling as self.compiler:
            self.writer = writer
            self.environment = writer.write("environment", header(self.options, writer))
            try:
                self._verify()
                measured = self._roofs()
                finished = self._tune()
                finished = self._bench(measured) and finished
                self._overhead()
                reason = "complete" if finished else "budget"
            except KeyboardInterrupt:
                reason = "interrupted"
            except Exception as error:
                self._end("error", message=told(error))
                raise
            self._end(reason)
        return Outcome(writer.path, reason, self.errors, tuple(self.said))

    def _end(self, reason: str, **more: str) -> None:
        self.writer.write("end", {"reason": reason, "seconds": round(perf_counter() - self.begin, 3), **more})

    def _earlier(self) -> Run | None:
        """What earlier runs of this folder measured, which were all on this device."""
        runs = [results.read(path) for path in results.written(self.folder, results.CAMPAIGN)]
        return results.merged(runs) if runs else None

    def _left(self, reserved: float = 0.0) -> float:
        """Seconds until the budget ends, a share of it reserved for what comes after."""
        return self.seconds * (1 - END - reserved) - (perf_counter() - self.begin)

    # -------------------------------------------------------------- verify

    def _verify(self) -> None:
        """Every variant on one layer per class, against float64.

        What was wrong, or lost the GPU, is not tried again before its source or a version changes, for it may end the
        run; it is counted again. Other errors may pass.
        """
        rows = (*self.earlier.errors, *self.earlier.checks) if self.earlier else ()
        lasting = [row for row in rows if row["kind"] == "check" or row["status"] == "wrong" or row.get("context_lost")]
        known = {tuple(row.get(key) for key in IDENTITY): row["kind"] for row in lasting
                 if row.get("versions") == self.versions}  # fmt: skip
        answers = [(each, known.get(self._identity(*each))) for each in self._checks()]
        waiting = [each for each, kind in answers if kind is None]
        self.errors = failed = sum(kind == "error" for _, kind in answers)
        self.progress.begin(len(waiting))
        deadline, checked = perf_counter() + min(VERIFY * self.seconds, self._left()), 0
        started = self.compiler.start(
            (name, task.problem, variant(name).default(task.problem, self.device))
            for task, name in waiting
            if variant(name).backend == "triton"  # they come first
        )
        for index, (task, name) in enumerate(waiting):
            self.compiler.finish(started[index : index + 1], max(0.0, deadline - perf_counter()))
            if perf_counter() >= deadline:
                break
            self._check(task, name)
            checked += 1
            self.progress.step(f"verify {name} on {task.layer}")
        rest = f" ({failed} of them known before)" if failed else ""
        rest += f", {len(waiting) - checked} left for another run" if checked < len(waiting) else ""
        self.said.append(f"verify: {checked} answers held against float64, {self.errors} wrong or failed{rest}")

    def _checks(self) -> list[tuple[Task, str]]:
        """Kernels before formulations in torch's operations."""
        served = checks_of(self.options.dtypes, self.options.layouts, self.device)
        return sorted(served, key=lambda each: variant(each[1]).backend != "triton")

    def _identity(self, task: Task, name: str) -> tuple:
        record = variant(name)
        dtype = str(task.problem.dtype).removeprefix("torch.")
        return task.layer, record.pass_name, dtype, task.problem.layout, name, source_hash(record)

    def _check(self, task: Task, name: str) -> None:
        layer, pass_name, dtype, layout, _, source = self._identity(task, name)
        record = variant(name)
        head = {"layer": layer, "suite": task.suite, "pass": pass_name, "dtype": dtype, "layout": layout,
                "variant": name, "source": source, "versions": self.versions,
                "problem": sizes_of(task.problem)}  # fmt: skip
        chosen = Selection(record, record.default(task.problem, self.device), "verified")
        try:
            plan = dispatch.plan_of(task.problem, self.device, **{pass_name: chosen})
            verdict = Case(task.problem, self.device).judge(plan, pass_name)
        except Exception as error:
            self.errors += 1
            lost = context_is_lost(error)
            self.writer.write("error", {**head, "status": "error", "message": told(error), "context_lost": lost})
            if lost:
                raise
            return
        if verdict.ok:
            self.writer.write("check", {**head, "max_error": verdict.max_error, "tolerance": verdict.tolerance})
        else:
            self.errors += 1
            self.writer.write("error", {**head, "status": "wrong", "message": str(verdict)})

    # -------------------------------------------------------------- the other steps

    def _roofs(self) -> list[dict]:
        """Of earlier runs and of this one, which measures the products that they lack; they are put into the store."""
        found = list(self.earlier.roofs) if self.earlier else []
        names = {(row["name"], row["dtype"]) for row in found}
        lacking = [dtype for dtype in self.options.dtypes if not self._products(dtype) <= names]
        if lacking or (LAUNCH, None) not in names:  # of the copies and the launch, which come first, that is the last
            each = min(0.5, ROOFS * self.seconds / (3 + 2 * len(lacking)))
            measured = [self.writer.write("roof", {**row, "when": "start"})
                        for row in roofs.measure(self.device, lacking, each)]  # fmt: skip
            self.said.append(f"roofs: {len(measured)} measured")
            found += measured
        else:
            self.said.append("roofs: known from an earlier run")
        ceilings = from_roofs(found, self.environment, self.device)
        if ceilings is not None:
            calibrate.keep(ceilings, self.device)
            dispatch.forget()
        return found

    def _products(self, dtype: torch.dtype) -> set[tuple[str, str]]:
        """The roofs of matrix products that a dtype has here."""
        name = str(dtype).removeprefix("torch.")
        also = {(MATMUL, TF32)} if dtype is torch.float32 and self.device.type == "cuda" else set()
        return {(MATMUL, name)} | also

    def _tune(self) -> bool:
        seconds = min(TUNE * self.seconds, self._left())
        if seconds <= 0:
            return False
        scale = self.options.scale
        tasks = [
            Task(layer.problem(dtype, layout, scale), layer.name, layer.suite)
            for dtype in self.options.dtypes
            for layer in in_turn(layer for layer, _ in distinct(self.options.layers, scale))
            for layout in self.options.layouts
            if left_out(layer, scale) is None and not layer.family
        ]
        session = Session(self.device, None, seconds, write=self.writer.write, goes_on=True, compiler=self.compiler)
        report = session.run(tasks, self.progress)
        self.errors += report.errors
        self.said.append(
            f"tune: {len(report.winners)} choices ({report.torch_won} of them torch's own), "
            f"{len(report.known)} problems known before, {report.unfinished}"
        )
        return report.reason == "complete"

    def _bench(self, known_roofs: list[dict]) -> bool:
        seconds = self._left(OVERHEAD)
        if seconds <= 0:
            self.said.append("bench: no time was left")
            return False
        options = replace(self.options, seconds=seconds, compiled=False, done=self._done(OURS))
        finished = self._cells("bench", options, known_roofs)
        if finished and self.options.compiled:  # torch.compile is slow to ask, so it is asked last
            options = replace(
                options, seconds=self._left(OVERHEAD), variants=(), only_compiled=True, done=self._done(COMPILED)
            )
            finished = self._cells("torch.compile", options, known_roofs)
        return finished

    def _cells(self, step: str, options: Options, known_roofs: list[dict]) -> bool:
        run = measure(options, self.writer, self.progress, known_roofs, self.compiler)
        self.errors += run.errors
        self.said.append(f"{step}: {run.done} of {run.cells} cells, {len(options.done)} known before")
        if run.reason == "interrupted":
            raise KeyboardInterrupt
        return run.reason == "complete"

    def _done(self, timed: str) -> frozenset[tuple[str, str, str, str]]:
        """Cells in which earlier runs timed ``timed`` as it is now, or lost the GPU with what would run now."""
        if self.earlier is None:
            return frozenset()
        lost = [row for row in self.earlier.errors if row.get("context_lost")]
        rows = [row for row in self.earlier.results if row["variant"] == timed]
        rows += [row for row in lost if (row["variant"] == COMPILED) == (timed == COMPILED)]
        return frozenset(
            (row["layer"], row["dtype"], row["layout"], row["pass"])
            for row in rows
            if self._asked(row) and self._same(row)
        )

    def _asked(self, row: dict) -> bool:
        """This run is about the row's cell."""
        options = self.options
        return (
            any(layer.name == row["layer"] for layer in options.layers)
            and getattr(torch, row["dtype"]) in options.dtypes
            and row["layout"] in options.layouts
            and row["pass"] in options.passes
        )

    def _same(self, row: dict) -> bool:
        """The row's cell would run the same now: the choices of dispatch, their sources, the versions below them."""
        if row.get("versions") != self.versions:
            return False
        if row["variant"] in (BASELINE, COMPILED):
            return True
        layer = next(layer for layer in self.options.layers if layer.name == row["layer"])
        problem = layer.problem(getattr(torch, row["dtype"]), row["layout"], self.options.scale)
        single = next((record for record in self.options.variants if record.name == row["variant"]), None)
        now = served(single, problem, self.device, row["pass"])
        return all(row.get(key) == value for key, value in now.items())

    def _overhead(self) -> None:
        seconds = min(OVERHEAD * self.seconds, self._left())
        if seconds <= 0 or (self.earlier and self.earlier.overheads):
            return
        rows = [self.writer.write("overhead", row) for row in overhead.measure(self.device, torch.float32, seconds)]
        worst = max(overhead.excess(rows).values())
        self.said.append(f"overhead: at most {worst:+.1f} us per call over torch's layer")


def checks_of(
    dtypes: Iterable[torch.dtype], layouts: Sequence[str], device: torch.device
) -> Iterator[tuple[Task, str]]:
    """What is verified: the variants that serve a layer of each class, by name, each with its default config."""
    for dtype in dtypes:
        for layer in (workload(name) for name in dict.fromkeys(CLASSES.values())):
            for layout in layouts:
                task = Task(_small(layer.problem(dtype, layout)), layer.name, layer.suite)
                for record in variants():
                    if why_not(record, task.problem, device) is None:
                        yield task, record.name


def _small(problem):
    """The problem with axes of at most CHECKED_AXES voxels and batch at most 2."""
    size = tuple(min(each, CHECKED_AXES) for each in problem.size)
    with contextlib.suppress(ValueError):  # a crop that would leave nothing
        return gate.resized(problem, size, min(problem.n, gate.LARGEST_BATCH))
    return problem


@contextlib.contextmanager
def store_of(folder: Path) -> Iterator[None]:
    """Inside the block the store of a campaign's folder is the user's."""
    before = os.environ.get("TRITONCONV_CACHE")
    os.environ["TRITONCONV_CACHE"] = str((folder / STORE).absolute())
    dispatch.forget()
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITONCONV_CACHE"]
        else:
            os.environ["TRITONCONV_CACHE"] = before
        dispatch.forget()
