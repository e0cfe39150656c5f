"""Forward for few output channels: one GEMM makes every (voxel, tap) product, then taps are added phase by phase.

The products are taps*c_out values per input voxel, so the variant pays while c_out is small; a matrix unit or oneDNN's
16-wide channel block would be almost empty there.
"""

from __future__ import annotations

import itertools
import math

from tritonconv.kernels.torch_layout import add_bias_, matrix_refusal, sum_dtype, to_layout, voxel_rows
from tritonconv.kernels.torch_products import products
from tritonconv.kernels.variant import Variant
from tritonconv.kernels.work import by_torch, size_of


def supports(problem, device):
    return matrix_refusal(problem)


def _axis_parts(axis):
    """For each tap that lands: (tap, phase, slice of outputs within the phase, slice of inputs)."""
    for index, phase in enumerate(axis.phases):
        for tap, offset in zip(phase.taps, phase.offsets, strict=True):
            low, high = max(0, offset), min(axis.size, phase.count + offset)
            if low < high:
                yield tap, index, slice(low - offset, high - offset), slice(low, high)


def forward(problem, config, x, weight, bias, out=None):
    n, c_out = problem.n, problem.c_out
    x, weight = x.to(sum_dtype(problem.dtype)), weight.to(sum_dtype(problem.dtype))
    rows = weight.permute(2, 3, 4, 1, 0).flatten(0, 3)  # (taps*c_out, c_in)
    values = products(rows, voxel_rows(x).transpose(1, 2)).view(n, *problem.kernel, c_out, *problem.size)
    axes = problem.axes
    steps = [len(axis.phases) for axis in axes]
    counts = [axis.phases[0].count for axis in axes]  # the first phase is the longest
    sums = x.new_zeros((n, *steps, c_out, *counts))
    for parts in itertools.product(*(list(_axis_parts(axis)) for axis in axes)):
        taps, phases, targets, sources = zip(*parts, strict=True)
        sums[(slice(None), *phases, slice(None), *targets)] += values[(slice(None), *taps, slice(None), *sources)]
    y = sums.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(n, c_out, *(c * s for c, s in zip(counts, steps, strict=True)))
    od, oh, ow = problem.out_size
    y = y[:, :, :od, :oh, :ow]
    if out is not None:
        return out.copy_(add_bias_(y, bias))
    return add_bias_(to_layout(y, problem.memory_format), bias).to(problem.dtype)


def _product_bytes(problem) -> int:
    values = problem.n * problem.c_out * math.prod(problem.kernel) * math.prod(problem.size)
    return values * sum_dtype(problem.dtype).itemsize


VARIANT = Variant(
    name="forward_torch_columns",
    pass_name="forward",
    idea="few output channels: one GEMM over all taps, then an overlap-add per phase",
    backend="torch",
    launch=forward,
    strided=True,
    supports=supports,
    workspace_bytes=lambda problem: 2 * problem.bytes() + _product_bytes(problem),
    work=lambda problem, config: by_torch(
        problem, "forward", 3 * _product_bytes(problem) + 2 * size_of(problem, "y"), 4 * math.prod(problem.kernel)
    ),
)
