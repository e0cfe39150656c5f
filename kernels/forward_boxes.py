"""Forward for the compute-bound layers: the phases' implicit GEMM on tensor-descriptor boxes, a persistent grid.

A tile is a box of outputs of one phase x BLOCK_N output channels; its input under one tap is one box of x. Each
program takes every ``programs``-th tile, the tiles of the heaviest phase first.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from tritonconv.kernels import triton_boxes, triton_epilogue
from tritonconv.kernels.forward_phases import largest_phase, phase_order
from tritonconv.kernels.triton_boxes import box_corner, box_gemm, box_voxels, box_zeros, boxes, store_box
from tritonconv.kernels.triton_device import (
    aligned,
    ceil_div,
    grouped_order,
    product,
    ranked_phase,
)
from tritonconv.kernels.triton_epilogue import computes, with_bias
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, empty, geometry, precision, wide
from tritonconv.kernels.triton_launch import launch as run
from tritonconv.kernels.triton_taps import backward, tap_steps, volume_phase, voxel_steps
from tritonconv.kernels.triton_tiles import power_of_two
from tritonconv.kernels.variant import SPREADS_WEIGHT, Variant
from tritonconv.kernels.weight_orders import IN_INNERMOST, OUT_INNERMOST
from tritonconv.kernels.work import Work


@triton.jit(launch_metadata=accounting, do_not_specialize=RUN_TIME)
def forward_boxes_kernel(
    x_desc,  # (n, d, h, w, c_in)
    w_desc,  # (tap, c_in, c_out), or (tap, c_out, c_in) where K_INNERMOST
    bias_ptr,  # (c_out,) or None
    y_ptr,  # (n, c_out, od, oh, ow)
    residual_ptr, slopes,  # see triton_epilogue
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    strides,  # of y
    LAYER: tl.constexpr, CONFIG: tl.constexpr, ORDER: tl.constexpr, K_INNERMOST: tl.constexpr,
    VOXELS_LAST: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """A program owns every ``num_programs``-th tile. Rows: a box of BLOCK_D x BLOCK_H x BLOCK_W outputs of one phase;
    columns: BLOCK_N output channels; depth: (tap of the phase, input channel).
    """
    EPILOGUE: tl.constexpr = CONFIG.EPILOGUE  # Triton 3.6.0 hands no tuple with a name on as an attribute
    C_OUT: tl.constexpr = LAYER.C_OUT
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    DILATION: tl.constexpr = LAYER.DILATION
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    (y_strides,) = aligned(strides, UNITS)
    out_size, crop = (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    TILES_N: tl.constexpr = ceil_div(C_OUT, BLOCK_N)
    PHASES: tl.constexpr = product(STRIDE)
    largest = (
        tl.cdiv(out_size[0], STRIDE[0]),
        tl.cdiv(out_size[1], STRIDE[1]),
        tl.cdiv(out_size[2], STRIDE[2]),
    )
    tiles_m = n * boxes(largest, CONFIG)
    for tile in range(tl.program_id(0), tiles_m * TILES_N * PHASES, tl.num_programs(0)):
        phase = ranked_phase(tile // (tiles_m * TILES_N), ORDER)
        tile_m, tile_n = grouped_order(tile % (tiles_m * TILES_N), tiles_m, TILES_N, CONFIG.GROUP_M)
        first, outs, tap, taps, start = volume_phase(phase, crop, out_size, KERNEL, STRIDE, DILATION)
        outs_d, outs_h, outs_w = outs
        image, d, h, w = box_corner(tile_m, largest, CONFIG)
        acc = box_gemm(
            box_zeros(CONFIG, VOXELS_LAST), x_desc, w_desc,
            image=image, d=d + start[0], h=h + start[1], w=w + start[2],
            tap=tap, taps=taps, column=tile_n * BLOCK_N,
            TAP_STEP=tap_steps(STRIDE, DILATION), VOXEL_STEP=backward(voxel_steps(STRIDE, DILATION)),
            KERNEL=KERNEL, K=LAYER.C_IN, K_INNERMOST=K_INNERMOST, CONFIG=CONFIG,
            VOXELS_LAST=VOXELS_LAST, PRECISION=PRECISION, WAIT=WAIT,
        )  # fmt: skip
        if VOXELS_LAST:
            acc = tl.trans(acc)
        if bias_ptr is not None:
            channel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + channel, mask=channel < C_OUT, other=0.0)
            acc = with_bias(acc, bias, y_ptr, EPILOGUE)
        d, h, w, mask_m = box_voxels(d, h, w, (outs_d, outs_h, outs_w), CONFIG, WIDE)
        d, h, w = first[0] + d * STRIDE[0], first[1] + h * STRIDE[1], first[2] + w * STRIDE[2]
        store_box(
            y_ptr, y_strides, acc, image=image, d=d, h=h, w=w, mask_m=mask_m, column=tile_n * BLOCK_N,
            CHANNELS=C_OUT, CONFIG=CONFIG, WIDE=WIDE,
            residual_ptr=residual_ptr, slopes=slopes, EPILOGUE=EPILOGUE,
        )  # fmt: skip


def launches(problem, config, x, weight, bias, out=None, **epilogue):
    y = empty(problem, problem.y_shape, x) if out is None else out
    if y.numel() == 0:
        return y
    k_innermost = x.dtype.itemsize == 4  # TF32 wants the summed axis innermost
    block = (config["BLOCK_N"], config["BLOCK_K"]) if k_innermost else (config["BLOCK_K"], config["BLOCK_N"])
    count = triton_boxes.box_tiles(problem, largest_phase(problem), problem.c_out, config) * math.prod(problem.stride)
    x = triton_boxes.describable(x)
    run(
        forward_boxes_kernel,
        triton_boxes.programs(x.device, count),
        {**config, **triton_boxes.register_limit()},
        (y,),
        x_desc=triton_boxes.volume(x, triton_boxes.box_shape(config), config["BLOCK_K"]),
        w_desc=triton_boxes.taps_first(weight, IN_INNERMOST if k_innermost else OUT_INNERMOST, block),
        bias_ptr=bias,
        y_ptr=y,
        **triton_epilogue.arguments(problem, y, **epilogue),
        **geometry(problem, forward_boxes_kernel),
        strides=(y.stride(),),
        ORDER=phase_order(problem),
        K_INNERMOST=k_innermost,
        WIDE=wide(y, of=problem),
        VOXELS_LAST=triton_boxes.voxels_last(config),
        PRECISION=precision(problem.dtype),
    )
    return y


def box_config(problem, size, columns, depth):
    """The default tile: 128 voxels in the box that covers ``size`` best, up to 128 columns."""
    half = problem.dtype.itemsize == 2
    d, h, w = triton_boxes.box_of(size, 128 if half else 64)
    block_n = power_of_two(columns, 16, 128 if half else 64)
    return {
        "BLOCK_D": d,
        "BLOCK_H": h,
        "BLOCK_W": w,
        "BLOCK_N": block_n,
        "BLOCK_K": power_of_two(depth, 16, 64 if half else 32),
        "GROUP_M": 8,
        "num_warps": 8 if block_n == 128 or not half else 4,  # float32 with 4 spills on sm_100
        "num_stages": 3,
    }


def box_space(base, size):
    """The default; fewer and more voxels; fewer and more columns; other pipelines."""
    voxels = base["BLOCK_D"] * base["BLOCK_H"] * base["BLOCK_W"]
    configs = [base]
    for block_m in (voxels // 2, voxels * 2):
        d, h, w = triton_boxes.box_of(size, block_m)
        configs.append({**base, "BLOCK_D": d, "BLOCK_H": h, "BLOCK_W": w})
    for block_n in (base["BLOCK_N"] // 2, base["BLOCK_N"] * 2):
        if 16 <= block_n <= 256:
            configs.append({**base, "BLOCK_N": block_n, "num_warps": 8 if block_n >= 128 else 4})
    configs += [{**base, "num_stages": stages} for stages in (2, 4)]
    configs += [{**base, "GROUP_M": group} for group in (1, 16)]
    return tuple(configs)


def default(problem, device):
    return box_config(problem, largest_phase(problem), problem.c_out, problem.c_in)


def work(problem, config) -> Work:
    depth = problem.c_in * sum(phase.taps for phase in problem.phases)
    return triton_boxes.boxes_work(problem, "forward", config, largest_phase(problem), problem.c_out, depth)


VARIANT = Variant(
    "forward_boxes", "forward", "implicit GEMM per phase on tensor-descriptor boxes, persistent grid", "triton",
    launches=launches, supports=triton_boxes.box_refusal,
    space=lambda problem, device: box_space(default(problem, device), largest_phase(problem)), default=default,
    spreads_nonfinite=SPREADS_WEIGHT, work=work, epilogue=computes,
)  # fmt: skip
