"""A cell of the benchmark: one layer in one dtype and layout for one pass.

Its contestants are ``torch`` (the baseline), ``tritonconv`` (the public operation as dispatched), torch.compile and any
variants asked for; they are gated (``gate.py``), then timed in turns by every clock of the device
(``measure.py``); in some cells null contestants run among them (``nulls.py``).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

import torch

from tritonconv.kernels.variant import Variant
from tritonconv.lab.bench import cudnn_graph, gpu, nulls, same_traffic, spent
from tritonconv.lab.bench.calls import TensorCall
from tritonconv.lab.bench.case import CHANGED_BY_ONE, Case
from tritonconv.lab.bench.clock import GpuClock, gpu_clock
from tritonconv.lab.bench.conduct import Operands
from tritonconv.lab.bench.contestants import Contestant, contestant, served, why_not
from tritonconv.lab.bench.environment import OtherPrograms
from tritonconv.lab.bench.failures import context_is_lost, disqualifies
from tritonconv.lab.bench.layer_sizes import Workload
from tritonconv.lab.bench.measure import Measured, measure
from tritonconv.lab.bench.options import Options
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS, Writer
from tritonconv.lab.bench.rows import executed_flops, head, layer_fields, measured_fields, versions_of, warning_of
from tritonconv.lab.bench.workloads import ALL
from tritonconv.problem import Problem


@dataclass(frozen=True)
class Cell:
    """A pass of a layer in one dtype and layout; ``key`` is (layer, dtype, layout, pass)."""

    layer: Workload
    duplicates: tuple[str, ...]
    case: Case
    pass_name: str

    @property
    def problem(self) -> Problem:
        return self.case.problem

    @property
    def key(self) -> tuple[str, str, str, str]:
        row = self.head
        return row["layer"], row["dtype"], row["layout"], row["pass"]

    @property
    def head(self) -> dict[str, Any]:
        """The fields that every row about the cell begins with."""
        return head(self.layer.name, self.layer.suite, self.pass_name, self.problem)


class CellTimer:
    """Measures cells and writes their rows. ``roofs`` may grow meanwhile; ``with_nulls`` are keys of cells."""

    def __init__(
        self,
        options: Options,
        writer: Writer,
        roofs: Sequence[Mapping],
        with_nulls: frozenset[tuple[str, str, str, str]],
    ) -> None:
        self.options, self.writer, self.roofs, self.with_nulls = options, writer, roofs, with_nulls
        self.versions = versions_of(options.device)
        self.others = OtherPrograms()
        self.errors = 0

    @cached_property
    def clock(self) -> GpuClock | None:
        """None on a CPU."""
        return gpu_clock(self.options.device)

    def measure(self, cell: Cell, seconds: float, leave_out: Set[str] = frozenset()) -> None:
        """Gates and times a cell in about ``seconds``, contestants of some names left out, and writes its rows.

        A lost GPU is written as a row, then raised.
        """
        begin = perf_counter()
        self.others.since_last()
        passed = self._gated(cell, leave_out)
        if not passed:
            return
        try:
            rows = self._timed(cell, passed, seconds - (perf_counter() - begin))
        except Exception as error:
            if not (disqualifies(error) or context_is_lost(error)):
                raising = self._raising(cell, passed)
                if not raising:  # a mistake in the program
                    raise
                for name, each in raising.items():
                    self._failed(cell, name, None, each)
                self.measure(cell, seconds, leave_out={*leave_out, *raising})
                return
            self._failed(cell, COMPILED if self.options.only_compiled else ALL, None, error)
            if context_is_lost(error):
                raise
            rows = []
        if not rows and self.clock is not None:  # the error is gone by here, and with it what the cell's graphs held
            torch.cuda.empty_cache()
        others = {"other_cores": self.others.since_last()}
        for kind, row in rows:
            self.writer.write(kind, {**cell.head, **row, **others, "status": "ok", "message": ""})

    def _gated(self, cell: Cell, leave_out: Set[str]) -> dict[str, Contestant]:
        """The contestants whose outputs are right; for every other a row is written."""
        options, problem = self.options, cell.problem
        single = [record for record in options.variants if record.pass_name == cell.pass_name]
        passed: dict[str, Contestant] = {}
        judge, runs_torch = cell.case.judge(cell.pass_name), False
        asked = {BASELINE: True, OURS: not options.only_compiled, COMPILED: options.compiled or options.only_compiled,
                 cudnn_graph.NAME: options.cudnn_graph}  # fmt: skip
        names = [name for name, wanted in asked.items() if wanted]
        for name, record in [*zip(names, itertools.repeat(None)), *((each.name, each) for each in single)]:
            if name in leave_out:
                continue
            try:
                refused = why_not(record, problem, options.device) if record else None
                if name == cudnn_graph.NAME:
                    refused = cudnn_graph.why_not(problem, options.device, cell.pass_name)
                if refused is not None:
                    self.writer.write("skip", {**cell.head, "variant": name, "message": refused})
                    continue
                one = contestant(name, record, cell.case, cell.pass_name, runs_torch)
                executed_flops(one, problem)  # what raises does so here
            except Exception as error:  # what fails is a row of its own, and the run goes on
                self._failed(cell, name, record, error)
                if context_is_lost(error):  # every later cell would fail too
                    raise
                continue
            runs_torch |= name == BASELINE
            if one.verdict.ok:
                passed[name] = one
            else:
                self._wrong(cell, name, str(one.verdict))
        calls = {name: one.call for name, one in passed.items() if name != BASELINE}
        wrong = {name: str(verdict) for name, verdict in judge.recheck(calls).items()}
        if judge.torch_faults and BASELINE in passed:
            wrong[BASELINE] = "; ".join(judge.torch_faults.values())
        for name, message in wrong.items():
            self._wrong(cell, name, message)
            del passed[name]
        return passed

    def _wrong(self, cell: Cell, name: str, message: str) -> None:
        """The row of a contestant whose answer is wrong."""
        self.errors += 1
        self.writer.write("error", {**cell.head, "variant": name, "status": "wrong", "message": message})

    def _timed(self, cell: Cell, passed: Mapping[str, Contestant], seconds: float) -> list[tuple[str, dict]]:
        """All rows of a cell with their kinds, or an exception: half a cell would count as known."""
        device, problem = cell.case.device, cell.problem
        beside: dict[str, TensorCall] = {}
        if cell.key in self.with_nulls and BASELINE in passed and not self.options.only_compiled:
            with spent.on(spent.TRIALS):
                beside = nulls.calls(cell.case, cell.pass_name)
        if self.options.copies:
            beside[same_traffic.NAME] = same_traffic.call(problem, device, cell.pass_name)
        calls = {name: one.call for name, one in passed.items()} | beside
        graphs = {name: one.in_graph.call for name, one in passed.items() if one.in_graph is not None}
        # The gate has run every call at size, so all are warm. A slow cell takes its extra time from later cells.
        measured = self._measured(cell, calls, graphs, seconds)
        honest = self._honest(cell, passed)
        if any(warning_of(one, measured, problem, cell.pass_name, self.roofs) for one in honest.values()):
            calls = {name: call for name, call in calls.items() if name in honest or name in beside}
            graphs = {name: call for name, call in graphs.items() if name in honest}
            measured = self._measured(cell, calls, graphs, seconds)  # a second look
        rows: list[tuple[str, dict]] = []
        for one in honest.values():
            if self.options.only_compiled and one.name != COMPILED:
                continue
            row = layer_fields(cell.layer, cell.duplicates, problem)
            row |= measured_fields(one, measured, problem, cell.head, self.roofs)
            row |= {**one.fields, "versions": self.versions}
            if same_traffic.NAME in beside:
                row |= same_traffic.fields(one.name, measured)
            if self.clock is not None:
                with spent.on(spent.TIMING):
                    row |= {"l2_flushed": True, "peak_bytes": gpu.peak_bytes(one.call, device)}
            rows.append(("result", row))
        for name in beside.keys() - {same_traffic.NAME}:
            rows.append(("null", {"text": str(problem), **nulls.fields(name, measured)}))
        return rows

    def _raising(self, cell: Cell, passed: Mapping[str, Contestant]) -> dict[str, Exception]:
        """The errors of the calls that raise now, by contestant; they passed the gate before."""
        found: dict[str, Exception] = {}
        for name, one in passed.items():
            try:
                one.call()
            except Exception as error:
                found[name] = error
        return found

    def _measured(
        self, cell: Cell, calls: Mapping[str, TensorCall], graphs: Mapping[str, TensorCall], seconds: float
    ) -> Measured:
        """Times the calls, whose operands change from round to round; ``graphs`` as ``in_graph`` of :func:`measure`."""
        with Operands(cell.case.tensors) as operands:
            where = BASELINE, cell.case.device, self.clock
            return measure(calls, *where, seconds, in_graph=graphs, before=operands.change)

    def _honest(self, cell: Cell, passed: Mapping[str, Contestant]) -> dict[str, Contestant]:
        """Those whose answers are right after the timing too; for every other a row is written."""
        changed, judge = cell.case.put_back(), cell.case.judge(cell.pass_name)
        calls = {name: one.call for name, one in passed.items() if name != BASELINE}
        red = {name: str(verdict) for name, verdict in judge.look_again(calls).items()}
        if changed and not red:
            red = dict.fromkeys(passed, CHANGED_BY_ONE.format(changed))
        for name, message in red.items():
            self._wrong(cell, name, message)
        return {name: one for name, one in passed.items() if name not in red}

    def _failed(self, cell: Cell, name: str, record: Variant | None, error: Exception) -> None:
        """Writes the row of a contestant, or of a cell, that raised. If the GPU is lost, the row says what lost it, so
        that a campaign does not start with the same again."""
        self.errors += 1
        message = f"{type(error).__name__}: {error}"
        row: dict[str, object] = {**cell.head, "variant": name, "status": "error", "message": message}
        if context_is_lost(error):
            row |= {"context_lost": True, "versions": self.versions}
            with contextlib.suppress(Exception):  # it may ask the GPU
                if name not in (BASELINE, COMPILED):
                    row |= served(record, cell.problem, self.options.device, cell.pass_name)
        self.writer.write("error", row)
