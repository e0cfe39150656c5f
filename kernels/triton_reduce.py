"""The sum of float32 partial results in a fixed order, the second half of every split reduction.

A kernel that splits a long sum over programs writes one partial per split, and no atomics: the same problem and
config then always add the same numbers in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritonconv.kernels.triton_device import ceil_div, divided, offset, widened
from tritonconv.kernels.triton_launch import launch as run
from tritonconv.kernels.triton_launch import wide
from tritonconv.kernels.triton_tiles import PROGRAMS, power_of_two

TILE = 2048  # float32 values that one program has in flight: 16 in each of its 128 threads


@triton.jit
def summed(partial_ptr, splits, elements, element, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr):
    """The sums of the columns ``element`` (BLOCK_E,) of ``partial`` (splits, elements), float32."""
    offs_s = tl.arange(0, BLOCK_S)
    if WIDE:
        offs_s = offs_s.to(tl.int64)
        element = element.to(tl.int64)
    pointers = partial_ptr + offs_s[:, None] * elements + element[None, :]  # (BLOCK_S, BLOCK_E)
    acc = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    for first in range(0, splits, BLOCK_S):
        mask = (first + offs_s < splits)[:, None] & (element < elements)[None, :]
        acc += tl.load(pointers, mask=mask, other=0.0)
        pointers += BLOCK_S * elements
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=("splits",))
def sum_partials_kernel(
    partial_ptr,  # (splits, *SHAPE), dense
    bias_partial_ptr,  # (splits, BIAS), dense, or None
    out_ptr,  # SHAPE
    bias_ptr,  # (BIAS,) or None
    splits, out_strides, bias_stride,
    SHAPE: tl.constexpr, ELEMENTS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = ceil_div(ELEMENTS, BLOCK_E)
    tile = tl.program_id(0)
    offs_e = tl.arange(0, BLOCK_E)
    if tile < TILES:
        element = tile * BLOCK_E + offs_e
        acc = summed(partial_ptr, splits, ELEMENTS, element, BLOCK_S, BLOCK_E, WIDE)
        rest = element.to(tl.int64) if WIDE else element
        where = rest * 0
        for back in tl.static_range(len(SHAPE)):  # the last axis counts fastest
            where += rest % SHAPE[len(SHAPE) - 1 - back] * out_strides[len(SHAPE) - 1 - back]
            rest = rest // SHAPE[len(SHAPE) - 1 - back]
        tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=element < ELEMENTS)
    else:
        if bias_ptr is not None:
            channel = (tile - TILES) * BLOCK_E + offs_e
            acc = summed(bias_partial_ptr, splits, BIAS, channel, BLOCK_S, BLOCK_E, WIDE)
            tl.store(bias_ptr + channel * bias_stride, acc.to(bias_ptr.dtype.element_ty), mask=channel < BIAS)


@triton.jit(do_not_specialize=("splits", "elements", "d", "h", "w"))
def sum_volumes_kernel(
    partial_ptr,  # (splits, n, d, h, w, CHANNELS), dense
    out_ptr,  # (n, CHANNELS, d, h, w)
    splits, elements, d, h, w, out_strides,
    CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    element = widened(tl.program_id(0), WIDE) * BLOCK_E + tl.arange(0, BLOCK_E)
    acc = summed(partial_ptr, splits, elements, element, BLOCK_S, BLOCK_E, WIDE)
    row, place_w = divided(element // CHANNELS, w, WIDE)
    plane, place_h = divided(row, h, WIDE)
    image, place_d = divided(plane, d, WIDE)
    where = offset(out_strides, image, element % CHANNELS, place_d, place_h, place_w)
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=element < elements)


def sum_volumes(partial: torch.Tensor, out: torch.Tensor) -> None:
    """Writes ``partial.sum(0)``, partial (splits, n, d, h, w, c) dense float32, into ``out`` (n, c, d, h, w).

    In one launch and a fixed order, rounded once; ``out`` has any strides.
    """
    splits, n, d, h, w, channels = partial.shape
    elements = out.numel()
    assert tuple(out.shape) == (n, channels, d, h, w) and partial.is_contiguous() and elements
    block_e = power_of_two(elements // PROGRAMS, 32, 512)
    run(
        sum_volumes_kernel,
        triton.cdiv(elements, block_e),
        {"BLOCK_S": power_of_two(splits, 1, TILE // block_e), "BLOCK_E": block_e, "num_warps": 4},
        out.device,
        partial_ptr=partial,
        out_ptr=out,
        splits=splits,
        elements=elements,
        d=d,
        h=h,
        w=w,
        out_strides=out.stride(),
        CHANNELS=channels,
        WIDE=wide(partial, out),
    )


def sum_partials(
    partial: torch.Tensor,
    out: torch.Tensor,
    bias_partial: torch.Tensor | None = None,
    bias_out: torch.Tensor | None = None,
) -> None:
    """Writes ``partial.sum(0)`` into ``out``, rounded once to its dtype, in one launch and a fixed order.

    ``partial`` is (splits, *out.shape), dense, float32. ``out`` has any rank and any strides: hand over a permuted
    view of the result, so that its axes come in the order in which the partials hold them, such as
    ``grad_weight.flatten(2).permute(2, 0, 1)`` for partials (splits, tap, c_in, c_out). ``bias_partial``
    (splits, channels) into ``bias_out`` (channels,) rides along in the same launch. No splits at all gives zeros.
    """
    splits, elements = partial.shape[0], out.numel()
    channels = 0 if bias_out is None else bias_out.numel()
    assert partial.shape[1:] == out.shape and partial.is_contiguous()
    if bias_out is not None:
        assert bias_partial is not None and bias_partial.shape == (splits, channels) and bias_partial.is_contiguous()
    block_e = power_of_two(max(elements, channels) // PROGRAMS, 32, 512)
    tiles = triton.cdiv(elements, block_e) + triton.cdiv(channels, block_e)
    if tiles == 0:
        return
    run(
        sum_partials_kernel,
        tiles,
        {"BLOCK_S": power_of_two(splits, 1, TILE // block_e), "BLOCK_E": block_e, "num_warps": 4},
        out.device,
        partial_ptr=partial,
        bias_partial_ptr=bias_partial,
        out_ptr=out,
        bias_ptr=bias_out,
        splits=splits,
        out_strides=out.stride(),
        bias_stride=0 if bias_out is None else bias_out.stride(0),
        SHAPE=tuple(out.shape),
        ELEMENTS=elements,
        BIAS=channels,
        WIDE=wide(partial, out),
    )
