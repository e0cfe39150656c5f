"""The implicit GEMM that the forward and the backward-data kernels share: one loop over taps and channel blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonconv.kernels.triton_device import TIES_LAST, chunk, inside, next_step, widened


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
    VOXEL_STEP: tl.constexpr,  # ... and reads the voxel at + m*VOXEL_STEP
    KERNEL: tl.constexpr,
    K_GROUP: tl.constexpr,  # channels per group on the k side
    N_GROUP: tl.constexpr,  # and on the n side
    PACK: tl.constexpr,  # groups that share the tile, block-diagonally
    WRAP_N: tl.constexpr,  # the weight counts n within a group and k over all of them; False: the other way round
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    VOXELS_INNER: tl.constexpr = False,  # lanes run along the voxels: near each other, whatever the stride
    split=0, splits=1,
    SPLIT: tl.constexpr = False,  # only this one of so many chunks of the steps
    SKIP: tl.constexpr = False,  # without the taps along d and h that leave the operand for all voxels of the tile
):  # fmt: skip
    """sum over taps and channels k of a[voxel(tap), k] * weight[tap, k, n], float32 (BLOCK_M, BLOCK_N)."""
    K: tl.constexpr = PACK * K_GROUP
    N: tl.constexpr = PACK * N_GROUP
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SKIP:
        first_d, taps_d = reached(d, mask_m, size[0], taps[0], VOXEL_STEP[0])
        first_h, taps_h = reached(h, mask_m, size[1], taps[1], VOXEL_STEP[1])
        d, h = d + first_d * VOXEL_STEP[0], h + first_h * VOXEL_STEP[1]
        tap = (tap[0] + first_d * TAP_STEP[0], tap[1] + first_h * TAP_STEP[1], tap[2])
        taps = (taps_d, taps_h, taps[2])
    rows = image * a_strides[0] + d * a_strides[2] + h * a_strides[3] + w * a_strides[4]
    offs_k = widened(tl.arange(0, BLOCK_K), WIDE)
    columns = widened(offs_n % N_GROUP if PACK > 1 and WRAP_N else offs_n, WIDE) * w_strides[1]
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
        hit = mask_m & inside(d + vd, size[0]) & inside(h + vh, size[1]) & inside(w + vw, size[2])
        moved = vd * a_strides[2] + vh * a_strides[3] + vw * a_strides[4]
        plane = (tap[0] + md * TAP_STEP[0]) * KERNEL[1] + tap[1] + mh * TAP_STEP[1]
        index = widened(plane * KERNEL[2] + tap[2] + mw * TAP_STEP[2], WIDE)
        channels = k + offs_k
        weight_k = channels if PACK == 1 or WRAP_N else channels % K_GROUP
        a_mask, a_ptrs = hit[:, None], a_ptr + (rows + moved)[:, None] + (channels * a_strides[1])[None, :]
        if VOXELS_INNER and TIES_LAST:
            a_mask, a_ptrs = hit[None, :], a_ptr + (rows + moved)[None, :] + (channels * a_strides[1])[:, None]
        w_mask = (offs_n < N)[None, :]
        if K % BLOCK_K != 0:
            a_mask = a_mask & ((channels < K)[:, None] if VOXELS_INNER and TIES_LAST else (channels < K)[None, :])
            w_mask = w_mask & (channels < K)[:, None]
        if PACK > 1:
            w_mask = w_mask & ((channels // K_GROUP)[:, None] == (offs_n // N_GROUP)[None, :])
        a_tile = tl.load(a_ptrs, mask=a_mask, other=0.0)
        w_tile = tl.load(
            w_ptr + index * w_strides[2] + (weight_k * w_strides[0])[:, None] + columns[None, :], mask=w_mask, other=0.0
        )
        if VOXELS_INNER and TIES_LAST:
            a_tile = tl.trans(a_tile)
        acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)  # (BLOCK_M, BLOCK_K) x (BLOCK_K, BLOCK_N)
        k, md, mh, mw = next_step(k, md, mh, mw, taps, K, BLOCK_K)
    return acc
