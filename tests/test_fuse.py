"""``fuse(model)``: batch norm, residual and activation in the call of the transposed convolution. Runs on the CPU."""

from __future__ import annotations

import copy
import io
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap
from torch.nn.utils import parametrizations

import tritonconv
from tritonconv import ArgumentTypeError, ConvTranspose3d, FusedConvTranspose3d
from tritonconv.folding import FusedForward

KEYWORDS = {"kernel_size": 2, "stride": 2}
ACTIVATIONS = (
    nn.ReLU, lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(0.2), nn.PReLU, lambda: nn.PReLU(4), nn.Sigmoid,
    nn.Tanh, nn.SiLU, nn.GELU, lambda: nn.GELU("tanh"),
)  # fmt: skip


def trained(norm: nn.Module) -> nn.Module:
    """With statistics, and a weight and a bias where it has any."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 2)
    return norm


def up(*behind: nn.Module, kind=ConvTranspose3d, **more) -> nn.Sequential:
    return nn.Sequential(kind(4, 4, **KEYWORDS, **more), *behind)


class Decoder(nn.Module):
    """Sequentials, functions, methods, residuals, and an argument that is seldom given."""

    def __init__(self):
        super().__init__()
        self.first = up(trained(nn.BatchNorm3d(4)), bias=False)
        self.second = nn.ModuleList([up(trained(nn.BatchNorm3d(4)), nn.Dropout(0.5), nn.PReLU())])
        self.third = ConvTranspose3d(4, 4, **KEYWORDS, groups=2)
        self.norm = trained(nn.BatchNorm3d(4))
        self.last = nn.ConvTranspose3d(4, 1, **KEYWORDS)

    def forward(self, x, skip, mask=None):
        y = F.relu(self.first(x) + skip, inplace=True)
        y = self.second[0](y)
        y = self.norm(self.third(y))
        y += 1
        y = self.last(y).sigmoid()
        return y if mask is None else y * mask


def inputs(dtype=torch.float32):
    return torch.randn(2, 4, 1, 2, 1, dtype=dtype), torch.randn(2, 4, 2, 4, 2, dtype=dtype)


def near(found, want, dtype=None):
    tolerance = 16 * torch.finfo(dtype or want.dtype).eps
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance * (1 + want.abs().max().item()))


def fused_forwards(model) -> list[str]:
    return [name for name, each in model.named_modules() if isinstance(vars(each).get("forward"), FusedForward)]


@pytest.fixture(autouse=True)
def _one_thread():
    """A second one only waits where tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------ values


def test_sequentials():
    """Every activation, with and without a batch norm and a bias, in both formats and three dtypes."""
    for dtype, turn in product((torch.float32, torch.float64, torch.bfloat16), range(len(ACTIVATIONS))):
        memory_format = (torch.contiguous_format, torch.channels_last_3d)[turn % 2]
        x = inputs(dtype)[0].contiguous(memory_format=memory_format)
        for norm, bias in product((True, False), repeat=2):
            behind = [trained(nn.BatchNorm3d(4, affine=turn % 3 > 0))] * norm + [ACTIVATIONS[turn]()]
            model = up(*behind, bias=bias, groups=1 + turn % 2).to(dtype, memory_format=memory_format).eval()
            want = model(x)
            report = tritonconv.fuse(model)
            assert [name for name, _ in report.fused] == ["0"] and report.left == ()
            with torch.no_grad():
                found = model(x)
            near(found, want)
            assert found.stride() == want.stride() and found.dtype == dtype
            assert norm or torch.equal(found, want), "without a batch norm the bits are the same"
            near(found.double(), model.double()(x.double()), dtype)


def test_a_model_keeps_its_state_and_its_answers():
    model, (x, skip) = Decoder().eval(), inputs()
    want, state, text = model(x, skip), copy.deepcopy(model.state_dict()), repr(model)
    report = tritonconv.fuse(model)
    assert report.model is model and report.left == ()
    assert report.fused == (
        ("first.0", "with BatchNorm3d first.1, residual, relu, in the forward of Decoder"),
        ("second.0.0", "with BatchNorm3d 1, PReLU 3, in the forward of Sequential second.0"),
        ("third", "with BatchNorm3d norm, in the forward of Decoder"),
        ("last", "with sigmoid, in the forward of Decoder"),
    )
    assert str(report).startswith("4 fused, 0 left\n  fused  first.0: with BatchNorm3d first.1, residual")
    assert fused_forwards(model) == ["", "second.0"]
    assert list(state) == list(model.state_dict()) and repr(model) == text
    with torch.no_grad():
        found = model(x, skip)
        near(found, want)
        assert not torch.equal(found, want), "the batch norms are folded"
        torch.testing.assert_close(model(x, skip, mask=torch.tensor(2.0)), 2 * want)
        model.train()
        assert not torch.equal(model(x, skip), want), "statistics of the batch"
        model.eval()
    tritonconv.fuse(model)
    restored = tritonconv.restore(model)
    assert [name for name, _ in restored.replaced] == ["", "first.0", "second.0", "second.0.0", "third"]
    assert restored.replaced[0][1] == "Decoder, its own forward again" and fused_forwards(model) == []
    assert tritonconv.restore(model).replaced == ()
    tritonconv.fuse(model)
    model.load_state_dict(state)
    assert tritonconv.unfuse(model) != () and fused_forwards(model) == []
    assert torch.equal(model(x, skip), want) and tritonconv.unfuse(model) == ()


def test_the_parameters_of_now_are_folded():
    model, (x, skip) = Decoder().eval(), inputs()
    before, other = copy.deepcopy(model), Decoder().eval()
    tritonconv.fuse(model)
    with torch.inference_mode():
        near(model(x, skip), before(x, skip))
    with torch.no_grad():
        model.load_state_dict(other.state_dict())
        near(model(x, skip), other(x, skip))
        model.norm.running_mean.add_(1)
        other.norm.running_mean.add_(1)
        near(model(x, skip), other(x, skip))
        model.double(), other.double()
        near(model(x.double(), skip.double()), other(x.double(), skip.double()))


def test_gradients_flow_as_before():
    model, (x, skip) = Decoder().eval(), inputs(torch.float64)
    model.double()
    leaves = [x.requires_grad_(), skip.requires_grad_(), *model.parameters()]
    want = torch.autograd.grad(model(x, skip).sum(), leaves)
    tritonconv.fuse(model)
    for mine, own in zip(torch.autograd.grad(model(x, skip).sum(), leaves), want, strict=True):
        torch.testing.assert_close(mine, own)
    model.requires_grad_(False)
    for mine, own in zip(torch.autograd.grad(model(x, skip).sum(), leaves[:2]), want[:2], strict=True):
        torch.testing.assert_close(mine, own)


class Sum(nn.Module):
    """``add`` of the layer's output and another tensor."""

    def __init__(self, add):
        super().__init__()
        self.up, self.add = ConvTranspose3d(4, 4, **KEYWORDS), add

    def forward(self, x, skip):
        return self.add(self.up(x), skip)


def test_sums_of_all_kinds():
    def into_skip(y, skip):
        skip += y
        return skip

    def plus_equals(y, skip):
        y += skip
        return y

    def written_between(y, skip):
        skip.mul_(2)
        return y + skip

    (x, skip), narrow = inputs(), torch.randn(4, 1, 1, 1)
    for add, residual, fuses in (
        (lambda y, s: y + s, skip, True), (lambda y, s: s + y, skip, True), (lambda y, s: torch.add(y, s), skip, True),
        (lambda y, s: y.add_(s).relu_(), skip, True), (lambda y, s: F.leaky_relu(s.add(y), 0.2), skip, True),
        (lambda y, s: y + s, narrow, True), (lambda y, s: y + s, skip.double(), True),
        (plus_equals, skip, True), (lambda y, s: y + y, skip, False), (lambda y, s: y + 1, skip, False),
        (into_skip, skip, False), (lambda y, s: torch.add(y, s, alpha=2), skip, False), (written_between, skip, False),
        (lambda y, s: (y + s) * y, skip, False), (lambda y, s: F.elu(y), skip, False),
        (lambda y, s: F.gelu(y, approximate="tanh") + s, skip, True),
        (lambda y, s: F.leaky_relu(y, s.mean().item()), skip, False),
    ):  # fmt: skip
        model = Sum(add).eval()
        with torch.no_grad():
            kept = residual.clone(), residual.clone()
            want = model(x, kept[0])
            report = tritonconv.fuse(model)
            assert bool(report.fused) is fuses, report
            assert torch.equal(model(x, kept[1]), want) and torch.equal(*kept), "written alike"
            with torch.autocast("cpu", torch.bfloat16):
                found = model(x, residual.clone())
                tritonconv.unfuse(model)
                assert found.dtype == model(x, residual.clone()).dtype


# ------------------------------------------------------------------ reasons


def only_reason(model, name="0") -> str:
    report = tritonconv.fuse(model)
    assert report.fused == () and [left for left, _ in report.left] == [name], report
    return report.left[0][1]


def test_reasons():
    norm = trained(nn.BatchNorm3d(4))
    assert only_reason(up(norm)) == "in training mode; call eval() first"
    frozen = up(trained(nn.BatchNorm3d(4))).eval()
    frozen[1].train()
    assert only_reason(frozen) == "followed by BatchNorm3d 1: it is in training mode"
    assert only_reason(up(nn.BatchNorm3d(4, track_running_stats=False)).eval()).endswith("1: it tracks no statistics")
    assert only_reason(up(nn.BatchNorm3d(5)).eval()).endswith("it has 5 channels, the convolution 4")
    assert only_reason(up(nn.PReLU(2)).eval()).endswith("it has 2 slopes, the convolution 4 channels")
    assert "no activation of conv_transpose3d (relu, " in only_reason(up(nn.ELU()).eval())
    assert only_reason(up(nn.Conv3d(4, 1, 1)).eval()) == "followed by Conv3d 1"
    assert only_reason(up().eval()) == only_reason(ConvTranspose3d(4, 4, 2).eval(), "") == "nothing follows"
    assert only_reason(up(nn.ReLU(), kind=FusedConvTranspose3d).eval()).endswith("has a forward of its own")
    for place in (0, 1):
        model = up(nn.ReLU()).eval()
        model[place].register_forward_hook(lambda *_: None)
        assert only_reason(model).endswith("it has hooks")
    model = up(nn.ReLU()).eval()
    parametrizations.weight_norm(model[0])
    assert only_reason(model) == "it is parametrized"
    model = nn.Sequential(nn.Sequential(ConvTranspose3d(4, 4, **KEYWORDS)), nn.ReLU()).eval()
    model[0].register_forward_hook(lambda *_: None)
    assert only_reason(model, "0.0") == "Sequential: 0 has hooks"
    with pytest.raises(ArgumentTypeError, match="got str"):
        tritonconv.fuse("model")


class Odd(nn.Module):
    def __init__(self, odd):
        super().__init__()
        self.up, self.odd = up(trained(nn.BatchNorm3d(4))), odd

    def forward(self, x):
        return torch.relu(self.odd(self.up(x)))


def test_forwards_that_torch_fx_does_not_record():
    """Then the scopes inside are fused all the same."""
    x, _ = inputs()
    for odd, text in (
        (lambda y: y if y.sum() > 0 else -y, "does not record its forward (TraceError"),
        (lambda y: y + torch.ones(1), "makes tensors of its own"),
    ):
        model = Odd(odd).eval()
        want, before = model(x), set(vars(model))
        assert tritonconv.fuse(model).fused == (("up.0", "with BatchNorm3d 1, in the forward of Sequential up"),)
        assert set(vars(model)) == before and "forward" in vars(model.up)
        with torch.no_grad():
            near(model(x), want)
        model.up[1] = nn.Identity()
        assert text in only_reason(model.eval(), "up.0")
    model = Odd(lambda y: y).eval()
    model.up.append(model.up[0])
    model.up.append(model.up[1])
    want = model(x)
    assert len(tritonconv.fuse(model).fused) == 1, "a layer that is called twice is fused in each of its calls"
    with torch.no_grad():
        near(model(x), want)


# ------------------------------------------------------------------ tools


def test_tools_see_the_forward_of_the_class():
    model, (x, skip) = Decoder().eval().requires_grad_(False), inputs()
    want = model(x, skip)
    tritonconv.fuse(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert fused_forwards(again) == [] and torch.equal(again(x, skip), want)
        assert len(tritonconv.fuse(again).fused) == 4
        near(again(x, skip), want)
    near(torch.export.export(model, (x, skip)).module()(x, skip), want)
    near(torch.jit.trace(model, (x, skip))(x, skip), want)
    near(torch.fx.symbolic_trace(model, {"mask": None})(x, skip), want)
    near(vmap(model)(x[:, None], skip[:, None])[:, 0], want)
    near(torch.func.functional_call(model, model.state_dict(), (x, skip)), want)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    near(compiled(x, skip), want)
