"""Forward as a plain gather: every output looks at every tap, and a stride mask drops those that miss.

The simplest kernel to read, and the baseline that shows what the others save: it executes s**3 times the useful work.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.triton_convolution import forward
from tritonconv.kernels.triton_device import (
    aligned,
    ceil_div,
    grouped_order,
    next_step,
    offset,
    voxel_tiles,
    voxels,
    widened,
)
from tritonconv.kernels.triton_epilogue import computes, with_bias
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, empty, refusal
from tritonconv.kernels.triton_store import store_outputs
from tritonconv.kernels.triton_weights import preferred
from tritonconv.kernels.variant import SPREADS_WEIGHT, Variant
from tritonconv.kernels.work import Work, parts, tap_gemm


@triton.jit
def source(o, crop, tap, size, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """Along one axis, the input index that output o reads through a tap, and whether there is one."""
    reach = o + crop - DILATION * tap
    index = reach // STRIDE
    return index, (reach >= 0) & (reach % STRIDE == 0) & (index < size)


@triton.jit(launch_metadata=accounting, do_not_specialize=RUN_TIME)
def forward_gather_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    w_ptr,  # (c_in, c_out, taps)
    bias_ptr,  # (c_out,) or None
    y_ptr,  # (n, c_out, od, oh, ow)
    residual_ptr, slopes,  # see triton_epilogue
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    strides,  # of x, of the weight, of y
    LAYER: tl.constexpr, CONFIG: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, GROUP_M: tl.constexpr,
    UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows, voxels of y, x BLOCK_N columns, output channels of one group.

    Depth: (tap, input channel), BLOCK_K channels of one tap in a step.
    """
    EPILOGUE: tl.constexpr = CONFIG.EPILOGUE  # Triton 3.6.0 hands no tuple with a name on as an attribute
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    DILATION: tl.constexpr = LAYER.DILATION
    x_strides, w_strides, y_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    TILES_N: tl.constexpr = ceil_div(C_OUT, BLOCK_N)
    tiles_m = voxel_tiles(n, out_size, BLOCK_M, BLOCK_W, WIDE)
    tile_m, tile_n = grouped_order(tl.program_id(0), tiles_m, TILES_N * LAYER.GROUPS, GROUP_M)
    image, d, h, w, mask_m = voxels(tile_m, n, out_size, BLOCK_M, BLOCK_W, WIDE)
    group = widened(tile_n // TILES_N, WIDE)
    offs_n = widened(tile_n % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N), WIDE)
    offs_k = widened(tl.arange(0, BLOCK_K), WIDE)
    mask_n = offs_n < C_OUT
    x_ptr += group * C_IN * x_strides[1]
    w_ptr += group * C_IN * w_strides[0]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k, td, th, tw = 0, 0, 0, 0
    for _ in range(KERNEL[0] * KERNEL[1] * KERNEL[2] * tl.cdiv(C_IN, BLOCK_K)):
        i_d, hit_d = source(d, crop[0], td, size[0], STRIDE[0], DILATION[0])
        i_h, hit_h = source(h, crop[1], th, size[1], STRIDE[1], DILATION[1])
        i_w, hit_w = source(w, crop[2], tw, size[2], STRIDE[2], DILATION[2])
        channels = k + offs_k
        mask_k = channels < C_IN
        rows = offset(x_strides, image, 0, i_d, i_h, i_w)  # (BLOCK_M,)
        x_tile = tl.load(
            x_ptr + rows[:, None] + (channels * x_strides[1])[None, :],
            mask=(mask_m & hit_d & hit_h & hit_w)[:, None] & mask_k[None, :],
            other=0.0,
        )  # (BLOCK_M, BLOCK_K)
        tap = widened((td * KERNEL[1] + th) * KERNEL[2] + tw, WIDE)
        w_tile = tl.load(
            w_ptr + tap * w_strides[2] + (channels * w_strides[0])[:, None] + (offs_n * w_strides[1])[None, :],
            mask=mask_k[:, None] & mask_n[None, :],
            other=0.0,
        )  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        k, td, th, tw = next_step(k, td, th, tw, KERNEL, K=C_IN, BLOCK_K=BLOCK_K)

    channel = group * C_OUT + offs_n
    if bias_ptr is not None:
        acc = with_bias(acc, tl.load(bias_ptr + channel, mask=mask_n, other=0.0), y_ptr, EPILOGUE)
    rows = offset(y_strides, image, 0, d, h, w)  # (BLOCK_M,)
    store_outputs(
        y_ptr, y_strides, rows, channel, acc, mask_m=mask_m, mask_n=mask_n, VOXELS_INNER=CONFIG.VOXELS_INNER,
        residual_ptr=residual_ptr, slopes=slopes, EPILOGUE=EPILOGUE,
    )  # fmt: skip


def programs(problem, config) -> int:
    return tiles.programs(problem, problem.out_size, problem.c_out // problem.groups, config)


def launches(problem, config, x, weight, bias, out=None, **epilogue):
    y = empty(problem, problem.y_shape, x) if out is None else out
    inner, grid = y.stride(1) != 1, programs(problem, config)
    return forward(forward_gather_kernel, grid, problem, config, x, weight, bias, y, VOXELS_INNER=inner, **epilogue)


def default(problem, device):
    columns, depth = problem.c_out // problem.groups, problem.c_in // problem.groups
    base = tiles.gemm(problem, problem.out_size, columns, depth, problem.groups)
    large = 128 * 64 if problem.dtype.itemsize == 2 else 64 * 32
    if base["BLOCK_M"] * base["BLOCK_N"] >= large:  # the stride masks need registers: with 4 warps it spills
        base["num_warps"] = 8
    return {**base, "GROUP_M": 8, "WEIGHT": preferred(problem)}


def work(problem, config) -> Work:
    count = programs(problem, config)
    steps = count * math.prod(problem.kernel) * parts(problem.c_in // problem.groups, config["BLOCK_K"])
    return tap_gemm(problem, "forward", config, count, steps)


def space(problem, device):
    base = default(problem, device)
    columns = parts(problem.c_out // problem.groups, base["BLOCK_N"]) * problem.groups
    return tiles.around(
        base,
        problem,
        WEIGHT=(0, 1, 2),
        BLOCK_K=tiles.depths(problem.c_in // problem.groups),
        GROUP_M=tiles.orders(columns),
    )


VARIANT = Variant(
    "forward_gather", "forward", "gather over all taps with stride masks: the baseline", "triton",
    launches=launches, supports=refusal, space=space, default=default, spreads_nonfinite=SPREADS_WEIGHT, work=work,
    epilogue=computes,
)  # fmt: skip
