"""Backward-data for few output channels: taps and channels share the depth of the dot.

One program owns BLOCK_M input voxels x BLOCK_N input channels. Rows: the voxels i of grad_x; columns: input channels;
depth: (tap, output channel) counted together, so that one output channel still fills the dot.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_launch, triton_taps
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.triton_convolution import backward_data
from tritonconv.kernels.triton_device import (
    aligned,
    ceil_div,
    grouped_order,
    load_along,
    offset,
    product,
    store_tile,
    voxel_tiles,
    voxels,
)
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, empty
from tritonconv.kernels.triton_taps import tap_lanes, voxel_words
from tritonconv.kernels.variant import SPREADS_WEIGHT, Variant
from tritonconv.kernels.weight_orders import AS_GIVEN
from tritonconv.kernels.work import Work, parts, tap_gemm
from tritonconv.problem import Problem

MOST_CHANNELS = 16  # output channels per group; as many fill a dot without the taps


@triton.jit(launch_metadata=accounting, do_not_specialize=RUN_TIME)
def backward_data_packed_kernel(
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    w_ptr,  # (c_in, c_out, taps)
    grad_x_ptr,  # (n, c_in, d, h, w)
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    strides,  # of grad_y, of the weight, of grad_x
    C_IN: tl.constexpr, C_OUT: tl.constexpr, GROUPS: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, GROUP_M: tl.constexpr,
    X_VOXELS_INNER: tl.constexpr, Y_VOXELS_INNER: tl.constexpr,
    UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows, voxels of x, x BLOCK_N columns, input channels of one group.

    Depth: (tap, output channel) counted together, BLOCK_K of them in a step.
    """
    grad_y_strides, w_strides, grad_x_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    TILES_N: tl.constexpr = ceil_div(C_IN, BLOCK_N)
    DEPTH: tl.constexpr = product(KERNEL) * C_OUT
    tiles_m = voxel_tiles(n, size, BLOCK_M, BLOCK_W, WIDE)
    tile_m, tile_n = grouped_order(tl.program_id(0), tiles_m, TILES_N * GROUPS, GROUP_M)
    image, d, h, w, mask_m = voxels(tile_m, n, size, BLOCK_M, BLOCK_W, WIDE)
    group = tile_n // TILES_N
    offs_n = tile_n % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C_IN
    offs_k = tl.arange(0, BLOCK_K)
    if WIDE:
        group = group.to(tl.int64)
        offs_k = offs_k.to(tl.int64)

    od, oh, ow = d * STRIDE[0] - crop[0], h * STRIDE[1] - crop[1], w * STRIDE[2] - crop[2]
    words = voxel_words(od, oh, ow, mask_m, size=out_size, KERNEL=KERNEL, DILATION=DILATION)
    grad_y_rows = grad_y_ptr + offset(grad_y_strides, image, group * C_OUT, od, oh, ow)[None, :]  # (1, BLOCK_M)
    channel = group * C_IN + offs_n
    w_columns = w_ptr + (channel * w_strides[1])[None, :]  # (1, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        tap, td, th, tw, co, wanted = tap_lanes(k + offs_k, C_OUT, KERNEL)
        moved = offset(grad_y_strides, 0, co, td * DILATION[0], th * DILATION[1], tw * DILATION[2])
        # The voxels are the last axis, so that the lanes of a warp run along them: neighbours, whatever the stride.
        hit = (words[None, :] & wanted[:, None]) == wanted[:, None]  # (BLOCK_K, BLOCK_M)
        if Y_VOXELS_INNER:
            grad_y_tile = load_along(grad_y_rows + moved[:, None], hit, 1)
        else:
            grad_y_tile = tl.load(grad_y_rows + moved[:, None], mask=hit, other=0.0)
        w_mask = mask_n[None, :]
        if DEPTH % BLOCK_K != 0:
            w_mask = w_mask & (k + offs_k < DEPTH)[:, None]
        w_tile = tl.load(w_columns + (tap * w_strides[2] + co * w_strides[0])[:, None], mask=w_mask, other=0.0)
        acc = tl.dot(tl.trans(grad_y_tile), w_tile, acc, input_precision=PRECISION)

    rows = offset(grad_x_strides, image, 0, d, h, w)  # (BLOCK_M,)
    store_tile(grad_x_ptr, rows, channel * grad_x_strides[1], acc, mask_m, mask_n, VOXELS_INNER=X_VOXELS_INNER)


def programs(problem: Problem, config) -> int:
    return tiles.programs(problem, problem.size, problem.c_in // problem.groups, config)


def launches(problem, config, grad_y, weight):
    grad_x = empty(problem, problem.x_shape, grad_y, zero=grad_y.numel() == 0)
    if grad_x.zero:
        return grad_x
    return backward_data(
        backward_data_packed_kernel, programs(problem, config), problem, config, grad_y, weight, grad_x,
        X_VOXELS_INNER=grad_x.stride(1) != 1,
        Y_VOXELS_INNER=grad_y.stride(1) != 1 or problem.weight_shape[1] % 2 != 0,
    )  # fmt: skip


def supports(problem: Problem, device: torch.device) -> str | None:
    why_not = triton_launch.refusal(problem, device) or triton_taps.refusal(problem.kernel)
    if why_not is None and problem.c_out // problem.groups > MOST_CHANNELS:
        return f"{problem.c_out // problem.groups} output channels per group fill a dot without the taps"
    return why_not


def default(problem: Problem, device: torch.device):
    columns, depth = problem.c_in // problem.groups, problem.weight_shape[1] * math.prod(problem.kernel)
    base = tiles.gemm(problem, problem.size, columns, depth, problem.groups)
    # Each lane has an address of its own, so the tile comes through registers: half as deep, and in more threads.
    if problem.dtype.itemsize == 2 and base["BLOCK_M"] * base["BLOCK_N"] >= 128 * 64:
        base["num_warps"] = 8
    return {**base, "BLOCK_K": min(base["BLOCK_K"], 32), "GROUP_M": 8, "WEIGHT": AS_GIVEN}


def space(problem: Problem, device: torch.device):
    return tiles.around(default(problem, device), problem, WEIGHT=(0, 1, 2), num_stages=tiles.UNSTAGED)


def work(problem: Problem, config) -> Work:
    count = programs(problem, config)
    steps = count * parts(problem.weight_shape[1] * math.prod(problem.kernel), config["BLOCK_K"])
    return tap_gemm(problem, "backward_data", config, count, steps, apart=(problem.stride[2], 1))


VARIANT = Variant(
    "backward_data_packed", "backward_data", "taps and few output channels share the depth of the dot", "triton",
    launches=launches, supports=supports, space=space, default=default, spreads_nonfinite=SPREADS_WEIGHT, work=work,
)  # fmt: skip
