"""The first step of a campaign: every variant on one layer per class, held against float64."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from tritonconv.autotune.choose import Selection
from tritonconv.autotune.sources import revision
from tritonconv.autotune.tuning.tasks import Task
from tritonconv.dispatch import plan_of
from tritonconv.kernels.registry import variants
from tritonconv.kernels.variant import COPY, Variant
from tritonconv.lab.bench import gate, rows, spent
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.contestants import why_not
from tritonconv.lab.bench.failures import context_is_lost, one_line
from tritonconv.lab.bench.options import Options
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.bench.results import Run, Writer
from tritonconv.lab.bench.rows import sizes_of
from tritonconv.lab.bench.workloads import workload
from tritonconv.lab.inspection.jobs import SAMPLE_LAYERS
from tritonconv.lab.inspection.precompile import Precompiler
from tritonconv.problem import Problem

CHECKED_AXES = 12  # a problem is verified at no more voxels per axis
# The fields that identify a checked answer, besides the versions.
IDENTITY = ("layer", "pass", "dtype", "layout", "variant", "source", "config")


@dataclass
class Verification:
    """``errors`` counts the answers that were wrong or failed, also in earlier runs."""

    options: Options
    writer: Writer
    versions: Mapping[str, str | None]
    compiler: Precompiler
    progress: Progress
    errors: int = 0
    _cases: dict[Problem, Case] = field(default_factory=dict)  # they are small

    def run(self, earlier: Run | None, seconds: float) -> str:
        """Checks what ``earlier`` runs did not, for so many seconds; says in a line what was done.

        A variant that was wrong, or lost the GPU, may end the run: it is counted again, but not tried again before its
        source or a version changes. Other errors are tried again. A lost GPU is written as a row, then raised.
        """
        before = (*earlier.errors, *earlier.checks) if earlier else ()
        lasting = [
            row for row in before if row["kind"] == "check" or row["status"] == "wrong" or row.get("context_lost")
        ]
        known = {_identity(row): row["kind"] for row in lasting if row.get("versions") == self.versions}
        # Kernels before formulations in torch's operations.
        served = list(checks_of(self.options.dtypes, self.options.layouts, self.options.device, self._raised))
        checks = sorted(served, key=lambda each: each[1].variant.backend != "triton")
        answers = [(each, known.get(_identity(_head(*each)))) for each in checks]
        waiting = [each for each, kind in answers if kind is None]
        failed = sum(kind == "error" for _, kind in answers)
        self.errors += failed
        self.progress.begin(len(waiting))
        deadline, checked = perf_counter() + seconds, 0
        started = self.compiler.start(
            (chosen.variant.name, task.problem, chosen.config)
            for task, chosen in waiting
            if chosen.variant.backend == "triton"  # they come first
        )
        for index, (task, chosen) in enumerate(waiting):
            with spent.on(spent.COMPILING):
                self.compiler.finish(started[index : index + 1], max(0.0, deadline - perf_counter()))
            if perf_counter() >= deadline:
                break
            self._check(task, chosen)
            checked += 1
            self.progress.step(f"verify {chosen.variant.name} on {task.layer}")
        rest = f" ({failed} of them known before)" if failed else ""
        rest += f", {len(waiting) - checked} left for another run" if checked < len(waiting) else ""
        return f"verify: {checked} answers held against float64, {self.errors} wrong or failed{rest}"

    def _raised(self, task: Task, record: Variant, error: Exception) -> None:
        """The row of a variant that raised when it was asked whether it serves a problem, and with which config."""
        self.errors += 1
        fields = rows.head(task.layer, task.suite, record.pass_name, task.problem)
        self.writer.write("error", {**fields, "variant": record.name, "status": "error", "message": one_line(error)})

    def _check(self, task: Task, chosen: Selection) -> None:
        row = {**_head(task, chosen), "versions": self.versions, "problem": sizes_of(task.problem)}
        pass_name = chosen.variant.pass_name
        try:
            plan = plan_of(task.problem, self.options.device, **{pass_name: chosen})
            if task.problem not in self._cases:
                self._cases[task.problem] = Case(task.problem, self.options.device)
            verdict = self._cases[task.problem].verdict(plan, pass_name)
        except Exception as error:
            self.errors += 1
            lost = context_is_lost(error)
            self.writer.write("error", {**row, "status": "error", "message": one_line(error), "context_lost": lost})
            if lost:
                raise
            return
        if verdict.ok:
            self.writer.write("check", {**row, "max_error": verdict.max_error, "tolerance": verdict.tolerance})
        else:
            self.errors += 1
            self.writer.write("error", {**row, "status": "wrong", "message": str(verdict)})


def _head(task: Task, chosen: Selection) -> dict[str, object]:
    """The first fields of a row about a check: the config where it is not the default one."""
    record = chosen.variant
    fields = rows.head(task.layer, task.suite, record.pass_name, task.problem)
    config = {"config": dict(chosen.config)} if chosen.config.get(COPY) else {}
    return {**fields, "variant": record.name, "source": revision(record), **config}


def _identity(row: Mapping) -> str:
    return json.dumps([row.get(key) for key in IDENTITY], sort_keys=True)


def checks_of(
    dtypes: Iterable[torch.dtype],
    layouts: Sequence[str],
    device: torch.device,
    raised: Callable[[Task, Variant, Exception], None] | None = None,
) -> Iterator[tuple[Task, Selection]]:
    """The checks: the variants that serve a layer of each class, each with its default config and the one that copies
    operands first.

    A variant that raises is passed to ``raised``, and has none; without ``raised`` its error propagates.
    """
    for dtype in dtypes:
        for layer in (workload(name) for name in dict.fromkeys(SAMPLE_LAYERS.values())):
            for layout in layouts:
                task = Task(_small(layer.problem(dtype, layout)), layer.name, layer.suite)
                for record in variants():
                    try:
                        served = why_not(record, task.problem, device) is None
                        starts = record.starts(task.problem, device) if served else ()
                    except Exception as error:
                        if raised is None:
                            raise
                        raised(task, record, error)
                        continue
                    yield from ((task, Selection(record, config, "verified")) for config in starts)


def _small(problem: Problem) -> Problem:
    """The problem with axes of at most CHECKED_AXES voxels and batch at most 2."""
    size = tuple(min(each, CHECKED_AXES) for each in problem.size)
    with contextlib.suppress(ValueError):  # a crop that would leave nothing
        return gate.resized(problem, size, min(problem.n, gate.LARGEST_BATCH))  # type: ignore[arg-type]
    return problem
