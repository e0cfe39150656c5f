"""The sum of partial results in a fixed order, the second half of every split reduction.

A kernel that splits a long sum over programs writes one float32 partial per split, and no atomics: the same problem and
config then always add the same numbers in the same order. The partials hold the channels of a tile side by side, the
results often another axis (the taps of a weight, the voxels of NCDHW): tiles are read along one and written along the
other. Written along the channels, each lane would fill 2 bytes of a sector of its own.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_buffers import Buffer
from tritonconv.kernels.triton_device import multiple, widened
from tritonconv.kernels.triton_launch import launch as run
from tritonconv.kernels.triton_launch import wide
from tritonconv.kernels.triton_target import step_of
from tritonconv.kernels.triton_tiles import power_of_two

TILE = 2048  # values that one program has in flight: 16 in each of its 128 threads
ROW = 32  # channels of a tile: a request of 128 bytes
LAST = torch.channels_last_3d


@triton.jit
def summed(
    partial_ptr, splits, elements, offsets, mask,
    BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_I: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sums, float32 (BLOCK_F, BLOCK_I), at ``offsets`` of ``partial`` (splits, elements)."""
    offs_s = widened(tl.arange(0, BLOCK_S), WIDE)
    pointers = partial_ptr + (offs_s * elements)[:, None, None] + offsets[None, :, :]  # (BLOCK_S, BLOCK_F, BLOCK_I)
    acc = tl.zeros((BLOCK_S, BLOCK_F, BLOCK_I), tl.float32)
    for first in range(0, splits, BLOCK_S):
        wanted = (first + offs_s < splits)[:, None, None] & mask[None, :, :]
        acc += tl.load(pointers, mask=wanted, other=0.0).to(tl.float32)
        pointers += BLOCK_S * elements
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=("splits", "batch", "flat"))
def sum_partials_kernel(
    partial_ptr,  # (splits, batch, flat, INNER), dense
    bias_partial_ptr,  # (splits, BIAS), dense, or None
    out_ptr,  # (batch, INNER, flat), or (batch, flat, INNER) where not TRANSPOSED, dense
    bias_ptr,  # (BIAS,) or None
    splits, batch, flat,
    INNER: tl.constexpr, FLAT_STEP: tl.constexpr,  # divides flat: wide stores
    BIAS: tl.constexpr, TRANSPOSED: tl.constexpr,
    TAPS: tl.constexpr, OTHER: tl.constexpr,  # flat is (OTHER, TAPS) in ``out``, (TAPS, OTHER) in ``partial``; or 0
    BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_I: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_F x BLOCK_I sums, and adds BLOCK_S splits at a time; those behind the last tile own the
    bias's.
    """
    flat = multiple(flat, FLAT_STEP)
    tiles_f, tiles_i = tl.cdiv(flat, BLOCK_F), tl.cdiv(INNER, BLOCK_I)
    tile, tiles = tl.program_id(0), batch * tiles_f * tiles_i
    if tile < tiles:
        image = widened(tile // (tiles_f * tiles_i), WIDE)
        offs_f = widened(tile // tiles_i % tiles_f * BLOCK_F + tl.arange(0, BLOCK_F), WIDE)
        offs_i = widened(tile % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I), WIDE)
        row = image * flat + (offs_f % TAPS * OTHER + offs_f // TAPS if TAPS else offs_f)
        mask = (offs_f < flat)[:, None] & (offs_i < INNER)[None, :]
        elements = widened(batch, WIDE) * flat * INNER
        offsets = (row * INNER)[:, None] + offs_i[None, :]
        acc = summed(
            partial_ptr, splits, elements, offsets, mask, BLOCK_S=BLOCK_S, BLOCK_F=BLOCK_F, BLOCK_I=BLOCK_I,
            WIDE=WIDE,
        )  # fmt: skip
        acc = acc.to(out_ptr.dtype.element_ty)
        if TRANSPOSED:
            out_ptrs = out_ptr + ((image * INNER + offs_i) * flat)[:, None] + offs_f[None, :]
            tl.store(out_ptrs, tl.trans(acc), mask=tl.trans(mask))
        else:
            tl.store(out_ptr + ((image * flat + offs_f) * INNER)[:, None] + offs_i[None, :], acc, mask=mask)
    else:
        if bias_ptr is not None:
            channel = (tile - tiles) * (BLOCK_F * BLOCK_I) + tl.arange(0, BLOCK_F * BLOCK_I)[None, :]
            wanted = channel < BIAS
            sums = summed(
                bias_partial_ptr, splits, BIAS, channel, wanted, BLOCK_S=BLOCK_S, BLOCK_F=1,
                BLOCK_I=BLOCK_F * BLOCK_I, WIDE=WIDE,
            )  # fmt: skip
            tl.store(bias_ptr + channel, sums.to(bias_ptr.dtype.element_ty), mask=wanted)


def sum_volumes(partial: Buffer, out: Buffer) -> None:
    """Writes ``partial.sum(0)``, partial (splits, n, d, h, w, c) dense, into ``out`` (n, c, d, h, w).

    In one launch and a fixed order, rounded once; ``out`` is dense, contiguous or channels_last_3d.
    """
    splits, n, *size, channels = partial.shape
    assert tuple(out.shape) == (n, channels, *size)
    _sum(partial, out, (splits, n, math.prod(size), channels), not out.is_contiguous(memory_format=LAST))


def sum_weights(
    partial: Buffer,
    grad_weight: Buffer,
    bias_partial: Buffer | None = None,
    grad_bias: Buffer | None = None,
) -> None:
    """Writes ``partial.sum(0)``, partial (splits, groups, taps, c_out, c_in) dense, into ``grad_weight``.

    In one launch and a fixed order, rounded once; ``grad_weight``, contiguous, is (groups*c_in, c_out, taps) in memory.
    ``bias_partial`` (splits, channels) into ``grad_bias`` (channels,) rides along in the same launch. No splits at all
    give zeros.
    """
    splits, groups, taps, c_out, c_in = partial.shape
    assert grad_weight.is_contiguous()
    assert grad_bias is None or (bias_partial is not None and bias_partial.shape == (splits, grad_bias.numel()))
    _sum(partial, grad_weight, (splits, groups, taps * c_out, c_in), True, (taps, c_out), bias_partial, grad_bias)


def sum_parts(partial: Buffer, out: Buffer, bias_partial: Buffer | None = None, bias_out: Buffer | None = None) -> None:
    """Writes ``partial.sum(0)``, partial (splits, *out.shape), both dense and contiguous, into ``out``.

    In one launch and a fixed order, rounded once; ``bias_partial`` (splits, channels) into ``bias_out`` rides along.
    """
    inner = math.gcd(out.numel(), ROW)
    shape = (partial.shape[0], 1, out.numel() // inner, inner)
    _sum(partial, out, shape, False, (0, 0), bias_partial, bias_out, programs=4)  # partials are many


def _sum(partial, out, shape, transposed, taps=(0, 0), bias_partial=None, bias_out=None, programs=1) -> None:
    """``programs``: of a multiprocessor, where the sums are few."""
    splits, batch, flat, inner = shape
    assert partial.is_contiguous() and partial.numel() == splits * out.numel()
    channels = 0 if bias_out is None else bias_out.numel()
    most = power_of_two(max(out.numel(), channels) // (programs * MULTIPROCESSORS), 32, TILE)
    block_i = power_of_two(inner, 1, min(ROW, most))
    block_f = power_of_two(flat, 1, most // block_i)
    grid = batch * triton.cdiv(flat, block_f) * triton.cdiv(inner, block_i) + triton.cdiv(channels, block_f * block_i)
    if grid == 0:
        return
    run(
        sum_partials_kernel,
        grid,
        {
            "BLOCK_S": power_of_two(splits, 1, TILE // (block_f * block_i)),
            "BLOCK_F": block_f,
            "BLOCK_I": block_i,
            "num_warps": 4,
        },
        (out, bias_out),
        partial_ptr=partial,
        bias_partial_ptr=bias_partial,
        out_ptr=out,
        bias_ptr=bias_out,
        splits=splits,
        batch=batch,
        flat=flat,
        INNER=inner,
        FLAT_STEP=step_of(flat),
        BIAS=channels,
        TRANSPOSED=transposed,
        TAPS=taps[0],
        OTHER=taps[1],
        WIDE=wide(partial, out),
    )
