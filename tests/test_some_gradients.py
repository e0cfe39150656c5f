"""Double backward where a loss takes some of the first gradients, of a call with some leaves: as torch's."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

import tritonconv
from tritonconv.problem import PASSES

OURS, TORCH = tritonconv.conv_transpose3d, F.conv_transpose3d
SHUFFLE = tuple(f"{name}_torch_shuffle" for name in PASSES)


@pytest.mark.parametrize("needs", [each for each in itertools.product((False, True), repeat=3) if any(each)])
def test_a_loss_of_some_first_gradients_alone_is_as_torchs(needs):
    """Where they depend on no tensor that requires a gradient torch's have a graph too, and leave no gradient."""
    drawn = [
        torch.randn(shape, dtype=torch.float64) for shape in ((1, 2, 2, 1, 2), (2, 3, 2, 2, 2), (3,), (1, 3, 4, 2, 4))
    ]

    def second(call, asked):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(drawn[:3], needs, strict=True)]
        y = call(*leaves, 2)
        first = torch.autograd.grad(
            y, [leaf for leaf, ask in zip(leaves, asked, strict=True) if ask], drawn[3], create_graph=True
        )
        loss = sum(each.square().sum() for each in first)
        if loss.requires_grad:
            loss.backward()
        return loss, loss.requires_grad, [leaf.grad for leaf in leaves]

    def stage(x, weight, bias, stride):
        layer = torch.nn.ConvTranspose3d(2, 3, 2, stride)
        for name, value in (("weight", weight), ("bias", bias)):
            del layer._parameters[name]
            setattr(layer, name, value)
        return tritonconv.up_concat(layer, x, torch.zeros(1, 1, 4, 2, 4, dtype=x.dtype))[:, :3]

    for asked in itertools.product(*[(False, need) if need else (False,) for need in needs]):
        if any(asked):
            want = second(TORCH, asked)
            for call in (OURS, functools.partial(OURS, residual=torch.zeros_like(drawn[3])), stage):
                with tritonconv.use(*SHUFFLE):
                    torch.testing.assert_close(second(call, asked), want)
