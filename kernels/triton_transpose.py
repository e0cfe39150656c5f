"""Copies in another order of axes, through tiles that are read along one axis and written along another.

torch's own copy of a permuted tensor reads what it writes side by side from far apart: of a weight with k taps, which
are its innermost axis, each lane reads 2 bytes of another sector of 32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_buffers import Buffer, new
from tritonconv.kernels.triton_device import multiple, widened
from tritonconv.kernels.triton_launch import launch, wide
from tritonconv.kernels.triton_target import STEP, step_of
from tritonconv.kernels.triton_tiles import power_of_two

SMALLEST, LARGEST = 1024, 8192  # elements of a tile
IN_FOUR_WARPS = 16 << 10  # bytes of a tile: of more, 64 elements of 4 bytes for each of 128 threads, ptxas spills some
ROWS = 64  # at least so many, where there are: elements of a tile that become neighbours


@triton.jit(do_not_specialize=("batch", "flat"))
def transpose_kernel(
    source_ptr,  # (batch, INNER, flat), dense
    out_ptr,  # (batch, flat, INNER), dense
    batch, flat,
    INNER: tl.constexpr,
    STEP: tl.constexpr,  # divides flat: wide loads
    TAPS: tl.constexpr, OTHER: tl.constexpr,  # flat is (OTHER, TAPS) in ``source``, (TAPS, OTHER) in ``out``; or 0
    BLOCK_I: tl.constexpr, BLOCK_F: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of BLOCK_I x BLOCK_F elements of an image of the copy."""
    flat = multiple(flat, STEP)
    tiles_i, tiles_f = tl.cdiv(INNER, BLOCK_I), tl.cdiv(flat, BLOCK_F)
    pid = tl.program_id(0)
    image = widened(pid // (tiles_i * tiles_f), WIDE)
    offs_i = widened(pid % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I), WIDE)
    offs_f = widened(pid // tiles_i % tiles_f * BLOCK_F + tl.arange(0, BLOCK_F), WIDE)
    mask = (offs_i < INNER)[:, None] & (offs_f < flat)[None, :]
    rows = source_ptr + ((image * INNER + offs_i) * flat)[:, None]
    tile = tl.load(rows + offs_f[None, :], mask=mask)  # (BLOCK_I, BLOCK_F)
    row = image * flat + (offs_f % TAPS * OTHER + offs_f // TAPS if TAPS else offs_f)
    tl.store(out_ptr + (row * INNER)[:, None] + offs_i[None, :], tl.trans(tile), mask=tl.trans(mask))


def _transpose(source, out, batch, inner, flat, step, taps=(0, 0)) -> None:
    largest = power_of_two(source.numel() // MULTIPROCESSORS, SMALLEST, LARGEST)
    block_f = power_of_two(flat, 4, largest // ROWS)
    block_i = power_of_two(inner, 8, max(8, largest // block_f))
    if block_i == block_f:  # Triton gives tiles of one shape one layout, and what is wide for one axis is not for both
        block_i //= 2
    warps = 4 if block_i * block_f * source.dtype.itemsize <= IN_FOUR_WARPS else 8
    launch(
        transpose_kernel,
        batch * triton.cdiv(inner, block_i) * triton.cdiv(flat, block_f),
        {"BLOCK_I": block_i, "BLOCK_F": block_f, "num_warps": warps},
        (out,),
        source_ptr=source,
        out_ptr=out,
        batch=batch,
        flat=flat,
        INNER=inner,
        STEP=step,
        TAPS=taps[0],
        OTHER=taps[1],
        WIDE=wide(source),
    )


def channels_last(x: Buffer) -> Buffer:
    """A copy of ``x`` (n, c, d, h, w), dense, in channels_last_3d."""
    n, channels, *size = x.shape
    out = new(x.shape, x, memory_format=torch.channels_last_3d)
    voxels = math.prod(size)
    _transpose(x, out, n, channels, voxels, step_of(voxels))
    return out


def taps_first(weight: Buffer, innermost: int) -> Buffer:
    """A copy of ``weight`` (c_in, c_out, kd, kh, kw), dense, whose memory has the order (tap, other, ``innermost``).

    ``innermost`` is the axis 0 (c_in) or 1 (c_out); the shape stays as it is.
    """
    c_in, c_out, kd, kh, kw = weight.shape
    taps, plane = kd * kh * kw, c_in * c_out
    channels = (1, c_in) if innermost == 0 else (c_out, 1)
    out = new(weight.shape, weight, strides=(*channels, kh * kw * plane, kw * plane, plane))
    if innermost == 0:  # a row for each c_in, in it all (c_out, tap) side by side
        _transpose(weight, out, 1, c_in, c_out * taps, math.gcd(c_out * taps, STEP), (taps, c_out))
    else:  # a row for each (c_in, c_out)
        _transpose(weight, out, 1, plane, taps, math.gcd(taps, STEP))
    return out
