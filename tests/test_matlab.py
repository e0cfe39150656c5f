"""MATLAB's rules for transposedConv3dLayer, against a NumPy scatter in MATLAB's own axis order.

Values are small integers, so every sum is exact and outputs are compared with no tolerance.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tritonconv.matlab.layer import TransposedConv3dLayer

Layer = TransposedConv3dLayer
RNG = np.random.default_rng(0)


def integers(*size):
    return RNG.integers(-3, 4, size).astype(np.float64)


def scatter(x, weights, bias, stride, begin, end, append=(0, 0, 0)):
    """x (h, w, d, c, n), weights (fh, fw, fd, F, c), bias (F,) -> y (h, w, d, F, n): each voxel stamps the filter."""
    filters = weights.shape[:3]
    full = [(size - 1) * s + f for size, s, f in zip(x.shape[:3], stride, filters, strict=True)]
    y = np.zeros((*full, weights.shape[3], x.shape[4]))
    for voxel in itertools.product(*map(range, x.shape[:3])):
        place = tuple(slice(i * s, i * s + f) for i, s, f in zip(voxel, stride, filters, strict=True))
        y[place] += np.einsum("hwdfc,cn->hwdfn", weights, x[voxel])
    y = y[tuple(slice(b, size - e) for b, e, size in zip(begin, end, full, strict=True))]
    return np.pad(y, [*((0, planes) for planes in append), (0, 0), (0, 0)]) + bias.reshape(1, 1, 1, -1, 1)


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(4, 3, 0, 1, 2))).float()


def check(size, filters, stride, cropping, begin, end, append=(0, 0, 0), channels=2, num_filters=3, n=2):
    x, weights, bias = integers(*size, channels, n), integers(*filters, num_filters, channels), integers(num_filters)
    layer = Layer(filters, num_filters, stride=stride, cropping=cropping, weights=weights, bias=bias)
    want = to_torch(scatter(x, weights, bias, stride, begin, end, append))
    got = layer(to_torch(x))
    assert got.shape == want.shape
    assert torch.equal(got, want)
    assert layer.cropping_size == (tuple(begin), tuple(end))
    return got


def same(filter_size, stride):
    surplus = max(0, filter_size - stride)
    return surplus // 2, surplus - surplus // 2, max(0, stride - filter_size)


@pytest.mark.parametrize("stride", range(1, 5))
@pytest.mark.parametrize("filter_size", range(1, 6))
def test_same_gives_stride_times_the_input(filter_size, stride):
    begin, end, append = same(filter_size, stride)
    got = check((2, 3, 2), (filter_size,) * 3, (stride,) * 3, "same", [begin] * 3, [end] * 3, [append] * 3)
    assert got.shape[2:] == (2 * stride, 3 * stride, 2 * stride)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.tuples(*[st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))] * 3))
def test_same_treats_each_axis_alone(axes):
    size, filters, stride = zip(*axes, strict=True)
    begin, end, append = zip(*(same(f, s) for _, f, s in axes), strict=True)
    check(size, filters, stride, "same", begin, end, append, channels=1, n=1)


@pytest.mark.parametrize(
    ("cropping", "begin", "end"),
    [
        (0, (0, 0, 0), (0, 0, 0)),
        (2, (2, 2, 2), (2, 2, 2)),
        ([1, 2, 0], (1, 2, 0), (1, 2, 0)),
        ([[1, 0, 2], [0, 2, 1]], (1, 0, 2), (0, 2, 1)),
        (np.array([[0, 0, 0], [1, 1, 1]]), (0, 0, 0), (1, 1, 1)),
        (torch.tensor([[3, 0, 0], [0, 0, 3]]), (3, 0, 0), (0, 0, 3)),
        (np.array([[2.0, 1.0, 0.0]]), (2, 1, 0), (2, 1, 0)),
    ],
)
@pytest.mark.parametrize(
    ("filters", "stride"), [((3, 3, 3), (2, 2, 2)), ((4, 2, 5), (2, 1, 3)), ((1, 3, 2), (3, 2, 1))]
)
def test_cropping(filters, stride, cropping, begin, end):
    size = (4, 5, 4)
    full = [(i - 1) * s + f for i, s, f in zip(size, stride, filters, strict=True)]
    assert all(f > b + e for f, b, e in zip(full, begin, end, strict=True))
    check(size, filters, stride, cropping, begin, end)


@pytest.mark.parametrize(
    "two", [2, 2.0, np.int8(2), np.float32(2), np.array(2), np.array([[2.0]]), torch.tensor(2), [2, 2, 2], (2, 2.0, 2)]
)
def test_numbers_in_every_form(two):
    layer = Layer(two, 5, stride=two, cropping=two, num_channels=4)
    assert layer.filter_size == layer.stride == (2, 2, 2)
    assert layer.cropping_size == ((2, 2, 2), (2, 2, 2))
    assert all(type(number) is int for number in layer.filter_size)
    if not isinstance(two, (list, tuple)):
        assert Layer(1, two, num_channels=two).weight.shape[:2] == (2, 2)


@pytest.mark.parametrize("value", [0, -1, 2.5, math.inf, math.nan, [3, 3], [1, 2, 3, 4], True, np.True_, "3", None, 2j])
@pytest.mark.parametrize("argument", ["filter_size", "num_filters", "stride", "num_channels"])
def test_refuses_what_is_no_positive_size(argument, value):
    arguments = {"filter_size": 3, "num_filters": 2, argument: value}
    with pytest.raises((ValueError, TypeError), match=argument):
        Layer(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"cropping": -1}, ValueError),
        ({"cropping": 0.5}, ValueError),
        ({"cropping": "valid"}, ValueError),
        ({"cropping": [1, 2]}, ValueError),
        ({"cropping": np.zeros((3, 2))}, ValueError),
        ({"cropping": [0, True, 0]}, TypeError),
        ({"num_channels": "all"}, ValueError),
        ({"weights_initializer": "xavier"}, ValueError),
        ({"weights_initializer": 0}, TypeError),
        ({"bias_initializer": "glorot"}, ValueError),
        ({"weight_learn_rate_factor": -1}, ValueError),
        ({"bias_learn_rate_factor": math.inf}, ValueError),
        ({"weight_l2_factor": "1"}, TypeError),
        ({"bias_l2_factor": False}, TypeError),
        ({"weights": np.zeros((3, 3, 3, 2, 1)), "num_channels": 4}, ValueError),
        ({"weights": np.zeros((3, 3, 3, 4, 1))}, ValueError),
        ({"weights": np.zeros((3, 3, 3, 2, 0))}, ValueError),
        ({"weights": np.zeros((3, 3, 3, 2, 1), complex)}, TypeError),
        ({"weights": "glorot"}, TypeError),
        ({"bias": np.zeros((1, 1, 1, 3))}, ValueError),
        ({"bias": np.zeros(2, bool)}, TypeError),
        ({"name": 3}, TypeError),
    ],
)
def test_refuses(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        Layer(3, 2, **arguments)


def test_a_refused_input_is_named_with_both_values():
    layer = Layer(2, 1, cropping=2, num_channels=4)
    with pytest.raises(ValueError, match="NumChannels is 4 but the input has 3 channels"):
        layer(torch.zeros(1, 3, 9, 9, 9))
    with pytest.raises(ValueError, match=r"empty.*at least \(4, 4, 4\), got \(4, 3, 4\)"):
        layer(torch.zeros(1, 4, 4, 3, 4))
    assert layer(torch.zeros(1, 4, 4, 4, 4)).shape == (1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"\(n, c, h, w, d\)"):
        layer(torch.zeros(9, 9, 9))


def test_unbatched_input_and_empty_batch():
    layer = Layer([3, 2, 1], 5, stride=2, cropping="same")
    x = torch.randn(3, 2, 3, 4)
    assert torch.equal(layer(x), layer(x[None])[0])
    assert layer(torch.zeros(0, 3, 2, 3, 4)).shape == (0, 5, 4, 6, 8)


def test_the_layer_is_recorded_by_torchs_tracers():
    layer = Layer(3, 5, stride=2, cropping=1, num_channels=2)
    x = torch.randn(1, 2, 2, 3, 2)
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))
    compiled = torch.compile(Layer(3, 5, stride=2, cropping="same", weights_initializer="ones"), backend="eager")
    assert compiled(x).shape == (1, 5, 4, 6, 4)


def test_gradients_through_crop_and_appended_planes():
    layer = Layer((3, 1, 2), 2, stride=2, cropping="same", num_channels=2, bias_initializer="ones").double()
    x = torch.randn(1, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    call = lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, layer.weight, layer.bias))


def test_weights_are_permuted_and_not_flipped():
    weights = np.zeros((3, 3, 3, 1, 1))
    weights[0, 1, 2] = 1
    y = Layer(3, 1, weights=weights)(torch.ones(1, 1, 1, 1, 1))
    assert y.nonzero().tolist() == [[0, 0, 0, 1, 2]]
    weights = integers(2, 3, 4, 5, 6)
    layer = Layer((2, 3, 4), 5, weights=weights)
    assert torch.equal(layer.weight.detach(), torch.from_numpy(weights).permute(4, 3, 0, 1, 2).float())
    assert layer.weight.is_contiguous()


def test_matlab_arrays_read_and_write_the_parameters():
    layer = Layer(2, 3, num_channels=4)
    weight, bias = layer.weight, layer.bias
    weights, values = integers(2, 2, 2, 3, 4), integers(1, 1, 1, 3)
    layer.Weights, layer.Bias = weights[::-1], values.tolist()
    assert layer.weight is weight
    assert layer.bias is bias
    assert np.array_equal(layer.Weights, weights[::-1])
    assert np.array_equal(layer.Bias, values)
    assert not layer.Weights.requires_grad
    assert not layer.Bias.requires_grad
    for name, wrong in (("Weights", integers(2, 2, 2, 3, 5)), ("Weights", integers(2, 2, 2, 4, 3)), ("Bias", [1, 2])):
        with pytest.raises(ValueError, match="expects size"):
            setattr(layer, name, wrong)
    weights[:] = 9
    assert not (layer.weight == 9).any()


def test_matlab_drops_trailing_axes_of_length_one():
    layer = Layer(2, 1, weights=np.ones((2, 2, 2)), bias=np.ones((1, 1)))
    assert layer.weight.shape == (1, 1, 2, 2, 2)
    assert layer.bias.shape == (1,)


def test_assigning_weights_settles_the_channels_and_reaches_a_parametrized_weight():
    layer = Layer(2, 3)
    layer.Weights = np.ones((2, 2, 2, 3, 4))
    assert layer.num_channels == 4
    assert layer.Bias is None
    assert (layer(torch.ones(1, 4, 1, 1, 1)) == 4).all()
    nn.utils.parametrizations.weight_norm(layer)
    layer.Weights = np.full((2, 2, 2, 3, 4), 2.0)
    assert torch.allclose(layer.weight, torch.tensor(2.0))


def test_properties_and_display():
    layer = Layer([4, 3, 2], 32, cropping="same", stride=2, name="up1")
    assert (layer.filter_size, layer.num_filters, layer.num_channels) == ((4, 3, 2), 32, "auto")
    assert (layer.stride, layer.cropping_mode, layer.name) == ((2, 2, 2), "same", "up1")
    assert Layer(1, 1).cropping_mode == "manual"
    assert Layer(1, 1).name == ""
    with pytest.raises(AttributeError):
        layer.stride = 3
    assert " ".join(repr(layer).split()) == (
        "TransposedConv3dLayer with properties: Name: 'up1' "
        "Hyperparameters FilterSize: [4 3 2] NumChannels: 'auto' NumFilters: 32 Stride: [2 2 2] "
        "CroppingMode: 'same' CroppingSize: [1 0 0; 1 1 0] Learnable Parameters Weights: [] Bias: []"
    )
    layer(torch.zeros(1, 5, 1, 1, 1))
    assert "NumChannels: 5" in repr(layer)
    assert "Weights: [4x3x2x32x5 float32]" in repr(layer)
