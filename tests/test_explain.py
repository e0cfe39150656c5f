"""``explain``: the plan of a call in words, and why a call goes to torch itself. Runs on the CPU."""

from __future__ import annotations

import argparse
import dataclasses
import sys

import pytest
import torch
from beside_torch import PHASES
from named_gpu import count_gpus, name_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import tritonconv
from tritonconv import ArgumentError, Problem, VariantNotApplicable, dispatch, explain
from tritonconv.explain import explain_problem
from tritonconv.lab.commands import tune
from tritonconv.lab.commands.problems import tasks_asked_for
from tritonconv.problem import PASSES

explanations = sys.modules["tritonconv.explain"]

CPU = torch.device("cpu")
X, WEIGHT = torch.ones(1, 2, 2, 3, 2), torch.ones(2, 3, 3, 3, 3)


@pytest.mark.parametrize("how", ["call", "unbatched", "problem", "forced"])
def test_explain_names_the_choice_and_why_not_the_others(capsys, how):
    x, weight = torch.ones(1, 64, 8, 8, 8), torch.ones(64, 16, 2, 2, 2)
    with tritonconv.use(*(PHASES if how == "forced" else ())):
        if how == "problem":
            found = explain(Problem(1, 64, 16, (8, 8, 8), (2, 2, 2), (2, 2, 2), (0, 0, 0), (16, 16, 16)))
        else:
            found = explain(x[0] if how == "unbatched" else x, weight, stride=2)
    assert capsys.readouterr().out == f"{found}\n" == f"{found.text}\n"
    assert found.reason is None
    lines = found.text.splitlines()
    assert str(found.plan.problem) in lines[0]
    assert "8 phases with 1, 1, 1, 1, 1, 1, 1, 1 taps" in lines[1]
    for pass_name in PASSES:
        choice = found.plan.choice(pass_name)
        at = lines.index(f"{pass_name}: {choice.variant.name} ({choice.variant.idea})")
        assert lines[at + 1] == f"  because: {choice.reason}"
        for record in tritonconv.variants(pass_name):
            if record is choice.variant:
                continue
            (line,) = [text for text in lines if text.startswith(f"  not {record.name}: ")]
            why_not = record.supports(found.plan.problem, CPU)
            assert why_not is None or line.endswith(why_not)
            assert why_not is not None or "applies" in line
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.reason = "other"


def as_subclass(t):
    return t.as_subclass(type("Special", (torch.Tensor,), {}))


@pytest.mark.parametrize(("kind", "words"), [
    ("complex", "complex64"), ("int", "int64"), ("fp8", "float8_e4m3fn"), ("meta", "meta"), ("functorch", "torch.func"),
    ("forward AD", "forward-mode"), ("fake", "dispatch mode"), ("subclass", "Special"),
])  # fmt: skip
def test_explain_says_why_a_call_goes_to_torch(capsys, kind, words):
    x, weight, answers = X, WEIGHT, []
    dtypes = {"complex": torch.complex64, "int": torch.int64, "fp8": torch.float8_e4m3fn}
    if kind in dtypes:
        x, weight = x.to(dtypes[kind]), weight.to(dtypes[kind])
    if kind == "meta":
        x, weight = x.to("meta"), weight.to("meta")
    if kind == "subclass":
        x = as_subclass(x)
    if kind == "functorch":
        torch.func.vmap(lambda t: answers.append(explain(t, weight, stride=2)) or t)(x[None])
    elif kind == "forward AD":
        with forward_ad.dual_level():
            answers.append(explain(x, weight, stride=2))
    elif kind == "fake":
        with FakeTensorMode() as mode:
            answers.append(explain(mode.from_tensor(x), mode.from_tensor(weight), stride=2))
    else:
        answers.append(explain(x, weight, stride=2))
    (found,) = answers
    assert found.plan is None
    assert words in found.reason
    assert found.reason in found.text
    assert capsys.readouterr().out == f"{found}\n"


def test_explain_raises_what_the_call_raises():
    with pytest.raises(TypeError, match="weight is missing"):
        explain(X)
    with pytest.raises(ArgumentError, match="expects 2 input channels"):
        explain(torch.ones(1, 5, 2, 2, 2), WEIGHT)
    with pytest.raises(ArgumentError, match="expects 2 input channels"):
        explain(torch.ones(1, 5, 2, 2, 2, dtype=torch.complex64), WEIGHT.to(torch.complex64))
    with tritonconv.use("forward_torch_shuffle"), pytest.raises(VariantNotApplicable, match="kernel = stride"):
        explain(X, WEIGHT)


def test_explain_under_autocast_shows_the_call_that_runs():
    with torch.autocast("cpu", torch.bfloat16):
        assert tritonconv.conv_transpose3d(X, WEIGHT).dtype == torch.bfloat16
        assert explain(X, WEIGHT).plan.problem.dtype == torch.bfloat16
    assert explain(X, WEIGHT).plan.problem.dtype == torch.float32


@pytest.mark.parametrize("problem", [
    Problem(2, 6, 4, (5, 4, 3), (2, 3, 1), (2, 3, 1), (0, 0, 0), (10, 12, 3), groups=2, bias=True),
    Problem(1, 8, 4, (4, 4, 4), (3, 3, 3), (2, 2, 2), (1, 1, 1), (8, 8, 8), dtype=torch.bfloat16, layout="ndhwc"),
    Problem(1, 8, 4, (6, 5, 4), (3, 3, 3), (1, 1, 1), (2, 1, 2), (6, 7, 4), dilation=(2, 2, 2)),
], ids=str)  # fmt: skip
def test_the_command_that_it_names_tunes_exactly_this(capsys, problem):
    line = explain_problem(problem, CPU).text.splitlines()[-1]
    asked = line.removeprefix("to measure it here: tritonconv tune ").split()
    parser = argparse.ArgumentParser()
    tune.add(parser)
    tasks, _ = tasks_asked_for(parser.parse_args(asked), CPU, "full")
    assert [task.problem for task in tasks] == [problem]


def test_no_command_is_named_that_would_change_nothing(capsys, monkeypatch):
    problem = Problem(1, 8, 4, (4, 4, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), (8, 8, 8))
    assert "tritonconv tune" in explain_problem(problem, CPU).text
    with tritonconv.use(*PHASES):
        assert "tritonconv tune" not in explain_problem(problem, CPU).text
    for other in (dataclasses.replace(problem, n=0), dataclasses.replace(problem, crop=(0, 0, 3), out_size=(8, 8, 5))):
        assert "tritonconv tune" not in explain_problem(other, CPU).text
    monkeypatch.setenv("TRITONCONV", "torch")
    dispatch.forget()
    assert "tritonconv tune" not in explain_problem(problem, CPU).text
    monkeypatch.undo()
    dispatch.forget()


def test_variants_are_asked_about_the_gpu_that_is_explained(monkeypatch):
    name_gpu(monkeypatch)
    now, asked = count_gpus(monkeypatch), []

    def supports(problem, device):
        asked.append(now.index)
        return "another GPU's limits"

    record = dataclasses.replace(tritonconv.variants("forward")[0], name="forward_asked", supports=supports)
    monkeypatch.setattr(explanations, "variants", lambda pass_name: (record,))
    problem = Problem(1, 64, 16, (8, 8, 8), (2, 2, 2), (2, 2, 2), (0, 0, 0), (16, 16, 16))
    found = explanations.explain_problem(problem, torch.device("cuda", 1))
    assert "not forward_asked: another GPU's limits" in found.text and asked == [1, 1, 1] and now.index == 0
