"""Outputs with an axis of no planes: torch's answer where torch has one, else one clear refusal. Empty batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from variant_cases import DEVICE

import tritonconv

LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# n, channels, kernel, stride, padding, size, groups: all axes empty, one axis, depthwise, no images.
CALLS = (
    (2, (3, 2), 1, 1, 1, (2, 2, 2), 1),
    (1, (3, 2), (1, 3, 3), 1, 1, (2, 4, 4), 1),
    (2, (4, 4), 1, 1, 1, (2, 2, 2), 4),
    (1, (3, 2), 2, 2, (1, 2, 0), (1, 2, 3), 1),
    (0, (3, 2), 1, 1, 1, (2, 2, 2), 1),
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_torchs_answer_or_a_refusal(call, bias):
    n, (c_in, c_out), kernel, stride, padding, size, groups = call
    answered = 0
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        made = [
            layer(c_in, c_out, kernel, stride, padding, groups=groups, bias=bias, dtype=dtype, device=DEVICE)
            for layer in (torch.nn.ConvTranspose3d, tritonconv.ConvTranspose3d)
        ]
        x = torch.randn(n, c_in, *size, device=DEVICE).to(dtype).contiguous(memory_format=layout).requires_grad_()
        try:
            want = made[0](x)
        except RuntimeError:
            with pytest.raises(tritonconv.ArgumentError, match=r"the output would be empty, size \("):
                made[1](x)
            continue
        y = made[1](x)
        assert (y.shape, y.stride(), y.dtype, y.device) == (want.shape, want.stride(), want.dtype, want.device)
        leaves = [(x, *layer.parameters()) for layer in made]
        grads = [torch.autograd.grad(y.sum(), own) for y, own in zip((want, y), leaves, strict=True)]
        assert all(map(torch.equal, *grads))
        with torch.no_grad():
            assert made[1](x.detach()).shape == want.shape
        answered += 1
    assert answered or DEVICE.type != "cpu"


def test_fewer_than_no_planes_are_refused():
    layer = tritonconv.ConvTranspose3d(3, 2, 3, 2, 2)
    with pytest.raises(tritonconv.ArgumentError, match=r"size \(-1, 3, 3\)"):
        layer(torch.randn(1, 3, 1, 3, 3))


def test_explain_says_that_torch_decides(capsys):
    x, weight = torch.randn(2, 3, 2, 2, 2), torch.randn(3, 2, 1, 1, 1)
    told = tritonconv.explain(x, weight, padding=1)
    assert told.plan is None and "torch answers this call, or refuses it" in capsys.readouterr().out


def test_an_empty_batch_has_torchs_strides_with_an_epilogue_too():
    for formats in itertools.product((torch.contiguous_format, torch.channels_last_3d), repeat=3):
        shapes = (0, 3, 2, 3, 2), (3, 4, 2, 2, 2), (0, 4, 4, 6, 4)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x, weight, residual = (
                torch.empty(shape, dtype=dtype).contiguous(memory_format=each)
                for shape, each in zip(shapes, formats, strict=True)
            )
            want = torch.relu(torch.conv_transpose3d(x, weight, None, 2)).stride()
            assert tritonconv.conv_transpose3d(x, weight, None, 2).stride() == want
            for more in ({"activation": "relu"}, {"residual": residual}, {"rounding": "torch"}):
                assert tritonconv.conv_transpose3d(x, weight, None, 2, **more).stride() == want
                leaf = x.clone().requires_grad_()
                assert tritonconv.conv_transpose3d(leaf, weight, None, 2, **more).stride() == want
