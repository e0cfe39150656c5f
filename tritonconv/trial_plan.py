"""The plan of a CPU's call whose first runs choose its formulations (:mod:`tritonconv.autotune.online`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

from tritonconv.autotune.choose import Selection
from tritonconv.autotune.online import FORWARD, GRADIENTS, PARTS, ROUNDS, FirstCalls, Names
from tritonconv.kernels.registry import variant
from tritonconv.plan import Plan


class TrialPlan(Plan):
    """As the plan ``settled``, but each run of an open trial is that of the contestant whose turn it is.

    ``finished`` is called when a trial has closed; it drops this plan and returns the one of later calls.
    """

    def __init__(self, settled: Plan, trials: dict[str, FirstCalls], finished: Callable[[], Plan]) -> None:
        super().__init__(settled.problem, settled.device, self._choice)
        self.plan_with = settled.plan_with
        self._settled, self._trials, self._finished = settled, trials, finished
        self._later: Plan | None = None
        self._plans: dict[Names, Plan] = {}
        self._single_gradients = 0

    def _choice(self, pass_name: str) -> Selection:
        chosen = self._settled.choice(pass_name)
        trial = self._open(FORWARD if pass_name in PARTS[FORWARD] else GRADIENTS)
        if trial is None:
            return chosen
        others = ", ".join(" + ".join(names) for names in trial.contestants)
        return chosen._replace(reason=f"{chosen.reason}; the first calls try {others}, and keep the fastest")

    def _open(self, kind: str) -> FirstCalls | None:
        """The trial that a run of these passes belongs to; None where user or tuner made the choice."""
        trial = self._trials.get(kind)
        if trial is None or trial.closed:
            return None
        chosen = [self._settled.choice(name) for name in PARTS[kind]]  # not before a call needs it
        if any(each.forced or each.entry is not None for each in chosen):
            self._trials.pop(kind, None)
            return None
        return trial

    # A call of torch's own would go past the trials.
    @property
    def torch_alone(self) -> tuple | None:  # type: ignore[override]  # they change when a trial closes
        return None if self._open(FORWARD) or self._open(GRADIENTS) else self._settled.torch_alone

    @property
    def torch_forward(self) -> tuple | None:  # type: ignore[override]
        return None if self._open(FORWARD) else self._settled.torch_forward

    @property
    def writes_out(self) -> bool:  # type: ignore[override]
        """True while contestants run, each as it would serve."""
        return self._open(FORWARD) is not None or self._settled.writes_out

    def lasting(self, recorded: bool) -> Plan | None:
        """None while a trial that such a call belongs to is open."""
        return None if self._open(FORWARD) or (recorded and self._open(GRADIENTS)) else self._settled

    def forward(self, x, weight, bias, out=None, room=None):  # type: ignore[override]
        return self._timed(lambda plan: _forward(plan, x, weight, bias, out, room), None)

    def stage(self, run: Callable[[Plan], Any], beside: int) -> Any:
        return self._timed(run, beside)

    def _timed(self, run: Callable[[Plan], Any], beside: int | None) -> Any:
        """``run`` of the contestant's plan whose turn it is, and its time counts; ``beside`` are the channels of the
        skip of a stage, None of a plain call. A trial has the times of one of the two alone, whichever began it."""
        trial = self._open(FORWARD)
        if trial is None:
            return run(self._without(FORWARD))
        if not trial.is_of(self.problem, beside):
            return run(self._settled)
        index, plan = self._contestant(trial)
        begin = perf_counter()
        try:
            answer = run(plan)
        except RuntimeError:  # it found no memory, for example
            if index == 0:
                raise
            self._leave(trial, index)
            return self._timed(run, beside)
        self._record(trial, index, perf_counter() - begin)
        return answer

    def backward(self, x, weight, grad_y, need_bias, packed=None):  # type: ignore[override]
        trial = self._open(GRADIENTS)
        if trial is None:
            return self._without(GRADIENTS).backward(x, weight, grad_y, need_bias, packed)
        index, plan = self._contestant(trial)
        begin = perf_counter()
        if index == 0:
            gradients = plan.backward(x, weight, grad_y, need_bias)
            self._record(trial, index, perf_counter() - begin)
            return gradients
        try:
            dense = plan._operand(plan.choice("backward_data"), grad_y)
            grad_x = plan.backward_data(dense, weight)
            between = perf_counter()
            gradients = grad_x, *plan.backward_weight(x, dense, need_bias)
        except RuntimeError:
            self._leave(trial, index)
            return self.backward(x, weight, grad_y, need_bias)
        self._record(trial, index, between - begin, perf_counter() - between)
        return gradients

    def backward_data(self, grad_y, weight, packed=None):  # type: ignore[override]
        return self._one_gradient().backward_data(grad_y, weight, packed)

    def backward_weight(self, x, grad_y, need_bias):  # type: ignore[override]
        return self._one_gradient().backward_weight(x, grad_y, need_bias)

    def _one_gradient(self) -> Plan:
        """The plan of a call that needs one gradient alone; a program that makes only such calls ends the trial."""
        trial = self._open(GRADIENTS)
        if trial is None:
            return self._without(GRADIENTS)
        self._single_gradients += 1
        if self._single_gradients > ROUNDS * len(trial.contestants):
            trial.give_up()
            return self._now()
        return self._settled

    def _contestant(self, trial: FirstCalls) -> tuple[int, Plan]:
        index = trial.turn()
        names = trial.contestants[index]
        plan = self._plans.get(names)
        if plan is None:
            chosen = {record.pass_name: record for record in map(variant, names)}
            selections = {
                name: Selection(record, record.default(self.problem, self.device), "tried in a first call")
                for name, record in chosen.items()
            }
            plan = self._plans[names] = Plan(self.problem, self.device, self._settled.choice, selections)
        return index, plan

    def _record(self, trial: FirstCalls, index: int, *seconds: float) -> None:
        trial.record(index, *seconds)
        if trial.closed:
            self._now()

    def _leave(self, trial: FirstCalls, index: int) -> None:
        trial.leave(index)
        if trial.closed:
            self._now()

    def _without(self, kind: str) -> Plan:
        """The plan of the passes of a kind that has no open trial."""
        return self._now() if kind in self._trials else self._settled

    def _now(self) -> Plan:
        """The plan after a trial."""
        if self._later is None:
            self._later = self._finished()
        return self._later


def _forward(plan: Plan, x, weight, bias, out, room):
    """A plan's forward; ``room`` where it takes any."""
    if room is None or not plan.takes_room:
        return plan.forward(x, weight, bias, out)
    return plan.forward(x, weight, bias, out, room=room)


def trial_of(settled: Plan, trials: Mapping[str, FirstCalls], finished: Callable[[], Plan]) -> Plan:
    """A :class:`TrialPlan` where a trial is open; else the plan itself."""
    mine = {kind: trial for kind, trial in trials.items() if not trial.closed}
    return TrialPlan(settled, mine, finished) if mine else settled
