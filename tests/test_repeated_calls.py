"""A repeated call is known by its weight, and is answered and refused as its first one: torch's own, and others."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tritonconv
from tritonconv import ArgumentError, ArgumentTypeError, dispatch, functional
from tritonconv.autotune import nearby, online, rules
from tritonconv.kernels.registry import variant
from tritonconv.problem import PASSES

STRIDE = (2, 2, 2)
TWICE_AND_SHORT = [False, False, True]


ROADS = {"torch's own": "native", "another": "shuffle"}


def choose(idea, monkeypatch):
    """Every call on a CPU that the formulation serves has it, forward and backward."""
    names = tuple(f"{name}_torch_{idea}" for name in PASSES)

    def picks(problem, vendor):
        serves = all(variant(name).supports(problem, torch.device("cpu")) is None for name in names)
        return (names if serves else tuple(rules.FALLBACK[name] for name in PASSES)), ("", "")

    monkeypatch.setenv(online.VARIABLE, online.NEVER)
    monkeypatch.setattr(nearby, "picks", picks)


@pytest.fixture(params=ROADS)
def road(request, monkeypatch):
    choose(ROADS[request.param], monkeypatch)
    return request.param


@pytest.fixture
def short(road, monkeypatch):
    """A function that makes a call, and says whether it ran without a look for its plan."""
    looked, original = [], functional.plan_for

    def plan_for(*call):
        looked.append(call)
        return original(*call)

    def short(*call):
        looked.clear()
        tritonconv.conv_transpose3d(*call)
        return not looked

    monkeypatch.setattr(functional, "plan_for", plan_for)
    dispatch.forget()
    yield short
    monkeypatch.undo()
    dispatch.forget()


def operands():
    return torch.randn(2, 3, 2, 2, 2), torch.randn(3, 2, 2, 2, 2), torch.randn(2)


def test_a_repeated_call_is_refused_as_its_first_one_is(short):
    x, weight, bias = operands()
    meta = torch.device("meta")
    assert [short(x, weight, bias, STRIDE) for _ in range(3)] == TWICE_AND_SHORT
    want = F.conv_transpose3d(x, weight, bias, 2)
    torch.testing.assert_close(tritonconv.conv_transpose3d(x, weight, bias, STRIDE), want)
    assert not short(x, weight, bias, tuple(iter(STRIDE))), "equal, and another object"
    assert not short(x, weight, None, STRIDE)
    assert not short(x.clone().requires_grad_(), weight, bias, STRIDE), "its gradients may be another's"
    assert not short(x[:1], weight, bias, STRIDE)
    assert not short(x.to(memory_format=torch.channels_last_3d), weight, bias, STRIDE)
    for fault, others in (
        ("weight is torch.float64", (x, weight.double(), bias)),
        ("weight is torch.float32 but input is torch.float64", (x.double(), weight, bias)),
        ("weight is on meta", (x, weight.to(meta), bias)),
        ("weight is on cpu but input is on meta", (x.to(meta), weight, bias)),
        ("bias is torch.float64", (x, weight, bias.double())),
        ("bias is on meta", (x, weight, bias.to(meta))),
        ("bias expects shape", (x, weight, bias[:1])),
        ("bias expects a tensor", (x, weight, 0.0)),
        ("input expects a tensor", (None, weight, bias)),
    ):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=fault):
            tritonconv.conv_transpose3d(*others, STRIDE)
    assert short(x, weight, bias, STRIDE)
    with dispatch.watch() as seen:
        tritonconv.conv_transpose3d(x, weight, bias, STRIDE)
    assert len(seen) == 1
    assert [short(x, weight, bias, STRIDE) for _ in range(3)] == TWICE_AND_SHORT
    dispatch.forget()
    assert not short(x, weight, bias, STRIDE)


def test_forced_variants_close_it_also_for_what_a_checkpoint_recomputes(short, monkeypatch):
    x, weight, bias = operands()
    leaf = weight.clone().requires_grad_()
    for each in (weight, leaf):
        assert [short(x, each, bias, STRIDE) for _ in range(3)] == TWICE_AND_SHORT
        with tritonconv.use("forward_torch_phases"):
            assert not short(x, each, bias, STRIDE)
    assert short(x, weight, bias, STRIDE)
    with tritonconv.use("forward_torch_phases"):
        y = checkpoint(tritonconv.conv_transpose3d, x, leaf, bias, STRIDE, use_reentrant=False)
    seen, original = [], functional.restore_forced
    monkeypatch.setattr(functional, "restore_forced", lambda weight: seen.append(original(weight)) or seen[-1])
    y.sum().backward()
    assert len(seen) == 1 and seen[0] is not None
    assert [short(x, leaf, bias, STRIDE) for _ in range(3)][-1], "open again behind it"


def test_without_gradients_first_then_with_them_and_the_other_way_round(short):
    for first, second in ((False, True), (True, False)):
        x, weight, bias = operands()
        weight.requires_grad_()
        with torch.set_grad_enabled(first):
            assert [short(x, weight, bias, STRIDE) for _ in range(3)] == TWICE_AND_SHORT
        with torch.set_grad_enabled(second):
            # The choices of the gradients' variants are none of a call without gradients; the other way round they are.
            assert short(x, weight, bias, STRIDE) is first
            assert [short(x, weight, bias, STRIDE) for _ in range(2)][-1]
        (mine,) = torch.autograd.grad(tritonconv.conv_transpose3d(x, weight, bias, STRIDE).sum(), weight)
        (want,) = torch.autograd.grad(F.conv_transpose3d(x, weight, bias, STRIDE).sum(), weight)
        torch.testing.assert_close(mine, want)


def test_the_gradients_of_a_repeated_call_are_those_of_its_first_one(short):
    x, weight, bias = (each.requires_grad_() for each in operands())
    assert [short(x, weight, bias, STRIDE) for _ in range(3)] == TWICE_AND_SHORT
    want = torch.autograd.grad(F.conv_transpose3d(x, weight, bias, 2).square().sum(), (x, weight, bias))
    for _ in range(2):
        y = tritonconv.conv_transpose3d(x, weight, bias, STRIDE)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (x, weight, bias)), want)
    with torch.no_grad():
        assert short(x, weight, bias, STRIDE) and not tritonconv.conv_transpose3d(x, weight, bias, STRIDE).requires_grad


def test_a_deterministic_run_has_its_own_choices(short, road):
    x, weight, bias = operands()
    for _ in range(2):
        torch.use_deterministic_algorithms(True)
        try:
            alone = [short(x, weight, bias, STRIDE) for _ in range(3)]
        finally:
            torch.use_deterministic_algorithms(False)
        assert alone[-1] == (road == "torch's own")
        assert [short(x, weight, bias, STRIDE) for _ in range(3)][-1]


def _in_mode(mode):
    def run(function, x):
        with mode:
            return function(x)

    return run


def _batched_gradients(function, x):
    y = x.clone().requires_grad_()
    return torch.autograd.grad(_Inside.apply(y, function), y, torch.ones(3, *x.shape), is_grads_batched=True)[0]


class _Inside(torch.autograd.Function):
    """Calls a function of x with a batch of gradients."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx, grad_y):
        ctx.function(grad_y)
        return grad_y, None


SURROUNDINGS = {
    "autocast": _in_mode(torch.autocast("cpu")),
    "autocast without its cache": _in_mode(torch.autocast("cpu", cache_enabled=False)),
    "inference": _in_mode(torch.inference_mode()),
    "flop counter": _in_mode(FlopCounterMode(display=False)),
    "torch.jit.trace": lambda function, x: torch.jit.trace(function, x, check_trace=False)(x),
    "make_fx": lambda function, x: make_fx(function)(x)(x),
    "vmap": lambda function, x: torch.func.vmap(function)(x[None]),
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,))[1],
    "functionalize": lambda function, x: torch.func.functionalize(function)(x),
    "batched gradients": _batched_gradients,
    "fake": lambda function, x: function(FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x)).shape,
    "negated": lambda function, x: function(torch.complex(x, x).conj().imag),
    "expanded": lambda function, x: function(x[:1].expand(2, -1, -1, -1, -1)),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_other_surroundings_of_a_call_are_seen(name, short, road):
    x, weight, bias = operands()
    assert [short(x, weight, bias, STRIDE) for _ in range(3)] == TWICE_AND_SHORT
    (entry,) = dispatch.repeated[id(weight)]
    answers = []

    def check(*call):
        answers.append(entry[0](*call))
        return answers[-1]

    dispatch.repeated[id(weight)] = ((check, *entry[1:]),)
    run = SURROUNDINGS[name]
    mine = run(lambda x: tritonconv.conv_transpose3d(x, weight, bias, STRIDE), x)
    # make_fx records torch's operation either way, and a graph's check takes its mode for none.
    assert answers and (name == "make_fx" or not any(answers))
    want = run(lambda x: F.conv_transpose3d(x, weight, bias, STRIDE), x)
    if isinstance(mine, torch.Tensor):
        # Another order of sums, which are rounded before the bias.
        rounding = torch.finfo(mine.dtype).eps * want.abs().max().item()
        torch.testing.assert_close(mine, want, rtol=0, atol=0 if road == "torch's own" else rounding)
    else:
        assert mine == want
    assert short(x, weight, bias, STRIDE)


def test_image_sizes_of_a_weight_are_known_up_to_a_bound(short):
    _, weight, bias = operands()
    images = [torch.randn(1, 3, 2, 2, size) for size in range(1, dispatch.MOST_KINDS + 2)]
    shorts = [[short(x, weight, bias, STRIDE) for _ in range(3)][-1] for x in images]
    assert shorts == [True] * dispatch.MOST_KINDS + [False]
    assert all(short(x, weight, bias, STRIDE) for x in images[:-1])
    assert any(short(images[-1], weight, bias, STRIDE) for _ in range(dispatch.PATIENCE + 3)), "a program's next part"


def test_no_short_way_for_arguments_that_may_change_or_only_look_alike(short):
    x, weight = torch.randn(1, 2, 3, 3, 3), torch.randn(2, 2, 2, 2, 2)
    steps = [2, 2, 2]
    for _ in range(3):
        assert tritonconv.conv_transpose3d(x, weight, None, steps).shape[2:] == (6, 6, 6)
    steps[:] = 1, 1, 1
    assert tritonconv.conv_transpose3d(x, weight, None, steps).shape[2:] == (4, 4, 4)
    for _ in range(3):
        tritonconv.conv_transpose3d(x, weight, None, 1)
    assert short(x, weight, None, 1)
    for other in (True, 1.0, (True, 1, 1), (1.0, 1, 1)):
        with pytest.raises(ArgumentTypeError, match="stride expects integers"):
            tritonconv.conv_transpose3d(x, weight, None, other)


@pytest.mark.parametrize("road", ["torch's own"], indirect=True)
def test_the_short_way_has_no_more_calls_of_python_than_torchs_layer(short):
    x = torch.randn(1, 3, 2, 2, 2)
    ours, theirs = (kind(3, 2, 2, 2) for kind in (tritonconv.ConvTranspose3d, torch.nn.ConvTranspose3d))
    for _ in range(3):
        ours(x)
    assert len(_python_calls(lambda: ours(x))) <= len(_python_calls(lambda: theirs(x)))
    call = x, ours.weight, ours.bias, *(getattr(ours, name) for name in ("stride", "padding", "output_padding"))
    own = _python_calls(lambda: tritonconv.conv_transpose3d(*call, ours.groups, ours.dilation))
    assert own == ["conv_transpose3d", "is_dynamo_compiling"]


def _python_calls(call):
    """The names of the functions of Python that a call calls."""
    names: list[str] = []
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return names[1:]  # without its own
