"""The implicit GEMM that the forward and the backward-data kernels share: one loop over taps and channel blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonconv.kernels.triton_device import chunk, inside, next_step, ties_last, widened
from tritonconv.kernels.triton_taps import voxel_words


@triton.jit
def reached(index, mask, size, taps, STEP: tl.constexpr):
    """The first m and how many m < taps there are with 0 <= index + m*STEP < size for some index of the tile; STEP > 0.

    Taken from the least and the largest index, so a tile that wraps around keeps them all.
    """
    low = tl.min(tl.where(mask, index, 1 << 30)).to(tl.int32)
    high = tl.max(tl.where(mask, index, -(1 << 30))).to(tl.int32)
    first = tl.maximum(-high + STEP - 1, 0) // STEP
    last = tl.minimum(tl.maximum(size - low + STEP - 1, 0) // STEP, taps)
    return first, tl.maximum(last - first, 0)


@triton.constexpr_function
def fits_a_word(MOST_TAPS):
    """Whether int32 has a bit for each tap of the three axes."""
    return sum(int(taps) for taps in MOST_TAPS) <= 30


@triton.jit
def implicit_gemm(
    a_ptr,  # the gathered operand, at channel 0 of the group
    a_strides,
    image, d, h, w, mask_m,  # (BLOCK_M,): the voxel that tap m = 0 reads
    size,  # of the gathered operand: a voxel outside reads as zero
    w_ptr,  # the weight at channel 0 of the group on both sides
    w_strides,  # (k, n, tap)
    tap, taps,  # (d, h, w): the first tap and how many there are
    offs_n,  # (BLOCK_N,): columns
    TAP_STEP: tl.constexpr,  # (d, h, w): tap m is tap + m*TAP_STEP ...
    VOXEL_STEP: tl.constexpr,  # ... and reads the voxel at + m*VOXEL_STEP, which is positive
    MOST_TAPS: tl.constexpr,  # (d, h, w): of any phase
    KERNEL: tl.constexpr,
    K_GROUP: tl.constexpr,  # channels per group on the k side
    N_GROUP: tl.constexpr,  # and on the n side
    WRAP_N: tl.constexpr,  # the weight counts n within a group and k over all of them; False: the other way round
    CONFIG: tl.constexpr,  # PACK groups share the tile, block-diagonally
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    VOXELS_INNER: tl.constexpr = False,  # lanes run along the voxels: near each other, whatever the stride
    split=0, splits=1,
    SPLIT: tl.constexpr = False,  # only this one of so many chunks of the steps
    SKIP: tl.constexpr = False,  # without the taps along d and h that leave the operand for all voxels of the tile
):  # fmt: skip
    """sum over taps and channels k of a[voxel(tap), k] * weight[tap, k, n], float32 (BLOCK_M, BLOCK_N).

    A step takes two instructions for each address and mask: the loop moves offsets, which are made before it, by one
    number, and a bit of the voxel's word says whether a tap is inside.
    """
    PACK: tl.constexpr = CONFIG.PACK
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    K: tl.constexpr = PACK * K_GROUP
    N: tl.constexpr = PACK * N_GROUP
    INNER: tl.constexpr = VOXELS_INNER and ties_last()
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SKIP:
        first_d, taps_d = reached(d, mask_m, size[0], taps[0], VOXEL_STEP[0])
        first_h, taps_h = reached(h, mask_m, size[1], taps[1], VOXEL_STEP[1])
        d, h = d + first_d * VOXEL_STEP[0], h + first_h * VOXEL_STEP[1]
        tap = (tap[0] + first_d * TAP_STEP[0], tap[1] + first_h * TAP_STEP[1], tap[2])
        taps = (taps_d, taps_h, taps[2])
    rows = image * a_strides[0] + d * a_strides[2] + h * a_strides[3] + w * a_strides[4]
    words = mask_m
    if fits_a_word(MOST_TAPS):
        words = voxel_words(d, h, w, mask_m, size=size, KERNEL=MOST_TAPS, DILATION=VOXEL_STEP)
    offs_k = widened(tl.arange(0, BLOCK_K), WIDE)
    channels = offs_k
    a_offsets = rows[:, None] + (offs_k * a_strides[1])[None, :]
    if INNER:
        a_offsets = rows[None, :] + (offs_k * a_strides[1])[:, None]
    columns = widened(offs_n % N_GROUP if PACK > 1 and WRAP_N else offs_n, WIDE) * w_strides[1]
    w_offsets = (offs_k * w_strides[0])[:, None] + columns[None, :]
    k, md, mh, mw = 0, 0, 0, 0
    first, last = 0, taps[0] * taps[1] * taps[2] * tl.cdiv(K, BLOCK_K)
    if SPLIT:
        if SKIP:
            taps = (taps[0], tl.maximum(taps[1], 1), taps[2])  # where none is left it divides all the same
        first, last = chunk(split, splits, last)
        k, mw = first % tl.cdiv(K, BLOCK_K) * BLOCK_K, first // tl.cdiv(K, BLOCK_K)
        mh, mw = mw // taps[2], mw % taps[2]
        md, mh = mh // taps[1], mh % taps[1]
    for _ in range(first, last):
        vd = widened(md * VOXEL_STEP[0], WIDE)
        vh = widened(mh * VOXEL_STEP[1], WIDE)
        vw = widened(mw * VOXEL_STEP[2], WIDE)
        if fits_a_word(MOST_TAPS):
            wanted = (1 << md) | (1 << (MOST_TAPS[0] + mh)) | (1 << (MOST_TAPS[0] + MOST_TAPS[1] + mw))
            hit = (words & wanted) == wanted
        else:
            hit = mask_m & inside(d + vd, size[0]) & inside(h + vh, size[1]) & inside(w + vw, size[2])
        moved = vd * a_strides[2] + vh * a_strides[3] + vw * a_strides[4] + widened(k, WIDE) * a_strides[1]
        plane = (tap[0] + md * TAP_STEP[0]) * KERNEL[1] + tap[1] + mh * TAP_STEP[1]
        index = widened(plane * KERNEL[2] + tap[2] + mw * TAP_STEP[2], WIDE)
        a_mask, w_mask = hit[None, :] if INNER else hit[:, None], (offs_n < N)[None, :]
        if K % BLOCK_K != 0 or PACK > 1:
            channels = k + offs_k
        if K % BLOCK_K != 0:
            a_mask = a_mask & ((channels < K)[:, None] if INNER else (channels < K)[None, :])
            w_mask = w_mask & (channels < K)[:, None]
        w_ptrs = w_ptr + (index * w_strides[2] + widened(k, WIDE) * w_strides[0]) + w_offsets
        if PACK > 1:
            w_mask = w_mask & ((channels // K_GROUP)[:, None] == (offs_n // N_GROUP)[None, :])
            if not WRAP_N:
                weight_k = channels % K_GROUP
                w_ptrs = w_ptr + index * w_strides[2] + (weight_k * w_strides[0])[:, None] + columns[None, :]
        a_tile = tl.load(a_ptr + moved + a_offsets, mask=a_mask, other=0.0)
        w_tile = tl.load(w_ptrs, mask=w_mask, other=0.0)
        if INNER:
            a_tile = tl.trans(a_tile)
        acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)  # (BLOCK_M, BLOCK_K) x (BLOCK_K, BLOCK_N)
        k, md, mh, mw = next_step(k, md, mh, mw, taps, K=K, BLOCK_K=BLOCK_K)
    return acc
