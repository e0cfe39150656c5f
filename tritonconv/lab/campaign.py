"""All measurements of a device within one budget, the most valuable first: verify, roofs, tune, bench.

A folder holds the campaign: its store of tuned choices and one results file per run. A later run goes on where the
budget ended: it does not verify, tune or benchmark the same sources again, and benchmarks a cell anew if tuning has
changed its choices.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch

from tritonconv import dispatch
from tritonconv.autotune import store
from tritonconv.autotune.ceilings import LAUNCH, MATMUL, from_json, from_roofs
from tritonconv.autotune.key import device_name
from tritonconv.autotune.tuning import calibrate
from tritonconv.autotune.tuning.session import Session
from tritonconv.autotune.tuning.tasks import Task
from tritonconv.device import current
from tritonconv.lab.bench import call_overhead, results, roofs, spent
from tritonconv.lab.bench.contestants import served
from tritonconv.lab.bench.layer_sizes import Workload, left_out
from tritonconv.lab.bench.options import Options
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.bench.recording import recording
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS
from tritonconv.lab.bench.roofs import TF32
from tritonconv.lab.bench.rows import versions_of
from tritonconv.lab.bench.runner import Outcome, header, measure
from tritonconv.lab.bench.stages import without_concat
from tritonconv.lab.bench.workloads import HEROES, distinct, in_order
from tritonconv.lab.inspection.launches import read_active
from tritonconv.lab.inspection.precompile import Precompiler, target_of
from tritonconv.lab.verification import Verification


class Shares(NamedTuple):
    """Shares of the budget for steps that have something to do; the benchmark has the rest."""

    verify: float
    roofs: float
    tune: float
    compile: float  # torch.compile
    overhead: float


# Of 540 s, with 60 layers in both formats, the tuner has 2.4 s a problem and what the steps before it left, and the
# benchmark 0.7 s a cell. On an H200 a problem took 2.5 s with kernels compiled ahead (2026-11-28).
SHARES = {"cuda": Shares(0.04, 0.02, 0.53, 0.07, 0.01), "cpu": Shares(0.12, 0.06, 0.42, 0.05, 0.03)}
END = 0.02  # reserved for a measurement that still runs when its step's time is over
STORE = "store"  # the folder of a campaign's choices, in its own


class Campaign:
    """One run of a campaign; ``options`` say which layers, dtypes, layouts and passes, and the budget."""

    def __init__(self, options: Options, folder: Path, progress: Progress) -> None:
        assert options.seconds is not None
        self.options, self.folder, self.progress = options, folder, progress
        self.device, self.seconds = options.device, options.seconds
        self.shares = SHARES[self.device.type]
        self.begin = perf_counter()
        self.errors = 0
        self.steps: list[str] = []

    def run(self) -> Outcome:
        """Raises ResultsError or StoreError where the folder cannot be written or holds another device's results.

        Any other error, for example a lost GPU, is written to the file, then raised.
        """
        before = [results.read(path) for path in results.written(self.folder, results.CAMPAIGN)]
        self.earlier, self.versions = results.merged(before) if before else None, versions_of(self.device)
        options = self.options
        here, compiling = current(self.device), Precompiler(target_of(self.device), ahead=read_active())
        with (
            store_of(self.folder),
            recording(
                self.folder, results.CAMPAIGN, self.device, options.command, options.seed, **header(options)
            ) as self.writer,
            here,
            compiling as self.compiler,
            spent.Ledger() as self.ledger,
        ):
            try:
                self._verify()
                measured = self._roofs()
                finished = self._tune()
                finished = self._bench(measured) and finished
                self._overhead()
                finished = self._sizes(measured) and finished
                self.writer.end["reason"] = "complete" if finished else "budget"
            except KeyboardInterrupt:
                self.writer.end["reason"] = "interrupted"
            finally:
                self.writer.end["spent"] = self.ledger.rounded()
        reason = str(self.writer.end["reason"])
        return Outcome(self.writer.path, reason, self.errors, tuple(self.steps), self.ledger.rounded())

    def _left(self, reserved: float = 0.0) -> float:
        """Seconds until the budget ends, a share of it reserved for what comes after."""
        return self.seconds * (1 - END - reserved) - (perf_counter() - self.begin)

    # -------------------------------------------------------------- the steps

    def _verify(self) -> None:
        self.ledger.step("verify")
        verification = Verification(self.options, self.writer, self.versions, self.compiler, self.progress)
        seconds = min(self.shares.verify * self.seconds, self._left())
        try:
            self.steps.append(verification.run(self.earlier, seconds))
        finally:
            self.errors = verification.errors

    def _roofs(self) -> list[dict]:
        """The roofs of earlier runs, and those that they lack, which are measured; puts them into the store."""
        self.ledger.step("roofs")
        rows = list(self.earlier.roofs) if self.earlier else []
        names = {(row["name"], row["dtype"]) for row in rows}
        lacking = [dtype for dtype in self.options.dtypes if not self._products(dtype) <= names]
        if lacking or (LAUNCH, None) not in names:  # of the copies and the launch, which come first, that is the last
            seconds = min(0.5, self.shares.roofs * self.seconds / (3 + 2 * len(lacking)))
            measured = [self.writer.write("roof", {**row, "when": "start"})
                        for row in roofs.measure(self.device, lacking, seconds)]  # fmt: skip
            self.steps.append(f"roofs: {len(measured)} measured")
            rows += measured
        else:
            self.steps.append("roofs: known from an earlier run")
        ceilings = from_roofs(rows, self.writer.environment, self.device)
        if ceilings is not None:
            calibrate.keep(ceilings, self.device)
            dispatch.forget()
        return rows

    def _products(self, dtype: torch.dtype) -> set[tuple[str, str]]:
        """The roofs of matrix products that a dtype has here."""
        name = str(dtype).removeprefix("torch.")
        also = {(MATMUL, TF32)} if dtype is torch.float32 and self.device.type == "cuda" else set()
        return {(MATMUL, name)} | also

    def _tune(self) -> bool:
        self.ledger.step("tune")
        until = (self.shares.verify + self.shares.roofs + self.shares.tune) * self.seconds
        seconds = min(until - (perf_counter() - self.begin), self._left())
        if seconds <= 0:
            return False
        scale = self.options.scale
        tasks = [
            Task(layer.problem(dtype, layout, scale), layer.name, layer.suite)
            for dtype in self.options.dtypes
            for layer in in_order(without_concat(layer) for layer, _ in distinct(self.options.layers, scale))
            for layout in self.options.layouts
            if left_out(layer, scale) is None and not layer.family
        ]
        session = Session(self.device, None, seconds, write=self.writer.write, goes_on=True, compiler=self.compiler)
        report = session.run(tasks, self.progress)
        self.errors += report.errors
        self.steps.append(
            f"tune: {len(report.winners)} choices ({report.torch_won} of them torch's own), "
            f"{len(report.known)} problems known before, {report.unfinished}"
        )
        return report.reason == "complete"

    def _bench(self, known_roofs: list[dict]) -> bool:
        """The layers of models, then torch.compile of the heroes, which is slow to ask."""
        layers = tuple(layer for layer in self.options.layers if not layer.family)
        heroes = tuple(layer for layer in layers if layer.name in HEROES) or layers
        compile_share = self.shares.compile if self.options.compiled else 0
        if self._left(self.shares.overhead + compile_share) <= 0:
            self.steps.append("bench: no time was left")
            return False
        finished = self._cells("bench", layers, known_roofs, self.shares.overhead + compile_share)
        if self.options.compiled and self._left(self.shares.overhead) > 0:
            reserved = self.shares.overhead
            return self._cells("torch.compile", heroes, known_roofs, reserved, COMPILED) and finished
        return finished

    def _sizes(self, known_roofs: list[dict]) -> bool:
        """Layers at sizes of no model, with the time that is left."""
        layers = tuple(layer for layer in self.options.layers if layer.family)
        return not layers or (self._left() > 0 and self._cells("sizes", layers, known_roofs))

    def _cells(
        self, step: str, layers: tuple[Workload, ...], known_roofs: list[dict], reserved: float = 0.0, timed: str = OURS
    ) -> bool:
        """Benchmarks the cells of the layers in which ``timed`` was not yet timed; True where none is left."""
        self.ledger.step(step)
        options = replace(
            self.options,
            layers=layers,
            seconds=self._left(reserved),
            compiled=False,
            only_compiled=timed == COMPILED,
            variants=() if timed == COMPILED else self.options.variants,
            done=self._done(timed),
        )
        run = measure(options, self.writer, self.progress, known_roofs, self.compiler)
        self.errors += run.errors
        self.steps.append(f"{step}: {run.done} of {run.cells} cells, {len(options.done)} known before")
        if run.reason == "interrupted":
            raise KeyboardInterrupt
        return run.reason == "complete"

    def _done(self, timed: str) -> frozenset[tuple[str, str, str, str]]:
        """Cells in which earlier runs timed ``timed`` as it is now, or lost the GPU with the present choices."""
        if self.earlier is None:
            return frozenset()
        lost = [row for row in self.earlier.errors if row.get("context_lost")]
        rows = [row for row in self.earlier.results if row["variant"] == timed]
        rows += [row for row in lost if (row["variant"] == COMPILED) == (timed == COMPILED)]
        return frozenset((row["layer"], row["dtype"], row["layout"], row["pass"]) for row in rows if self._same(row))

    def _same(self, row: dict) -> bool:
        """This run has the row's cell, which would run the same now: the same choices, sources and versions."""
        options, dtype = self.options, getattr(torch, row["dtype"])
        layer = next((layer for layer in options.layers if layer.name == row["layer"]), None)
        wanted = dtype in options.dtypes and row["layout"] in options.layouts and row["pass"] in options.passes
        if layer is None or not wanted or row.get("versions") != self.versions:
            return False
        if row["variant"] in (BASELINE, COMPILED):
            return True
        single = next((record for record in options.variants if record.name == row["variant"]), None)
        now = served(single, layer.problem(dtype, row["layout"], options.scale), self.device, row["pass"])
        return all(row.get(key) == value for key, value in now.items())

    def _overhead(self) -> None:
        self.ledger.step("overhead")
        seconds = min(self.shares.overhead * self.seconds, self._left())
        if seconds <= 0 or (self.earlier and self.earlier.overheads):
            return
        rows = [
            self.writer.write("overhead", row) for row in call_overhead.measure(self.device, torch.float32, seconds)
        ]
        worst = max(call_overhead.excess(rows).values())
        self.steps.append(f"overhead: at most {worst:+.1f} us per call over torch's layer")


def install(folder: Path, device: torch.device) -> int:
    """Puts a campaign's choices and ceilings into the user's store, where calls look; returns how many choices.

    Raises StoreError where that store cannot be written; the campaign's folder is as it was.
    """
    table = store.own(device_name(device), folder / STORE)
    if table.entries or table.ceilings:
        measured = from_json(table.ceilings or {})
        if measured is not None:
            calibrate.keep(measured, device)
        store.merge(store.Table(table.device, table.entries))
        dispatch.forget()
    return len(table.entries)


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
