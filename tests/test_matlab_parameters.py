"""The parameters of a TransposedConv3dLayer: made at the first call, MATLAB's initializers, factors in training."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tritonconv import TransposedConv3dLayer, param_groups

Layer = TransposedConv3dLayer


def test_channels_are_taken_from_the_first_input():
    layer = Layer(3, 4, stride=2)
    assert layer.num_channels == "auto"
    assert layer.Weights is None
    assert layer.Bias is None
    weight = layer.weight
    assert layer(torch.randn(2, 6, 2, 2, 2)).shape == (2, 4, 5, 5, 5)
    assert layer.num_channels == 6
    assert layer.weight is weight
    assert layer.weight.shape == (6, 4, 3, 3, 3)
    with pytest.raises(ValueError, match="NumChannels is 6"):
        layer(torch.randn(2, 5, 2, 2, 2))


def broken(size):
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("arguments", "x"),
    [
        ({"bias_initializer": broken}, torch.zeros(1, 2, 3, 3, 3)),
        ({"bias_initializer": lambda size: np.zeros(size[::-1])}, torch.zeros(1, 2, 3, 3, 3)),
        ({"cropping": 3}, torch.zeros(1, 2, 3, 3, 3)),
        ({}, torch.zeros(1, 2, 3, 3, 3, dtype=torch.float64)),
        ({}, torch.zeros(1, 2, 3, 3, 3, device="meta")),
        ({}, torch.zeros(1, 0, 3, 3, 3)),
        ({}, torch.zeros(3, 3, 3)),
    ],
)
def test_a_failed_first_call_leaves_the_layer_uninitialized(arguments, x):
    layer = Layer(3, 4, **arguments)
    with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
        layer(x)
    assert layer.num_channels == "auto"
    assert is_lazy(layer.weight)
    assert is_lazy(layer.bias)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_pickles(twin):
    x = torch.randn(1, 2, 3, 3, 3)
    layer = Layer(3, 4, name="up", weight_l2_factor=2)
    other = twin(layer)
    y = other(x)
    assert layer.num_channels == "auto"
    assert other.num_channels == 2
    assert torch.equal(twin(other)(x), y)
    assert (other.name, other.weight_l2_factor) == ("up", 2)


def test_state_dict_between_both_states():
    x = torch.randn(1, 2, 3, 3, 3)
    ready = Layer(3, 4, num_channels=2)
    for layer in (Layer(3, 4), Layer(3, 4, bias=np.ones(4))):
        assert list(layer.state_dict()) == list(ready.state_dict())
        layer.load_state_dict(ready.state_dict())
        assert layer.num_channels == 2
        assert torch.equal(layer(x), ready(x))
    empty = Layer(3, 4)
    empty.load_state_dict(Layer(3, 4).state_dict())
    assert empty.num_channels == "auto"
    before = copy.deepcopy(ready.state_dict())
    with pytest.raises(RuntimeError, match="uninitialized"):
        ready.load_state_dict(empty.state_dict())
    assert all(torch.equal(before[name], values) for name, values in ready.state_dict().items())
    wrong = Layer(3, 5)
    with pytest.raises(ValueError, match=r"expects \(2, 5, 3, 3, 3\), got \(2, 4, 3, 3, 3\)"):
        wrong.load_state_dict(ready.state_dict())
    assert is_lazy(wrong.weight)
    assert is_lazy(wrong.bias)


def test_an_uninitialized_layer_moves_trains_and_keeps_its_flags():
    layer = Layer(3, 4).double()
    layer.weight.requires_grad = False
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(1, 2, 3, 3, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert layer.weight.dtype is torch.float64
    assert layer.weight.grad is None
    assert (layer.bias != 0).all()
    with torch.autocast("cpu"):
        assert Layer(3, 4)(torch.randn(1, 2, 3, 3, 3)).dtype is torch.bfloat16
    layer = Layer(3, 4)
    with torch.inference_mode():
        layer(torch.randn(1, 2, 3, 3, 3))
    layer(torch.randn(1, 2, 3, 3, 3)).sum().backward()
    with pytest.raises(ValueError, match="DataParallel"):
        Layer(3, 4)._replicate_for_data_parallel()
    assert type(layer._replicate_for_data_parallel()) is Layer


def drawn(rule, seed=1):
    torch.manual_seed(seed)
    layer = Layer((5, 4, 3), 48, num_channels=32, weights_initializer=rule)
    return layer.weight.detach().double().flatten(), 60 * 32, 60 * 48


def test_glorot_and_he_have_matlabs_variance():
    weights, num_in, num_out = drawn("glorot")
    bound = math.sqrt(6 / (num_in + num_out))
    assert 0.99 * bound < weights.abs().max() <= bound * (1 + 1e-6)
    assert math.isclose(weights.var(), 2 / (num_in + num_out), rel_tol=0.02)
    torch.manual_seed(1)
    assert torch.equal(Layer((5, 4, 3), 48, num_channels=32).weight.detach().double().flatten(), weights)
    weights, num_in, _ = drawn("he")
    assert math.isclose(weights.var(), 2 / num_in, rel_tol=0.02)
    assert math.isclose((weights / weights.std()).pow(4).mean(), 3, rel_tol=0.05)


def test_plain_rules():
    weights, *_ = drawn("narrow-normal")
    assert math.isclose(weights.std(), 0.01, rel_tol=0.02)
    assert not drawn("zeros")[0].any()
    assert (drawn("ones")[0] == 1).all()
    torch.manual_seed(0)
    make = lambda rule: Layer(1, 2000, num_channels=1, bias_initializer=rule).bias.detach()  # noqa: E731
    assert math.isclose(make("narrow-normal").std(), 0.01, rel_tol=0.1)
    assert not make("zeros").any()
    assert (make("ones") == 1).all()
    assert not Layer(1, 4, num_channels=1).bias.any()


def test_functions_get_matlabs_size():
    sizes = []

    def count(size):
        sizes.append(size)
        return np.arange(math.prod(size)).reshape(size)

    layer = Layer((2, 3, 4), 5, weights_initializer=count, bias_initializer=count)
    layer(torch.zeros(1, 6, 2, 2, 2))
    assert sizes == [(2, 3, 4, 5, 6), (1, 1, 1, 5)]
    assert np.array_equal(layer.Weights, np.arange(720).reshape(sizes[0]))
    assert layer.bias.tolist() == [0, 1, 2, 3, 4]


def test_preset_values_win_until_they_are_reset():
    layer = Layer(2, 3, weights=np.full((2, 2, 2, 3, 1), 7), bias=[1, 2, 3], weights_initializer="ones")
    assert (layer.weight == 7).all()
    assert layer.bias.tolist() == [1, 2, 3]
    layer.reset_parameters()
    assert (layer.weight == 1).all()
    assert not layer.bias.any()


def rates(groups):
    return [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups]


def test_one_step_uses_the_factors():
    factors = {"weight_learn_rate_factor": 2, "bias_learn_rate_factor": 0.5, "weight_l2_factor": 3, "bias_l2_factor": 4}
    layer = Layer(2, 3, num_channels=2, **factors)
    optimizer = torch.optim.SGD(layer.param_groups(0.1, 0.01))
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    layer(torch.randn(1, 2, 2, 2, 2)).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), weight - 0.2 * (layer.weight.grad + 0.03 * weight))
    torch.testing.assert_close(layer.bias.detach(), bias - 0.05 * (layer.bias.grad + 0.04 * bias))


def test_groups_of_a_whole_model():
    first, second = Layer(2, 3, num_channels=2), Layer(2, 3, num_channels=3, weight_learn_rate_factor=10)
    model = nn.Sequential(first, nn.Conv3d(3, 3, 1), second, first)
    groups = param_groups(model, 0.1, 0.01)
    assert rates(groups) == [(0.1, 0.01, 3), (0.1, 0, 2), (1.0, 0.01, 1)]
    assert groups[0]["params"][0] is first.weight
    assert groups[1]["params"][1] is second.bias
    assert rates(param_groups(model, 0.1, 0)) == [(0.1, 0, 5), (1.0, 0, 1)]
    nn.utils.parametrizations.weight_norm(second)
    assert rates(param_groups(model, 0.1, 0.01)) == [(0.1, 0.01, 3), (0.1, 0, 2), (1.0, 0.01, 2)]


def test_groups_refuse_what_is_ambiguous_or_missing():
    first, second = Layer(2, 3, num_channels=3), Layer(2, 3, num_channels=3)
    first.weight = second.weight
    assert rates(param_groups(nn.Sequential(first, second), 1, 1)) == [(1, 1, 1), (1, 0, 2)]
    second.weight_l2_factor = 5
    with pytest.raises(ValueError, match="'0' and '1' share a parameter"):
        param_groups(nn.Sequential(first, second), 1, 1)
    with pytest.raises(ValueError, match=r"0\.weight has no values yet; run one forward"):
        param_groups(nn.Sequential(Layer(2, 3)), 1, 1)
    with pytest.raises(ValueError, match="lr"):
        first.param_groups(-1, 0)


def test_factors_by_matlabs_names():
    layer = Layer(2, 3, num_channels=2)
    assert [layer.get_learn_rate_factor(name) for name in ("Weights", "Bias")] == [1, 1]
    assert [layer.get_l2_factor(name) for name in ("Weights", "Bias")] == [1, 0]
    assert layer.set_learn_rate_factor("Bias", 2).set_l2_factor("Weights", np.float32(0.5)) is layer
    assert (layer.bias_learn_rate_factor, layer.weight_l2_factor) == (2, 0.5)
    with pytest.raises(ValueError, match="'Weights' or 'Bias', got 'weight'"):
        layer.get_l2_factor("weight")
    with pytest.raises(ValueError, match="weight_l2_factor"):
        layer.weight_l2_factor = -1
    assert layer.weight_l2_factor == 0.5
