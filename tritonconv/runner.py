"""``bench``: gates and times the public operation beside torch, layer by layer, and writes a results file.

A *cell* is one layer in one dtype and layout for one pass. Its candidates are ``torch`` (the baseline), ``tritonconv``
(the public operation as dispatched) and any variants asked for; they are gated (:mod:`tritonconv.bench.gate`), then
timed in turns (:mod:`tritonconv.bench.timing`). A finished cell is on disk before the next one begins.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Protocol

import torch

from tritonconv.bench import gate, gpu, roofs
from tritonconv.bench.calls import FORWARD_BACKWARD
from tritonconv.bench.environment import OtherPrograms, environment
from tritonconv.bench.failures import context_is_lost, disqualifies, told
from tritonconv.bench.results import BASELINE, COMPILED, OURS, SCHEMA, Writer
from tritonconv.bench.rows import Candidate, layer_fields, measured_fields, versions_of
from tritonconv.bench.subject import Subject
from tritonconv.bench.timing import interleave, method, stopwatch_for
from tritonconv.bench.workloads import ALL, SCALES, Workload, distinct, in_turn, left_out
from tritonconv.contestants import candidate, chosen_fields, launched, served, why_not
from tritonconv.inspection.precompile import Job, Precompiler, shared
from tritonconv.kernels.registry import Variant
from tritonconv.problem import Problem

# Time for one cell (s): what it gets without a budget, and the most it gets with one.
CELL_SECONDS = 0.5
MOST_CELL_SECONDS = 2.0
ROOF_SECONDS = 0.3
# The share of a budget, and the most seconds, that cells wait for kernels to be compiled.
COMPILING, MOST_COMPILING_SECONDS = 0.1, 60.0
# Roofs are taken at the start and so many times more, shorter: on a machine that others use, one may find it quiet.
ROOFS_AGAIN, SHORT_ROOF_SECONDS = 3, 0.06
CPU = torch.device("cpu")


class Progress(Protocol):
    """What the runner tells while it runs: how many cells there are, and each one that is done."""

    def begin(self, cells: int) -> None: ...
    def step(self, text: str) -> None: ...


@dataclass(frozen=True)
class Options:
    """What to measure. ``seconds`` is a budget for the whole run or None; ``scale`` is ``"cpu"`` or ``"full"``.

    A variant in ``variants`` is timed by itself in the cells of its own pass. ``compiled`` adds torch.compile, which
    takes a second or more per cell; with ``only_compiled`` its are the only rows, timed beside torch. ``done`` are
    cells (layer, dtype, layout, pass) that an earlier run has.
    """

    layers: tuple[Workload, ...]
    passes: tuple[str, ...] = ("forward", FORWARD_BACKWARD)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    layouts: tuple[str, ...] = ("ncdhw", "ndhwc")
    variants: tuple[Variant, ...] = ()
    scale: str = "cpu"
    seconds: float | None = None
    device: torch.device = CPU
    seed: int = 0
    command: tuple[str, ...] = ()
    compiled: bool = False
    only_compiled: bool = False
    done: frozenset[tuple[str, str, str, str]] = frozenset()


@dataclass(frozen=True)
class Outcome:
    """Where the rows are, why the run ended (``complete``, ``budget``, ``interrupted``), and how many are errors."""

    path: Path
    reason: str
    errors: int


def bench(options: Options, folder: Path, progress: Progress) -> Outcome:
    """Runs everything that ``options`` asks for and writes one results file into ``folder``.

    Ends early, with every finished row kept, when the budget is used up or on KeyboardInterrupt. Raises ResultsError
    where the file cannot be written. What else ends the run, such as a GPU that is lost, is in the file before it is
    raised.
    """
    with Writer(folder) as writer:
        writer.write("environment", header(options, writer))
        begin, others = perf_counter(), OtherPrograms()

        def end(reason: str, **more: object) -> None:
            seconds = round(perf_counter() - begin, 3)
            writer.write("end", {"reason": reason, "seconds": seconds, **more, "other_cores": others.since_last()})

        try:
            run = measure(options, writer, progress)
        except Exception as error:
            end("error", message=told(error))
            raise
        end(run.reason, cells=run.done, of_cells=run.cells)
        return Outcome(writer.path, run.reason, run.errors)


def measure(
    options: Options,
    writer: Writer,
    progress: Progress,
    known_roofs: Iterable[dict] = (),
    compiler: Precompiler | None = None,
) -> _Bench:
    """The cells, and the roofs where none are known, into a file that is open; its header and its end are others' work.

    ``compiler`` is one that runs already. Returns the run with ``reason``, ``errors``, ``done`` and ``cells``.
    """
    here = gpu.current(options.device), gpu.cudnn_benchmark(options.device)
    with here[0], here[1], shared(compiler, options.device) as compiling:
        run = _Bench(options, writer, progress, known_roofs)
        run.compile_ahead(compiling)
        run.run()
    return run


def header(options: Options, writer: Writer) -> dict[str, object]:
    """The environment row of a run of the benchmark."""
    return {
        "schema": SCHEMA,
        "run": writer.run,
        **environment(options.device, options.command, options.seed),
        "scale": options.scale,
        "scale_rule": SCALES[options.scale],
        "timing": method(options.device),
        "budget_s": options.seconds,
        "layers": len(options.layers),
        "distinct_layers": len(
            [1 for layer, _ in distinct(options.layers, options.scale) if left_out(layer, options.scale) is None]
        ),
    }


class _Bench:
    def __init__(self, options: Options, writer: Writer, progress: Progress, known_roofs: Iterable[dict]) -> None:
        self.options, self.writer, self.progress = options, writer, progress
        self.watch = stopwatch_for(options.device)
        self.versions = versions_of(options.device)
        self.begin = perf_counter()
        self.roofs: list[dict] = list(known_roofs)
        self.measures_roofs = not self.roofs
        self.reserved = 0.0  # seconds that the roofs took last time: they are taken once more at the end
        self.others_in_cell = OtherPrograms()
        self.reason = "complete"
        self.errors = self.done = 0
        self.layers = dict(distinct(options.layers, options.scale))
        self.left_out = {
            layer.name: why for layer in self.layers if (why := left_out(layer, options.scale)) is not None
        }
        self.layers = {layer: same for layer, same in self.layers.items() if layer.name not in self.left_out}
        self.cells = sum(1 for _ in self._order())

    def compile_ahead(self, compiler: Precompiler) -> None:
        """The kernels of all cells, in the cells' order; those that are late are compiled beside the first cells."""
        seconds = self.options.seconds
        most = MOST_COMPILING_SECONDS if seconds is None else COMPILING * seconds
        compiler.finish(compiler.start(self._kernels() if compiler.target else ()), min(most, MOST_COMPILING_SECONDS))

    def _kernels(self) -> Iterator[Job]:
        """What the candidates of the cells launch, each once."""
        options, found = self.options, set()
        for subject, layout, pass_name in self._order():
            problem = subject.problem(layout)
            single = [each for each in options.variants if each.pass_name == pass_name]
            for record in single if options.only_compiled else (None, *single):
                if record is None or why_not(record, problem, options.device) is None:
                    for each in launched(record, problem, options.device, pass_name).values():
                        job = each.variant.name, problem, tuple(sorted(each.config.items()))
                        if each.variant.backend == "triton" and job not in found:
                            found.add(job)
                            yield each.variant.name, problem, each.config

    def run(self) -> None:
        for name, why in self.left_out.items():
            self.writer.write("skip", {"layer": name, "pass": ALL, "variant": ALL, "message": why})
        try:
            self._measure_roofs("start", ROOF_SECONDS)
            self.progress.begin(self.cells)
            again = {self.cells * part // ROOFS_AGAIN for part in range(1, ROOFS_AGAIN)} if self.cells >= 20 else ()
            for subject, layout, pass_name in self._order():
                if self.done in again:
                    self._measure_roofs(f"after {self.done} cells", SHORT_ROOF_SECONDS)
                share = self._share()
                if share <= 0:
                    self.reason = "budget"
                    break
                self._cell(subject, layout, pass_name, share)
                self.done += 1
                self.progress.step(f"{subject.layer.name} {layout} {pass_name}")
            self._measure_roofs("end", SHORT_ROOF_SECONDS)
        except KeyboardInterrupt:
            self.reason = "interrupted"

    def _order(self) -> Iterator[tuple[Subject, str, str]]:
        """Suites take turns, layers at sizes of no model come last; the layouts and passes of a layer stay together."""
        options = self.options
        outputs = frozenset(name for pass_name in options.passes for name in gate.OUTPUTS[pass_name])
        ordered = sorted(in_turn(self.layers), key=lambda layer: bool(layer.family))
        for layer, dtype in itertools.product(ordered, options.dtypes):
            same = self.layers[layer]
            subject = Subject(layer, same, dtype, options.scale, options.device, options.seed, outputs)
            for layout, pass_name in itertools.product(options.layouts, options.passes):
                if (layer.name, _name(dtype), layout, pass_name) not in options.done:
                    yield subject, layout, pass_name

    def _measure_roofs(self, when: str, seconds: float) -> None:
        if not self.measures_roofs:
            return
        begin = perf_counter()
        for row in roofs.measure(self.options.device, self.options.dtypes, seconds):
            self.roofs.append(self.writer.write("roof", {**row, "when": when}))
        self.reserved = perf_counter() - begin

    def _share(self) -> float:
        """Seconds for the next cell: what is left of the budget, the roofs at the end reserved, split evenly."""
        if self.options.seconds is None:
            return CELL_SECONDS
        left = self.options.seconds - (perf_counter() - self.begin) - self.reserved
        return min(left / (self.cells - self.done), MOST_CELL_SECONDS)

    def _cell(self, subject: Subject, layout: str, pass_name: str, share: float) -> None:
        begin = perf_counter()
        self.others_in_cell.since_last()
        problem = subject.problem(layout)
        head = {
            "layer": subject.layer.name,
            "suite": subject.layer.suite,
            "pass": pass_name,
            "layout": layout,
            "dtype": _name(subject.dtype),
        }
        passed = self._gated(head, subject, problem, pass_name)
        if not passed:
            return
        try:
            rows = self._timed(head, subject, problem, passed, share - (perf_counter() - begin))
        except Exception as error:
            if not (disqualifies(error) or context_is_lost(error)):  # a mistake in the program
                raise
            self._failed(head, COMPILED if self.options.only_compiled else ALL, None, problem, error)
            if context_is_lost(error):
                raise
            rows = []
        if not rows and self._on_gpu:  # the error is gone by here, and with it what the cell's graphs held
            torch.cuda.empty_cache()
        others = {"other_cores": self.others_in_cell.since_last()}
        for row in rows:
            self.writer.write("result", {**head, **row, **others, "status": "ok", "message": ""})

    def _timed(
        self, head: dict, subject: Subject, problem: Problem, passed: dict[str, Candidate], seconds: float
    ) -> list[dict[str, object]]:
        """The rows of a cell, all of them or an exception: half a cell would count as known."""
        graphs = {name: gpu.captured(one.call, subject.device) for name, one in passed.items()} if self._on_gpu else {}
        calls = {name: graphs.get(name) or one.call for name, one in passed.items()}
        # The gate has run every call at size, so all are warm. What a slow cell takes too much, later cells lack.
        times = interleave(calls, self.watch, seconds)
        rows = []
        for one in passed.values():
            if self.options.only_compiled and one.name != COMPILED:
                continue
            row = layer_fields(subject, problem) | measured_fields(one, times, problem, head, self.roofs)
            row |= {**chosen_fields(one.chosen), "versions": self.versions}
            if self._on_gpu:
                row |= {
                    "timing": "graph" if graphs[one.name] else "events",
                    "l2_flushed": True,
                    "graph_ms": row["median_ms"] if graphs[one.name] else None,
                    "wall_ms": gpu.wall_ms(one.call, subject.device),
                    "peak_bytes": gpu.peak_bytes(one.call, subject.device),
                }
            rows.append(row)
        return rows

    def _failed(self, head: dict, name: str, record: Variant | None, problem: Problem, error: Exception) -> None:
        """The row of a candidate, or of a cell, that raised. Where the GPU is lost it says what lost it, so that a
        campaign does not begin with the same again."""
        self.errors += 1
        row = {**head, "variant": name, "status": "error", "message": f"{type(error).__name__}: {error}"}
        if context_is_lost(error):
            row |= {"context_lost": True, "versions": self.versions}
            with contextlib.suppress(Exception):  # it may ask the GPU
                if name not in (BASELINE, COMPILED):
                    row |= served(record, problem, self.options.device, head["pass"])
        self.writer.write("error", row)

    @property
    def _on_gpu(self) -> bool:
        return self.options.device.type == "cuda"

    def _gated(self, head: dict, subject: Subject, problem: Problem, pass_name: str) -> dict[str, Candidate]:
        """The candidates whose outputs are right; for every other a row is written."""
        single = [record for record in self.options.variants if record.pass_name == pass_name]
        passed: dict[str, Candidate] = {}
        plain: list[tuple[str, Variant | None]] = [(BASELINE, None)]
        if not self.options.only_compiled:
            plain.append((OURS, None))
        if self.options.compiled or self.options.only_compiled:
            plain.append((COMPILED, None))
        for name, record in [*plain, *((record.name, record) for record in single)]:
            refused = why_not(record, problem, self.options.device) if record else None
            if refused is not None:
                self.writer.write("skip", {**head, "variant": name, "message": refused})
                continue
            try:
                one = candidate(name, record, subject, problem, pass_name, passed.get(BASELINE))
            except Exception as error:  # what fails is a row of its own, and the run goes on
                self._failed(head, name, record, problem, error)
                if context_is_lost(error):  # every later cell would fail too
                    raise
                continue
            if one.verdict.ok:
                passed[name] = one
            else:
                self.errors += 1
                row = {**head, "variant": name, "status": "wrong", "message": str(one.verdict)}
                self.writer.write("error", row)
        return passed


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
