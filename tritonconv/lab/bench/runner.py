"""``bench``: gates and times the public operation beside torch, layer by layer, and writes a results file.

A *cell* is one layer in one dtype and layout for one pass (``cell.py``). A finished cell is on disk before
the next one begins.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from tritonconv.device import current
from tritonconv.lab.bench import gate, gpu, roofs, spent, stages
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.cell import Cell, CellTimer
from tritonconv.lab.bench.clock import method
from tritonconv.lab.bench.contestants import launched, why_not
from tritonconv.lab.bench.environment import OtherPrograms
from tritonconv.lab.bench.layer_sizes import SCALES, left_out
from tritonconv.lab.bench.options import Options
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.bench.recording import recording
from tritonconv.lab.bench.results import PREFIX, Writer
from tritonconv.lab.bench.workloads import ALL, distinct, in_order
from tritonconv.lab.inspection.precompile import Precompiler, Request, ensure_compiler

# Time for one cell (s): what it gets without a budget, and the most it gets with one.
CELL_SECONDS = 0.5
MOST_CELL_SECONDS = 2.0
ROOF_SECONDS = 0.3
# The share of a budget, and the most seconds, that cells wait for kernels to be compiled.
COMPILING, MOST_COMPILING_SECONDS = 0.1, 60.0
# Cells of each pass, spread over the run, that have null rows too; not the largest, whose graphs would not fit beside
# each other.
NULL_CELLS, MOST_NULL_BYTES = 5, 1 << 30
# Roofs are measured at the start and so many times more, shorter: on a shared machine one of them may find it quiet.
ROOFS_AGAIN, SHORT_ROOF_SECONDS = 3, 0.06


@dataclass(frozen=True)
class Outcome:
    """Where the rows are, why the run ended (``complete``, ``budget``, ``interrupted``), and how many are errors; of a
    campaign also what each step did, and where the seconds went."""

    path: Path
    reason: str
    errors: int
    steps: tuple[str, ...] = ()
    spent: spent.Spent = field(default_factory=dict)


def bench(options: Options, folder: Path, progress: Progress) -> Outcome:
    """Runs everything that ``options`` asks for and writes one results file into ``folder``.

    Ends early, with every finished row kept, when the budget is used up or on KeyboardInterrupt. Raises ResultsError
    where the file cannot be written. Any other error, for example a lost GPU, is written to the file, then raised.
    """
    others = OtherPrograms()
    with (
        recording(folder, PREFIX, options.device, options.command, options.seed, **header(options)) as writer,
        spent.Ledger() as ledger,
    ):
        ledger.step("bench")
        try:
            run = measure(options, writer, progress)
            writer.end |= {"reason": run.reason, "cells": run.done, "of_cells": run.cells}
        finally:
            writer.end |= {"other_cores": others.since_last(), "spent": ledger.rounded()}
    return Outcome(writer.path, run.reason, run.errors)


def measure(
    options: Options,
    writer: Writer,
    progress: Progress,
    known_roofs: Iterable[dict] = (),
    compiler: Precompiler | None = None,
) -> _Bench:
    """Measures the cells, and the roofs if none are known. The caller writes the header and the end row of the file.

    ``compiler`` is one that runs already. Returns the run with ``reason``, ``errors``, ``done`` and ``cells``.
    """
    here = current(options.device), gpu.cudnn_benchmark(options.device)
    with here[0], here[1], ensure_compiler(compiler, options.device) as compiling:
        run = _Bench(options, writer, progress, known_roofs)
        run.compile_ahead(compiling)
        run.run()
    return run


def header(options: Options) -> dict[str, object]:
    """The facts of a run of the benchmark, for its environment row."""
    return {
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
        self.begin = perf_counter()
        self.roofs: list[dict] = list(known_roofs)
        self.measures_roofs = not self.roofs
        self.reserved = 0.0  # seconds that the roofs took last time, for those at the end
        self.reason, self.done = "complete", 0
        self.layers = dict(distinct(options.layers, options.scale))
        self.left_out = {
            layer.name: why for layer in self.layers if (why := left_out(layer, options.scale)) is not None
        }
        self.layers = {layer: same for layer, same in self.layers.items() if layer.name not in self.left_out}
        cells = list(self._order())
        self.cells = len(cells)
        self.timer = CellTimer(options, writer, self.roofs, frozenset(_spread(cells)))

    def compile_ahead(self, compiler: Precompiler) -> None:
        """Compiles the kernels of all cells, in the cells' order; late ones are compiled while the first cells run."""
        seconds = self.options.seconds
        most = MOST_COMPILING_SECONDS if seconds is None else COMPILING * seconds
        with spent.on(spent.COMPILING):
            started = compiler.start(self._kernels() if compiler.target else ())
            compiler.finish(started, min(most, MOST_COMPILING_SECONDS))

    def _kernels(self) -> Iterator[Request]:
        """The launches of the cells' contestants, each once."""
        options, jobs = self.options, set()
        for cell in self._order():
            problem, pass_name = cell.problem, cell.pass_name
            single = [record for record in options.variants if record.pass_name == pass_name]
            for record in single if options.only_compiled else (None, *single):
                try:
                    served = record is None or why_not(record, problem, options.device) is None
                    chosen = launched(record, problem, options.device, pass_name) if served else {}
                except Exception:  # the cell writes it as a row
                    continue
                for selection in chosen.values():
                    job = selection.variant.name, problem, tuple(sorted(selection.config.items()))
                    if selection.variant.backend == "triton" and job not in jobs:
                        jobs.add(job)
                        yield selection.variant.name, problem, selection.config

    def run(self) -> None:
        for name, why in self.left_out.items():
            self.writer.write("skip", {"layer": name, "pass": ALL, "variant": ALL, "message": why})
        try:
            self._measure_roofs("start", ROOF_SECONDS)
            self.progress.begin(self.cells)
            again = {self.cells * part // ROOFS_AGAIN for part in range(1, ROOFS_AGAIN)} if self.cells >= 20 else ()
            for cell in self._order():
                if self.done in again:
                    self._measure_roofs(f"after {self.done} cells", SHORT_ROOF_SECONDS)
                share = self._share()
                if share <= 0:
                    self.reason = "budget"
                    break
                self.timer.measure(cell, share)
                self.done += 1
                self.progress.step(f"{cell.layer.name} {cell.problem.layout} {cell.pass_name}")
            self._measure_roofs("end", SHORT_ROOF_SECONDS)
        except KeyboardInterrupt:
            self.reason = "interrupted"

    def _order(self) -> Iterator[Cell]:
        """The layouts and passes of a layer stay together."""
        options = self.options
        outputs = frozenset(name for pass_name in options.passes for name in gate.OUTPUTS[pass_name])
        for layer, dtype in itertools.product(in_order(self.layers), options.dtypes):
            problems = [layer.problem(dtype, layout, options.scale) for layout in options.layouts]
            # The values follow from the layer's name and the seed alone.
            case = Case(problems[0], options.device, options.seed + zlib.crc32(layer.name.encode()), outputs)
            for problem, pass_name in itertools.product(problems, options.passes):
                if problem.epilogue is not None and pass_name not in stages.PASSES:
                    continue
                cell = Cell(layer, self.layers[layer], case.on(problem), pass_name)
                if cell.key not in options.done:
                    yield cell

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

    @property
    def errors(self) -> int:
        return self.timer.errors


def _spread(cells: Sequence[Cell]) -> Iterator[tuple[str, str, str, str]]:
    """The keys of NULL_CELLS cells of each pass, the first one included."""
    for pass_name in dict.fromkeys(cell.pass_name for cell in cells):
        fits = [cell for cell in cells if cell.pass_name == pass_name and cell.problem.bytes() <= MOST_NULL_BYTES]
        yield from (fits[len(fits) * part // NULL_CELLS].key for part in range(NULL_CELLS) if fits)
