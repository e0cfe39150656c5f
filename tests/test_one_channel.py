"""torch's convolution of one channel is wrong for some sizes on a CPU: ours never asks for those. CPU.

On CPUs whose oneDNN has no such fault these tests hold too.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tritonconv
from tritonconv.arguments import geometry, problem_of
from tritonconv.kernels.registry import variant, variants

CPU = torch.device("cpu")
CHANNELS_LAST = torch.channels_last_3d
# (batch, c_in, c_out, groups, size, kernel, stride, padding, output_padding): torch was wrong in channels_last_3d, in
# float32 and the half types where x is one voxel wide, in bfloat16 where y has one plane.
NARROW = [
    (3, 8, 1, 1, (7, 2, 1), (1, 4, 6), (1, 1, 2), (0, 2, 2), (0, 0, 1)),
    (1, 16, 1, 1, (2, 7, 1), (2, 5, 5), (2, 1, 2), (0, 0, 2), 0),
    (2, 8, 1, 1, (2, 2, 1), (3, 6, 4), (3, 1, 3), (1, 2, 0), (0, 0, 2)),
    (2, 1, 1, 1, (2, 2, 1), (6, 5, 6), (2, 1, 3), (0, 0, 2), (1, 0, 0)),
]
FLAT = [
    (1, 2, 1, 1, (1, 7, 2), (5, 1, 4), (1, 3, 1), (2, 0, 0), 0),
    (1, 6, 2, 2, (1, 7, 7), (5, 3, 6), (1, 3, 3), (2, 1, 2), (0, 0, 2)),
    (1, 8, 4, 4, (1, 3, 2), (5, 1, 5), (2, 1, 3), (2, 0, 2), (0, 0, 1)),
    (2, 16, 16, 16, (1, 4, 3), (3, 3, 3), (1, 2, 2), (1, 1, 1), (0, 1, 1)),
]
# Neighbours: torch's own serves them.
RIGHT = [
    (3, 8, 1, 1, (7, 2, 2), (1, 4, 6), (1, 1, 2), (0, 2, 2), (0, 0, 1)),
    (3, 8, 1, 1, (7, 2, 1), (1, 4, 6), 1, (0, 2, 2), 0),
    (3, 8, 2, 1, (7, 2, 1), (1, 4, 6), (1, 1, 2), (0, 2, 2), (0, 0, 1)),
    (1, 2, 1, 1, (2, 7, 2), (5, 1, 4), (1, 3, 1), (2, 0, 0), 0),
    (1, 2, 1, 1, (1, 7, 2), (1, 1, 4), (1, 3, 1), 0, 0),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def call_of(case, dtype, formats=(torch.contiguous_format,) * 3):
    """x, weight, grad_y of whole numbers in their memory formats, and the arguments."""
    batch, c_in, c_out, groups, size, kernel, stride, padding, output_padding = case
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (batch, c_in, *size), generator=draw)
    weight = torch.randint(-2, 3, (c_in, c_out // groups, *kernel), generator=draw)
    arguments = stride, padding, output_padding, groups
    shape = F.conv_transpose3d(x.double(), weight.double(), None, *arguments).shape
    grad_y = torch.randint(-1, 2, shape, generator=draw)
    return *(t.to(dtype, memory_format=f) for t, f in zip((x, weight, grad_y), formats, strict=True)), arguments


def spoil_freed_memory():
    """Outputs that stay unwritten must show."""
    blocks = [torch.full((size,), float("nan")) for size in range(16, 4096, 16)]
    del blocks


def exact(x, weight, grad_y, arguments):
    """y and both gradients in float64."""
    leaves = [t.detach().double().contiguous().requires_grad_() for t in (x, weight)]
    y = F.conv_transpose3d(*leaves, None, *arguments)
    return y, *torch.autograd.grad(y, leaves, grad_y.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NARROW + FLAT + RIGHT, ids=str)
def test_torchs_own_input_gradient_is_refused(case, dtype):
    x, weight, _, arguments = call_of(case, dtype)
    problem = problem_of(x, weight, None, geometry(*arguments, 1))
    refusal = variant("backward_data_torch_native").supports(problem, CPU)
    if case in RIGHT or dtype is torch.float64 or (case in FLAT and dtype is torch.float32):
        assert refusal is None
    else:
        assert f"x {problem.size}, y depth {problem.out_size[0]}, kernel {problem.kernel}" in refusal


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("case", NARROW + FLAT + RIGHT, ids=str)
def test_values_and_gradients(case, dtype):
    formats = [torch.contiguous_format, CHANNELS_LAST]
    for chosen in [(a, b, c) for a in formats for b in formats for c in formats]:
        x, weight, grad_y, arguments = call_of(case, dtype, chosen)
        want = exact(x, weight, grad_y, arguments)
        leaves = x.requires_grad_(), weight.requires_grad_()
        for _ in range(2):
            spoil_freed_memory()
            y = tritonconv.conv_transpose3d(*leaves, None, *arguments)
            for mine, expected in zip((y, *torch.autograd.grad(y, leaves, grad_y)), want, strict=True):
                assert torch.equal(mine, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", NARROW + FLAT, ids=str)
def test_every_torch_formulation(case, dtype):
    """The first calls may run each of them."""
    for memory_format in (torch.contiguous_format, CHANNELS_LAST):
        x, weight, grad_y, arguments = call_of(case, dtype, (memory_format,) * 3)
        problem = problem_of(x, weight, None, geometry(*arguments, 1))
        y, grad_x, grad_weight = exact(x, weight, grad_y, arguments)
        served = [each for each in variants() if each.backend == "torch" and each.supports(problem, CPU) is None]
        assert {each.pass_name for each in served} == {"forward", "backward_data", "backward_weight"}
        for each in served:
            config = each.default(problem, CPU)
            spoil_freed_memory()
            if each.pass_name == "forward":
                mine, want = each.launch(problem, config, x, weight, None), y
            elif each.pass_name == "backward_data":
                mine, want = each.launch(problem, config, grad_y, weight), grad_x
            else:
                mine, want = each.launch(problem, config, x, grad_y, False)[0], grad_weight
            assert torch.equal(mine, want.to(dtype)), each.name
