"""``up_concat`` beside torch's two operations: values, gradients of all orders, formats, and the copies it saves."""

from __future__ import annotations

import itertools

import pytest
import torch
from allocations import allocations, peak
from beside_torch import PHASES, close
from torch import nn
from variant_cases import DEVICE, Case, expected, integers, same

import tritonconv
from tritonconv import ArgumentError, ArgumentTypeError, TransposedConv3dLayer, concatenation, up_concat
from tritonconv.autotune.choose import Selection
from tritonconv.concatenation import geometry_of
from tritonconv.dispatch import plan
from tritonconv.forced import pinned
from tritonconv.kernels import torch_products, torch_shuffle
from tritonconv.kernels.registry import have_triton, variant
from tritonconv.problem import LAYOUTS, PASSES

f64 = torch.float64
LAST = torch.channels_last_3d
SHUFFLE = tuple(f"{name}_torch_shuffle" for name in PASSES)
K2 = Case(channels=(6, 5), size=(2, 3, 2), kernel=2, stride=2)
K4 = Case(channels=(3, 5), size=(2, 1, 3), kernel=(1, 3, 4), stride=(1, 3, 4))
K3 = Case(channels=(4, 3), size=(2, 1, 3), stride=2, front=1, back=1)
CALLS = {"k = s": (K2, SHUFFLE), "k > s": (K3, PHASES)}


def layer_of(case, weight, bias, kind=tritonconv.ConvTranspose3d):
    stride, padding, extra, groups, dilation = case.arguments
    front = tuple(begin for begin, _ in padding)
    layer = kind(*case.channels, tuple(weight.shape[2:]), stride, front, extra, groups, bias is not None, dilation)
    layer.weight, layer.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
    return layer


def operands_of(case, dtype=f64, layouts=("ncdhw", "ncdhw"), more=3):
    """A layer, x, the skip and the gradient of the result, all integers."""
    (x, weight, bias), grad_y, _, _ = expected(case, True)
    skip = integers((x.shape[0], more, *grad_y.shape[2:]), 5)
    x, skip = (t.to(DEVICE, dtype, memory_format=LAYOUTS[each]) for t, each in zip((x, skip), layouts, strict=True))
    return layer_of(case, weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)), x, skip


def joined(y, skip, skip_first):
    return torch.cat((skip, y) if skip_first else (y, skip), 1)


@pytest.mark.parametrize("label", CALLS)
def test_values_gradients_and_format_are_those_of_the_two_operations(label):
    case, names = CALLS[label]
    _, grad_y, y, (grad_x, grad_weight, grad_bias) = expected(case, True)
    dtypes = (torch.float32, f64, torch.bfloat16)
    combinations = list(itertools.product(dtypes, itertools.product(LAYOUTS, LAYOUTS), (False, True)))
    for dtype, layouts, first in combinations if label == "k = s" else combinations[::3]:  # each value of each
        layer, x, skip = operands_of(case, dtype, layouts)
        grad = joined(grad_y, integers(skip.shape, 6), first).to(DEVICE, dtype)
        leaves = [x.requires_grad_(), layer.weight, layer.bias, skip.requires_grad_()]
        with tritonconv.use(*names):
            got = up_concat(layer, x, skip, first)
            two = joined(layer(x), skip, first)
        gradients = torch.autograd.grad(got, leaves, grad)
        assert got.grad_fn.name() == "_UpConcatBackward" and got.dtype == dtype
        assert same(got, joined(y, skip.detach().to(f64), first)) and got.stride() == two.stride()
        wanted = grad_x, grad_weight, grad_bias, integers(skip.shape, 6)
        assert all(map(same, gradients, wanted))
        assert gradients[3].untyped_storage().data_ptr() == grad.untyped_storage().data_ptr()  # a view, as torch's cat


def test_each_subset_of_operands_that_need_a_gradient():
    case, names = CALLS["k = s"]
    grads = {}
    for wanted in itertools.product((False, True), repeat=4):
        layer, x, skip = operands_of(case)
        leaves = [x, layer.weight, layer.bias, skip]
        for leaf, need in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(need)
        with tritonconv.use(*names):
            got = up_concat(layer, x, skip)
            with torch.no_grad():
                assert torch.equal(up_concat(layer, x, skip), got) and not up_concat(layer, x, skip).requires_grad
        assert got.requires_grad == any(wanted)
        if any(wanted):
            (got * got.detach()).sum().backward()
        for index, (leaf, need) in enumerate(zip(leaves, wanted, strict=True)):
            assert (leaf.grad is not None) == need
            assert not need or torch.equal(leaf.grad, grads.setdefault(index, leaf.grad))


def small(record, problem) -> Selection:
    config = record.default(problem, DEVICE)
    tiles = {key: min(value, 16) for key, value in config.items() if key.startswith("BLOCK_")}
    return Selection(record, {**config, **tiles}, "small tiles, for the interpreter")


@pytest.mark.skipif(not have_triton(), reason="needs Triton")
@pytest.mark.parametrize("label", CALLS)
def test_triton_kernels_write_the_slice_and_read_the_gradient_as_a_view(label):
    case = CALLS[label][0]._replace(n=1)
    problem = case.problem(torch.float32)
    shuffled = ("forward_shuffle", "backward_data_shuffle", "backward_weight_shuffle")
    names = shuffled if label == "k = s" else ("forward_gather", "backward_data_gemm", "backward_weight_splitk")
    chosen = [small(variant(name), problem) for name in names]
    _, grad_y, y, wanted = expected(case, True)
    with pinned(*chosen):
        for first in (False, True):
            layer, x, skip = operands_of(case, torch.float32)
            grad = joined(grad_y, torch.zeros_like(skip), first).to(DEVICE, torch.float32)
            got = up_concat(layer, x.requires_grad_(), skip, first)
            assert same(got, joined(y, skip.to(f64), first))
            assert all(map(same, torch.autograd.grad(got, (x, layer.weight, layer.bias), grad), wanted))
        kept = [program for replay in plan(problem, DEVICE).replays.values() for program in replay.kept.values()]
    assert len(kept) >= 2
    assert not any(buffer.source for each in kept for buffer in each.program.owned)  # nothing is copied


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_copies_it_saves(layout, monkeypatch):
    """Of torch's two operations: y beside the buffer, and in the backward nothing but what a lone layer makes."""
    monkeypatch.setattr(torch_shuffle, "IMAGE_ELEMENTS", 2000)
    monkeypatch.setattr(torch_shuffle, "PART_ELEMENTS", 2000)
    layer = tritonconv.ConvTranspose3d(8, 8, 2, stride=2)
    x = torch.randn(2, 8, 6, 5, 4).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    skip = torch.randn(2, 8, 12, 10, 8).contiguous(memory_format=LAYOUTS[layout])
    nbytes = skip.nbytes
    with tritonconv.use(*SHUFFLE):
        up_concat(layer, x, skip), layer(x)
        made = allocations(lambda: up_concat(layer, x, skip))
        assert [size for size in made if size >= nbytes / 2] == [2 * nbytes]  # the buffer alone
        ours, torchs = (peak(lambda call=call: call(x, skip)) for call in (
            lambda x, skip: up_concat(layer, x, skip), lambda x, skip: torch.cat((layer(x), skip), 1)))  # fmt: skip
        assert torchs - ours >= 0.75 * nbytes  # a product is a quarter of y at most
        grad = torch.randn_like(up_concat(layer, x, skip))
        got, lone = up_concat(layer, x, skip), layer(x)
        in_slice = allocations(lambda: torch.autograd.grad(got, (x, *layer.parameters()), grad))
        own = grad[:, :8].contiguous(memory_format=LAYOUTS[layout])
        beside = allocations(lambda: torch.autograd.grad(lone, (x, *layer.parameters()), own))
        large = [[size for size in made if size >= nbytes / 2] for made in (in_slice, beside)]
        assert large[0] == large[1] == [nbytes]  # the unshuffled gradient, which both products read


@pytest.mark.parametrize("n", [1, 2])
def test_the_products_lie_where_the_skip_will(n, monkeypatch):
    """Nothing is held beside the result where the skip has the room, in memory of any values."""
    monkeypatch.setattr(torch_products, "mkl_is_slow", lambda: False)  # oneDNN's products are new tensors
    monkeypatch.setattr(torch_shuffle, "IMAGE_ELEMENTS", 1)
    for case, more, first in itertools.product((K2._replace(n=n), K4._replace(n=n)), (4, 5, 9), (False, True)):
        problem = case.problem(torch.float32)
        layer, x, skip = operands_of(case, torch.float32, more=more)
        size = skip[:, :1].nbytes
        with tritonconv.use(*SHUFFLE), torch.no_grad():
            want = joined(layer(x), skip, first)
            assert torch.equal(up_concat(layer, x, skip, first), want)
            held = peak(lambda layer=layer, x=x, skip=skip, first=first: up_concat(layer, x, skip, first))
        whole = size * (problem.c_out + more)
        assert (held == whole) == (more >= problem.c_out), (held, whole)
        assert held <= whole + size * problem.c_out


def test_a_repeated_call_of_torchs_own_goes_there_at_once(monkeypatch):
    layer, x, skip = operands_of(K3)
    with tritonconv.use():
        want = [up_concat(layer, x, skip, first) for first in (False, True)]
    with monkeypatch.context() as patch:
        patch.setattr(concatenation, "_eager", None)
        for first, each in enumerate(want):
            got = up_concat(layer, x, skip, bool(first))
            assert torch.equal(got, each) and torch.equal(got, joined(layer(x), skip, first))
    for wrong in (skip[:, :, 1:], skip[0], torch.zeros(0)):
        with pytest.raises(ArgumentError, match="must agree in all axes but the channels"):
            up_concat(layer, x, wrong)
    with pytest.raises(ArgumentError, match="skip is on meta"):
        up_concat(layer, x, skip.to("meta"))


@pytest.mark.parametrize("label", CALLS)
def test_double_backward(label):
    case, names = CALLS[label]
    layer, x, skip = operands_of(case._replace(n=1, channels=(2, 2)), more=1)

    def call(x, weight, bias, skip):
        layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        del layer._parameters["weight"], layer._parameters["bias"]
        layer.weight, layer.bias = weight, bias
        with tritonconv.use(*names):
            return up_concat(layer, x, skip, True)

    leaves = [t.detach().clone().requires_grad_() for t in (x, layer.weight, layer.bias, skip)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_torchs_memory_format_also_of_odd_shapes():
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        n, c, c_out, more, *size = torch.randint(1, 3, (7,), generator=generator).tolist()
        layer = tritonconv.ConvTranspose3d(c, c_out, 1)
        formats = [list(LAYOUTS.values())[index] for index in torch.randint(0, 2, (2,), generator=generator).tolist()]
        x = torch.randn(n, c, *size).contiguous(memory_format=formats[0])
        skip = torch.randn(n, 4, *size).contiguous(memory_format=formats[1])[:, :more]
        with tritonconv.use("forward_torch_shuffle"), torch.no_grad():
            got, want = up_concat(layer, x, skip), torch.cat((layer(x), skip), 1)
        assert torch.equal(got, want) and got.stride() == want.stride()


def test_dtypes_and_autocast():
    layer, x, skip = operands_of(K2, torch.float32)
    with tritonconv.use(*SHUFFLE):
        for dtype in (f64, torch.float16, torch.int32):
            other = skip.to(dtype).requires_grad_(dtype.is_floating_point)
            got, want = up_concat(layer, x, other), torch.cat((layer(x), other), 1)
            assert got.dtype == want.dtype and torch.equal(got, want)
            if dtype.is_floating_point:
                grads = [torch.autograd.grad(y.sum(), (other, layer.weight)) for y in (got, want)]
                assert grads[0][0].dtype == dtype and all(map(torch.equal, *grads))
        for dtype in (torch.bfloat16, torch.float32):
            with torch.autocast("cpu", torch.bfloat16):
                other = skip.to(dtype)
                got, want = up_concat(layer, x, other), torch.cat((layer(x), other), 1)
            assert got.dtype == want.dtype == dtype and torch.equal(got, want)
            grads = [torch.autograd.grad(y.float().sum(), layer.weight)[0] for y in (got, want)]
            assert torch.equal(*grads) and grads[0].dtype == torch.float32


@pytest.mark.usefixtures("variants")
def test_batchless_and_empty():
    layer, x, skip = operands_of(K3)
    got = up_concat(layer, x[0], skip[0], True)
    close(got, torch.cat((skip[0], layer(x[0])), 0))
    empty = up_concat(layer, x[:0], skip[:0])
    assert empty.shape == (0, 6, *skip.shape[2:])
    assert up_concat(layer, x, skip[:, :0]).shape == layer(x).shape
    empty.sum().backward()
    assert not layer.weight.grad.any()


def kinds():
    """Modules whose call is their own: up_concat must run it."""

    def hooked(register):
        layer = tritonconv.ConvTranspose3d(2, 3, 2, stride=2)
        register(layer)
        return layer

    class Twice(nn.ConvTranspose3d):
        def forward(self, input, output_size=None):
            return 2 * super().forward(input, output_size)

    yield hooked(lambda layer: layer.register_forward_hook(lambda module, args, y: 3 * y))
    yield hooked(lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,)))
    yield hooked(lambda layer: layer.register_full_backward_hook(lambda module, grad_x, grad_y: (7 * grad_x[0],)))
    yield hooked(nn.utils.parametrizations.weight_norm)
    yield hooked(nn.utils.spectral_norm).eval()
    yield hooked(lambda layer: setattr(layer, "forward", lambda x: nn.functional.interpolate(x, scale_factor=2)))
    yield Twice(2, 3, 2, stride=2)
    yield nn.Upsample(scale_factor=2)
    yield nn.Sequential(nn.ConvTranspose3d(2, 3, 2, stride=2), nn.ReLU())
    yield tritonconv.LazyConvTranspose3d(3, 2, stride=2)


@pytest.mark.filterwarnings("ignore:.*(lazy|Lazy|weight_norm|spectral_norm).*")
def test_a_layer_with_a_call_of_its_own_runs_it():
    for layer in kinds():
        assert geometry_of(layer) is None
        x = torch.randn(1, 2, 2, 3, 2, requires_grad=True)
        skip = torch.randn(1, 2, 4, 6, 4)
        with tritonconv.use(*SHUFFLE):
            got = up_concat(layer, x, skip, True)
            want = torch.cat((skip, layer(x)), 1)
        assert torch.equal(got, want)
        assert torch.equal(*[torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)])


def test_torchs_layer_and_matlabs():
    torchs = nn.ConvTranspose3d(4, 3, 2, stride=2)
    matlabs = TransposedConv3dLayer(2, 3, stride=2, num_channels=4)
    for layer in (torchs, matlabs):
        assert geometry_of(layer) is not None
        x, skip = torch.randn(2, 4, 2, 3, 2, requires_grad=True), torch.randn(2, 1, 4, 6, 4)
        with tritonconv.use(*SHUFFLE):
            got = up_concat(layer, x, skip)
        assert got.grad_fn.name() == "_UpConcatBackward"
        close(got, torch.cat((layer(x), skip), 1))
    lazy = TransposedConv3dLayer(2, 3, stride=2)
    assert geometry_of(lazy) is None and up_concat(lazy, x, skip).shape == got.shape
    assert geometry_of(lazy) is not None


def test_refusals():
    layer, x, skip = operands_of(K2)
    shapes = r"output \(2, 5, 4, 6, 4\) and skip "
    for forced in (SHUFFLE, ()):
        with tritonconv.use(*forced):
            for wrong in (skip[:, :, 1:], skip[:1], skip[0], torch.zeros(0)):
                with pytest.raises(ArgumentError, match=shapes + str(tuple(wrong.shape)).replace("(", r"\(")[:-1]):
                    up_concat(layer, x, wrong)
            with pytest.raises(ArgumentError, match="input channels"):
                up_concat(layer, x[:, 1:], skip)
            with pytest.raises(ArgumentTypeError, match="skip expects a tensor, got None"):
                up_concat(layer, x, None)
    with pytest.raises(ArgumentTypeError, match=r"layer expects a torch\.nn\.Module, got 3"):
        up_concat(3, x, skip)
    with tritonconv.use(*SHUFFLE), pytest.raises(ArgumentError, match="skip is on meta"):
        up_concat(layer, x, skip.to("meta"))


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = tritonconv.ConvTranspose3d(2, 3, 2, stride=2)

    def forward(self, x, skip):
        return up_concat(self.up, x, skip).relu()


def test_compile_trace_export_fx_and_transforms():
    stage, x, skip = Stage(), torch.randn(2, 2, 2, 3, 2), torch.randn(2, 4, 4, 6, 4)
    want = torch.cat((stage.up(x), skip), 1).relu()
    with tritonconv.use(*SHUFFLE):
        compiled = torch.compile(stage, backend="aot_eager", fullgraph=True)
        got = compiled(x, skip)
        close(got, want)
        grads = [torch.autograd.grad(y.square().sum(), tuple(stage.parameters())) for y in (got, want)]
        for pair in zip(*grads, strict=True):
            close(*pair)
        close(torch.jit.trace(stage, (x, skip))(x, skip), want)
    close(torch.export.export(stage, (x, skip)).module()(x, skip), want)
    graph = torch.fx.symbolic_trace(stage)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 1
    close(graph(x, skip), want)
    close(torch.vmap(lambda x, skip: stage(x[None], skip[None])[0])(x, skip), want)
    tangent = torch.func.jvp(lambda x: stage(x, skip), (x,), (x,))[1]
    assert tangent.shape == want.shape


def test_checkpoint_recomputes_with_the_same_variants():
    layer, x, skip = operands_of(K2)
    x.requires_grad_()
    with tritonconv.use(*SHUFFLE):
        got = torch.utils.checkpoint.checkpoint(up_concat, layer, x, skip, use_reentrant=False)
        want = up_concat(layer, x, skip)
    assert torch.equal(got, want)
    assert torch.equal(*[torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)])
