"""Backward-weight where kernel = stride: grad_weight and grad_bias from one read of grad_y and of x.

Each element of grad_y belongs to one voxel i of x and one tap t: ``grad_weight[ci, co, t] = sum over i of x[i, ci] *
grad_y[i*stride + t, co]``. One program owns BLOCK_M rows (tap, output channel), all of them where they fit a tile, x
BLOCK_N input channels, and one chunk of the voxels, the depth. No tap leaves the volume, so masks ask for the voxel
alone. The sums are stored in the order of the weight, in which the partials of several chunks are added as they lie.

Words: *rows* are in one of two orders.

* ROWS = 0: (tap, channel). grad_y is loaded (voxel, row), and the product is (rows, input channels).
* ROWS = 1: (tap_d, tap_h, channel, tap_w), where w is grad_y's contiguous axis. Whole rows of grad_y along w are loaded
  and their taps are parted in registers, so the product is the transposed one, (input channels, rows): its right
  operand comes from shared memory.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_shuffle_tiles as shuffle
from tritonconv.kernels.triton_arrival import ARRIVE, ahead, last_to_arrive, sum_in_order
from tritonconv.kernels.triton_device import (
    aligned,
    ceil_div,
    chunk,
    dividers,
    entered,
    load_voxels,
    multiple,
    offset,
    product,
    voxel_tiles,
    voxels,
    widened,
)
from tritonconv.kernels.triton_fold import folded, folded_outputs
from tritonconv.kernels.triton_fold import pays as fold_pays
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, precision, refusal, wide
from tritonconv.kernels.triton_partials import WeightGradients
from tritonconv.kernels.triton_reduce import sum_parts, sum_volumes
from tritonconv.kernels.triton_shuffle_tiles import tile_taps
from tritonconv.kernels.triton_target import STEP, compute_capability, zeros_behind_loops
from tritonconv.kernels.variant import FOLD, Config, Variant
from tritonconv.kernels.work import Work
from tritonconv.problem import Problem


@triton.jit
def by_channel_and_tap(acc, TAPS: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr):
    """The sums of a tile as (input channels, (output channel, tap)), as a weight lies."""
    M: tl.constexpr = acc.shape[1] if ROWS else acc.shape[0]
    N: tl.constexpr = acc.shape[0] if ROWS else acc.shape[1]
    if ROWS:
        weights = acc.reshape(N, TAPS // ACROSS, M // TAPS, ACROSS).permute(0, 2, 1, 3)
    else:
        weights = acc.reshape(TAPS, M // TAPS, N).permute(2, 1, 0)
    return weights.reshape(N, M)


@triton.jit
def in_steps(strides, STEP: tl.constexpr):
    """``strides`` with STEP, which divides all but the last, in sight of the compiler."""
    n, c, d, h = strides[0], strides[1], strides[2], strides[3]
    return multiple(n, STEP), multiple(c, STEP), multiple(d, STEP), multiple(h, STEP), strides[4]


@triton.jit(launch_metadata=accounting, do_not_specialize=(*RUN_TIME, "splits"))
def backward_weight_shuffle_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    grad_y_ptr,  # (n, c_out, d*kd, h*kh, w*kw)
    partial_ptr,  # (splits, c_in, c_out, taps), dense: the sums of chunks, or grad_weight itself
    bias_partial_ptr,  # (splits, tiles of a channel's taps, c_out), dense, or None
    arrivals_ptr,  # (programs of one split,) int32, zeros: the last one of a tile adds up its partials; or None
    total_ptr,  # (c_in, c_out, taps), dense, or None without arrivals
    total_bias_ptr,  # (c_out,), or None
    n, d_in, h_in, w_in, splits, strides,  # of x, of grad_y
    C_IN: tl.constexpr, C_OUT: tl.constexpr, GROUPS: tl.constexpr, KERNEL: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    VOXELS_INNER: tl.constexpr,  # of x and of grad_y: see load_voxels
    W_STEP: tl.constexpr,  # with ROWS: divides w_in and the strides across w, those of grad_y KERNEL[2] times
    ONES: tl.constexpr,  # columns of a product with ones that sums grad_y; or 0
    ENTER: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows (tap, output channel) x BLOCK_N columns (input channel) of grad_weight, and one of
    ``splits`` chunks of the voxels of x, the depth; that of the first input channels owns its channels' bias too.

    KERNEL is the stride too, and nothing is cropped.
    """
    x_strides, grad_y_strides = aligned(strides, UNITS)
    if ROWS:
        x_strides = in_steps(x_strides, W_STEP)
        grad_y_strides = in_steps(grad_y_strides, W_STEP * KERNEL[2])
    ALL: tl.constexpr = product(KERNEL)
    TAPS: tl.constexpr = tile_taps(KERNEL, C_OUT, BLOCK_M, ROWS)
    CHANNELS: tl.constexpr = BLOCK_M // TAPS
    ACROSS: tl.constexpr = KERNEL[2]
    TAP_TILES: tl.constexpr = ceil_div(ALL, TAPS)
    CHANNEL_TILES: tl.constexpr = ceil_div(C_OUT, CHANNELS)
    TILES_N: tl.constexpr = ceil_div(C_IN, BLOCK_N)
    TILES: tl.constexpr = TAP_TILES * CHANNEL_TILES * TILES_N * GROUPS
    pid = tl.program_id(0)
    split, tile = pid // TILES, pid % TILES
    tap_tile, channel_tile = tile % TAP_TILES, tile // TAP_TILES % CHANNEL_TILES
    tile_n = tile // (TAP_TILES * CHANNEL_TILES) % TILES_N
    group = widened(tile // (TAP_TILES * CHANNEL_TILES * TILES_N), WIDE)

    # A row's tap and channel; with ROWS a row stands for ACROSS of them, one beside the other along w.
    SIDE: tl.constexpr = ACROSS if ROWS else 1
    lane = tl.arange(0, BLOCK_M // SIDE)
    tap = tap_tile * TAPS + lane // CHANNELS * SIDE
    channel = channel_tile * CHANNELS + lane % CHANNELS
    mask_m = (channel < C_OUT) & (tap < ALL)
    td, th = widened(tap // (KERNEL[1] * KERNEL[2]), WIDE), widened(tap // KERNEL[2] % KERNEL[1], WIDE)
    tw = 0 if ROWS else widened(tap % KERNEL[2], WIDE)
    ci = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = ci < C_IN
    y_lanes = offset(grad_y_strides, 0, group * C_OUT + widened(channel, WIDE), td, th, tw)  # (BLOCK_M / SIDE,)
    x_lanes = (group * C_IN + widened(ci, WIDE)) * x_strides[1]  # (BLOCK_N,)

    size = (d_in, h_in, w_in)
    fine = (d_in, h_in, w_in * SIDE)
    by, by_fine = None, None
    if WIDE < 2 and BLOCK_W == 0:
        by, by_fine = dividers(size, BLOCK_W), dividers(fine, BLOCK_W)
    if ROWS:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        sums = tl.zeros((BLOCK_M // SIDE, BLOCK_K * SIDE // 8), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = tl.zeros((BLOCK_M, ONES if ONES else 1), tl.float32)
        ones = tl.full((BLOCK_K, ONES if ONES else 1), 1.0, x_ptr.dtype.element_ty)
    first, last = chunk(split, splits, voxel_tiles(n, size, BLOCK_K, BLOCK_W, WIDE))
    for tile_k in range(first, entered(first, last, ENTER)):
        image, d, h, w, mask_k = voxels(tile_k, n, size, BLOCK_K, BLOCK_W, WIDE, by=by)
        x_rows = offset(x_strides, image, 0, d, h, w)
        if ROWS:
            mask_k = (image < n) & (w < multiple(w_in, W_STEP))
            x_mask = mask_n[:, None] & mask_k[None, :]
            x_tile = tl.load(x_ptr + (x_lanes[:, None] + x_rows[None, :]), mask=x_mask, other=0.0)
            image, d, h, w, _ = voxels(tile_k, n, fine, BLOCK_K * SIDE, BLOCK_W * SIDE, WIDE, by=by_fine)
            y_columns = offset(grad_y_strides, image, 0, d * KERNEL[0], h * KERNEL[1], w)
            y_mask = mask_m[:, None] & ((image < n) & (w < multiple(w_in, W_STEP) * SIDE))[None, :]
            rows_tile = tl.load(grad_y_ptr + (y_lanes[:, None] + y_columns[None, :]), mask=y_mask, other=0.0)
            # As integers: next to a product the compiler takes the reshape for one of shared memory, and fails.
            parted = rows_tile.to(tl.int16, bitcast=True).reshape(BLOCK_M // SIDE, BLOCK_K, SIDE).permute(1, 0, 2)
            parted = parted.reshape(BLOCK_K, BLOCK_M).to(x_ptr.dtype.element_ty, bitcast=True)
            acc = tl.dot(x_tile, parted, acc, input_precision=PRECISION)
            if bias_partial_ptr is not None:  # of neighbours in one thread: the rest after the loop
                sums += tl.sum(rows_tile.reshape(BLOCK_M // SIDE, BLOCK_K * SIDE // 8, 8).to(tl.float32), 2)
        else:
            y_rows = offset(grad_y_strides, image, 0, d * KERNEL[0], h * KERNEL[1], w * KERNEL[2])
            y_mask, x_mask = mask_k[:, None] & mask_m[None, :], mask_k[:, None] & mask_n[None, :]
            grad_y_tile = load_voxels(grad_y_ptr + (y_rows[:, None] + y_lanes[None, :]), y_mask, VOXELS_INNER[1])
            x_tile = load_voxels(x_ptr + (x_rows[:, None] + x_lanes[None, :]), x_mask, VOXELS_INNER[0])
            acc = tl.dot(tl.trans(grad_y_tile), x_tile, acc, input_precision=PRECISION)
            if bias_partial_ptr is not None:
                if ONES:  # exact products, and no element of the tile passes through a register
                    sums = tl.dot(tl.trans(grad_y_tile), ones, sums)
                else:
                    sums += tl.sum(grad_y_tile.to(tl.float32), 0)[:, None]

    weights = by_channel_and_tap(acc.to(partial_ptr.dtype.element_ty), TAPS, ACROSS, ROWS)  # (BLOCK_N, BLOCK_M)
    column = tl.arange(0, BLOCK_M)
    if TAPS == ALL:  # neighbours in memory
        offs_w = channel_tile * BLOCK_M + column
        mask_w = mask_n[:, None] & (offs_w < C_OUT * ALL)[None, :]
    else:
        channel_w, tap_w = channel_tile * CHANNELS + column // TAPS, tap_tile * TAPS + column % TAPS
        offs_w = channel_w * ALL + tap_w
        mask_w = mask_n[:, None] & ((channel_w < C_OUT) & (tap_w < ALL))[None, :]
    offsets = ((group * C_IN + ci) * (C_OUT * ALL))[:, None] + offs_w[None, :]
    step = widened(GROUPS * C_IN * C_OUT * ALL, WIDE)
    tl.store(partial_ptr + (split * step + offsets), weights, mask=mask_w)
    if bias_partial_ptr is not None:
        if not ROWS and ONES:  # all columns are alike
            sums = tl.where(tl.arange(0, ONES)[None, :] == 0, sums, 0.0)
        # The rows of a channel first: the other way round Triton 3.9.0 fails for sm_100 (128 x 128 in 8 warps).
        of_channels = sums.reshape(BLOCK_M // SIDE // CHANNELS, CHANNELS, sums.shape[1])
        biases = tl.sum(tl.sum(of_channels, 0), 1)  # (CHANNELS,)
        channel_b = channel_tile * CHANNELS + tl.arange(0, CHANNELS)
        mask_b = channel_b + tile_n * C_OUT < C_OUT  # of the first input channels alone
        offs_b = group * C_OUT + channel_b
        bias_ptrs = bias_partial_ptr + ((split * TAP_TILES + tap_tile) * (GROUPS * C_OUT) + offs_b)
        tl.store(bias_ptrs, biases.to(bias_partial_ptr.dtype.element_ty), mask=mask_b)
    if arrivals_ptr is not None:  # noqa: SIM102
        if last_to_arrive(arrivals_ptr, tile, splits):
            weights = sum_in_order(partial_ptr, step, splits, offsets, mask_w, ahead(BLOCK_M * BLOCK_N))
            tl.store(total_ptr + offsets, weights.to(total_ptr.dtype.element_ty), mask=mask_w)
            if bias_partial_ptr is not None:
                biases = sum_in_order(bias_partial_ptr, GROUPS * C_OUT, splits, offs_b, mask_b, ahead(CHANNELS))
                tl.store(total_bias_ptr + offs_b, biases.to(total_bias_ptr.dtype.element_ty), mask=mask_b)


def launches(problem, config, x, grad_y, need_bias):
    config = dict(config)
    across = problem.kernel[2] if config.pop(FOLD, 0) else 1  # taps that count as channels
    if across > 1 or not shuffle.sums_itself(problem, config):
        config[ARRIVE] = 0
    sums = WeightGradients(problem, config, x, grad_y, need_bias)
    if sums.nothing:
        return sums.results()
    if across > 1:
        problem, grad_y = sums.problem, sums.grad_y = folded(problem), folded_outputs(grad_y, across)
    tap_parts = shuffle.tap_tiles(problem, config)
    if sums.splits * across > 1:
        sums.split_weight(*problem.weight_shape)
    if sums.splits * tap_parts * across > 1:
        sums.split_bias(sums.splits * tap_parts)
    sums.launch(
        backward_weight_shuffle_kernel,
        shuffle.programs(problem, config),
        VOXELS_INNER=(x.stride(1) != 1 and config["BLOCK_W"] == 0, grad_y.stride(1) != 1),
        W_STEP=_width_step(problem, x, grad_y) if config["ROWS"] and config["BLOCK_W"] else 1,
        ONES=_ones(problem) if need_bias else 0,
        ENTER=zeros_behind_loops(),
        WIDE=wide(x, grad_y, sums.partial),
        PRECISION=precision(problem.dtype),
    )
    if across > 1:
        _sum_folded(sums.partial, sums.weight, sums.bias_partial, sums.bias, across)
        return sums.weight, sums.bias
    return sums.results(sum_parts)


def _sum_folded(partial, grad_weight, bias_partial, grad_bias, across: int) -> None:
    """Adds partials whose taps along w, ``across``, lie before the channels, where a weight has them last."""
    splits, c_in = partial.shape[:2]
    parted = partial.view(lambda tensor: tensor.view(splits, c_in, across, 1, 1, -1))
    sum_volumes(parted, grad_weight.view(lambda tensor: tensor.view(c_in, -1, across, 1, 1)))
    if grad_bias is not None:
        sum_parts(bias_partial.view(lambda tensor: tensor.view(-1, grad_bias.numel())), grad_bias)


def _width_step(problem: Problem, x, grad_y) -> int:
    """W_STEP: few values, so that a new image size seldom compiles anew."""
    taps = problem.kernel[2]
    across = (s // taps if s % taps == 0 else 1 for s in grad_y.stride()[:4])
    return math.gcd(STEP, problem.size[2], *x.stride()[:4], *across)


def _ones(problem: Problem) -> int:
    """ONES: TF32 would round grad_y, and for sm_80 Triton loads a tile of two products through registers."""
    return shuffle.LEAST_COLUMNS if problem.dtype.itemsize == 2 and not 0 < compute_capability() < 90 else 0


def supports(problem: Problem, device: torch.device) -> str | None:
    if not problem.tiles_exactly:
        exactly = "each element of grad_y has one tap only where kernel = stride and nothing is cropped"
        return refusal(problem, device) or exactly
    return refusal(problem, device)


def space(problem: Problem, device: torch.device):
    configs = shuffle.space(problem, device)
    if fold_pays(problem):
        around = shuffle.space(folded(problem), device)
        configs += tuple({**config, FOLD: 1} for config in around if not config.get(ARRIVE))
    return configs


def work(problem: Problem, config: Config) -> Work:
    if not config.get(FOLD):
        return shuffle.work(problem, config)
    counts = shuffle.work(folded(problem), {**config, ARRIVE: 0})
    return replace(counts, launches=2 + problem.bias)


def workspace_bytes(problem: Problem) -> int:
    most = shuffle.workspace_bytes(problem)
    return max(most, shuffle.workspace_bytes(folded(problem))) if fold_pays(problem) else most


VARIANT = Variant(
    "backward_weight_shuffle", "backward_weight",
    "kernel = stride: one GEMM over all taps and voxels, the bias gradient in the same pass", "triton",
    launches=launches, supports=supports, space=space, default=shuffle.default, options=(ARRIVE, FOLD),
    workspace_bytes=workspace_bytes, work=work,
)  # fmt: skip
