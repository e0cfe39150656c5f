"""The operation beside torch's, for the tests of torch.compile and of torch's transforms: operands and comparison."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import tritonconv
from tritonconv.problem import PASSES

OURS, TORCH = tritonconv.conv_transpose3d, F.conv_transpose3d
PHASES = tuple(f"{name}_torch_phases" for name in PASSES)
HYPER = {"stride": 2, "padding": 1, "output_padding": 1}
f64 = torch.float64


def operands(n=2, size=(2, 3, 2), dtype=f64):
    return torch.randn(n, 3, *size, dtype=dtype), torch.randn(3, 4, 3, 4, 3, dtype=dtype), torch.randn(4, dtype=dtype)


def ours(x, weight, bias=None):
    return OURS(x, weight, bias, **HYPER)


def theirs(x, weight, bias=None):
    return TORCH(x, weight, bias, **HYPER)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10 if want.dtype in (f64, torch.complex128) else 1e-4, atol=1e-5)
