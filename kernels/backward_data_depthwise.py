"""Backward-data of a depthwise layer without a dot: a strided depthwise convolution of grad_y.

One program owns BLOCK_H x BLOCK_W lanes x BLOCK_C channels x PLANES planes of grad_x. A lane has UNROLL_H x UNROLL_W
neighbouring voxels, whose windows overlap: each value of grad_y that they need is loaded once for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_depthwise as depthwise
from tritonconv.kernels.triton_depthwise import add_window, distance, filled, lanes, store_places, tile_of
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, empty, geometry, refusal, wide
from tritonconv.kernels.triton_launch import launch as run
from tritonconv.kernels.triton_weights import packed, strides
from tritonconv.kernels.variant import SPREADS_WEIGHT, Variant
from tritonconv.kernels.work import Work
from tritonconv.problem import Problem

ELEMENTS = {"ndhwc": 4096, "ncdhw": 2048}  # float32 accumulators of a program: 32 or 16 in each of 128 threads


@triton.jit(launch_metadata=accounting, do_not_specialize=RUN_TIME)
def backward_data_depthwise_kernel(
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    w_ptr,  # (c_in, c_out/groups, taps)
    grad_x_ptr,  # (n, c_in, d, h, w)
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    strides,  # of grad_y, of the weight, of grad_x
    C_IN: tl.constexpr, C_OUT: tl.constexpr, GROUPS: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, INTERLEAVE: tl.constexpr,
    UNROLL_H: tl.constexpr, UNROLL_W: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_H x BLOCK_W lanes of UNROLL_H x UNROLL_W voxels of grad_x, the rows, x BLOCK_C channels, the
    columns, and PLANES planes. The depth is (output of the channel, tap).
    """
    y_strides, w_strides, x_strides = strides
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    PLACES: tl.constexpr = (UNROLL_H, UNROLL_W)
    count = (tl.cdiv(size[1], UNROLL_H), tl.cdiv(size[2], UNROLL_W))
    image, first, h, w, channel = tile_of(
        tl.program_id(0), n, count, size[0], PLANES=PLANES, CHANNELS=GROUPS, BLOCK_H=BLOCK_H, BLOCK_W=BLOCK_W,
        BLOCK_C=BLOCK_C, WIDE=WIDE,
    )  # fmt: skip
    mask_c = channel < GROUPS
    lane_h, lane_w = lanes(h, w, BLOCK_H, BLOCK_W)
    row = lane_h * (UNROLL_H * STRIDE[1]) - crop[1]  # (BLOCK_M, 1): the first slot of the window
    column = lane_w * (UNROLL_W * STRIDE[2]) - crop[2]
    y_base = grad_y_ptr + image * y_strides[0]
    y_tile = row * y_strides[3] + column * y_strides[4] + channel * C_OUT * y_strides[1]  # (BLOCK_M, BLOCK_C)
    w_tile = w_ptr + channel * w_strides[0]  # (1, BLOCK_C)
    start = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)

    for plane in range(first, tl.minimum(first + PLANES, size[0])):
        reach = plane * STRIDE[0] - crop[0]  # the plane of grad_y that tap 0 reads
        low = tl.cdiv(tl.maximum(-reach, 0), DILATION[0])
        high = tl.minimum(tl.cdiv(tl.maximum(out_size[0] - reach, 0), DILATION[0]), KERNEL[0])
        acc = filled(start, UNROLL_H * UNROLL_W)
        for output in range(C_OUT):
            for tap_d in range(low, high):
                moved = (reach + tap_d * DILATION[0]) * y_strides[2] + distance(output, y_strides[1])
                weight = tap_d * (KERNEL[1] * KERNEL[2]) * w_strides[2] + output * w_strides[1]
                acc = add_window(
                    acc=acc, a_ptr=y_base + moved + y_tile, row=row, column=column, mask_c=mask_c,
                    size=out_size, a_strides=y_strides, w_ptr=w_tile + weight, tap_stride=w_strides[2],
                    KERNEL=KERNEL, PLACES=PLACES, TAPS_H=TAPS_H, TAPS_W=TAPS_W, SCATTERED=UNROLL_W * STRIDE[2] > 1,
                )  # fmt: skip
        x_plane = grad_x_ptr + image * x_strides[0] + plane * x_strides[2]
        store_places(
            acc, x_plane, h=h, w=w, channel=channel, size=size, out_strides=x_strides, mask_c=mask_c, PLACES=PLACES,
            INTERLEAVE=INTERLEAVE, BLOCK_H=BLOCK_H, BLOCK_W=BLOCK_W,
        )  # fmt: skip


def launches(problem, config, grad_y, weight):
    grad_x = empty(problem, problem.x_shape, grad_y)
    if grad_x.numel() == 0:
        return grad_x
    config = dict(config)
    weight = packed(weight, config.pop("WEIGHT"))
    places = config["UNROLL_H"], config["UNROLL_W"]
    windows = [
        depthwise.strided_window(axis.kernel, axis.stride, axis.dilation, count)
        for axis, count in zip(problem.axes[1:], places, strict=True)
    ]
    run(
        backward_data_depthwise_kernel,
        depthwise.programs(problem.n, problem.c_in, problem.size, places, config),
        config,
        (grad_x,),
        grad_y_ptr=grad_y,
        w_ptr=weight,
        grad_x_ptr=grad_x,
        **geometry(problem, backward_data_depthwise_kernel),
        strides=(grad_y.stride(), strides(weight), grad_x.stride()),
        TAPS_H=windows[0][1],
        TAPS_W=windows[1][1],
        INTERLEAVE=int(places[1] == 2 and problem.layout == "ncdhw"),
        WIDE=wide(grad_y, weight, grad_x, of=problem),
    )
    return grad_x


def supports(problem: Problem, device: torch.device) -> str | None:
    return refusal(problem, device) or depthwise.refused(problem)


def default(problem: Problem, device: torch.device):
    # In NCDHW the lanes lie along w: a second voxel there would double the gap between the values they read.
    overlap = [axis.kernel > axis.stride and axis.size > 1 for axis in problem.axes[1:]]
    places = 1 + overlap[0], 1 + (overlap[1] and problem.layout == "ndhwc")
    elements = ELEMENTS[problem.layout] // (places[0] * places[1])
    if problem.layout == "ncdhw":  # float32 of as many elements spills on sm_90, with Triton 3.6.0
        elements = elements * 2 // problem.dtype.itemsize
    elements = max(128, min(1024, elements))
    config = depthwise.tile_sizes(problem.layout, problem.c_in, depthwise.lane_counts(problem.size, places), elements)
    config["num_warps"] = 8  # 4 spill on sm_100
    config["PLANES"] = depthwise.planes(problem, problem.c_in, problem.size, places, config)
    return {**config, "UNROLL_H": places[0], "UNROLL_W": places[1], "WEIGHT": depthwise.weight_order(problem)}


def space(problem: Problem, device: torch.device):
    return depthwise.around(default(problem, device), WEIGHT=(0, 1), UNROLL_H=(1, 2, 4), UNROLL_W=(1, 2))


def work(problem: Problem, config) -> Work:
    places = config["UNROLL_H"], config["UNROLL_W"]
    programs = depthwise.programs(problem.n, problem.c_in, problem.size, places, config)
    return depthwise.work(problem, "backward_data", config, programs, places[0] * places[1])


VARIANT = Variant(
    "backward_data_depthwise", "backward_data",
    "one input channel per group: FMAs, neighbouring voxels from one look at grad_y", "triton",
    launches=launches, supports=supports, space=space, default=default, spreads_nonfinite=SPREADS_WEIGHT, work=work,
)  # fmt: skip
