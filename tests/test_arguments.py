"""Calls that the operation refuses and accepts: torch's own answer to every call, and errors that say more. CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import tritonconv
from tritonconv import ArgumentError, ArgumentTypeError, Problem, arguments, dispatch

X, W, ONE = (1, 3, 4, 4, 4), (3, 2, 3, 3, 3), (1, 3, 1, 1, 1)

# id: (x shape, weight shape, bias shape or None, hyper-parameters, what the message must name)
BAD_VALUES = {
    "channels": (X, (4, 2, 3, 3, 3), None, {}, ["weight expects 4", "x has 3", "(1, 3, 4, 4, 4)", "(4, 2, 3, 3, 3)"]),
    "channels, unbatched": ((2, 4, 4, 4), W, None, {}, ["weight expects 3", "x has 2", "(3, 2, 3, 3, 3)"]),
    "channels of a group": (X, (1, 2, 3, 3, 3), None, {"groups": 3}, ["weight expects 1", "x has 3"]),
    "bias length": (X, W, (3,), {}, ["bias", "(2,)", "(3,)", "(3, 2, 3, 3, 3)"]),
    "bias length of a group": ((1, 4, 4, 4, 4), (4, 2, 3, 3, 3), (2,), {"groups": 2}, ["bias", "(4,)", "(2,)"]),
    "bias 2-D": (X, W, (2, 1), {}, ["bias", "(2,)", "(2, 1)"]),
    "bias 0-D": (X, W, (), {}, ["bias", "(2,)", "got ()"]),
    "groups do not divide": (X, W, None, {"groups": 2}, ["groups=2", "3 input channels", "(3, 2, 3, 3, 3)"]),
    "groups 0": (X, W, None, {"groups": 0}, ["groups", "got 0", "at least 1"]),
    "groups -1": (X, W, None, {"groups": -1}, ["groups", "got -1", "at least 1"]),
    "stride 0": (X, W, None, {"stride": 0}, ["stride", "got 0", "at least 1"]),
    "stride -1": (X, W, None, {"stride": -1}, ["stride", "got -1", "at least 1"]),
    "one stride 0": (X, W, None, {"stride": (1, 0, 1)}, ["stride", "(1, 0, 1)", "at least 1"]),
    "dilation 0": (X, W, None, {"dilation": 0}, ["dilation", "got 0", "at least 1"]),
    "dilation -1": (X, W, None, {"dilation": -1}, ["dilation", "got -1", "at least 1"]),
    "padding -1": (X, W, None, {"padding": -1}, ["padding", "got -1", "at least 0"]),
    "one padding -1": (X, W, None, {"padding": [0, 0, -1]}, ["padding", "[0, 0, -1]", "at least 0"]),
    "output_padding -1": (X, W, None, {"stride": 2, "output_padding": -1}, ["output_padding", "got -1", "at least 0"]),
    "output_padding = stride": (X, W, None, {"stride": 2, "output_padding": 2}, ["output_padding (2", "stride (2"]),
    "output_padding, stride 1": (X, W, None, {"output_padding": 1}, ["output_padding (1, 1, 1)", "dilation (1, 1, 1)"]),
    "one output_padding": (X, W, None, {"stride": (3, 3, 2), "output_padding": (0, 0, 2)}, ["(0, 0, 2)", "(3, 3, 2)"]),
    "output of size 0": (X, W, None, {"padding": 3}, ["empty", "(0, 0, 0)", "padding", "(3, 3, 3)", "(1, 3, 4, 4, 4)"]),
    "output of size -6": (X, W, None, {"padding": 6}, ["empty", "(-6, -6, -6)", "padding", "(6, 6, 6)"]),
    "one empty axis": (X, W, None, {"padding": (0, 3, 0)}, ["empty", "(6, 0, 6)", "(0, 3, 0)"]),
    "two strides": (X, W, None, {"stride": (1, 2)}, ["stride", "three", "got 2", "(1, 2)"]),
    "no stride": (X, W, None, {"stride": ()}, ["stride", "three", "got 0"]),
    "four paddings": (X, W, None, {"padding": (1, 1, 1, 1)}, ["padding", "three", "got 4", "(1, 1, 1, 1)"]),
    "two dilations": (X, W, None, {"dilation": [1, 1]}, ["dilation", "three", "got 2", "[1, 1]"]),
    "two output_paddings": (X, W, None, {"stride": 2, "output_padding": (1, 1)}, ["output_padding", "got 2", "(1, 1)"]),
    "input 0-D": ((), W, None, {}, ["input", "x ()", "(3, 2, 3, 3, 3)"]),
    "input 3-D": ((3, 4, 4), W, None, {}, ["input", "5 axes", "x (3, 4, 4)", "(3, 2, 3, 3, 3)"]),
    "input 6-D": ((1, 1, 3, 4, 4, 4), W, None, {}, ["input", "5 axes", "x (1, 1, 3, 4, 4, 4)"]),
    "weight 4-D": (X, (3, 2, 3, 3), None, {}, ["weight", "5 axes", "(3, 2, 3, 3)", "(1, 3, 4, 4, 4)"]),
    "weight 6-D": (X, (1, 3, 2, 3, 3, 3), None, {}, ["weight", "5 axes", "(1, 3, 2, 3, 3, 3)"]),
    "no input channels": ((1, 0, 4, 4, 4), (0, 2, 3, 3, 3), None, {}, ["input", "channel", "(1, 0, 4, 4, 4)"]),
    "empty spatial axis": ((1, 3, 0, 4, 4), W, None, {}, ["input", "empty", "(1, 3, 0, 4, 4)"]),
    "empty kernel axis": (X, (3, 2, 0, 3, 3), None, {}, ["weight", "empty", "(3, 2, 0, 3, 3)"]),
}  # fmt: skip

BAD_TYPES = {
    "padding same": {"padding": "same"}, "stride text": {"stride": "2"}, "stride float": {"stride": 1.0},
    "one stride float": {"stride": (2.0, 2, 2)}, "padding float": {"padding": 0.0}, "dilation float": {"dilation": 1.0},
    "output_padding float": {"output_padding": 0.0}, "groups float": {"groups": 1.0}, "stride None": {"stride": None},
    "groups None": {"groups": None}, "groups tuple": {"groups": (1,)}, "stride set": {"stride": {2}},
    "stride bool": {"stride": True}, "strides bool": {"stride": (True, True, True)}, "groups bool": {"groups": True},
    "padding bool": {"padding": False},
}  # fmt: skip

f32, f64, bf16, c64, i64 = torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64
BAD_DTYPES = [
    (f32, f64, None), (f64, f32, None), (bf16, f32, None), (i64, f32, None), (f32, i64, None), (c64, f32, None),
    (f32, c64, None), (f32, f32, f64), (f32, f32, i64), (f32, f32, c64), (c64, c64, f32), (i64, i64, f32),
]  # fmt: skip


def refused(call) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  torch raises four kinds of error here
        call()
    return caught.value


def tensors(x, weight, bias, device="cpu"):
    return [None if shape is None else torch.ones(shape, device=device) for shape in (x, weight, bias)]


@pytest.fixture(params=["eager", "meta", "fake"])
def where(request):
    """The device of the call's tensors: real ones, meta tensors, or fake ones inside FakeTensorMode."""
    if request.param == "fake":
        with FakeTensorMode():
            yield "cpu"
    else:
        yield "meta" if request.param == "meta" else "cpu"


@pytest.mark.parametrize("name", BAD_VALUES)
def test_torch_refuses_the_listed_calls(name):
    *shapes, hyper, _ = BAD_VALUES[name]
    assert isinstance(refused(lambda: F.conv_transpose3d(*tensors(*shapes), **hyper)), RuntimeError)


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_wrong_value_or_shape_is_refused(name, where):
    *shapes, hyper, fragments = BAD_VALUES[name]
    before = dict(dispatch._by_call), dict(dispatch._by_problem)
    args = tensors(*shapes, device=where)
    for _ in range(2):  # a refusal is not remembered as an acceptance
        error = refused(lambda: tritonconv.conv_transpose3d(*args, **hyper))
        assert isinstance(error, ArgumentError), repr(error)
        assert isinstance(error, ValueError)
        assert isinstance(error, RuntimeError), "a program that catches torch's error keeps working"
        assert str(error).startswith("conv_transpose3d: ")
        assert all(fragment in str(error) for fragment in fragments), f"{error} lacks one of {fragments}"
    assert (dispatch._by_call, dispatch._by_problem) == before


@pytest.mark.parametrize("name", BAD_TYPES)
def test_a_wrong_type_is_refused(name, where):
    hyper = BAD_TYPES[name]
    args = tensors(X, W, None, where)
    assert isinstance(refused(lambda: F.conv_transpose3d(*args, **hyper)), TypeError)
    error = refused(lambda: tritonconv.conv_transpose3d(*args, **hyper))
    assert isinstance(error, ArgumentTypeError), repr(error)
    assert isinstance(error, TypeError)
    assert isinstance(error, RuntimeError)
    (key, value), *_ = hyper.items()
    assert key in str(error)
    assert repr(value) in str(error)


@pytest.mark.parametrize("hyper", [
    {"stride": 1.0}, {"padding": (0.0, 0, 0)}, {"groups": 1.0}, {"dilation": True}, {"stride": [1.0, 1, 1]},
    {"padding": [False] * 3}, {"dilation": np.float64(1)}, {"stride": np.ones(3)}, {"groups": np.True_},
])  # fmt: skip
def test_a_plan_made_for_integers_is_not_found_by_their_equals(hyper):
    args = tensors(X, W, None)
    (name,) = hyper
    tritonconv.conv_transpose3d(*args, **{name: (0, 0, 0) if name == "padding" else 1})
    with pytest.raises(ArgumentTypeError, match=name):  # 1.0 == True == 1, and they hash alike
        tritonconv.conv_transpose3d(*args, **hyper)


@pytest.mark.parametrize("dtypes", BAD_DTYPES, ids=str)
def test_mixed_dtypes_are_refused(dtypes, where):
    x, weight, bias = tensors(X, W, None if dtypes[2] is None else (2,), where)
    args = [None if t is None else t.to(dtype) for t, dtype in zip((x, weight, bias), dtypes, strict=True)]
    error = refused(lambda: tritonconv.conv_transpose3d(*args))
    assert isinstance(error, ArgumentTypeError), repr(error)
    assert isinstance(error, RuntimeError)
    odd = dtypes[1] if dtypes[2] is None else dtypes[2]
    for fragment in ("weight" if dtypes[2] is None else "bias", str(odd), str(dtypes[0])):
        assert fragment in str(error)


@pytest.mark.parametrize("args", [(X, None), (X, "w"), (None, W), (X, W, [1.0, 2.0]), (X, W, 1.0)], ids=str)
def test_something_that_is_no_tensor_is_refused(args):
    values = [torch.ones(arg) if isinstance(arg, tuple) else arg for arg in args]
    assert isinstance(refused(lambda: F.conv_transpose3d(*values)), TypeError)
    assert isinstance(refused(lambda: tritonconv.conv_transpose3d(*values)), TypeError)


@pytest.mark.parametrize("where", ["eager", "fake"], indirect=True)
def test_autocast_takes_mixed_dtypes_as_torch_does(where):
    x, weight, bias = torch.ones(X, dtype=bf16), torch.ones(W), torch.ones(2, dtype=torch.float16)
    with torch.autocast("cpu", bf16):
        for call in (F.conv_transpose3d, tritonconv.conv_transpose3d):
            y = call(x, weight, bias, stride=2)
            assert (y.dtype, y.shape) == (bf16, (1, 2, 9, 9, 9))
        for other in (f64, i64, c64):  # what autocast does not lower stays mixed
            if type(x) is torch.Tensor:  # torch 2.11 takes it for fake tensors
                assert isinstance(refused(lambda other=other: F.conv_transpose3d(x, weight.to(other))), RuntimeError)
            error = refused(lambda other=other: tritonconv.conv_transpose3d(x, weight.to(other)))
            assert isinstance(error, ArgumentTypeError), repr(error)


@pytest.mark.parametrize("padding", [((0, 1), (1, 0)), ((0, 1), (1, 0), (0,)), ((0, 1), 1, (1, 0)), ((0, -1),) * 3])
def test_crop_pairs_must_be_three_pairs(padding, where):
    args = tensors(X, W, None, where)
    with pytest.raises(ArgumentError, match="padding") as caught:
        tritonconv.conv_transpose3d(*args, padding=padding)
    assert str(-1 if padding[0][1] < 0 else padding) in str(caught.value)


def test_crop_pairs_cut_what_they_say(where):
    args = tensors(X, W, (2,), where)
    assert tritonconv.conv_transpose3d(*args, 2, ((0, 1), [2, 0], (3, 5))).shape == (1, 2, 8, 7, 1)
    with pytest.raises(ArgumentError, match=r"empty, size \(8, 7, 0\).*begin \(0, 2, 3\), end \(1, 0, 6\)"):
        tritonconv.conv_transpose3d(*args, 2, ((0, 1), [2, 0], (3, 6)))


@pytest.mark.parametrize(("stride", "error", "message"), [
    (2**70, ArgumentError, "stride"),  # torch: Overflow when unpacking long long
    (2**15, RuntimeError, "allocate"),  # 8 PB: torch's own refusal
])  # fmt: skip
def test_an_impossible_size_is_refused_before_its_phases_are_listed(monkeypatch, stride, error, message):
    def listed(problem):
        raise AssertionError("stride^3 phases would be listed")

    args = tensors(X, W, None)
    assert isinstance(refused(lambda: F.conv_transpose3d(*args, stride=stride)), (ValueError, RuntimeError))
    monkeypatch.setattr(Problem, "phases", property(listed))
    with pytest.raises(error, match=message):
        tritonconv.conv_transpose3d(*args, stride=stride)


GOOD = {
    "one-element tuples": (X, W, (2,), {"stride": (2,), "padding": (1,), "output_padding": (1,), "dilation": (1,)}),
    "lists": (X, W, (2,), {"stride": [1, 2, 3], "padding": [1, 0, 1], "output_padding": [0, 1, 2]}),
    "torch.Size": (X, W, None, {"stride": torch.Size([2, 1, 2])}),
    "zero-dimensional tensor": (X, W, None, {"stride": torch.tensor(2)}),
    "output_padding < dilation": (X, W, (2,), {"stride": 2, "dilation": 3, "output_padding": 2}),
    "empty batch": ((0, *X[1:]), W, (2,), {"stride": 2}),
    "unbatched": (X[1:], W, (2,), {"stride": 2, "padding": 1}),
    "padding beyond the kernel": (X, (3, 2, 1, 1, 1), (2,), {"padding": 1}),
    "padding beyond the input": (ONE, (3, 2, 1, 1, 1), (2,), {"padding": 1, "output_padding": 2, "dilation": 3}),
    "one voxel": (ONE, (3, 2, 1, 1, 1), None, {}),
    "groups": ((2, 6, 3, 3, 3), (6, 1, 2, 2, 2), (3,), {"groups": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_torch_accepts_is_accepted(name):
    *shapes, hyper = GOOD[name]
    x, weight, bias = (None if s is None else torch.randint(-3, 4, s).double() for s in shapes)
    want = F.conv_transpose3d(x, weight, bias, **hyper)
    for _ in range(2):  # the second call is served from the plan of the first
        got = tritonconv.conv_transpose3d(x, weight, bias, **hyper)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_every_spelling_of_the_integers_is_looked_up(monkeypatch):
    """A call is checked once, and not again because its integers stand in a list."""
    x, weight, bias = tensors(X, W, (2,))
    strides = [
        2,
        (2, 2, 2),
        [2, 2, 2],
        [2],
        torch.Size((2, 2, 2)),
        np.int64(2),
        (np.int32(2),) * 3,
        [np.int64(2), 2, 2],
    ]
    paddings = [
        1,
        [1, 1, 1],
        (np.int64(1),) * 3,
        ((1, 1),) * 3,
        [[1, 1], (1, 1), [1, np.int64(1)]],
        torch.Size((1,) * 3),
    ]
    want = F.conv_transpose3d(x, weight, bias, 2, 1, 1, 1, 2)
    checked = []
    check = arguments.check_shapes
    monkeypatch.setattr(arguments, "check_shapes", lambda *args: checked.append(args[3]) or check(*args))
    dispatch.forget()
    for turn in range(2):
        for stride in strides:
            for padding in paddings:
                y = tritonconv.conv_transpose3d(x, weight, bias, stride, padding, [1, 1, 1], np.int64(1), [2, 2, 2])
                assert torch.equal(y, want)
        assert len(checked) == 9, f"turn {turn}: three ways to write each, once each"


def test_no_output_channels_is_torchs_decision():
    x, weight = torch.ones(X), torch.ones(3, 0, 3, 3, 3)
    assert isinstance(refused(lambda: F.conv_transpose3d(x, weight)), RuntimeError)
    assert isinstance(refused(lambda: tritonconv.conv_transpose3d(x, weight)), RuntimeError)
    meta = tritonconv.conv_transpose3d(x.to("meta"), weight.to("meta"))
    assert meta.shape == F.conv_transpose3d(x.to("meta"), weight.to("meta")).shape == (1, 0, 6, 6, 6)


def test_every_argument_can_be_named():
    x, weight, bias = torch.randn(X), torch.randn(6, 1, 3, 3, 3)[:3], torch.randn(3)
    named = {"input": x, "weight": weight, "bias": bias, "stride": 2, "padding": 1, "output_padding": 1}
    named |= {"groups": 3, "dilation": 1}
    want = F.conv_transpose3d(**named)
    assert torch.equal(tritonconv.conv_transpose3d(**named), want)
    assert torch.equal(tritonconv.conv_transpose3d(*named.values()), want), "and the order is torch's"
