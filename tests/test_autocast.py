"""Autocast around the operation: torch's answers and gradients, and no parameter cast twice in a block. CPU."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from beside_torch import PHASES
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.profiler import ProfilerActivity, profile

import tritonconv
from tritonconv import autocast

BF16, F16 = torch.bfloat16, torch.float16
CPU = torch.device("cpu")


def layers():
    """Our layer and torch's, the same parameters; and an input."""
    torch.manual_seed(0)
    mine, own = (kind(4, 6, 3, stride=2) for kind in (tritonconv.ConvTranspose3d, nn.ConvTranspose3d))
    own.load_state_dict(mine.state_dict())
    return mine, own, torch.randn(2, 4, 3, 3, 3)


def region(dtype=BF16, **more):
    return torch.autocast("cpu", dtype, **more)


def casts(call):
    """How often the call copied a tensor of the weight's shape, and of the bias', to another dtype."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    copied = [event.input_shapes[0] for event in profiler.events() if event.name == "aten::_to_copy"]
    return copied.count([4, 6, 3, 3, 3]), copied.count([6])


def repeated(layer, x, times=4):
    return lambda: [layer(x) for _ in range(times)]


def test_a_parameter_is_cast_once_in_a_block(variants):
    for layer, x in ((layers()[index], layers()[2]) for index in (0, 1)):
        for _ in range(2):
            with region():
                assert casts(repeated(layer, x)) == (1, 1)
                with region(), torch.no_grad():
                    assert casts(repeated(layer, x)) == (0, 0), "a block inside, and without gradients"
                with region(enabled=False):
                    layer(x)
                assert casts(repeated(layer, x)) == (0, 0)


def test_the_casts_go_with_torchs(variants):
    layer, _, x = layers()
    with region():
        repeated(layer, x)()
        kept = weakref.ref(next(iter(autocast._casts[CPU]().values()))[0])
        with region():
            pass
        assert kept() is not None
    gc.collect()
    assert kept() is None, "the outermost block has ended"
    with region():
        repeated(layer, x)()
        torch.clear_autocast_cache()
        assert casts(repeated(layer, x)) == (1, 1)
        with region(cache_enabled=False):
            assert casts(repeated(layer, x)) == (4, 4)
    with region(cache_enabled=False):
        assert casts(repeated(layer, x)) == (4, 4)


def test_what_torch_does_not_keep_is_not_kept(variants):
    layer, _, x = layers()
    layer.requires_grad_(False)
    with region():
        assert casts(repeated(layer, x)) == (4, 4)
    weight = layer.weight.clone().requires_grad_()
    with region():
        assert casts(lambda: [tritonconv.conv_transpose3d(x, 1 * weight, None, 2) for _ in range(4)]) == (4, 0)
        assert not autocast._casts[CPU]() if CPU in autocast._casts else True


def gradients(layer, x, before=None):
    layer.zero_grad()
    with region():
        if before is not None:
            with before():
                layer(x)
        y = layer(x)
        y = y.float().square().sum() + layer(x.flip(2)).float().sum()
        y.backward()
    return y.detach(), layer.weight.grad.clone(), layer.bias.grad.clone()


@pytest.mark.parametrize("before", [None, torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_reach_the_float32_parameters(before):
    """Also where the first call of the block needed none; tiny problems run torch's own, so the bits are torch's."""
    mine, own, x = layers()
    for _ in range(2):
        for got, want in zip(gradients(mine, x, before), gradients(own, x, before), strict=True):
            assert got.dtype == torch.float32
            assert torch.equal(got, want)


def test_gradients_of_a_forced_variant(launches):
    mine, own, x = layers()
    with tritonconv.use(*PHASES):
        found = gradients(mine, x, torch.inference_mode)
    assert launches == [PHASES[0]] * 3 + [PHASES[2]] * 2, "and x needs no gradient"
    for got, want in zip(found, gradients(own, x), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))


def test_each_dtype_has_its_own_cast(variants):
    layer, own, x = layers()
    with region():
        assert layer(x).dtype == BF16
        with region(F16):
            half = layer(x)
        assert layer(x).dtype == BF16
    assert half.dtype == F16
    with region(F16):
        want = own(x)
    torch.testing.assert_close(half, want, rtol=1e-2, atol=1e-2)


def test_a_parameter_that_changes_inside_the_block_is_cast_anew(variants):
    layer, _, x = layers()
    with region():
        before = layer(x)
        with torch.no_grad():
            layer.weight.mul_(2)
            layer.bias.mul_(2)
        after = layer(x)
    torch.testing.assert_close(after, 2 * before)


def test_a_parameter_that_died_lends_its_cast_to_nobody(variants):
    """Ids are used again."""
    x = layers()[2]
    with region():
        for scale in range(1, 20):
            weight = torch.full((4, 6, 3, 3, 3), float(scale), requires_grad=True)
            y = tritonconv.conv_transpose3d(torch.ones_like(x), weight, None, 3)
            assert (y == 4 * scale).all()
            del weight


def converted_weights(module):
    """Nodes of a graph that change the dtype of something of the weight's shape."""
    return [
        node
        for node in module.graph.nodes
        if "_to_copy" in str(node.target)
        and tuple(node.meta["val"].shape) == (4, 6, 3, 3, 3)
        and node.meta["val"].dtype == BF16
    ]


@pytest.mark.parametrize("inside", [False, True])
def test_compiled(variants, inside):
    graphs, found = [], []
    for layer, x in ((layers()[index], layers()[2]) for index in (0, 1)):
        torch._dynamo.reset()
        kept = []
        backend = aot_autograd(
            fw_compiler=lambda module, _, kept=kept: kept.append(module) or module, bw_compiler=lambda module, _: module
        )

        def call(x, layer=layer):
            with region(enabled=inside or torch.is_autocast_enabled("cpu")):
                return layer(x).float().square().sum() + layer(x.flip(2)).float().sum()

        with region(enabled=not inside):
            y = torch.compile(call, backend=backend, fullgraph=True)(x)
        y.backward()
        graphs.append(len(converted_weights(kept[0])))
        found.append((y.detach(), layer.weight.grad, layer.bias.grad))
    assert graphs[0] == graphs[1], "casts in the graph of torch's layer"
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))
