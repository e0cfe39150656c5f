"""Measures a network: the operations of a step with torch's layers, its transposed convolutions beside ours, and the
whole step, torch's against the converted one's, eager and compiled.

A network's rows are ``operation`` (a row of the table), ``step`` (a contestant's times of the whole step), and ``skip``
or ``error``, whose layer is the network and whose pass is "training step".
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from torch import nn

from tritonconv.dispatch import wait_until_compiled
from tritonconv.errors import ArgumentError
from tritonconv.lab.bench import gpu
from tritonconv.lab.bench.calls import FORWARD_BACKWARD
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.clock import WallClock, gpu_clock
from tritonconv.lab.bench.columns import GRAPH, WALL
from tritonconv.lab.bench.conduct import Operands
from tritonconv.lab.bench.contestants import contestant
from tritonconv.lab.bench.failures import context_is_lost, one_line
from tritonconv.lab.bench.first_calls import let_choose
from tritonconv.lab.bench.measure import Measured, measure, rounds
from tritonconv.lab.bench.noise import AGAIN
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS, OURS_COMPILED, Writer
from tritonconv.lab.bench.rows import sizes_of
from tritonconv.lab.models import steps
from tritonconv.lab.models.factories import Network, shown
from tritonconv.lab.models.first_state import FirstState, seed_all
from tritonconv.lab.models.profiled_step import Operation, profiled
from tritonconv.lab.models.recorded import recorded
from tritonconv.lab.models.twins import DECODER, Twins, Wanted, twins
from tritonconv.precision import TF32, float32_precision

STEP = "training step"
SAID = {
    BASELINE: "torch's layers",
    AGAIN: "torch's layers, a copy (null)",
    OURS: "convert(model)",
    DECODER: "convert(model, decoder=True)",
    COMPILED: "torch.compile, torch's layers",
    OURS_COMPILED: "torch.compile, convert(model)",
}
# Shares of the seconds: the layers by themselves, the eager steps, the compiled ones and their compilation.
LAYERS, EAGER, COMPILED_STEPS = 0.25, 0.4, 0.35
PROFILED_STEPS = 3
MOST_ROUNDS = 50


def head_of(network: Network, wanted: Wanted) -> dict[str, object]:
    """The fields that all rows of a network have."""
    dtype = str(wanted.dtype).removeprefix("torch.")
    return {"model": network.name, "inputs": shown(network.inputs), "layout": wanted.layout, "dtype": dtype}


def measured(network: Network, wanted: Wanted, writer: Writer, made: Twins | None = None) -> None:
    """Writes the rows of a network; ``made`` are its :func:`twins`, where they are there already. Raises ArgumentError
    where it cannot be built or run as asked for."""
    with gpu.cudnn_benchmark(wanted.device):
        Measurement(network, wanted, writer, made)()


class Measurement:
    """One network in one dtype and layout. Raises ArgumentError where its state cannot be copied."""

    def __init__(self, network: Network, wanted: Wanted, writer: Writer, made: Twins | None = None) -> None:
        self.network, self.wanted, self.writer = network, wanted, writer
        self.head = head_of(network, wanted)
        self.twins = made or twins(network, wanted)
        self.firsts: dict[str, FirstState] = {}
        try:
            for name, model in (self.twins.models | self.twins.compiled).items():
                self.firsts[name] = FirstState(model, self.firsts.get(BASELINE))
        except Exception as error:
            if context_is_lost(error):
                raise
            said = f"argument --model: the state of {network.name} cannot be copied: {one_line(error)}"
            raise ArgumentError(said) from None

    def __call__(self) -> None:
        begin, seconds = perf_counter(), self.wanted.seconds
        sound = self._compared()
        try:
            self._measured(sound, begin, seconds)
        except Exception as error:  # of the model's own, after steps that went well; the next model may do
            self._failed(BASELINE, error, "while the steps were timed: ")

    def _measured(self, sound: Mapping[str, Mapping[str, object]], begin: float, seconds: float) -> None:
        if BASELINE in sound:
            self._operations(LAYERS * seconds)
            self._timed({name: self._step(name) for name in sound}, sound, EAGER * seconds)
        if self.wanted.compiled and BASELINE in sound and OURS in sound:
            self._compiled_steps(max(begin + seconds, perf_counter() + COMPILED_STEPS * seconds))

    def _model(self, name: str) -> nn.Module:
        return (self.twins.models | self.twins.compiled)[name]

    def _step(self, name: str, forward: nn.Module | None = None) -> steps.Step:
        model = self._model(name)
        return steps.training_step(model, model if forward is None else forward, self.twins.inputs, self.wanted.dtype)

    # ------------------------------------------------------------------ answers

    def _compared(self) -> dict[str, dict[str, object]]:
        """The fields about the answers of each contestant whose answers are right; for every other an error row."""
        answers: dict[str, steps.Answers] = {}
        for name in self.twins.models:
            found = self._answered(name, self._step(name))
            if found is not None:
                answers[name] = found
        truth = self._truth()
        if BASELINE not in answers:
            return {}
        self.reference, self.by_float64 = truth or answers[BASELINE], truth is not None
        self.torchs = steps.errors(answers[BASELINE], self.reference)
        if self.by_float64 and not self.torchs.finite:
            self._skip("float64", "answers are held against torch's alone: its own are no numbers or of other shapes")
            self.reference, self.by_float64 = answers[BASELINE], False
            self.torchs = steps.errors(answers[BASELINE], self.reference)
        if not self.torchs.finite:
            self._row("error", variant=BASELINE, status="wrong", message="outputs or gradients are infinite or NaN")
            return {}
        judged = {name: self._judged(name, mine) for name, mine in answers.items()}
        return {name: fields for name, fields in judged.items() if fields is not None}

    def _answered(self, name: str, step: steps.Step) -> steps.Answers | None:
        """The answers of a warm step, copied; None, and an error row, where it raises."""
        try:
            found = self._warm(self._model(name), step, self.firsts[name])
            return steps.Answers(*([each.clone() for each in kind] for kind in (found.outputs, found.gradients)))
        except Exception as error:
            self._failed(name, error)
            return None

    def _warm(self, model: nn.Module, step: steps.Step, first: FirstState) -> steps.Answers:
        """The answers of a step from the first state, after those in which torch's own may have stood in, on a GPU, or
        which chose, on a CPU: the same state and the same random numbers for every contestant."""
        with steps.without_dropout(model):
            let_choose(step)
            if self.wanted.device.type == "cuda":
                wait_until_compiled()
            first.put_back()
            seed_all(self.wanted.seed)
            return step()

    def _truth(self) -> steps.Answers | None:
        """The answers in float64; None, and a skip row that says why, where they cannot be had."""
        model, self.twins.exact = self.twins.exact, None
        try:
            if model is None:
                raise RuntimeError("the model could not be copied in float64")
            inputs = [each.double() for each in self.twins.inputs]
            step = steps.training_step(model, model, inputs, torch.float64)
            # Trying all of cuDNN's algorithms in float64 would take longer than anything else here.
            with gpu.cudnn_benchmark(self.wanted.device, wanted=False):
                return self._warm(model, step, FirstState(model))
        except Exception as error:
            if context_is_lost(error):
                raise
            self._skip("float64", f"answers are held against torch's alone: {one_line(error)}")
            return None

    def _judged(self, name: str, answers: steps.Answers) -> dict[str, object] | None:
        """The fields about the answers; None, and an error row, where they are ours and wrong. torch's own, eager and
        compiled, set the measure."""
        mine = steps.errors(answers, self.reference)
        wanted = self.wanted
        in_tf32 = wanted.device.type == "cuda" and wanted.dtype is torch.float32 and float32_precision() == TF32
        # TF32 has float16's mantissa.
        slack = steps.SLACK[torch.float16 if in_tf32 else wanted.dtype] * (1 if self.by_float64 else steps.FAR)
        if name == COMPILED and mine.finite:
            self.torchs = self.torchs.worse(mine)
        elif name != BASELINE and not mine.within(self.torchs, slack):
            off = f"outputs off by {mine.outputs:.3g}, gradients by {mine.gradients:.3g}"
            allowed = f"{steps.CREDIT:g} times torch's {self.torchs.outputs:.3g} and {self.torchs.gradients:.3g}"
            self._row("error", variant=name, status="wrong", message=f"{off}; allowed {allowed}, and {slack:.3g}")
            return None
        against = "float64" if self.by_float64 else BASELINE
        return {"output_error": mine.outputs, "gradient_error": mine.gradients, "held_against": against}

    # ------------------------------------------------------------------ times

    def _operations(self, seconds: float) -> None:
        """The rows of the operations, and of each transposed convolution by itself, torch's beside ours."""
        step = self._step(BASELINE)
        with recorded(self.twins.models[BASELINE]) as calls:
            step()
        found = profiled(step, self.wanted.device, calls, PROFILED_STEPS)
        whole = sum(one.ms for one in found)
        mine = [one for one in found if one.problem is not None]
        for one in found:
            fields: dict[str, object] = {
                "operation": one.name, "calls": one.calls, "ms": one.ms, "share": one.ms / whole,
                "forward_ms": one.forward_ms, "backward_ms": one.backward_ms,
            }  # fmt: skip
            if one.problem is not None:
                fields |= {"layers": one.layers, "problem": sizes_of(one.problem)}
                fields |= self._alone(one, seconds / len(mine))
            self.writer.write("operation", {**self.head, **fields})

    def _alone(self, one: Operation, seconds: float) -> dict[str, object]:
        """Times of one call by itself with its gradients; none, and an error row, where one of them is wrong."""
        assert one.problem is not None
        case = Case(one.problem, self.wanted.device)
        try:
            both = [contestant(name, None, case, FORWARD_BACKWARD, at_size) for name, at_size in
                    ((BASELINE, False), (OURS, True))]  # fmt: skip
            red = [f"{each.name}: {each.verdict}" for each in both if not each.verdict.ok]
            if red:
                raise ArgumentError("; ".join(red))
            calls = {each.name: each.call for each in both}
            with Operands(case.tensors) as operands:
                where = BASELINE, case.device, gpu_clock(case.device)
                timed = measure(calls, *where, seconds, before=operands.change)
        except Exception as error:
            self._failed(OURS, error, f"{one.name}: ")
            return {}
        times = timed.times[timed.first]
        ratio = times.speedup(OURS, BASELINE)
        return {
            "torch_ms": times.spread(BASELINE).median, "ours_ms": times.spread(OURS).median,
            "speedup": ratio.median, "speedup_p20": ratio.p20, "speedup_p80": ratio.p80,
            "chosen": {name: choice.variant.name for name, choice in both[1].chosen.items()},
        }  # fmt: skip

    def _timed(
        self, calls: Mapping[str, steps.Step], fields: Mapping[str, Mapping[str, object]], seconds: float
    ) -> None:
        """Times the steps in turns from the first state, torch's among them, and writes a row for each that has
        ``fields``.

        The times are those of the wall: a step of a model keeps the GPU busy, or the host does not, and both count. On
        a GPU those of the steps' CUDA graphs come with them.
        """
        device = self.wanted.device
        shares = {WALL: 0.6, GRAPH: 0.4} if device.type == "cuda" else {WALL: 1.0}
        times = {}
        for column, share in shares.items():
            timed: dict[str, Any] = dict(calls)
            if column == GRAPH:
                captured = {name: gpu.captured(call, device) for name, call in calls.items()}
                timed = {name: replay for name, replay in captured.items() if replay is not None}
                del captured
            if BASELINE in timed:
                watch = WallClock.for_call(device, timed[BASELINE])
                for name in timed:
                    first = self.firsts[name]
                    (first.put_tensors_back if column == GRAPH else first.put_back)()
                seed_all(self.wanted.seed)
                times[column], _ = rounds(timed, watch, None, share * seconds, max_rounds=MOST_ROUNDS)
            del timed  # and the memory of its graphs
        columns = Measured(times, {})
        for name in fields:
            spread, ratio = times[WALL].spread(name), times[WALL].speedup(name, BASELINE)
            row: dict[str, object] = {
                "variant": name, "median_ms": spread.median, "p20_ms": spread.p20, "p80_ms": spread.p80,
                "n_runs": spread.runs, "baseline": BASELINE, "timing": WALL, **fields[name],
                "speedup": ratio.median, "speedup_p20": ratio.p20, "speedup_p80": ratio.p80,
                **columns.fields(name, BASELINE),
            }  # fmt: skip
            if name == OURS_COMPILED and COMPILED in calls:
                row["over_torch_compile"] = times[WALL].speedup(name, COMPILED).median
            if device.type == "cuda":
                row["peak_bytes"] = gpu.peak_bytes(calls[name], device)
            self.writer.write("step", {**self.head, **row})

    def _compiled_steps(self, end: float) -> None:
        """Both models compiled, beside torch's eager step. Where torch's was, ours is, however long that took: one
        without the other says nothing."""
        fields: dict[str, dict[str, object]] = {}
        calls, begin = {BASELINE: self._step(BASELINE)}, perf_counter()
        torch.compiler.reset()
        for name, model in self.twins.compiled.items():
            since = perf_counter()
            if since >= end and not fields:
                used = "the eager steps used it up" if name == COMPILED else f"compiling took {since - begin:.0f} s"
                self._skip(name, f"out of the budget of {self.wanted.seconds:g} s: {used}")
                continue
            try:
                step = self._step(name, torch.compile(model))  # type: ignore[arg-type]
                step()  # in the mode of training, where dropout draws
            except Exception as error:
                self._failed(name, error)
                continue
            took_s = round(perf_counter() - since, 2)
            answers = self._answered(name, step)
            judged = None if answers is None else self._judged(name, answers)
            if judged is not None:
                calls[name], fields[name] = step, {"compile_s": took_s, **judged}
        if fields:
            self._timed(calls, fields, max(end - perf_counter(), 0.0))

    # ------------------------------------------------------------------ rows

    def _row(self, kind: str, **fields: object) -> None:
        self.writer.write(kind, {"layer": self.network.name, "pass": STEP, **self.head, **fields})

    def _skip(self, name: str, message: str) -> None:
        self._row("skip", variant=name, message=message)

    def _failed(self, name: str, error: Exception, where: str = "") -> None:
        """A lost GPU is written as a row, then raised."""
        self._row("error", variant=name, status="error", message=where + one_line(error))
        if context_is_lost(error):
            raise error
