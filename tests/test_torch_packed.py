"""``forward_torch_packed``: parts of any size, views that cover y once, and calls that its rows say are faster. CPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from tritonconv.arguments import geometry, problem_of
from tritonconv.kernels import torch_packed
from tritonconv.problem import LAYOUTS

# (kernel, stride, padding, output_padding): even and odd outputs, bases that rise and that do not, uneven overhangs.
CALLS = [
    ((4, 4, 4), 2, 1, 0),
    ((3, 3, 3), 2, 1, (1, 0, 1)),
    ((2, 3, 5), (2, 2, 3), (0, 1, 2), (0, 1, 2)),
    ((7, 4, 2), (3, 4, 1), (4, 1, 0), (1, 2, 0)),
]


def problem_and_operands(call, layout, groups=1):
    kernel, stride, padding, output_padding = call
    draw = torch.Generator().manual_seed(5)
    x = torch.randint(-4, 5, (3, 2 * groups, 4, 3, 5), generator=draw).float()
    weight = torch.randint(-4, 5, (2 * groups, 5, *kernel), generator=draw).float()
    bias = torch.arange(5.0 * groups)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    problem = problem_of(x, weight, bias, geometry(stride, padding, output_padding, groups, 1))
    want = torch.nn.functional.conv_transpose3d(x, weight, bias, stride, padding, output_padding, groups)
    return problem, (x, weight, bias), want


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_parts_of_any_size_are_the_whole(call, layout, monkeypatch):
    counts = set()
    convolve = torch_packed.correlate
    for groups, elements in itertools.product((1, 2), (1, 3_000, 20_000, 10**7)):
        monkeypatch.setattr(torch_packed, "PART_ELEMENTS", elements)
        calls = []
        monkeypatch.setattr(torch_packed, "correlate", lambda *args, calls=calls: calls.append(args) or convolve(*args))
        problem, operands, want = problem_and_operands(call, layout, groups)
        assert torch.equal(torch_packed.forward(problem, {}, *operands), want)
        counts.add(len(calls))
    assert min(counts) == 1 and max(counts) == (15 if layout == "ncdhw" else 3)  # of 3 images, of 5 channels each


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_views_cover_y_once(call, layout):
    problem, _, want = problem_and_operands(call, layout)
    packings = [torch_packed.Packing.of(axis) for axis in problem.axes]
    rows = want.shape[1] * torch.Size(len(packing.taps) for packing in packings).numel()
    values = torch.zeros(len(want), rows, *(packing.values for packing in packings))
    times = torch.zeros_like(want)
    for target, source in torch_packed.views(problem, values, times):
        assert target.shape == source.shape
        target += 1
    assert bool((times == 1).all())


def test_even_outputs_of_stride_2_are_one_view():
    """Then neighbours along w are written together (``torch_phase_copies.fill``), also where the crop is odd."""
    for call, views in ((CALLS[0], 1), (CALLS[1], 2)):
        problem, (x, weight, _), want = problem_and_operands(call, "ncdhw")
        packed = torch_packed.packed_weight(problem, weight)
        counts = [torch_packed.Packing.of(axis).values for axis in problem.axes]
        values = torch.zeros(len(x), packed.shape[0], *counts)
        assert len(list(torch_packed.views(problem, values, want))) == views


def test_what_it_does_not_serve():
    x = torch.randn(1, 2, 3, 3, 3)
    for kernel, stride, dilation, reason in (
        (3, 1, 1, "stride 1"),
        (1, 2, 1, "a tap in each phase"),
        (3, 2, 2, "dilation"),
    ):
        weight = torch.randn(2, 2, kernel, kernel, kernel)
        problem = problem_of(x, weight, None, geometry(stride, 0, 0, 1, dilation))
        assert reason in torch_packed.supports(problem, x.device)
