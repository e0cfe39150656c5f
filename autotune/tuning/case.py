"""One problem as the tuner measures it: its tensors, torch's own call, and the gate for a plan."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

import torch

from tritonconv.autograd import differentiable_forward
from tritonconv.autotune.rules import FALLBACK
from tritonconv.dispatch import Plan, plan_of
from tritonconv.kernels.registry import variant
from tritonconv.lab.bench import float64, gate, spent
from tritonconv.lab.bench.calls import FORWARD_BACKWARD, TensorCall, Tensors, make_tensors, torch_call
from tritonconv.lab.bench.judge import Judge
from tritonconv.problem import PASSES, Problem


class Case:
    """Tensors and references are made when first asked for, and kept until the case is dropped."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self._tensors: dict[Problem, Tensors] = {}
        self._outputs: dict[tuple, dict[str, torch.Tensor]] = {}
        self._judges: dict[str, Judge] = {}

    def tensors(self, problem: Problem) -> Tensors:
        """The values follow from the problem alone, whatever its layout."""
        if problem not in self._tensors:
            seed = zlib.crc32(str(replace(problem, layout="ncdhw")).encode())
            with spent.on(spent.TENSORS):
                self._tensors[problem] = make_tensors(problem, self.device, seed)
        return self._tensors[problem]

    @cached_property
    def torch_is_safe(self) -> bool:
        """torch's own gradients of such a problem are right (see ``kernels/torch_native.py``)."""
        return all(variant(FALLBACK[name]).supports(self.problem, self.device) is None for name in PASSES)

    @cached_property
    def torch_serves(self) -> bool:
        """torch's own call is right, and has arguments for the crops."""
        return self.torch_is_safe and self.problem.torch_crop.exact

    def baseline(self, problem: Problem, pass_name: str) -> TensorCall:
        """torch's own call; where torch has none, or a wrong one, what runs untuned."""
        if self.torch_serves:
            return torch_call(problem, self.tensors(problem), pass_name)
        return self.call(plan_of(problem, self.device), pass_name)

    def call(self, plan: Plan, pass_name: str) -> TensorCall:
        """One pass of a plan, or the training step through autograd."""
        t = self.tensors(plan.problem)
        if pass_name == "forward":
            return lambda: (plan.forward(t.x, t.weight, t.bias),)
        if pass_name == "backward_data":
            return lambda: (plan.backward_data(t.grad_y, t.weight),)
        if pass_name == "backward_weight":
            return lambda: plan.backward_weight(t.x, t.grad_y, plan.problem.bias)
        if plan.torch_alone is not None and self.torch_is_safe:  # such a plan never reaches our autograd
            return torch_call(plan.problem, t, FORWARD_BACKWARD)
        leaves = [tensor.detach().requires_grad_() for tensor in (t.x, t.weight, t.bias) if tensor is not None]
        bias = leaves[2] if t.bias is not None else None

        def step() -> tuple:
            y = differentiable_forward(leaves[0], leaves[1], bias, plan)
            return (y.detach(), *torch.autograd.grad(y, leaves, t.grad_y))

        return step

    def judge(self, plan: Plan, pass_name: str) -> gate.Verdict:
        """Both steps of the gate for a plan that is meant for ``self.problem``."""
        served = PASSES if pass_name == FORWARD_BACKWARD else (pass_name,)
        with spent.on(spent.GATE):
            return self.judge_of(pass_name)(
                lambda problem: self.call(self._on(plan, problem), pass_name),
                [plan.choice(name).variant for name in served],
            )

    def judge_of(self, pass_name: str) -> Judge:
        """The judge of all that is proposed for a pass."""
        if pass_name not in self._judges:
            self._judges[pass_name] = Judge(self, self.problem, pass_name)
        return self._judges[pass_name]

    def trusts_torch(self, pass_name: str) -> bool:
        """torch serves the problem, and no candidate has shown its answer to be wrong."""
        return self.torch_serves and not self.judge_of(pass_name).torch_faults

    @property
    def torch_faults(self) -> dict[str, dict[str, str]]:
        """Where torch's own answer was found wrong: by pass what is said of each output."""
        return {name: judge.torch_faults for name, judge in self._judges.items() if judge.torch_faults}

    def exact(self, problem: Problem, outputs: Iterable[str]) -> gate.Outputs:
        """The outputs in float64."""
        return self._in_float64(problem, outputs, float64.reference)

    def cut(self, problem: Problem, outputs: Iterable[str]) -> gate.Outputs:
        """The same of operands as TF32 has them; none where torch's switch does not permit it."""
        if not gate.in_tf32(problem, self.device):
            return {}
        return self._in_float64(problem, outputs, float64.reference_in_tf32)

    def _in_float64(self, problem: Problem, outputs: Iterable[str], reference) -> gate.Outputs:
        key, t = (problem, reference), self.tensors(problem)
        if key not in self._outputs:
            self._outputs[key] = reference(problem, t.x, t.weight, t.bias, t.grad_y, gate.OUTPUTS[FORWARD_BACKWARD])
        return {name: self._outputs[key][name] for name in outputs if name in self._outputs[key]}

    def _on(self, plan: Plan, problem: Problem) -> Plan:
        return plan_of(problem, self.device, **{name: plan.choice(name) for name in PASSES})
