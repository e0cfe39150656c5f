"""Measures a network: the operations of a step with torch's layers, its transposed convolutions beside ours, and the
whole step, torch's against the converted one's, eager and compiled.

A network's rows are ``operation`` (a row of the table), ``step`` (a contestant's times of the whole step), and ``skip``
or ``error``, whose layer is the network and whose pass is "training step".
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn

from tritonconv.convert import ConversionReport, convert
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
from tritonconv.lab.bench.measure import Measured, measure, rounds
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS, Writer
from tritonconv.lab.bench.rows import sizes_of
from tritonconv.lab.models import steps
from tritonconv.lab.models.factories import Network, shown
from tritonconv.lab.models.operations import Operation, profiled
from tritonconv.lab.models.recorded import recorded, transposed
from tritonconv.problem import LAYOUTS

DECODER, OURS_COMPILED = "tritonconv_decoder", "tritonconv_compile"
STEP = "training step"
SAID = {
    BASELINE: "torch's layers",
    OURS: "convert(model)",
    DECODER: "convert(model, decoder=True)",
    COMPILED: "torch.compile, torch's layers",
    OURS_COMPILED: "torch.compile, convert(model)",
}
# Shares of the seconds: the layers by themselves, the eager steps, the compiled ones and their compilation.
LAYERS, EAGER, COMPILED_STEPS = 0.25, 0.4, 0.35
PROFILED_STEPS = 3
MOST_ROUNDS = 50


@dataclass(frozen=True)
class Wanted:
    """How networks are measured: ``seconds`` for each of them; ``compiled`` adds torch.compile."""

    device: torch.device
    dtype: torch.dtype
    layout: str
    seconds: float
    seed: int = 0
    compiled: bool = False


@dataclass
class Twins:
    """The model with torch's layers and its converted copies, by contestant; and a copy in float64."""

    models: dict[str, nn.Module]
    exact: nn.Module | None
    inputs: list[torch.Tensor]


def measured(network: Network, wanted: Wanted, writer: Writer) -> None:
    """Writes the rows of a network. Raises ArgumentError where it cannot be built or run as asked for."""
    with gpu.cudnn_benchmark(wanted.device):
        Measurement(network, wanted, writer)()


class Measurement:
    """One network in one dtype and layout."""

    def __init__(self, network: Network, wanted: Wanted, writer: Writer) -> None:
        self.network, self.wanted, self.writer = network, wanted, writer
        self.head: dict[str, object] = {
            "model": network.name, "inputs": shown(network.inputs), "layout": wanted.layout,
            "dtype": str(wanted.dtype).removeprefix("torch."),
        }  # fmt: skip
        self.twins = twins(network, wanted)

    def __call__(self) -> None:
        begin, seconds = perf_counter(), self.wanted.seconds
        sound = self._compared()
        if BASELINE in sound:
            self._operations(LAYERS * seconds)
            self._timed({name: self._step(name) for name in sound}, sound, EAGER * seconds)
        if self.wanted.compiled and BASELINE in sound and OURS in sound:
            self._compiled_steps(max(begin + seconds, perf_counter() + COMPILED_STEPS * seconds))

    def _step(self, name: str, forward: nn.Module | None = None) -> steps.Step:
        model = self.twins.models[name]
        forward = model if forward is None else forward  # torch.compile's module asks the model's len() for its truth
        return steps.training_step(model, forward, self.twins.inputs, self.wanted.dtype)

    # ------------------------------------------------------------------ answers

    def _compared(self) -> dict[str, dict[str, object]]:
        """The fields about the answers of each contestant whose answers are right; for every other an error row."""
        answers: dict[str, steps.Answers] = {}
        for name in self.twins.models:
            found = self._answered(name, self._step(name))
            if found is not None:
                answers[name] = found
        truth = self._truth()
        reference = truth or answers.get(BASELINE)
        if reference is None:
            return {}
        sound: dict[str, dict[str, object]] = {}
        torchs = steps.errors(answers[BASELINE], reference) if BASELINE in answers else steps.Errors(0.0, 0.0)
        slack = steps.SLACK[self.wanted.dtype] * (1 if truth else steps.FAR)
        for name, mine in answers.items():
            fields = self._judged(name, steps.errors(mine, reference), torchs, slack, truth is not None)
            if fields is not None:
                sound[name] = fields
        return sound

    def _answered(self, name: str, step: steps.Step) -> steps.Answers | None:
        """The answers of the first step, gradients copied; None, and an error row, where it raises."""
        try:
            torch.manual_seed(self.wanted.seed)
            with steps.without_dropout(self.twins.models[name]):
                found = self._warm(step)
            return steps.Answers(found.outputs, [each.clone() for each in found.gradients])
        except Exception as error:
            self._failed(name, error)
            return None

    def _warm(self, step: steps.Step) -> steps.Answers:
        """The answers of a step; on a GPU of the second, for in the first torch's own may have stood in."""
        found = step()
        if self.wanted.device.type == "cuda":
            wait_until_compiled()
            found = step()
        return found

    def _truth(self) -> steps.Answers | None:
        """The answers in float64; None, and a skip row that says why, where they cannot be had."""
        model, self.twins.exact = self.twins.exact, None
        try:
            if model is None:
                raise RuntimeError("the model could not be copied in float64")
            inputs = [each.double() for each in self.twins.inputs]
            step = steps.training_step(model, model, inputs, torch.float64)
            torch.manual_seed(self.wanted.seed)
            with steps.without_dropout(model):
                return self._warm(step)
        except Exception as error:
            if context_is_lost(error):
                raise
            self._skip("float64", f"answers are held against torch's alone: {one_line(error)}")
            return None

    def _judged(
        self, name: str, mine: steps.Errors, torchs: steps.Errors, slack: float, by_float64: bool
    ) -> dict[str, object] | None:
        if name != BASELINE and not mine.within(torchs, slack):
            allowed = f"allowed {steps.CREDIT:g} times torch's {torchs.outputs:.3g} and {torchs.gradients:.3g}"
            message = (
                f"outputs off by {mine.outputs:.3g}, gradients by {mine.gradients:.3g}, {allowed}, and {slack:.3g}"
            )
            self._row("error", variant=name, status="wrong", message=message)
            return None
        return {
            "output_error": mine.outputs, "gradient_error": mine.gradients,
            "held_against": "float64" if by_float64 else BASELINE,
        }  # fmt: skip

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
        """Times the steps in turns, torch's among them, and writes a row for each that has ``fields``.

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
        """Both models compiled, beside torch's eager step."""
        fields: dict[str, dict[str, object]] = {}
        calls, begin = {BASELINE: self._step(BASELINE)}, perf_counter()
        torch.compiler.reset()
        for name, of in ((COMPILED, BASELINE), (OURS_COMPILED, OURS)):
            since = perf_counter()
            if since >= end:
                took = f"compiling took {since - begin:.0f} s" if fields else "the eager steps used it up"
                self._skip(name, f"out of the budget of {self.wanted.seconds:g} s: {took}")
                continue
            try:
                step = self._step(of, torch.compile(self.twins.models[of]))  # type: ignore[arg-type]
                self._warm(step)
                calls[name], fields[name] = step, {"compile_s": round(perf_counter() - since, 2)}
            except Exception as error:
                self._failed(name, error)
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


def twins(network: Network, wanted: Wanted) -> Twins:
    """The models and their inputs. Raises ArgumentError where the network cannot be built, copied or run, or has no
    transposed convolution of torch's class."""
    kept = torch.float32 if wanted.dtype in steps.HALVES else wanted.dtype
    try:
        torch.manual_seed(wanted.seed)
        model = network.build().to(wanted.device, kept).train()
        for parameter in model.parameters():
            if parameter.dim() == 5:
                parameter.data = parameter.data.contiguous(memory_format=LAYOUTS[wanted.layout])
    except Exception as error:
        raise ArgumentError(f"argument --model: {network.name} cannot be built: {one_line(error)}") from None
    if not transposed(model):
        raise ArgumentError(f"argument --model: {network.name} has no torch.nn.ConvTranspose3d")
    inputs = steps.inputs_of(network.inputs, wanted.dtype, wanted.layout, wanted.device, wanted.seed)
    try:
        with recorded(model) as calls:
            steps.training_step(model, model, inputs, wanted.dtype)()
    except Exception as error:
        if context_is_lost(error):
            raise
        given = f"{network.name} does not take {shown(network.inputs)}"
        raise ArgumentError(f"argument --input: {given}: {one_line(error)}") from None
    if not calls:
        raise ArgumentError(f"argument --model: the forward of {network.name} calls none of its ConvTranspose3d")
    model.zero_grad(set_to_none=True)
    try:
        copied = [copy.deepcopy(model) for _ in range(3)]
    except Exception as error:
        raise ArgumentError(f"argument --model: {network.name} cannot be copied: {one_line(error)}") from None
    models = {BASELINE: model, OURS: copied[0], DECODER: copied[1]}
    report, of_blocks = convert(models[OURS]), convert(models[DECODER], decoder=True)
    if len(of_blocks.replaced) == len(report.replaced):  # no block concatenates
        del models[DECODER]
    if not report.replaced:
        raise ArgumentError(f"argument --model: convert leaves every layer of {network.name}: {_reasons(report)}")
    return Twins(models, copied[2].double(), inputs)


def _reasons(report: ConversionReport) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in report.left[:3])
