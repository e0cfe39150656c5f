"""Backward-weight as one GEMM over all voxels, split into chunks, with the bias gradient from the same launch.

One program owns BLOCK_M rows (tap, output channel) x BLOCK_N input channels of grad_weight and one contiguous chunk of
the input voxels i, the depth: ``grad_weight[ci, co, t] = sum over i of grad_y[i*stride - crop + dilation*t, co] *
x[i, ci]``. Taps and output channels count together, so that few channels still fill a dot.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_taps
from tritonconv.kernels.triton_arrival import ARRIVE
from tritonconv.kernels.triton_channels_last import copying
from tritonconv.kernels.triton_device import (
    aligned,
    ceil_div,
    chunk,
    dividers,
    entered,
    load_lanes,
    offset,
    product,
    voxel_tiles,
    voxels,
    widened,
)
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, refusal
from tritonconv.kernels.triton_split_gemm import SplitGemm, store_channel_sums, store_weights, strided
from tritonconv.kernels.triton_taps import lanes_inside, spans, tap_lanes
from tritonconv.kernels.variant import SPREADS_VOXELS, Variant
from tritonconv.problem import Problem

LOAD_INSTRUCTIONS = 20  # every step finds its voxels anew


@triton.constexpr_function
def weight_tiles(KERNEL, C_OUT, C_IN, GROUPS, BLOCK_M, BLOCK_N):
    """How many tiles grad_weight has: programs of one split."""
    return ceil_div(math.prod(int(taps) for taps in KERNEL) * C_OUT, BLOCK_M) * ceil_div(C_IN, BLOCK_N) * GROUPS


@triton.jit
def store_weight_tile(
    pid, x_ptr, grad_y_ptr, partial_ptr, bias_partial_ptr, arrivals_ptr, total_ptr, total_bias_ptr,
    n, size, out_size, crop, splits, strides,
    LAYER: tl.constexpr, CONFIG: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes what the program ``pid`` owns of :func:`backward_weight_splitk_kernel`, whose arguments these are."""
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    GROUPS: tl.constexpr = LAYER.GROUPS
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    DILATION: tl.constexpr = LAYER.DILATION
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    BLOCK_W: tl.constexpr = CONFIG.BLOCK_W
    Y_VOXELS_INNER: tl.constexpr = CONFIG.Y_VOXELS_INNER
    X_VOXELS_INNER: tl.constexpr = CONFIG.X_VOXELS_INNER
    x_strides, grad_y_strides, partial_strides = strides
    TILES: tl.constexpr = weight_tiles(KERNEL, C_OUT, C_IN, GROUPS, BLOCK_M, BLOCK_N)
    BIAS_TILES: tl.constexpr = 0 if bias_partial_ptr is None else ceil_div(C_OUT * GROUPS, CONFIG.BIAS_C)
    split, tile = pid // (TILES + BIAS_TILES), pid % (TILES + BIAS_TILES)
    if bias_partial_ptr is not None:  # noqa: SIM102
        if tile < BIAS_TILES:
            store_channel_sums(
                grad_y_ptr, bias_partial_ptr, arrivals_ptr, total_bias_ptr, n=n, out_size=out_size,
                grad_y_strides=grad_y_strides, tile=tile, split=split, splits=splits, CHANNELS=C_OUT * GROUPS,
                VOXELS_INNER=Y_VOXELS_INNER, BLOCK_V=CONFIG.BIAS_V, BLOCK_C=CONFIG.BIAS_C, BLOCK_W=CONFIG.BIAS_W,
                WIDE=WIDE,
            )  # fmt: skip
            return

    tile -= BIAS_TILES
    M: tl.constexpr = product(KERNEL) * C_OUT
    TILES_M: tl.constexpr = ceil_div(M, BLOCK_M)
    TILES_N: tl.constexpr = ceil_div(C_IN, BLOCK_N)
    group = tile // (TILES_M * TILES_N)
    offs_m = tile % TILES_M * BLOCK_M + tl.arange(0, BLOCK_M)  # (tap, output channel)
    offs_n = tile // TILES_M % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    group, offs_m, offs_n = widened(group, WIDE), widened(offs_m, WIDE), widened(offs_n, WIDE)
    tap, td, th, tw, co, words = tap_lanes(offs_m, C_OUT, KERNEL)
    mask_m, mask_n = offs_m < M, offs_n < C_IN
    ci = group * C_IN + offs_n
    vd, vh, vw = td * DILATION[0], th * DILATION[1], tw * DILATION[2]
    # The voxels are the last axis of both operands, so that the lanes of a warp run along them wherever the channels
    # are not neighbours: near each other in memory, whatever the stride.
    grad_y_rows = grad_y_ptr + offset(grad_y_strides, 0, group * C_OUT + co, vd, vh, vw)[:, None]  # (BLOCK_M, 1)
    x_rows = x_ptr + (ci * x_strides[1])[:, None]  # (BLOCK_N, 1)
    first, last = chunk(split, splits, voxel_tiles(n, size, BLOCK_K, BLOCK_W, WIDE))
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    by = None
    if WIDE < 2 and not Y_VOXELS_INNER:
        by = dividers(size, BLOCK_W)
    lanes = spans((vd, vh, vw), crop, out_size, mask_m, STRIDE)
    # Of i*stride - crop + tap the loop adds only i*stride.
    cut = (widened(crop[0], WIDE), widened(crop[1], WIDE), widened(crop[2], WIDE))
    grad_y_rows -= cut[0] * grad_y_strides[2] + cut[1] * grad_y_strides[3] + cut[2] * grad_y_strides[4]
    y_strides = strided(grad_y_strides, STRIDE, WIDE)
    for tile_k in range(first, entered(first, last, CONFIG.ENTER)):
        image, d, h, w, mask_k = voxels(tile_k, n, size, BLOCK_K, BLOCK_W, WIDE, by=by)
        hit = lanes_inside(
            d, h, w, mask_k, lanes, words, cut=crop, size=out_size,
            CHANNELS=C_OUT, STRIDE=STRIDE, KERNEL=KERNEL, DILATION=DILATION, WIDE=WIDE,
        )  # fmt: skip
        grad_y_columns = offset(y_strides, image, 0, d, h, w)[None, :]
        grad_y_tile = load_lanes(grad_y_rows + grad_y_columns, hit, Y_VOXELS_INNER)  # (BLOCK_M, BLOCK_K)
        x_columns = offset(x_strides, image, 0, d, h, w)[None, :]
        x_mask = mask_n[:, None] & mask_k[None, :]
        x_tile = load_lanes(x_rows + x_columns, x_mask, X_VOXELS_INNER)  # (BLOCK_N, BLOCK_K)
        acc = tl.dot(grad_y_tile, tl.trans(x_tile), acc, input_precision=PRECISION)

    store_weights(
        acc, partial_ptr, arrivals_ptr, total_ptr, partial_strides, tile=tile + BIAS_TILES, split=split, splits=splits,
        co=co, tap_m=tap, ci=ci, tap_n=0, mask=mask_m[:, None] & mask_n[None, :],
        C_OUT=C_OUT, TAPS=product(KERNEL), WIDE=WIDE,
    )  # fmt: skip


@triton.jit(launch_metadata=accounting, do_not_specialize=(*RUN_TIME, "splits"))
def backward_weight_splitk_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    partial_ptr,  # (splits, c_in, c_out, taps): the sums of chunks, or grad_weight itself
    bias_partial_ptr,  # (splits, c_out): those of grad_bias, or None
    arrivals_ptr,  # (programs of one split,) int32, zeros: the last one of a tile adds up its partials; or None
    total_ptr,  # (c_in, c_out, taps), dense, or None without arrivals
    total_bias_ptr,  # (c_out,), or None
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    splits, strides,  # of x, of grad_y, of the partials
    LAYER: tl.constexpr, CONFIG: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns one of ``splits`` chunks of the voxels of x, the depth, and of that chunk's grad_weight BLOCK_M
    rows (tap, output channel) x BLOCK_N columns (input channel), or BIAS_C channels of its grad_bias.

    A step of the former has BLOCK_K voxels, one of the bias BIAS_V voxels of grad_y in rows of BIAS_W along w.
    """
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    store_weight_tile(
        tl.program_id(0), x_ptr=x_ptr, grad_y_ptr=grad_y_ptr, partial_ptr=partial_ptr,
        bias_partial_ptr=bias_partial_ptr, arrivals_ptr=arrivals_ptr, total_ptr=total_ptr,
        total_bias_ptr=total_bias_ptr, n=n, size=size, out_size=out_size, crop=crop, splits=splits,
        strides=aligned(strides, UNITS), LAYER=LAYER, CONFIG=CONFIG, WIDE=WIDE, PRECISION=PRECISION,
    )  # fmt: skip


def gemm(problem: Problem) -> SplitGemm:
    rows = math.prod(problem.kernel) * problem.c_out // problem.groups
    return SplitGemm(problem, rows, problem.c_in // problem.groups, problem.size)


def launches(problem, config, x, grad_y, need_bias):
    return gemm(problem).launches(backward_weight_splitk_kernel, config, x, grad_y, need_bias)


def supports(problem: Problem, device: torch.device) -> str | None:
    return refusal(problem, device) or triton_taps.refusal(problem.kernel)


VARIANT = copying(Variant(
    "backward_weight_splitk", "backward_weight",
    "one GEMM over all voxels, split into chunks; the bias gradient in the same launch", "triton",
    launches=launches, supports=supports, space=lambda problem, device: gemm(problem).space(gemm(problem).default()),
    default=lambda problem, device: gemm(problem).default(), spreads_nonfinite=SPREADS_VOXELS, options=(ARRIVE,),
    workspace_bytes=lambda problem: gemm(problem).workspace_bytes(),
    work=lambda problem, config: gemm(problem).work(config, LOAD_INSTRUCTIONS),
), ("x", "y"), "c_out")  # fmt: skip
