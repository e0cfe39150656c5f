"""``TRITONCONV=torch`` in the environment: every call is torch's own operation."""

from __future__ import annotations

import pytest
import torch

import tritonconv
from tritonconv import ArgumentError, dispatch
from tritonconv.autotune import nearby, rules
from tritonconv.autotune.rules import FALLBACK
from tritonconv.problem import PASSES, Problem
from tritonconv.switches import REASON, VARIABLE

CPU = torch.device("cpu")
# Of images of one voxel, and of kernel = stride: another variant is chosen for each.
CALLS = {
    "one voxel": ((2, 8, 1, 1, 1), (8, 4, 4, 4, 4), 1),
    "tiles": ((2, 64, 16, 16, 32), (64, 32, 2, 2, 2), 2),
}


@pytest.fixture(autouse=True)
def _planned_anew():
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.mark.parametrize("call", CALLS)
def test_every_pass_is_torchs_own(monkeypatch, call, launches, capsys):
    for module in (rules, nearby):
        monkeypatch.setattr(module, "cpu_vendor", lambda: "AuthenticAMD")
    x_shape, weight_shape, stride = CALLS[call]
    x, weight = torch.randn(x_shape, requires_grad=True), torch.randn(weight_shape, requires_grad=True)
    ours = tritonconv.explain(x, weight, None, stride).plan
    assert any(ours.choice(name).variant.name != FALLBACK[name] for name in PASSES)
    dispatch.forget()

    monkeypatch.setenv(VARIABLE, "torch")
    found = tritonconv.explain(x, weight, None, stride)
    assert found.text.count(f"  because: {REASON}") == 3
    assert [found.plan.choice(name).variant.name for name in PASSES] == [FALLBACK[name] for name in PASSES]
    y, right = tritonconv.conv_transpose3d(x, weight, None, stride), torch.conv_transpose3d(x, weight, None, stride)
    assert torch.equal(y, right)
    assert y.grad_fn.name() == right.grad_fn.name() and launches == []  # torch and its autograd, nothing of ours


def test_a_forced_variant_comes_before_it_and_a_layer_is_converted(monkeypatch, launches):
    monkeypatch.setenv(VARIABLE, "torch")
    model = torch.nn.Sequential(torch.nn.ConvTranspose3d(4, 4, 2, 2))
    assert len(tritonconv.convert(model).replaced) == 1 and type(model[0]) is tritonconv.ConvTranspose3d
    x = torch.randn(1, 4, 3, 3, 3)
    with torch.no_grad():
        right = model(x)
        assert launches == []
        with tritonconv.use("forward_torch_shuffle"):
            torch.testing.assert_close(model(x), right)
    assert launches == ["forward_torch_shuffle"]


def test_it_is_read_when_a_call_is_planned(monkeypatch):
    problem = Problem(2, 8, 4, (1, 1, 1), (4, 4, 4), (1, 1, 1), (0, 0, 0), (4, 4, 4))
    before = dispatch.plan(problem, CPU)
    assert before.choice("forward").variant.name == "forward_torch_linear"
    monkeypatch.setenv(VARIABLE, "torch")
    assert dispatch.plan(problem, CPU).choice("forward") is before.choice("forward")
    dispatch.forget()
    assert dispatch.plan(problem, CPU).choice("forward").variant.name == FALLBACK["forward"]
    monkeypatch.setenv(VARIABLE, "")
    dispatch.forget()
    assert dispatch.plan(problem, CPU).choice("forward").variant.name == "forward_torch_linear"


@pytest.mark.parametrize("value", ["off", "Torch", "0", "triton", " torch"])
def test_another_value_is_refused_by_name(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ArgumentError, match=f"variable TRITONCONV: got '{value}', expected 'torch'"):
        tritonconv.conv_transpose3d(torch.ones(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2))
