"""ConvTranspose3d and LazyConvTranspose3d as drop-in replacements of torch's layers. Runs on the CPU."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import tritonconv
from tritonconv import ConvTranspose3d, LazyConvTranspose3d

CONSTRUCTIONS = [
    ((2, 3, 3), {}),
    ((4, 6, (3, 4, 5)), {"stride": (1, 2, 3), "padding": 1, "output_padding": (0, 1, 2), "groups": 2}),
    ((4, 6, 2), {"stride": 2, "bias": False}),
    ((3, 3, 3), {"stride": 2, "dilation": (1, 2, 3), "groups": 3, "dtype": torch.float64}),
    ((2, 3, (1, 2, 2)), {"stride": (1, 2, 2), "padding": (0, 1, 0)}),
]
ATTRIBUTES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "dilation", "groups")


def both(args, kwargs, mine=ConvTranspose3d, own=nn.ConvTranspose3d):
    """Our layer and torch's, made at the same seed; and both random states after it."""
    layers, states = [], []
    for cls in (mine, own):
        torch.manual_seed(7)
        layers.append(cls(*args, **kwargs))
        states.append(torch.get_rng_state())
    return *layers, *states


@pytest.fixture
def pair():
    mine, own, *_ = both((2, 3, 3), {"stride": 2, "padding": 1})
    return mine, own, torch.randn(2, 2, 4, 5, 6)


@pytest.mark.parametrize(("args", "kwargs"), CONSTRUCTIONS)
def test_construction_is_torchs(args, kwargs):
    mine, own, my_state, its_state = both(args, kwargs)
    assert torch.equal(my_state, its_state), "the same draws from the generator"
    assert list(mine.state_dict()) == list(own.state_dict())
    for name, value in own.state_dict().items():
        assert torch.equal(mine.state_dict()[name], value)
        assert mine.state_dict()[name].dtype == value.dtype
    for name in (*ATTRIBUTES, "padding_mode", "transposed"):
        assert getattr(mine, name) == getattr(own, name), name
    assert (mine.bias is None) is (own.bias is None)
    assert repr(mine) == repr(own)
    assert isinstance(mine, nn.ConvTranspose3d), "code that asks for torch's class finds it"
    x = torch.randn(2, mine.in_channels, 3, 4, 5, dtype=mine.weight.dtype)
    torch.testing.assert_close(mine(x), own(x))
    torch.testing.assert_close(mine(x[0]), own(x[0]))


def test_reset_parameters_draws_as_torch_does(pair):
    mine, own, _ = pair
    before = mine.weight.detach().clone()
    for layer in (mine, own):
        torch.manual_seed(11)
        layer.reset_parameters()
    assert not torch.equal(mine.weight, before)
    assert torch.equal(mine.weight, own.weight)
    assert torch.equal(mine.bias, own.bias)


@pytest.mark.parametrize(("args", "kwargs"), [
    ((3, 4, 3), {"groups": 2}), ((4, 3, 3), {"groups": 2}), ((4, 4, 3), {"groups": 0}),
    ((4, 4, 3), {"padding_mode": "reflect"}), ((4, 4, 3), {"padding_mode": "nonsense"}),
])  # fmt: skip
def test_a_wrong_construction_is_refused(args, kwargs):
    with pytest.raises(ValueError) as own:  # noqa: PT011
        nn.ConvTranspose3d(*args, **kwargs)
    with pytest.raises(ValueError) as mine:  # noqa: PT011
        ConvTranspose3d(*args, **kwargs)
    assert str(mine.value).replace("'", "") == str(own.value).replace("'", "")


def test_a_padding_mode_set_later_is_refused_by_the_call(pair):
    for layer in pair[:2]:
        layer.padding_mode = "circular"
        with pytest.raises(ValueError, match=r"padding.mode"):
            layer(pair[2])


@pytest.mark.parametrize("size", [[7, 9, 11], [8, 10, 12], [7, 10, 11], (8, 9, 12), torch.Size([2, 3, 8, 9, 12])])
def test_output_size_picks_the_output_padding(pair, size):
    mine, own, x = pair
    assert mine(x, output_size=size).shape[2:] == tuple(size)[-3:]
    torch.testing.assert_close(mine(x, output_size=size), own(x, output_size=size))
    torch.testing.assert_close(mine(x, size), own(x, size))
    if len(size) == 3:
        torch.testing.assert_close(mine(x[0], output_size=size), own(x[0], output_size=size))


@pytest.mark.parametrize("size", [[6, 9, 11], [9, 9, 11], [8, 8], [8, 8, 8, 8], [1, 2, 3, 8, 9, 11]])
def test_an_output_size_out_of_reach_is_refused(pair, size):
    mine, own, x = pair
    with pytest.raises(ValueError, match=r"output_size|output size"):
        own(x, output_size=size)
    with pytest.raises(ValueError, match=r"output_size|output size"):
        mine(x, output_size=size)


def test_output_padding_of_the_constructor_is_used_where_no_size_is_given():
    mine, own, *_ = both((2, 3, 3), {"stride": 3, "output_padding": (0, 1, 2)})
    x = torch.randn(1, 2, 2, 2, 2)
    assert mine(x).shape == (1, 3, 6, 7, 8)
    assert mine(x, output_size=[6, 6, 6]).shape == (1, 3, 6, 6, 6)
    torch.testing.assert_close(mine(x), own(x))


def test_errors_of_the_call_name_the_shapes(pair):
    mine, _, _ = pair
    with pytest.raises(tritonconv.ArgumentError, match=r"expects 2 input channels .* x has 5 .*\(1, 5, 3, 3, 3\)"):
        mine(torch.randn(1, 5, 3, 3, 3))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict", "from torch's state_dict"])
def test_copies_compute_the_same(pair, way):
    mine, own, x = pair
    if way == "deepcopy":
        other = copy.deepcopy(mine)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(mine))
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(mine, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = ConvTranspose3d(2, 3, 3, stride=2, padding=1)
        assert not torch.equal(other.weight, mine.weight)
        other.load_state_dict((own if "torch" in way else mine).state_dict(), strict=True)
    assert type(other) is ConvTranspose3d
    assert other.weight is not mine.weight
    assert other.weight.data_ptr() != mine.weight.data_ptr()
    assert torch.equal(other(x), mine(x))
    own.load_state_dict(other.state_dict(), strict=True)  # and back


def test_training_step_equals_torchs(pair):
    mine, own, x = pair
    for layer in (mine, own):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(mine.weight, own.weight)
    torch.testing.assert_close(mine.bias, own.bias)


@pytest.mark.parametrize("way", ["weight_norm", "spectral_norm", "parametrize"])
def test_parametrizations_treat_it_as_a_transposed_convolution(pair, way):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    mine, own, x = pair
    for layer in (mine, own):
        torch.manual_seed(3)
        if way == "weight_norm":
            parametrizations.weight_norm(layer, dim=1)
            assert layer.parametrizations.weight.original0.shape == (1, 3, 1, 1, 1)
        elif way == "spectral_norm":
            parametrizations.spectral_norm(layer)
            assert layer.parametrizations.weight[0].dim == 1, "torch asks isinstance(module, ConvTranspose3d)"
        else:
            parametrize.register_parametrization(layer, "weight", Twice())
    torch.testing.assert_close(mine(x), own(x))
    mine(x).sum().backward()
    own(x).sum().backward()
    for (name, got), (other, want) in zip(mine.named_parameters(), own.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(got.grad, want.grad)


def test_moved_and_converted(pair):
    mine, own, x = pair
    torch.testing.assert_close(mine.double()(x.double()), own.double()(x.double()))
    last = mine.float().to(memory_format=torch.channels_last_3d)
    assert last.weight.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(last(x), own.float()(x))
    frozen = mine.requires_grad_(False).eval()
    assert not frozen(x).requires_grad


def test_meta_device_and_to_empty():
    mine = ConvTranspose3d(4, 6, 3, stride=2, padding=1, output_padding=1, device="meta")
    y = mine(torch.empty(2, 4, 3, 4, 5, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 6, 6, 8, 10)
    own = nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1, output_padding=1)
    real = mine.to_empty(device="cpu")
    real.load_state_dict(own.state_dict())
    x = torch.randn(1, 4, 2, 2, 2)
    torch.testing.assert_close(real(x), own(x))
    with torch.device("meta"):
        assert ConvTranspose3d(2, 3, 3).weight.is_meta


# ------------------------------------------------------------------ lazy


def test_a_lazy_layer_becomes_an_ordinary_one():
    mine, own, *_ = both((6, (3, 2, 3)), {"stride": 2, "groups": 2}, LazyConvTranspose3d, nn.LazyConvTranspose3d)
    assert repr(mine) == repr(own)
    assert mine.has_uninitialized_params()
    x = torch.randn(2, 4, 2, 3, 2)
    results = []
    for layer in (mine, own):
        torch.manual_seed(5)
        results.append(layer(x))
    torch.testing.assert_close(*results)
    assert type(mine) is ConvTranspose3d
    assert mine.in_channels == 4
    assert mine.weight.shape == (4, 3, 3, 2, 3)
    assert torch.equal(mine.weight, own.weight)
    assert repr(mine) == repr(own)
    torch.testing.assert_close(mine(x), own(x))
    with pytest.raises(tritonconv.ArgumentError, match="expects 4 input channels"):
        mine(torch.randn(2, 6, 2, 3, 2))


@pytest.mark.parametrize("batched", [True, False])
def test_a_lazy_layer_takes_output_size_and_unbatched_input(batched):
    mine = LazyConvTranspose3d(3, 3, stride=2, padding=1)
    x = torch.randn(2, 4, 2, 2, 2) if batched else torch.randn(4, 2, 2, 2)
    assert mine(x, output_size=[4, 3, 4]).shape[-4:] == (3, 4, 3, 4)
    assert mine.in_channels == 4


def test_lazy_state_dicts():
    ready = ConvTranspose3d(4, 6, 3, stride=2)
    lazy = LazyConvTranspose3d(6, 3, stride=2)
    lazy.load_state_dict(ready.state_dict())  # the shapes come from the state
    x = torch.randn(1, 4, 2, 2, 2)
    assert torch.equal(lazy(x), ready(x))
    assert type(lazy) is ConvTranspose3d
    waiting = LazyConvTranspose3d(6, 3, stride=2)
    other = LazyConvTranspose3d(6, 3, stride=2)
    other.load_state_dict(waiting.state_dict())
    assert other.has_uninitialized_params()
    assert type(copy.deepcopy(waiting)) is LazyConvTranspose3d
    assert pickle.loads(pickle.dumps(waiting)).has_uninitialized_params()


def test_lazy_without_bias_and_at_another_precision():
    lazy = LazyConvTranspose3d(3, 2, bias=False, dtype=torch.float64)
    assert lazy(torch.randn(1, 2, 2, 2, 2, dtype=torch.float64)).dtype == torch.float64
    assert lazy.bias is None
    assert list(lazy.state_dict()) == ["weight"]
