"""A repeated call of ``up_concat`` on a CPU is known by its layer's weight, and its first calls choose its road."""

from __future__ import annotations

import copy

import pytest
import torch
from allocations import peak
from test_online import Clock
from test_repeated_calls import SURROUNDINGS, TWICE_AND_SHORT, choose
from torch import nn

import tritonconv
from tritonconv import ArgumentError, concatenation, dispatch, trial_plan, up_concat
from tritonconv.autotune import nearby, online
from tritonconv.autotune.online import ROUNDS

ROADS = {"two operations": "native", "in the slice": "shuffle"}


@pytest.fixture(params=ROADS)
def short(request, monkeypatch):
    """A function that makes a call, and says whether it ran without a look for its plan."""
    looked, original = [], concatenation.plan_for

    def plan_for(*call):
        looked.append(call)
        return original(*call)

    def short(*call):
        looked.clear()
        up_concat(*call)
        return not looked

    choose(ROADS[request.param], monkeypatch)
    monkeypatch.setattr(concatenation, "plan_for", plan_for)
    dispatch.forget()
    yield short
    monkeypatch.undo()
    dispatch.forget()


def operands(kind=tritonconv.ConvTranspose3d):
    return kind(3, 2, 2, stride=2), torch.randn(1, 3, 2, 3, 2), torch.randn(1, 4, 4, 6, 4)


def joined(layer, x, skip, first=False):
    y = nn.functional.conv_transpose3d(x, layer.weight, layer.bias, layer.stride)
    return torch.cat((skip, y) if first else (y, skip), 1)


def test_it_answers_and_refuses_as_the_first_one(short):
    for kind in (tritonconv.ConvTranspose3d, nn.ConvTranspose3d):
        layer, x, skip = operands(kind)
        for grad in (True, False):  # its gradients may be another's
            with torch.set_grad_enabled(grad):
                assert [short(layer, x, skip) for _ in range(3)][-1]
        for first in (False, True):
            got = up_concat(layer, x, skip, first)
            torch.testing.assert_close(got, joined(layer, x, skip, first))
            grads = [torch.autograd.grad(y.square().sum(), tuple(layer.parameters())) for y in (
                got, joined(layer, x, skip, first))]  # fmt: skip
            torch.testing.assert_close(*grads)
        with pytest.raises(ArgumentError, match="must agree in all axes but the channels"):
            up_concat(layer, x, skip[:, :, 1:])
        with pytest.raises(ArgumentError, match="skip is on meta"):
            up_concat(layer, x, skip.to("meta"))
        with pytest.raises(ArgumentError, match="input channels"):
            up_concat(layer, x[:, 1:], skip)
        assert not short(layer, x, skip.double()) and short(layer, x, skip)
        assert not short(layer, x.clone().requires_grad_(), skip), "its gradients may be another's"
        assert not short(layer, x, skip.clone().requires_grad_())
        assert short(layer, x, skip)


def test_a_frozen_layer_beside_a_skip_that_is_trained(short):
    layer, x, skip = operands()
    layer.requires_grad_(False)
    skip.requires_grad_()
    assert [short(layer, x, skip) for _ in range(3)] == TWICE_AND_SHORT
    got = up_concat(layer, x, skip)
    assert torch.equal(torch.autograd.grad(got.sum(), skip)[0], torch.ones_like(skip))


def test_a_change_of_the_layer_is_seen(short):
    layer, x, skip = operands()
    assert [short(layer, x, skip) for _ in range(3)] == TWICE_AND_SHORT
    handle = layer.register_forward_hook(lambda module, args, y: 3 * y)
    torch.testing.assert_close(up_concat(layer, x, skip), torch.cat((3 * joined(layer, x, skip)[:, :2], skip), 1))
    handle.remove()
    assert short(layer, x, skip)
    layer.forward = lambda x: 5 * type(layer).forward(layer, x)
    torch.testing.assert_close(up_concat(layer, x, skip), torch.cat((5 * joined(layer, x, skip)[:, :2], skip), 1))
    del layer.forward
    assert short(layer, x, skip)
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(up_concat(layer, x, skip), joined(layer, x, skip))
    layer.bias = None
    torch.testing.assert_close(up_concat(layer, x, skip), joined(layer, x, skip))
    layer.stride = (2, 1, 2)
    wide = torch.randn(1, 1, 4, 4, 4)
    torch.testing.assert_close(up_concat(layer, x, wide), joined(layer, x, wide))


def test_forced_variants_and_a_change_of_the_choices_close_it(short):
    layer, x, skip = operands()
    assert [short(layer, x, skip) for _ in range(3)] == TWICE_AND_SHORT
    with tritonconv.use("forward_torch_phases"):
        assert not short(layer, x, skip)
    with dispatch.watch() as seen:
        up_concat(layer, x, skip)
    assert len(seen) == 1
    layer, x, skip = operands()
    assert [short(layer, x, skip) for _ in range(3)] == TWICE_AND_SHORT
    dispatch.forget()
    assert [short(layer, x, skip) for _ in range(3)] == TWICE_AND_SHORT
    torch.use_deterministic_algorithms(True)
    try:
        in_slice = dispatch.stages[id(layer.weight)][0][-1] is not None
        assert short(layer, x, skip) != in_slice  # the first calls chose nothing for such a run
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_a_batch_no_entry_is_kept(short):
    layer, x, skip = operands()
    for _ in range(3):
        assert not short(layer, x[0], skip[0])
    assert not dispatch.stages.get(id(layer.weight))


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_other_surroundings_of_a_call_are_seen(name, short):
    layer, x, _ = operands()
    x, skip = torch.randn(2, 3, 2, 2, 2), torch.randn(2, 1, 4, 4, 4)
    layer.requires_grad_(False)
    assert [short(layer, x, skip) for _ in range(3)] == TWICE_AND_SHORT

    def of(layer):  # a skip that is a tensor of the same surroundings
        return lambda x: up_concat(layer, x, x.sum(1, keepdim=True).repeat_interleave(8, 1).view(2, 1, 4, 4, 4))

    run = SURROUNDINGS[name]
    mine, first = run(of(layer), x), run(of(copy.deepcopy(layer)), x)
    assert torch.equal(mine, first) if isinstance(mine, torch.Tensor) else mine == first
    assert short(layer, x, skip)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_the_first_calls_run_each_road_as_it_would_serve(layout, launches, monkeypatch):
    """torch's own with its concatenation, a formulation where its y will lie. One that is as fast saves memory."""
    monkeypatch.delenv(online.VARIABLE, raising=False)
    monkeypatch.setattr(nearby, "likely_forwards", lambda *of: [("forward_torch_shuffle",), ("forward_torch_columns",)])
    monkeypatch.setattr(nearby, "likely_gradients", lambda *of: [])
    monkeypatch.setattr(trial_plan, "perf_counter", Clock(*[0.010, 0.0099, 0.011] * ROUNDS))
    dispatch.forget()
    cats, original = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda *of: cats.append(len(launches)) or original(*of))
    layer = tritonconv.ConvTranspose3d(8, 4, 2, stride=2).requires_grad_(False)
    x, skip = torch.randn(1, 8, 4, 4, 4), torch.randn(1, 4, 8, 8, 8)
    x, skip = x.contiguous(memory_format=layout), skip.contiguous(memory_format=layout)
    want = joined(layer, x, skip)
    cats.clear()
    for _ in range(3 * ROUNDS + 3):
        got = up_concat(layer, x, skip)
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()
    others = ["forward_torch_shuffle", "forward_torch_columns"]
    assert launches == others * ROUNDS + others[:1] * 3 and cats == list(range(0, 2 * ROUNDS, 2))
    if layout is torch.contiguous_format:
        assert peak(lambda: up_concat(layer, x, skip)) == got.nbytes
    monkeypatch.undo()
    dispatch.forget()


def test_a_call_without_gradients_keeps_its_forward_where_a_recorded_one_is_torchs_own(monkeypatch):
    """A forward that saves less than the road through our autograd: recorded calls are torch's own."""
    layer, x, skip = operands()
    monkeypatch.setattr(dispatch.Plan, "torch_alone", ((2,) * 3, (0,) * 3, (0,) * 3, 1, (1,) * 3))
    choose("shuffle", monkeypatch)
    dispatch.forget()
    ran, original = [], concatenation._concatenation
    monkeypatch.setattr(concatenation, "_concatenation", lambda *call: ran.append(call) or original(*call))
    for _ in range(3):
        torch.testing.assert_close(up_concat(layer, x, skip), joined(layer, x, skip))
    assert not ran
    with torch.no_grad():
        torch.testing.assert_close(up_concat(layer, x, skip), joined(layer, x, skip))
    assert len(ran) == 1
    monkeypatch.undo()
    dispatch.forget()
