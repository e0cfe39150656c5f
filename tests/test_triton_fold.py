"""Taps along w counted as channels: exact in both gradients, of operands in any strides, and no default."""

from __future__ import annotations

import pytest
import torch
from variant_cases import DEVICE, Case, complaints, expected, run, same

from tritonconv.kernels.registry import variant
from tritonconv.kernels.variant import FOLD

pytestmark = pytest.mark.usefixtures("poisoned")
pytest.importorskip("triton")

NAMES = ("backward_data_shuffle", "backward_weight_shuffle")
CASES = {
    "20 to 5, k2x4x4": Case(n=1, channels=(20, 5), size=(2, 3, 5), kernel=(2, 4, 4), stride=(2, 4, 4)),
    "1 to 5": Case(channels=(1, 5), size=(2, 3, 4), kernel=(1, 2, 2), stride=(1, 2, 2)),
    "24 to 3": Case(channels=(24, 3), size=(2, 3, 8), kernel=(1, 1, 3), stride=(1, 1, 3)),
    "16 to 1": Case(channels=(16, 1), size=(1, 3, 8), kernel=2, stride=2),
}


def folding(record, problem):
    return [config for config in record.space(problem, DEVICE) if config.get(FOLD)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("label", CASES)
def test_exact(name, label):
    record = variant(name)
    for dtype in (torch.float16, torch.float32):
        found = complaints(
            record, CASES[label], dtype, "ndhwc", True, DEVICE, lambda p: [folding(record, p)[i] for i in (0, -1)]
        )
        assert found == []


@pytest.mark.parametrize("name", NAMES)
def test_operands_of_other_strides(name):
    """grad_y in NCDHW, the weight with output channels or input channels innermost."""
    record, case = variant(name), CASES["20 to 5, k2x4x4"]
    problem = case.problem(torch.float16, "ndhwc")
    (x, weight, _), grad_y, _, (grad_x, grad_weight, grad_bias) = expected(case, True)
    x, weight, grad_y = (each.detach().to(DEVICE, torch.float16) for each in (x, weight, grad_y))
    orders = (
        weight,
        weight.to(memory_format=torch.channels_last_3d),
        weight.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
    )
    for each in orders:
        found = run(record, problem, folding(record, problem)[0], (x, each, None), grad_y, True)
        wanted = [grad_x] if name == NAMES[0] else [grad_weight, grad_bias]
        assert all(map(same, found, wanted))


def test_where_it_pays():
    """Where a load takes more of the folded channels, and each output has one tap; never by default."""
    for name in NAMES:
        record = variant(name)
        for case, layout, pays in (
            (CASES["20 to 5, k2x4x4"], "ndhwc", True),
            (CASES["20 to 5, k2x4x4"], "ncdhw", False),
            (Case(channels=(20, 5), kernel=(2, 4, 1), stride=(2, 4, 1)), "ndhwc", False),
            (Case(channels=(16, 16), kernel=2, stride=2), "ndhwc", False),
            (Case(channels=(4, 6), kernel=2, stride=2, groups=2), "ndhwc", False),
        ):
            problem = case.problem(torch.float16, layout)
            assert (folding(record, problem) != []) == pays
            assert not record.default(problem, DEVICE).get(FOLD)
