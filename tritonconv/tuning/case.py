"""One problem as the tuner measures it: its tensors, torch's own call, and the gate for a plan."""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import cached_property

import torch

from tritonconv.autograd import differentiable_forward
from tritonconv.autotune.rules import FALLBACK
from tritonconv.bench import gate, gpu, spent
from tritonconv.bench.calls import FORWARD_BACKWARD, TensorCall, Tensors, make_tensors, torch_call
from tritonconv.dispatch import Plan, plan_of
from tritonconv.kernels.registry import variant
from tritonconv.problem import PASSES, Problem


class Case:
    """Tensors and references are made when first asked for, and kept until the case is dropped."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self._tensors: dict[Problem, Tensors] = {}
        self._outputs: dict[tuple, dict[str, torch.Tensor]] = {}

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
        with spent.on(spent.GATE):
            return self._judge(plan, pass_name)

    def _judge(self, plan: Plan, pass_name: str) -> gate.Verdict:
        small = self._reduced(plan, pass_name)
        with gpu.cudnn_benchmark(self.device, wanted=small == self.problem):
            exact, errors = self._reference(small, pass_name)
            mine = self._named(self._on(plan, small), pass_name)
        verdict = gate.against_reference(small, mine, errors, exact)
        if not verdict.ok or small == self.problem:
            return verdict
        relative = gate.relative_error(errors, exact)
        key = (self.problem, pass_name)
        if key not in self._outputs:
            outputs = self.baseline(self.problem, pass_name)()
            self._outputs[key] = _by_name(outputs, pass_name)
        at_size = gate.against_torch(self.problem, self._named(plan, pass_name), self._outputs[key], relative)
        return verdict if at_size.ok else at_size

    def _reduced(self, plan: Plan, pass_name: str) -> Problem:
        small = gate.reduced(self.problem, self.device)
        served = PASSES if pass_name == FORWARD_BACKWARD else (pass_name,)
        serves = all(plan.choice(name).variant.supports(small, self.device) is None for name in served)
        return small if serves else self.problem

    def _reference(self, small: Problem, pass_name: str) -> tuple[gate.Outputs, gate.Errors]:
        """The outputs in float64, and torch's errors."""
        outputs = gate.OUTPUTS[pass_name]
        exact = self._in_float64(small, gate.reference)
        in_tf32 = self._in_float64(small, gate.reference_in_tf32) if gate.in_tf32(small, self.device) else {}
        torchs = _by_name(self.baseline(small, pass_name)(), pass_name)
        exact = {name: value for name, value in exact.items() if name in outputs}
        return exact, gate.errors(torchs, exact, in_tf32)

    def _in_float64(self, small: Problem, reference) -> gate.Outputs:
        key, t = (small, reference), self.tensors(small)
        if key not in self._outputs:
            self._outputs[key] = reference(small, t.x, t.weight, t.bias, t.grad_y, gate.OUTPUTS[FORWARD_BACKWARD])
        return self._outputs[key]

    def _on(self, plan: Plan, problem: Problem) -> Plan:
        return plan_of(problem, self.device, **{name: plan.choice(name) for name in PASSES})

    def _named(self, plan: Plan, pass_name: str) -> dict[str, torch.Tensor]:
        return _by_name(self.call(plan, pass_name)(), pass_name)


def _by_name(values: tuple, pass_name: str) -> dict[str, torch.Tensor]:
    names = gate.OUTPUTS[pass_name]
    return {key: value for key, value in zip(names, values, strict=False) if value is not None}
