"""The gate's procedure for the contestants of one problem and pass, and float64's word where torch is in doubt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from tritonconv.kernels.variant import Variant
from tritonconv.lab.bench import float64, gate, gpu
from tritonconv.lab.bench.calls import TensorCall, Tensors
from tritonconv.problem import Problem

WRONG = "{}: torch's own is wrong at this size: max error {:.3g} against float64"


class References(Protocol):
    """What a contestant is held against: the tensors of a problem, its outputs in float64, and torch's call.

    ``exact`` and ``cut`` are :func:`~tritonconv.lab.bench.float64.reference` of the outputs named and, where TF32 is
    permitted, :func:`~tritonconv.lab.bench.float64.reference_in_tf32`; else ``cut`` is empty.
    """

    @property
    def device(self) -> torch.device: ...
    def tensors(self, problem: Problem) -> Tensors: ...
    def exact(self, problem: Problem, outputs: Iterable[str]) -> gate.Outputs: ...
    def cut(self, problem: Problem, outputs: Iterable[str]) -> gate.Outputs: ...
    def baseline(self, problem: Problem, pass_name: str) -> TensorCall: ...


class Judge:
    """Judges contestants of a pass of ``problem``.

    ``torch_faults`` says by output where torch's own answer at full size was found wrong. It grows while contestants
    are judged; those that passed before were held against the wrong answer, so they go through :meth:`at_size` again.
    """

    def __init__(self, references: References, problem: Problem, pass_name: str) -> None:
        self.references, self.problem, self.pass_name = references, problem, pass_name
        self.torch_faults: dict[str, str] = {}
        self._relative: dict[str, float] = {}

    def __call__(
        self, call_on: Callable[[Problem], TensorCall], variants: Iterable[Variant] = (), at_size: bool = True
    ) -> gate.Verdict:
        """The verdict on a contestant: of step 1, unless step 2 is red.

        ``call_on`` makes its call on a problem, the reduced one or that of full size. ``variants`` are those it runs;
        where one of them does not serve the reduced problem, step 1 is done at full size. Without ``at_size`` step 2
        is left out.
        """
        small = gate.reduced(self.problem, self.references.device)
        if any(each.supports(small, self.references.device) is not None for each in variants):
            small = self.problem
        with gpu.cudnn_benchmark(self.references.device, wanted=small == self.problem):
            exact, errors = self._exact(small)
            verdict = gate.against_reference(small, self._named(call_on(small)()), errors, exact)
        if not verdict.ok or small == self.problem or not at_size:
            return verdict
        second = self.at_size(call_on(self.problem))
        return verdict if second.ok else second

    def at_size(self, call: TensorCall) -> gate.Verdict:
        """Step 2 alone, for a call at full size."""
        if not self._relative:
            small = gate.reduced(self.problem, self.references.device)
            with gpu.cudnn_benchmark(self.references.device, wanted=small == self.problem):
                self._exact(small)
        mine, torchs = self._named(call()), self._torchs(self.problem)
        return gate.worst([self._output(name, mine, want) for name, want in torchs.items()])

    def _exact(self, small: Problem) -> tuple[gate.Outputs, gate.Errors]:
        """The outputs in float64, and torch's errors."""
        outputs = gate.OUTPUTS[self.pass_name]
        exact, torchs = self.references.exact(small, outputs), self._torchs(small)
        errors = gate.errors(small, torchs, exact, self.references.cut(small, outputs))
        self._relative = gate.relative_errors(errors, exact)
        if small == self.problem:
            for name, want in exact.items():
                error = gate.distance(torchs[name], want)
                if not error <= errors[name]:  # it earned no credit
                    self.torch_faults.setdefault(name, f"{WRONG.format(name, error)}, of rounding {errors[name]:.3g}")
        return exact, errors

    def _output(self, name: str, mine: gate.Outputs, want: torch.Tensor) -> gate.Verdict:
        verdict = gate.against_torch(self.problem, name, mine, want, self._relative[name])
        if verdict.message or (verdict.ok and name not in self.torch_faults):
            return verdict
        scale, (error, of_torch) = self._distances(name, [mine[name], want])
        limit = gate.limit(self.problem, name, self._relative[name], scale)
        if not of_torch <= limit and name not in self.torch_faults:
            again = self._distances(name, [self._torchs(self.problem)[name]])[1][0]
            told = f"of another call {again:.3g}, allowed {limit:.3g}"
            self.torch_faults[name] = f"{WRONG.format(name, of_torch)}, {told}"
        return gate.Verdict(name, error, of_torch, limit)

    def _distances(self, name: str, answers: list[torch.Tensor]) -> tuple[float, list[float]]:
        return float64.distances(self.problem, self.references.tensors(self.problem), name, answers)

    def _torchs(self, problem: Problem) -> gate.Outputs:
        return self._named(self.references.baseline(problem, self.pass_name)())

    def _named(self, values: tuple) -> dict[str, torch.Tensor]:
        names = gate.OUTPUTS[self.pass_name]
        return {name: value for name, value in zip(names, values, strict=False) if value is not None}
