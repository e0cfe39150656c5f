"""torch's weight gradient on a CPU is wrong for some padded layers: ours never asks for those. CPU.

On CPUs whose oneDNN has no such fault these tests hold too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import tritonconv
from tritonconv.arguments import geometry, problem_of
from tritonconv.autotune import nearby, online
from tritonconv.kernels.registry import variant
from tritonconv.kernels.torch_native import fast_padding, safe_padding
from tritonconv.problem import Problem

CPU = torch.device("cpu")
# (c_in, c_out, size, kernel, stride, padding, output_padding): each axis and stride by which torch was wrong or ended
# the process, and the most padding that is left to it.
WRONG = [
    ((16, 8, (4, 1, 3), (1, 4, 3), 2, (0, 1, 1), (1, 0, 1)), (0, 0, 1)),
    ((8, 3, (3, 1, 2), 3, 3, 1, 0), (1, 0, 0)),
    ((32, 8, (4, 2, 1), (3, 2, 4), (1, 2, 3), (0, 0, 1), (0, 1, 0)), (1, 0, 0)),
    ((16, 8, (3, 1, 1), (2, 1, 3), 3, (0, 0, 1), (1, 2, 0)), (0, 0, 0)),
    ((48, 2, (2, 3, 4), (3, 2, 3), (1, 3, 3), (1, 0, 1), 0), (0, 0, 1)),
    ((32, 1, (4, 3, 2), (5, 1, 1), (1, 2, 1), (2, 0, 0), 0), (0, 0, 0)),
    ((32, 6, (2, 1, 7), (3, 4, 4), (3, 2, 1), 1, (1, 0, 0)), (1, 0, 1)),
    ((16, 4, (3, 2, 1), (1, 3, 3), (3, 1, 3), (0, 1, 1), (2, 0, 0)), (0, 0, 0)),
]
# Neighbours of the first by which it was right: they keep their padding.
RIGHT = [
    ((16, 8, (4, 3, 3), (1, 4, 3), 2, (0, 1, 1), (1, 0, 1)), (0, 1, 1)),
    ((16, 8, (4, 1, 3), (1, 4, 3), 2, (0, 0, 1), (1, 0, 1)), (0, 1, 1)),
    ((32, 16, (4, 4, 4), 3, 2, 1, 1), (1, 1, 1)),
]
# In float32: padding of the first axis beyond half of the kernel, the second axis' up to half of its extent. Another
# kernel serves the neighbours, whose second axis has more.
WRONG_FLOAT32 = [
    ((3, 3, (3, 4, 3), (5, 4, 2), (2, 2, 1), (3, 1, 0), 0), (2, 1, 0)),
    ((16, 4, (3, 4, 7), (4, 3, 4), (2, 1, 1), (3, 0, 1), 0), (1, 0, 1)),
    ((17, 8, (4, 7, 4), (4, 3, 4), (2, 3, 3), (3, 0, 0), (0, 0, 1)), (1, 0, 0)),
    ((16, 16, (3, 5, 4), (5, 4, 4), (2, 3, 2), (3, 2, 3), (0, 0, 1)), (2, 2, 3)),
]
RIGHT_FLOAT32 = [
    ((16, 4, (3, 4, 7), (4, 3, 4), (2, 1, 1), (3, 2, 1), 0), (3, 2, 1)),
    ((32, 16, (4, 4, 4), 4, 2, 3, 0), (3, 3, 3)),
    ((32, 16, (4, 4, 4), 4, 2, (1, 3, 2), 0), (1, 3, 2)),
]


def call_of(case, dtype=torch.bfloat16, memory_format=torch.contiguous_format, seed=0):
    c_in, c_out, size, kernel, *arguments = case
    kernel = kernel if isinstance(kernel, tuple) else (kernel,) * 3
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (2, c_in, *size), generator=draw).to(dtype).contiguous(memory_format=memory_format)
    weight = torch.randint(-2, 3, (c_in, c_out, *kernel), generator=draw).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), arguments


def problem_and_half(case, dtype):
    x, weight, (stride, padding, output_padding) = call_of(case, dtype)
    problem = problem_of(x, weight, None, geometry(stride, padding, output_padding, 1, 1))
    return problem, tuple((k - 1) // 2 for k in weight.shape[2:])


def refused(problem):
    return variant("backward_weight_torch_native").supports(problem, CPU)


@pytest.mark.parametrize(("case", "most"), WRONG + RIGHT, ids=str)
def test_padding_that_is_left_to_torch_in_bfloat16(case, most):
    problem, half = problem_and_half(case, torch.bfloat16)
    assert safe_padding(problem, problem.dtype) == most
    wrong = (case, most) in WRONG
    assert (refused(problem) is not None) == wrong
    assert not wrong or f"padding {problem.torch_crop.padding} beyond {most}" in refused(problem)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert refused(problem_and_half(case, dtype)[0]) is None
    assert safe_padding(problem, torch.float16) == half


@pytest.mark.parametrize(("case", "most"), WRONG_FLOAT32 + RIGHT_FLOAT32, ids=str)
def test_padding_that_is_left_to_torch_in_float32(case, most):
    problem, half = problem_and_half(case, torch.float32)
    assert safe_padding(problem, problem.dtype) == most
    assert fast_padding(problem, problem.dtype) == tuple(map(min, half, most))
    wrong = (case, most) in WRONG_FLOAT32
    assert (refused(problem) is not None) == wrong
    assert not wrong or f"padding {problem.torch_crop.padding} beyond {most}" in refused(problem)
    assert refused(problem_and_half(case, torch.float64)[0]) is None  # torch's own loops
    assert refused(problem_and_half(case, torch.float16)[0]) is not None  # not tried beyond half


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.bfloat16) for case, _ in WRONG]
    + [(case, dtype) for case, _ in WRONG_FLOAT32 + RIGHT_FLOAT32 for dtype in (torch.float32, torch.float64)],
    ids=str,
)
def test_gradients_where_torch_is_wrong_and_beside_it(case, dtype, memory_format):
    for seed in range(4):
        x, weight, arguments = call_of(case, dtype, memory_format, seed)
        y = tritonconv.conv_transpose3d(x, weight, None, *arguments)
        grad_y = torch.randint(-1, 2, y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
        # Freed memory that is read must show.
        blocks = [torch.full((size,), 3e20) for size in range(16, 4096, 16)]
        del blocks
        mine = torch.autograd.grad(y, (x, weight), grad_y)
        exact = [each.detach().double().contiguous().requires_grad_() for each in (x, weight)]
        want = torch.autograd.grad(F.conv_transpose3d(exact[0], exact[1], None, *arguments), exact, grad_y.double())
        for gradient, expected in zip(mine, want, strict=True):
            torch.testing.assert_close(gradient, expected.to(dtype), rtol=0, atol=0)


UNSAFE = [
    Problem(8, 32, 16, (8, 8, 8), (4, 4, 4), (2, 2, 2), (3, 1, 1), (12, 16, 16)),
    Problem(64, 32, 16, (16, 1, 16), (3, 4, 3), (2, 2, 2), (1, 1, 1), (31, 2, 31), dtype=torch.bfloat16),
]


@pytest.mark.parametrize("problem", UNSAFE, ids=str)
def test_no_trial_runs_a_gradient_of_torch_that_is_not_safe(problem, monkeypatch):
    monkeypatch.delenv(online.VARIABLE, raising=False)
    unsafe = "backward_weight_torch_native"
    assert variant(unsafe).supports(problem, CPU) is not None
    for layout in ("ncdhw", "ndhwc"):
        for vendor in (*nearby.VENDORS, "Another"):
            monkeypatch.setattr(online, "cpu_vendor", lambda vendor=vendor: vendor)
            monkeypatch.setattr(online, "_trials", {})
            contestants = online.trials(replace(problem, layout=layout))[online.GRADIENTS].contestants
            assert len(contestants) > 1 and all(unsafe not in names for names in contestants)
