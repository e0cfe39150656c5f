"""Forward of a depthwise layer without a dot: all phases along h and w of a tile from one look at x.

One program owns BLOCK_H x BLOCK_W lanes x BLOCK_C channels x PLANES output planes; a lane has all stride_h * stride_w
phases, so that each value of x that a plane needs is loaded once for all of them, and y is written in whole rows.
Any channel multiplier c_out/groups, stride, dilation and crop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_depthwise as depthwise
from tritonconv.kernels.triton_convolution import forward
from tritonconv.kernels.triton_depthwise import add_window, begun, filled, lanes, store_places, tile_of
from tritonconv.kernels.triton_device import axis_phase, tap_period, tap_shift
from tritonconv.kernels.triton_epilogue import computes
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, empty, refusal
from tritonconv.kernels.variant import SPREADS_WEIGHT, Variant
from tritonconv.kernels.work import Work
from tritonconv.problem import Problem

ELEMENTS = {"ndhwc": 4096, "ncdhw": 2048}  # float32 accumulators of a program: 32 or 16 in each of 128 threads


@triton.jit(launch_metadata=accounting, do_not_specialize=RUN_TIME)
def forward_depthwise_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    w_ptr,  # (c_in, c_out/groups, taps)
    bias_ptr,  # (c_out,) or None
    y_ptr,  # (n, c_out, od, oh, ow)
    residual_ptr, slopes,  # see triton_epilogue
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    strides,  # of x, of the weight, of y
    LAYER: tl.constexpr, CONFIG: tl.constexpr,
    FIRST: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, INTERLEAVE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_H x BLOCK_W lanes of STRIDE[1] x STRIDE[2] outputs, the rows, x BLOCK_C channels, the
    columns, and PLANES planes. The depth is the taps.
    """
    EPILOGUE: tl.constexpr = CONFIG.EPILOGUE  # Triton 3.6.0 hands no tuple with a name on as an attribute
    C_OUT: tl.constexpr = LAYER.C_OUT
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    DILATION: tl.constexpr = LAYER.DILATION
    x_strides, w_strides, y_strides = strides
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    PLACES: tl.constexpr = (STRIDE[1], STRIDE[2])
    CHANNELS: tl.constexpr = LAYER.GROUPS * C_OUT
    count = (tl.cdiv(out_size[1], STRIDE[1]), tl.cdiv(out_size[2], STRIDE[2]))
    image, first, h, w, channel = tile_of(
        tl.program_id(0), n, count, out_size[0], PLANES=PLANES, CHANNELS=CHANNELS, BLOCK_H=BLOCK_H, BLOCK_W=BLOCK_W,
        BLOCK_C=BLOCK_C, WIDE=WIDE,
    )  # fmt: skip
    mask_c = channel < CHANNELS
    row, column = lanes(
        h + crop[1] // STRIDE[1] + FIRST[0], w + crop[2] // STRIDE[2] + FIRST[1], BLOCK_H, BLOCK_W
    )  # (BLOCK_M, 1): the first slot of the window
    x_base = x_ptr + image * x_strides[0]
    x_tile = row * x_strides[3] + column * x_strides[4] + channel // C_OUT * x_strides[1]  # (BLOCK_M, BLOCK_C)
    w_tile = w_ptr + channel // C_OUT * w_strides[0] + channel % C_OUT * w_strides[1]  # (1, BLOCK_C)
    zero = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    start, bias = begun(zero, bias_ptr, channel, mask_c, EPILOGUE)

    VOXEL_STEP: tl.constexpr = tap_shift(STRIDE[0], DILATION[0])
    for out_plane in range(first, tl.minimum(first + PLANES, out_size[0])):
        reach = out_plane + crop[0]
        _, _, tap, taps, _ = axis_phase(reach % STRIDE[0], crop[0], out_size[0], KERNEL[0], STRIDE[0], DILATION[0])
        newest = (reach - DILATION[0] * tap) // STRIDE[0]  # the plane of x that the first tap reads
        low = tl.maximum(tl.cdiv(newest - size[0] + 1, VOXEL_STEP), 0)
        high = tl.where(reach < DILATION[0] * tap, 0, tl.minimum(taps, newest // VOXEL_STEP + 1))
        acc = filled(start, STRIDE[1] * STRIDE[2])
        for m in range(low, high):
            tap_d = tap + m * tap_period(STRIDE[0], DILATION[0])
            acc = add_window(
                acc=acc, a_ptr=x_base + (newest - m * VOXEL_STEP) * x_strides[2] + x_tile, row=row, column=column,
                mask_c=mask_c, size=size, a_strides=x_strides,
                w_ptr=w_tile + tap_d * (KERNEL[1] * KERNEL[2]) * w_strides[2], tap_stride=w_strides[2],
                KERNEL=KERNEL, PLACES=PLACES, TAPS_H=TAPS_H, TAPS_W=TAPS_W,
            )  # fmt: skip
        y_plane = y_ptr + image * y_strides[0] + out_plane * y_strides[2]
        residual_plane = residual_ptr
        if residual_ptr is not None:
            residual_plane = residual_ptr + image * y_strides[0] + out_plane * y_strides[2]
        store_places(
            acc, y_plane, h=h, w=w, channel=channel, size=out_size, out_strides=y_strides, mask_c=mask_c,
            PLACES=PLACES, INTERLEAVE=INTERLEAVE, BLOCK_H=BLOCK_H, BLOCK_W=BLOCK_W, bias=bias,
            residual_ptr=residual_plane, slopes=slopes, EPILOGUE=EPILOGUE,
        )  # fmt: skip


def launches(problem, config, x, weight, bias, out=None, **epilogue):
    y = empty(problem, problem.y_shape, x) if out is None else out
    return forward(
        forward_depthwise_kernel, programs(problem, config), problem, config, x, weight, bias, y,
        **depthwise.phase_windows(problem),
        INTERLEAVE=int(problem.stride[2] == 2 and problem.layout == "ncdhw"), **epilogue,
    )  # fmt: skip


def programs(problem: Problem, config) -> int:
    return depthwise.programs(problem.n, problem.c_out, problem.out_size, problem.stride[1:], config)


def supports(problem: Problem, device: torch.device) -> str | None:
    phases = problem.stride[1] * problem.stride[2]
    if phases > depthwise.MOST_PLACES:
        return f"{phases} phases along h and w need more accumulators than {depthwise.MOST_PLACES}"
    return refusal(problem, device) or depthwise.refused(problem)


def default(problem: Problem, device: torch.device):
    places = problem.stride[1:]
    elements = max(128, min(1024, ELEMENTS[problem.layout] // (places[0] * places[1])))
    counts = depthwise.lane_counts(problem.out_size, places)
    config = depthwise.tile_sizes(problem.layout, problem.c_out, counts, elements)
    if problem.dtype.itemsize == 4:  # 4 warps of float32 spill on sm_80 and sm_100
        config["num_warps"] = 8
    config["PLANES"] = depthwise.planes(problem, problem.c_out, problem.out_size, places, config)
    return {**config, "WEIGHT": depthwise.weight_order(problem)}


def space(problem: Problem, device: torch.device):
    return depthwise.around(default(problem, device), WEIGHT=(0, 1))


def work(problem: Problem, config) -> Work:
    places = problem.stride[1] * problem.stride[2]
    return depthwise.work(problem, "forward", config, programs(problem, config), places)


VARIANT = Variant(
    "forward_depthwise", "forward",
    "one input channel per group: FMAs, all phases along h and w from one look at x", "triton",
    launches=launches, supports=supports, space=space, default=default, spreads_nonfinite=SPREADS_WEIGHT, work=work,
    epilogue=computes,
)  # fmt: skip
