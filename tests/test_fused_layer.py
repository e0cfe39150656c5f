"""FusedConvTranspose3d: torch's layer with an activation, and a residual in its call. Runs on the CPU."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import tritonconv
from tritonconv import ArgumentError, ArgumentTypeError, FusedConvTranspose3d

ARGUMENTS = (3, 4, 3)
KEYWORDS = {"stride": 2, "padding": 1}
MODULES = {
    None: nn.Identity, "relu": nn.ReLU, ("leaky_relu", 0.2): lambda: nn.LeakyReLU(0.2), "sigmoid": nn.Sigmoid,
    ("prelu", 4): lambda: nn.PReLU(4), "prelu": nn.PReLU, ("gelu", "tanh"): lambda: nn.GELU("tanh"),
}  # fmt: skip


@pytest.fixture(params=MODULES, ids=str)
def pair(request):
    """Our layer; torch's layer and its activation."""
    layers = []
    for make in (FusedConvTranspose3d, nn.ConvTranspose3d):
        torch.manual_seed(3)
        more = {"activation": request.param} if make is FusedConvTranspose3d else {}
        layers.append(make(*ARGUMENTS, **KEYWORDS, **more))
    return *layers, MODULES[request.param]()


def inputs():
    return torch.randn(2, 3, 2, 1, 3), torch.randn(2, 4, 3, 1, 5)


def close(found, want):
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_it_is_torchs_layer_and_the_operations_behind(pair):
    mine, own, activation = pair
    x, residual = inputs()
    close(mine(x), activation(own(x)))
    close(mine(x, residual), activation(own(x) + residual))
    close(mine(x[0], residual[0]), activation(own(x[:1]) + residual[:1])[0])
    close(mine(x, output_size=[4, 2, 6]), activation(own(x, output_size=[4, 2, 6])))
    assert list(mine.state_dict()) == list(own.state_dict()) + ["slopes"] * (mine.slopes is not None)
    assert isinstance(mine, nn.ConvTranspose3d)
    mine.load_state_dict(own.state_dict(), strict=mine.slopes is None)
    leaves = [*mine.parameters()]
    found = torch.autograd.grad(mine(x, residual).sum(), leaves)
    want = torch.autograd.grad(activation(own(x) + residual).sum(), [*own.parameters(), *activation.parameters()])
    for one, other in zip(found, want, strict=True):
        close(one, other)


def test_copies_and_files_keep_it(pair):
    mine, *_ = pair
    x, residual = inputs()
    want = mine(x, residual)
    file = io.BytesIO()
    torch.save(mine, file)
    file.seek(0)
    for again in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), torch.load(file, weights_only=False)):
        assert type(again) is FusedConvTranspose3d and repr(again) == repr(mine)
        assert torch.equal(again(x, residual), want)


def test_its_repr_and_its_slopes():
    plain = nn.ConvTranspose3d(*ARGUMENTS, **KEYWORDS)
    layer = FusedConvTranspose3d(*ARGUMENTS, **KEYWORDS, activation=("prelu", 4), rounding="torch")
    text = repr(plain).replace("ConvTranspose3d(", "FusedConvTranspose3d(", 1)
    assert repr(layer) == f"{text[:-1]}, activation=('prelu', 4), rounding='torch')"
    assert repr(FusedConvTranspose3d(*ARGUMENTS, **KEYWORDS)) == text
    nn.init.zeros_(layer.slopes)
    layer.reset_parameters()
    assert layer.slopes.tolist() == [0.25] * 4
    half = FusedConvTranspose3d(*ARGUMENTS, activation="prelu", dtype=torch.bfloat16)
    assert half.slopes.dtype == torch.bfloat16 and half.slopes.shape == (1,)


def test_refusals():
    for activation, kind, text in (
        ("elu", ArgumentError, "got 'elu'"),
        (("prelu", 3), ArgumentError, "1 slope or out_channels=4, got 3"),
        (("prelu", 1, 2), ArgumentError, "got None"),
        (nn.ReLU(), ArgumentTypeError, "a name"),
    ):
        with pytest.raises(kind, match=text):
            FusedConvTranspose3d(*ARGUMENTS, activation=activation)
    with pytest.raises(ArgumentError, match="got 'up'"):
        FusedConvTranspose3d(*ARGUMENTS, rounding="up")
    layer, (x, residual) = FusedConvTranspose3d(*ARGUMENTS, **KEYWORDS, activation="relu"), inputs()
    with pytest.raises(ArgumentError, match="residual expects the shape of y"):
        layer(x, residual[:1])
    with pytest.raises(ArgumentTypeError, match=r"torch\.jit\.trace"):
        torch.jit.script(layer)


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = FusedConvTranspose3d(*ARGUMENTS, **KEYWORDS, activation="relu")

    def forward(self, x, skip):
        return self.up(x, skip)


def test_tools_see_a_layer():
    stage, (x, residual) = Stage(), inputs()
    graph = torch.fx.symbolic_trace(stage)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["up"]
    assert torch.equal(graph(x, residual), stage(x, residual))
    program = torch.export.export(stage, (x, residual)).module()
    close(program(x, residual), stage(x, residual))
    report = tritonconv.convert(stage)
    assert report.left == (("up", "already tritonconv's"),)
    assert tritonconv.restore(stage).replaced == () and type(stage.up) is FusedConvTranspose3d
