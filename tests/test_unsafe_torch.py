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
from tritonconv.kernels.torch_native import safe_padding
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


def call_of(case, dtype=torch.bfloat16, memory_format=torch.contiguous_format, seed=0):
    c_in, c_out, size, kernel, *arguments = case
    kernel = kernel if isinstance(kernel, tuple) else (kernel,) * 3
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (2, c_in, *size), generator=draw).to(dtype).contiguous(memory_format=memory_format)
    weight = torch.randint(-2, 3, (c_in, c_out, *kernel), generator=draw).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), arguments


@pytest.mark.parametrize(("case", "most"), WRONG + RIGHT, ids=str)
def test_padding_that_is_left_to_torch(case, most):
    native = variant("backward_weight_torch_native")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, weight, arguments = call_of(case, dtype)
        stride, padding, output_padding = arguments
        problem = problem_of(x, weight, None, geometry(stride, padding, output_padding, 1, 1))
        half = tuple((k - 1) // 2 for k in weight.shape[2:])
        assert safe_padding(problem, dtype) == (most if dtype is torch.bfloat16 else half)
        refused = native.supports(problem, CPU)
        wrong = dtype is torch.bfloat16 and (case, most) in WRONG
        assert (refused is not None) == wrong, refused
        assert not wrong or f"padding {problem.torch_crop.padding} beyond {most}" in refused


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("case", [case for case, _ in WRONG], ids=str)
def test_gradients_of_a_layer_with_which_torch_is_wrong(case, memory_format):
    for seed in range(4):
        x, weight, arguments = call_of(case, memory_format=memory_format, seed=seed)
        y = tritonconv.conv_transpose3d(x, weight, None, *arguments)
        grad_y = torch.randint(-1, 2, y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
        # Freed memory that is read must show.
        blocks = [torch.full((size,), 3e20) for size in range(16, 4096, 16)]
        del blocks
        mine = torch.autograd.grad(y, (x, weight), grad_y)
        exact = [each.detach().double().contiguous().requires_grad_() for each in (x, weight)]
        want = torch.autograd.grad(F.conv_transpose3d(exact[0], exact[1], None, *arguments), exact, grad_y.double())
        for gradient, expected in zip(mine, want, strict=True):
            torch.testing.assert_close(gradient, expected.bfloat16(), rtol=0, atol=0)


UNSAFE = [
    Problem(8, 32, 16, (8, 8, 8), (4, 4, 4), (2, 2, 2), (3, 3, 3), (12, 12, 12)),
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
            online.forget()
            contestants = online.trials(replace(problem, layout=layout))[online.GRADIENTS].contestants
            assert len(contestants) > 1 and all(unsafe not in names for names in contestants)
    online.forget()
