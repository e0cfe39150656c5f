"""A CPU's formulations chosen by a program's own first calls."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import tritonconv
from tritonconv import dispatch, trial_plan
from tritonconv.autotune import nearby, online
from tritonconv.autotune.online import FORWARD, GRADIENTS, MOST_ROUNDS, ROUNDS
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.contestants import contestant
from tritonconv.lab.bench.results import OURS
from tritonconv.plan import Plan
from tritonconv.problem import PASSES, Problem
from tritonconv.trial_plan import TrialPlan

OWN = tuple(f"{name}_torch_native" for name in PASSES)
FORWARDS = [("forward_torch_onednn",), ("forward_torch_phases",)]
PAIRS = [
    ("backward_data_torch_conv", "backward_weight_torch_conv"),
    ("backward_data_torch_phases", "backward_weight_torch_phases"),
]
SHAPE, ARGUMENTS = (2, 6, 5, 6, 7), {"stride": 2, "padding": 1}
PROBLEM = Problem(2, 6, 4, (5, 6, 7), (3, 3, 3), (2, 2, 2), (1, 1, 1), (9, 11, 13), bias=True)


class Clock:
    """Each look at it is later by the seconds of the call that runs between two looks, in a list by turns."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.now, self.looks = list(seconds), 0.0, 0

    def __call__(self) -> float:
        self.looks += 1
        if self.looks % 2 == 0:
            self.now += self.seconds.pop(0)
        return self.now


@pytest.fixture
def tried(monkeypatch):
    """Small problems have the contestants above, and a call takes what the test's clock says."""
    monkeypatch.delenv(online.VARIABLE, raising=False)
    monkeypatch.setattr(nearby, "likely_forwards", lambda *of: FORWARDS)
    monkeypatch.setattr(nearby, "likely_gradients", lambda *of: PAIRS)
    dispatch.forget()
    yield lambda *seconds: monkeypatch.setattr(trial_plan, "perf_counter", Clock(*seconds))
    monkeypatch.undo()
    dispatch.forget()


def operands(requires_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = SHAPE, (6, 4, 3, 3, 3), (4,)
    return tuple(torch.randn(shape).requires_grad_(requires_grad) for shape in shapes)


def agree(ours, *given: torch.Tensor) -> None:
    expected = F.conv_transpose3d(*(each.detach().double() for each in given), **ARGUMENTS)
    torch.testing.assert_close(ours.detach().double(), expected, rtol=1e-4, atol=1e-4)


def test_the_first_calls_run_each_in_turns_and_the_fastest_stays(tried, launches):
    tried(*[0.010, 0.008, 0.009] * ROUNDS)
    x, weight, bias = operands()
    for _ in range(3 * ROUNDS + 2):
        agree(tritonconv.conv_transpose3d(x, weight, bias, **ARGUMENTS), x, weight, bias)
    turns = ["forward_torch_native", "forward_torch_onednn", "forward_torch_phases"] * ROUNDS
    assert launches == [*turns, "forward_torch_onednn", "forward_torch_onednn"]
    plan = dispatch.plan(PROBLEM, x.device)
    assert "1.25 times as fast as torch's own in the first calls here, where 2 others were tried" in (
        plan.choice("forward").reason
    )


def test_the_first_run_of_each_does_not_count(tried):
    tried(*[0.010, 0.045, 0.009], *[0.010, 0.008, 0.009] * (ROUNDS - 1))
    given = operands()
    for _ in range(3 * ROUNDS):
        tritonconv.conv_transpose3d(*given, **ARGUMENTS)
    assert dispatch.plan(PROBLEM, given[0].device).choice("forward").variant.name == "forward_torch_onednn"


@pytest.mark.parametrize(("own", "other", "short"), [(0.0010, 0.0009, True), (0.0020, 0.0015, False)])
def test_a_forward_that_saves_little_is_torchs_in_a_step(tried, launches, monkeypatch, own, other, short):
    """Less than the road through our autograd takes; in a call without gradients it stays."""
    tried(*[own, other, own] * MOST_ROUNDS)
    x, weight, bias = operands()
    monkeypatch.setattr(nearby, "likely_gradients", lambda *of: [])
    for _ in range(3 * MOST_ROUNDS):
        tritonconv.conv_transpose3d(x, weight, bias, **ARGUMENTS)
    weight.requires_grad_()
    for _ in range(3):
        launches.clear()
        y = tritonconv.conv_transpose3d(x, weight, bias, **ARGUMENTS)
        assert ("ConvolutionBackward" in type(y.grad_fn).__name__) == short
        agree(y, x, weight, bias)
        with torch.no_grad():
            launches.clear()
            tritonconv.conv_transpose3d(x, weight, bias, **ARGUMENTS)
            assert launches == ["forward_torch_onednn"]


def test_torchs_own_stays_where_nothing_is_faster_and_goes_the_short_way(tried, launches):
    tried(*[0.010, 0.012, 0.00985] * ROUNDS)
    x, weight, bias = operands()
    for _ in range(3 * ROUNDS):
        tritonconv.conv_transpose3d(x, weight, bias, **ARGUMENTS)
    launches.clear()
    assert torch.equal(
        tritonconv.conv_transpose3d(x, weight, bias, **ARGUMENTS), F.conv_transpose3d(x, weight, bias, **ARGUMENTS)
    )
    assert not launches  # torch's own, called without a plan
    assert "none of 2 others was faster" in dispatch.plan(PROBLEM, x.device).choice("forward").reason


def test_gradients_are_timed_part_by_part_and_the_best_of_each_stays(tried, monkeypatch):
    monkeypatch.setattr(nearby, "likely_forwards", lambda *of: [])
    # Of a contestant that is not torch's own three looks: begin, between, end.
    looks = iter([(0.019,), (0.004, 0.009), (0.012, 0.003)] * ROUNDS)
    steps: list[float] = []

    def clock() -> float:
        if not steps:
            now, times = 0.0, [0.0]
            for each in next(looks):
                times.append(now := now + each)
            steps.extend(times)
        return steps.pop(0)

    monkeypatch.setattr(trial_plan, "perf_counter", clock)
    x, weight, bias = operands(requires_grad=True)
    wide = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    expected = torch.autograd.grad(F.conv_transpose3d(*wide, **ARGUMENTS).square().sum(), wide)
    for _ in range(3 * ROUNDS + 2):
        y = tritonconv.conv_transpose3d(x, weight, bias, **ARGUMENTS)
        for ours, theirs in zip(torch.autograd.grad(y.square().sum(), (x, weight, bias)), expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-3)
    plan = dispatch.plan(PROBLEM, x.device)
    assert [plan.choice(name).variant.name for name in PASSES[1:]] == [PAIRS[0][0], PAIRS[1][1]]
    assert online.trials(PROBLEM)[GRADIENTS].closed


def test_double_backward_and_out_go_through_a_contest(tried, monkeypatch):
    x, weight, bias = (each.double() for each in operands())
    arguments = tuple(each.requires_grad_() for each in (x, weight, bias))
    assert torch.autograd.gradgradcheck(
        lambda *each: tritonconv.conv_transpose3d(*each, **ARGUMENTS), arguments, fast_mode=True
    )
    with torch.no_grad():
        expected = F.conv_transpose3d(x, weight, bias, **ARGUMENTS)
        for _ in range(3 * ROUNDS + 1):
            buffer = torch.full((2, 7, 9, 11, 13), torch.nan, dtype=torch.float64)
            tritonconv.conv_transpose3d(x, weight, bias, **ARGUMENTS, out=buffer[:, 2:6])
            torch.testing.assert_close(buffer[:, 2:6], expected)
            assert buffer[:, :2].isnan().all() and buffer[:, 6:].isnan().all()


def is_tried(*given) -> bool:
    plan = dispatch.plan_for(*given, (2, 1, 0, 1, 1))
    return isinstance(plan, TrialPlan) and plan.torch_alone is None and plan.torch_forward is None


def test_nothing_is_tried_where_the_choice_is_made(tried, monkeypatch, tmp_path):
    given = operands()
    assert is_tried(*given)
    assert not isinstance(dispatch.plan(PROBLEM, given[0].device), TrialPlan)  # that of a compiled graph
    with tritonconv.use("forward_torch_phases"):
        assert not is_tried(*given)
    torch.use_deterministic_algorithms(True)
    try:
        assert not is_tried(*given)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in ((online.VARIABLE, online.NEVER), ("TRITONCONV", "torch")):
        dispatch.forget()
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not is_tried(*given)
    dispatch.forget()
    dispatch.plan(PROBLEM, given[0].device).torch_alone  # noqa: B018  # it makes the choices
    tritonconv.save_choices(tmp_path / "choices.json")
    tritonconv.pin_choices(tmp_path / "choices.json")
    try:
        assert not is_tried(*given)
    finally:
        tritonconv.pin_choices(None)
    assert is_tried(*given)


def test_a_decision_is_not_used_by_a_deterministic_call(tried, monkeypatch):
    tried(*[0.010, 0.008, 0.009] * ROUNDS)
    given = operands()
    before = dispatch.plan(PROBLEM, given[0].device).choice("forward").variant.name
    for _ in range(3 * ROUNDS):
        tritonconv.conv_transpose3d(*given, **ARGUMENTS)
    assert dispatch.plan(PROBLEM, given[0].device).choice("forward").variant.name == "forward_torch_onednn"
    torch.use_deterministic_algorithms(True)
    try:
        assert dispatch.plan(PROBLEM, given[0].device).choice("forward").variant.name == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_contestant_that_raises_leaves_and_the_call_is_answered(tried, monkeypatch):
    real = Plan._as_it_likes

    def without_memory(plan, choice):
        if choice.variant.name in ("forward_torch_onednn", PAIRS[0][1]):

            def raises(*operands):
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

            return raises
        return real(plan, choice)

    monkeypatch.setattr(Plan, "_as_it_likes", without_memory)
    given = operands(requires_grad=True)
    for _ in range(3 * MOST_ROUNDS):
        y = tritonconv.conv_transpose3d(*given, **ARGUMENTS)
        agree(y, *given)
        y.sum().backward()
    assert all(trial.closed for trial in online.trials(PROBLEM).values())
    names = [dispatch.plan(PROBLEM, y.device).choice(name).variant.name for name in PASSES]
    assert "forward_torch_onednn" not in names and PAIRS[0][1] not in names


def test_an_error_of_the_caller_is_torchs_own(tried):
    x, weight, bias = operands()
    with pytest.raises(RuntimeError):
        tritonconv.conv_transpose3d(x, weight, bias, **ARGUMENTS, out=torch.empty(3))


def test_a_program_with_one_gradient_alone_ends_the_contest(tried, monkeypatch):
    monkeypatch.setattr(nearby, "likely_forwards", lambda *of: [])
    x, weight, bias = operands()
    x.requires_grad_()
    for _ in range(3 * ROUNDS + 3):
        y = tritonconv.conv_transpose3d(x, weight, bias, **ARGUMENTS)
        y.sum().backward()
    assert online.trials(PROBLEM)[GRADIENTS].closed
    assert online.decided(PROBLEM, PASSES[1]) is None


def test_threads_share_a_contest(tried):
    x, weight, bias = operands()
    expected = F.conv_transpose3d(x, weight, bias, **ARGUMENTS)
    wrong = []

    def calls() -> None:
        for _ in range(MOST_ROUNDS):
            y = tritonconv.conv_transpose3d(x, weight, bias, **ARGUMENTS)
            if not torch.allclose(y, expected, rtol=1e-4, atol=1e-4):
                wrong.append(y)

    threads = [threading.Thread(target=calls) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert online.trials(PROBLEM)[FORWARD].closed


def test_a_number_of_threads_has_its_own_contest(tried):
    before = torch.get_num_threads()
    first = online.trials(PROBLEM)
    torch.set_num_threads(before + 1)
    try:
        assert online.trials(PROBLEM) is not first
    finally:
        torch.set_num_threads(before)
    assert online.trials(PROBLEM) is first


def test_explain_names_those_that_will_be_tried(tried, capsys):
    given = operands()
    tritonconv.explain(*given, **ARGUMENTS)
    assert "the first calls try forward_torch_native, forward_torch_onednn, forward_torch_phases, and keep" in (
        capsys.readouterr().out
    )


def test_a_benchmark_times_what_the_first_calls_have_chosen(tried):
    case = Case(PROBLEM, torch.device("cpu"), 0)
    own = contestant(OURS, None, case, "forward", at_size=False)
    assert own.verdict.ok
    assert online.trials(PROBLEM)[FORWARD].closed and not online.trials(PROBLEM)[GRADIENTS].seconds[0]
    assert "in the first calls" in own.chosen["forward"].reason


def test_likely_formulations_serve_the_problem_and_small_ones_have_none():
    layer = Problem(2, 64, 32, (16, 32, 32), (2, 2, 2), (2, 2, 2), (0, 0, 0), (32, 64, 64))
    forwards = nearby.likely_forwards(layer, "AuthenticAMD", 200.0, 3)
    pairs = nearby.likely_gradients(layer, "AuthenticAMD", 300.0, 3)
    assert 0 < len(forwards) <= 3 and 0 < len(pairs) <= 3
    cropped = replace(layer, kernel=(4, 4, 4), crop=(1, 1, 1))
    for problem in (layer, cropped):
        found = nearby.likely_forwards(problem, "AuthenticAMD", 200.0, 9)
        found += nearby.likely_gradients(problem, "AuthenticAMD", 300.0, 9)
        for names in found:
            for name in names:
                assert nearby.variant(name).supports(problem, torch.device("cpu")) is None, name
    # Without rows of the vendor, those of another say where to look.
    assert nearby.likely_forwards(layer, "Another", 200.0, 3) == forwards
    small = replace(layer, n=1, c_in=1, c_out=1, size=(2, 2, 2), out_size=(4, 4, 4))
    assert not nearby.likely_forwards(small, "AuthenticAMD", 200.0, 3)
    assert not nearby.likely_gradients(small, "AuthenticAMD", 300.0, 3)
    assert not nearby.likely_forwards(replace(layer, dtype=torch.float64), "AuthenticAMD", 200.0, 3)
    assert online.trials(replace(layer, n=0)) == {}
