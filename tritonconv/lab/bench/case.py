"""A problem as it is measured: its tensors, its outputs in float64, the calls that are timed, and the gate for them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch

from tritonconv.autograd import differentiable_forward
from tritonconv.autotune.rules import FALLBACK
from tritonconv.dispatch import Plan, plan_of
from tritonconv.kernels.registry import variant
from tritonconv.kernels.variant import Variant
from tritonconv.lab.bench import conduct, float64, gate, gpu, spent
from tritonconv.lab.bench.behind import off_the_kink
from tritonconv.lab.bench.calls import (
    FORWARD_BACKWARD,
    TensorCall,
    Tensors,
    make_tensors,
    operation_call,
    training_step,
)
from tritonconv.lab.bench.operations import our_operation, torch_call
from tritonconv.problem import LAYOUTS, PASSES, Problem

CHANGED = "the call changes its operand {}"
CHANGED_BY_ONE = "one of the calls that were timed together changes {}, and it is not known which"
WRONG = "{}: torch's own is wrong at this size: max error {:.3g} against float64"
EVERY_OUTPUT = frozenset(gate.OUTPUTS[FORWARD_BACKWARD])
GRADIENTS = EVERY_OUTPUT - {"y"}


@dataclass(eq=False)
class Case:
    """A problem on a device. Tensors and references are made when first asked for, and kept until the case is dropped.

    The values follow from the seed, by default from the problem, whatever its layout and what ran before. ``outputs``
    are those that will be compared.
    """

    problem: Problem
    device: torch.device
    seed: int | None = None
    outputs: frozenset[str] = EVERY_OUTPUT
    _tensors: dict[Problem, Tensors] = field(default_factory=dict, repr=False)
    _sums: dict[Problem, conduct.Checksums] = field(default_factory=dict, repr=False)
    _float64: dict[tuple, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)
    _judges: dict[str, Judge] = field(default_factory=dict, init=False, repr=False)

    def on(self, problem: Problem) -> Case:
        """The case of another problem, which shares the tensors and references: one for all layouts and passes."""
        return self if problem == self.problem else replace(self, problem=problem)

    @property
    def tensors(self) -> Tensors:
        problem = self.problem
        if problem not in self._tensors:
            layouts = (self._tensors.get(replace(problem, layout=each)) for each in LAYOUTS)
            same = next((each for each in layouts if each is not None), None)
            with spent.on(spent.TENSORS):
                made = same.in_layout(problem.layout) if same else self._drawn()
                self._tensors[problem], self._sums[problem] = made, conduct.checksums(made)
        return self._tensors[problem]

    def _drawn(self) -> Tensors:
        seed = zlib.crc32(str(replace(self.problem, layout="ncdhw")).encode()) if self.seed is None else self.seed
        made = make_tensors(self.problem, self.device, seed)
        if self.outputs & GRADIENTS:
            off_the_kink(self.problem, made)
        return made

    def put_back(self) -> str:
        """Draws operands anew whose values have changed; their names, "" where none has."""
        if self.problem not in self._sums:
            return ""
        now, before = conduct.checksums(self.tensors), self._sums[self.problem]
        changed = [name for name in now if now[name] != before[name]]
        if changed:
            fresh, own = conduct.named(self._drawn()), conduct.named(self.tensors)
            for name in changed:
                if own[name].shape == fresh[name].shape:
                    own[name].copy_(fresh[name])
                else:
                    own[name].data = fresh[name]
        return " and ".join(changed)

    def exact(self, pass_name: str) -> gate.Outputs:
        """The outputs of a pass in float64."""
        return self._reference(pass_name, float64.reference)

    def cut(self, pass_name: str) -> gate.Outputs:
        """The same of operands as TF32 has them; none where torch's switch does not permit it."""
        if not gate.in_tf32(self.problem, self.device):
            return {}
        return self._reference(pass_name, float64.reference_in_tf32)

    def _reference(self, pass_name: str, reference: Callable[..., dict[str, torch.Tensor]]) -> gate.Outputs:
        plain = replace(self.problem, layout="ncdhw")
        key = plain, reference
        if key not in self._float64:
            self._float64[key] = float64.outputs_of(plain, self.tensors, self.outputs, reference)
        return {name: self._float64[key][name] for name in gate.OUTPUTS[pass_name] if name in self._float64[key]}

    @cached_property
    def torch_is_safe(self) -> bool:
        """torch's own gradients of such a problem are right (see ``kernels/torch_native.py``)."""
        return all(variant(FALLBACK[name]).supports(self.problem, self.device) is None for name in PASSES)

    @cached_property
    def torch_serves(self) -> bool:
        """torch's own call is right, and has arguments for the crops."""
        return self.torch_is_safe and self.problem.torch_crop.exact

    def torch(self, pass_name: str) -> TensorCall:
        """torch's own call. Raises ArgumentError where torch has no arguments for the crops."""
        return torch_call(self.problem, self.tensors, pass_name)

    def baseline(self, pass_name: str) -> TensorCall:
        """torch's own call; where torch has none, or a wrong one, what runs untuned."""
        return self.torch(pass_name) if self.torch_serves else self.call(plan_of(self.problem, self.device), pass_name)

    def call(self, plan: Plan, pass_name: str) -> TensorCall:
        """One pass of a plan of the problem, or the training step through autograd."""
        t = self.tensors
        if pass_name == "forward" and self.problem.epilogue is not None:
            forward = plan.forward_with(self.problem.epilogue)
            return lambda: (forward(t.x, t.weight, t.bias, t.beside, t.slopes),)
        if pass_name == "forward":
            return lambda: (plan.forward(t.x, t.weight, t.bias),)
        if pass_name == "backward_data":
            return lambda: (plan.backward_data(t.grad_y, t.weight),)
        if pass_name == "backward_weight":
            return lambda: plan.backward_weight(t.x, t.grad_y, self.problem.bias)
        if self.problem.epilogue is not None:
            return operation_call(our_operation, self.problem, t, FORWARD_BACKWARD)
        if plan.torch_alone is not None and self.torch_is_safe:  # such a plan never reaches our autograd
            return self.torch(FORWARD_BACKWARD)
        return training_step(differentiable_forward, t.leaves, plan)

    def judge(self, pass_name: str) -> Judge:
        """The judge of all that is proposed for a pass."""
        if pass_name not in self._judges:
            self._judges[pass_name] = Judge(self, pass_name)
        return self._judges[pass_name]

    def verdict(self, plan: Plan, pass_name: str) -> gate.Verdict:
        """Both steps of the gate for a plan of the problem."""
        chosen = {name: plan.choice(name) for name in PASSES}
        passes = PASSES if pass_name == FORWARD_BACKWARD else (pass_name,)
        with spent.on(spent.GATE):
            return self.judge(pass_name)(
                lambda case: case.call(plan_of(case.problem, case.device, **chosen), pass_name),
                [chosen[name].variant for name in passes],
            )

    def trusts_torch(self, pass_name: str) -> bool:
        """torch serves the problem, and no candidate has shown its answer to be wrong."""
        return self.torch_serves and not self.judge(pass_name).torch_faults

    @property
    def torch_faults(self) -> dict[str, dict[str, str]]:
        """Where torch's own answer was found wrong: a message by output, by pass."""
        return {name: judge.torch_faults for name, judge in self._judges.items() if judge.torch_faults}


class Judge:
    """The gate's procedure for a pass of a case; float64 decides where torch is in doubt.

    ``torch_faults`` says by output where torch's own answer at full size was found wrong. It grows while contestants
    are judged; those that passed before were held against the wrong answer, so they go through :meth:`recheck`.
    """

    def __init__(self, case: Case, pass_name: str) -> None:
        self.case, self.pass_name = case, pass_name
        self.small = case.on(gate.reduced(case.problem, case.device))
        self.torch_faults: dict[str, str] = {}
        self._relative: dict[str, float] = {}

    def __call__(
        self, call_of: Callable[[Case], TensorCall], variants: Iterable[Variant] = (), at_size: bool = True
    ) -> gate.Verdict:
        """The verdict on a contestant: of step 1, unless step 2 is red.

        ``call_of`` makes its call on a case, that of the reduced problem or that of full size. ``variants`` are those
        that it runs; where one of them does not serve the reduced problem, step 1 is done at full size. Without
        ``at_size`` step 2 is left out.
        """
        case = self.case
        refused = any(record.supports(self.small.problem, case.device) is not None for record in variants)
        small, looked = case if refused else self.small, False
        try:
            with gpu.cudnn_benchmark(case.device, wanted=small is case):
                exact, errors = self._exact(small)
                verdict = gate.against_reference(small.problem, self._named(call_of(small)()), errors, exact)
            looked = verdict.ok and at_size
            if looked:
                second = self.at_size(call_of(case))
                verdict = verdict if second.ok else second
        finally:
            changed = small.put_back() or ("" if looked else case.put_back())
        return self._broken(CHANGED.format(changed)) if changed else verdict

    def recheck(self, calls: Mapping[str, TensorCall]) -> dict[str, gate.Verdict]:
        """The red verdicts, by name, of contestants that passed: they may agree with a wrong answer of torch."""
        return self.look_again(calls) if self.torch_faults else {}

    def look_again(self, calls: Mapping[str, TensorCall]) -> dict[str, gate.Verdict]:
        """The red verdicts, by name, of calls that passed step 2 before: what they do since may be something else."""
        with spent.on(spent.GATE):
            verdicts = {name: self.at_size(call) for name, call in calls.items()}
        return {name: verdict for name, verdict in verdicts.items() if not verdict.ok}

    def at_size(self, call: TensorCall) -> gate.Verdict:
        """Step 2 alone, for a call at full size, on operands that it has not seen; its conduct counts too."""
        case = self.case
        if not self._relative:
            with gpu.cudnn_benchmark(case.device, wanted=self.small is case):
                self._exact(self.small)
        torchs: dict[str, torch.Tensor] = {}
        settle = partial(off_the_kink, case.problem, case.tensors) if self.pass_name == FORWARD_BACKWARD else None
        with conduct.Operands(case.tensors, settle) as operands:
            names = gate.OUTPUTS[self.pass_name]
            mine = conduct.answer(call, names, case.problem, operands, lambda: torchs.update(self._torchs(case)))
            verdict = gate.worst([self._output(name, mine.outputs, want) for name, want in torchs.items()])
        changed = case.put_back()  # also by the calls before
        if changed:
            return self._broken(CHANGED.format(changed))
        if mine.fault:
            return self._broken(mine.fault, mine.output)
        late = "" if verdict.ok else mine.late()
        return self._broken(conduct.LATE, late) if late else verdict

    def _broken(self, message: str, output: str = "") -> gate.Verdict:
        """The red verdict on a call whose conduct is wrong."""
        return gate.Verdict(output or gate.OUTPUTS[self.pass_name][0], math.inf, 0.0, 0.0, message)

    def _exact(self, small: Case) -> tuple[gate.Outputs, gate.Errors]:
        """The outputs in float64, and torch's errors."""
        exact, torchs = small.exact(self.pass_name), self._torchs(small)
        errors = gate.errors(small.problem, torchs, exact, small.cut(self.pass_name))
        self._relative = gate.relative_errors(errors, exact)
        if small is self.case:
            for name, want in exact.items():
                error = gate.distance(torchs[name], want)
                if not error <= errors[name]:  # it earned no credit
                    self.torch_faults.setdefault(name, f"{WRONG.format(name, error)}, of rounding {errors[name]:.3g}")
        return exact, errors

    def _output(self, name: str, mine: gate.Outputs, want: torch.Tensor) -> gate.Verdict:
        problem = self.case.problem
        verdict = gate.against_torch(problem, name, mine, want, self._relative[name])
        if verdict.message or (verdict.ok and name not in self.torch_faults):
            return verdict
        scale, (error, torch_error) = self._distances(name, [mine[name], want])
        limit = gate.limit(problem, name, self._relative[name], scale)
        if not torch_error <= limit and name not in self.torch_faults:
            again = self._distances(name, [self._torchs(self.case)[name]])[1][0]
            more = f"of another call {again:.3g}, allowed {limit:.3g}"
            self.torch_faults[name] = f"{WRONG.format(name, torch_error)}, {more}"
        return gate.Verdict(name, error, torch_error, limit)

    def _distances(self, name: str, answers: list[torch.Tensor]) -> tuple[float, list[float]]:
        return float64.distances(self.case.problem, self.case.tensors, name, answers)

    def _torchs(self, case: Case) -> gate.Outputs:
        return self._named(case.baseline(self.pass_name)())

    def _named(self, values: tuple) -> dict[str, torch.Tensor]:
        names = gate.OUTPUTS[self.pass_name]
        return {name: value for name, value in zip(names, values, strict=False) if value is not None}
