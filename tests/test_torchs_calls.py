"""A repeated call of torch's own is known by a part of its key, and is answered and refused as its first one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tritonconv
from tritonconv import ArgumentError, ArgumentTypeError, dispatch


@pytest.fixture
def fresh(monkeypatch):
    for memory in ("_by_call", "_by_problem", "_torchs"):
        monkeypatch.setattr(dispatch, memory, {})


def test_a_repeated_call_of_torchs_own_is_refused_as_its_first_one_is(fresh):
    x, weight, bias = torch.randn(2, 3, 2, 2, 2), torch.randn(3, 2, 2, 2, 2), torch.randn(2)
    meta = torch.device("meta")

    def found(*operands, stride=(2, 2, 2)):
        return dispatch.torchs_for(*operands, stride, 0, 0, 1, 1)

    stride = (2, 2, 2)
    want = F.conv_transpose3d(x, weight, bias, 2)
    assert found(x, weight, bias, stride=stride) is None
    for _ in range(2):
        assert torch.equal(tritonconv.conv_transpose3d(x, weight, bias, stride), want)
        assert found(x, weight, bias, stride=stride) == (2,)
    assert found(x, weight, None, stride=stride) is None
    assert found(x.clone().requires_grad_(), weight, bias, stride=stride) is None, "its gradients may be another's"
    for fault, operands in (
        ("weight is torch.float64", (x, weight.double(), bias)),
        ("weight is on meta", (x, weight.to(meta), bias)),
        ("bias is torch.float64", (x, weight, bias.double())),
        ("bias is on meta", (x, weight, bias.to(meta))),
        ("bias expects shape", (x, weight, bias[:1])),
    ):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=fault):
            tritonconv.conv_transpose3d(*operands, stride)
    leaf = weight.clone().requires_grad_()
    with tritonconv.use("forward_torch_phases"):
        assert found(x, weight, bias, stride=stride) is None
        tritonconv.conv_transpose3d(x, leaf, bias, stride)
    for _ in range(2):
        tritonconv.conv_transpose3d(x, leaf.detach().requires_grad_(), bias, stride)
    assert found(x, leaf, bias, stride=stride) is None, "a checkpoint may ask for the variants that were forced"
    with torch.autocast("cpu"):
        assert found(x, weight, bias, stride=stride) is None
        assert tritonconv.conv_transpose3d(x, weight, bias, stride).dtype is torch.bfloat16
    with dispatch.watch() as seen:
        tritonconv.conv_transpose3d(x, weight, bias, stride)
    assert len(seen) == 1
    dispatch.forget()
    assert found(x, weight, bias, stride=stride) is None


def test_no_short_way_for_arguments_that_may_change_or_only_look_alike(fresh):
    x, weight = torch.randn(1, 2, 3, 3, 3), torch.randn(2, 2, 2, 2, 2)
    steps = [2, 2, 2]
    for _ in range(2):
        assert tritonconv.conv_transpose3d(x, weight, None, steps).shape[2:] == (6, 6, 6)
    steps[:] = 1, 1, 1
    assert tritonconv.conv_transpose3d(x, weight, None, steps).shape[2:] == (4, 4, 4)
    for _ in range(2):
        tritonconv.conv_transpose3d(x, weight, None, 1)
    for other in (True, 1.0, (True, 1, 1), (1.0, 1, 1)):
        with pytest.raises(ArgumentTypeError, match="stride expects integers"):
            tritonconv.conv_transpose3d(x, weight, None, other)
