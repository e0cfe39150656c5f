"""Backward-weight of a depthwise layer without a dot: split over voxels, all taps along h and w in registers.

A program owns one tap along d, BLOCK_C channels and one of SPLITS shares of the voxels. A lane of its tiles meets all
stride_h * stride_w phases of grad_y with the window of x that they touch (the forward's window), so that each value is
loaded once for all of its taps. The sums of the shares are added in a fixed order by a second launch. The bias gradient
is one more "tap": programs beside the others, over the same shares, which find grad_y in the L2 cache.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_depthwise as depthwise
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_arrival import ARRIVE, ahead, arrives, last_to_arrive, sum_in_order, with_arrivals
from tritonconv.kernels.triton_depthwise import any_tap, distance, filled, lanes, replaced, tile_at, within
from tritonconv.kernels.triton_device import ceil_div, constant, inside, widened
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, refusal, wide
from tritonconv.kernels.triton_partials import depthwise_gradients
from tritonconv.kernels.variant import SPREADS_VOXELS, Variant
from tritonconv.kernels.work import Work
from tritonconv.problem import Problem

MOST_TAPS = 64  # along h and w: float32 sums that a thread keeps for each of its channels
WAVES = 12  # programs per multiprocessor; about four fit at once


@triton.jit
def phase_tile(y_ptr, lane_h, lane_w, mask_c, size, grad_y_strides, PLACE_H: tl.constexpr, PLACE_W: tl.constexpr,
               STRIDE: tl.constexpr):  # fmt: skip
    """One phase of a plane of grad_y, float32 (BLOCK_M, BLOCK_C)."""
    h, w = lane_h * STRIDE[1] + PLACE_H, lane_w * STRIDE[2] + PLACE_W
    mask = inside(h, size[1]) & within(w, size[2], True) & mask_c
    return tl.load(y_ptr + (h * grad_y_strides[3] + w * grad_y_strides[4]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def correlated(acc, x_ptr, row, column, mask_c, size, x_strides, y_tiles,
               KERNEL: tl.constexpr, PLACES: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr):  # fmt: skip
    """acc, one sum per tap of a plane, plus the products of the phases ``y_tiles`` with their window of x."""
    for slot_h in tl.static_range(constant(len(TAPS_H) // PLACES[0])):
        if any_tap(TAPS_H, slot_h, PLACES[0]):
            mask_h = inside(row + slot_h, size[1]) & mask_c
            for slot_w in tl.static_range(constant(len(TAPS_W) // PLACES[1])):
                if any_tap(TAPS_W, slot_w, PLACES[1]):
                    mask = mask_h & within(column + slot_w, size[2], True)
                    moved = distance(slot_h, x_strides[3]) + distance(slot_w, x_strides[4])
                    x_tile = tl.load(x_ptr + moved, mask=mask, other=0.0).to(tl.float32)
                    for place_h in tl.static_range(constant(PLACES[0])):
                        for place_w in tl.static_range(constant(PLACES[1])):
                            acc = with_tap(
                                acc, TAPS_H[slot_h * PLACES[0] + place_h], TAPS_W[slot_w * PLACES[1] + place_w],
                                x_tile * y_tiles[place_h * PLACES[1] + place_w], KERNEL,
                            )  # fmt: skip
    return acc


@triton.jit
def with_tap(acc, TAP_H: tl.constexpr, TAP_W: tl.constexpr, value, KERNEL: tl.constexpr):
    """acc with ``value`` added to a tap, if there is one."""
    if TAP_H >= 0 and TAP_W >= 0:
        acc = replaced(acc, TAP_H * KERNEL[2] + TAP_W, acc[TAP_H * KERNEL[2] + TAP_W] + value)
    return acc


@triton.jit(launch_metadata=accounting, do_not_specialize=(*RUN_TIME, "splits"))
def backward_weight_depthwise_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    partial_ptr,  # (splits, taps, c_out) float32
    bias_partial_ptr,  # (splits, c_out) float32, or None
    arrivals_ptr,  # (programs of one split,) int32, zeros: the last one of a tile adds up its partials; or None
    total_ptr,  # (c_out, taps), dense, or None without arrivals
    total_bias_ptr,  # (c_out,), or None
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    splits, strides,  # of x, of grad_y
    LAYER: tl.constexpr, FIRST: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_C channels, the columns, one of KERNEL[0] taps along d with all taps along h and w, and one
    of ``splits`` chunks of the voxels, the depth; others own the bias gradient over the same chunks.

    Rows are BLOCK_H x BLOCK_W lanes along h and w. A lane loads STRIDE[1] x STRIDE[2] outputs of a plane of grad_y, and
    the window of x that their taps read.
    """
    C_OUT: tl.constexpr = LAYER.C_OUT
    GROUPS: tl.constexpr = LAYER.GROUPS
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    DILATION: tl.constexpr = LAYER.DILATION
    x_strides, grad_y_strides = strides
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    CHANNELS: tl.constexpr = GROUPS * C_OUT
    BLOCKS_C: tl.constexpr = ceil_div(CHANNELS, BLOCK_C)
    PLACES: tl.constexpr = (STRIDE[1], STRIDE[2])
    ROLES: tl.constexpr = KERNEL[0] + (bias_partial_ptr is not None)
    pid = tl.program_id(0)
    block_c = pid % BLOCKS_C
    tap_d = pid // BLOCKS_C % ROLES  # neighbours read the same share: all but the first from the L2 cache
    split = pid // (BLOCKS_C * ROLES)
    channel = block_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # (1, BLOCK_C)
    mask_c = channel < CHANNELS
    if WIDE:
        split = split.to(tl.int64)
        channel = channel.to(tl.int64)
    count = (tl.cdiv(out_size[1], STRIDE[1]), tl.cdiv(out_size[2], STRIDE[2]))
    planes = tl.where(tap_d < KERNEL[0], size[0], out_size[0])
    tiles = n * planes * tl.cdiv(count[0], BLOCK_H) * tl.cdiv(count[1], BLOCK_W)
    share = tl.cdiv(tiles, splits)
    low, high = split * share, tl.minimum((split + 1) * share, tiles)
    y_base = grad_y_ptr + channel * grad_y_strides[1]
    zero = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)

    if tap_d < KERNEL[0]:
        x_base = x_ptr + channel // C_OUT * x_strides[1]
        acc = filled(zero, KERNEL[1] * KERNEL[2])
        for index in range(low, high):
            image, plane, h, w = tile_at(index, size[0], count, BLOCK_H, BLOCK_W, WIDE)
            out_plane = plane * STRIDE[0] - crop[0] + tap_d * DILATION[0]
            if inside(out_plane, out_size[0]):
                lane_h, lane_w = lanes(h, w, BLOCK_H, BLOCK_W)
                y_plane = y_base + image * grad_y_strides[0] + out_plane * grad_y_strides[2]
                y_tiles = ()
                for place in tl.static_range(constant(PLACES[0] * PLACES[1])):
                    y_tiles = y_tiles + (  # type: ignore[assignment]  # noqa: RUF005
                        phase_tile(
                            y_plane, lane_h, lane_w, mask_c, size=out_size, grad_y_strides=grad_y_strides,
                            PLACE_H=place // PLACES[1], PLACE_W=place % PLACES[1], STRIDE=STRIDE,
                        ),
                    )  # fmt: skip
                row = lane_h + crop[1] // STRIDE[1] + FIRST[0]
                column = lane_w + crop[2] // STRIDE[2] + FIRST[1]
                x_tile = x_base + image * x_strides[0] + plane * x_strides[2]
                x_tile += row * x_strides[3] + column * x_strides[4]
                acc = correlated(
                    acc, x_tile, row, column, mask_c, size=size, x_strides=x_strides, y_tiles=y_tiles,
                    KERNEL=KERNEL, PLACES=PLACES, TAPS_H=TAPS_H, TAPS_W=TAPS_W,
                )  # fmt: skip
        for tap in tl.static_range(constant(KERNEL[1] * KERNEL[2])):
            at = (split * KERNEL[0] + tap_d) * (KERNEL[1] * KERNEL[2]) + tap
            tl.store(partial_ptr + at * CHANNELS + channel, tl.sum(acc[tap], 0)[None, :], mask=mask_c)
        if arrivals_ptr is not None:
            TAPS: tl.constexpr = KERNEL[1] * KERNEL[2]
            BLOCK_T: tl.constexpr = triton.next_power_of_2(TAPS)
            tap = tl.arange(0, BLOCK_T)[:, None]
            at = tap_d * TAPS + tap
            if last_to_arrive(arrivals_ptr, pid % (BLOCKS_C * ROLES), splits):
                offsets, mask = at * CHANNELS + channel, (tap < TAPS) & mask_c
                step = widened(KERNEL[0] * TAPS * CHANNELS, WIDE)
                sums = sum_in_order(partial_ptr, step, splits, offsets, mask, ahead(BLOCK_T * BLOCK_C))
                total_ptrs = total_ptr + channel * (KERNEL[0] * TAPS) + at
                tl.store(total_ptrs, sums.to(total_ptr.dtype.element_ty), mask=mask)
    else:
        if bias_partial_ptr is not None:
            total = zero
            for index in range(low, high):
                image, plane, h, w = tile_at(index, out_size[0], count, BLOCK_H, BLOCK_W, WIDE)
                lane_h, lane_w = lanes(h, w, BLOCK_H, BLOCK_W)
                y_plane = y_base + image * grad_y_strides[0] + plane * grad_y_strides[2]
                for place in tl.static_range(constant(PLACES[0] * PLACES[1])):
                    total += phase_tile(
                        y_plane, lane_h, lane_w, mask_c, size=out_size, grad_y_strides=grad_y_strides,
                        PLACE_H=place // PLACES[1], PLACE_W=place % PLACES[1], STRIDE=STRIDE,
                    )  # fmt: skip
            tl.store(bias_partial_ptr + split * CHANNELS + channel, tl.sum(total, 0)[None, :], mask=mask_c)
            if arrivals_ptr is not None:  # noqa: SIM102
                if last_to_arrive(arrivals_ptr, pid % (BLOCKS_C * ROLES), splits):
                    sums = sum_in_order(bias_partial_ptr, CHANNELS, splits, channel, mask_c, ahead(BLOCK_C))
                    tl.store(total_bias_ptr + channel, sums.to(total_bias_ptr.dtype.element_ty), mask=mask_c)


def launches(problem, config, x, grad_y, need_bias):
    sums = depthwise_gradients(problem, config, x, grad_y, need_bias)
    if not sums.nothing:
        windows, wide_offsets = depthwise.phase_windows(problem), wide(x, grad_y, sums.partial, of=problem)
        sums.launch(backward_weight_depthwise_kernel, _tiles(problem, config, need_bias), **windows, WIDE=wide_offsets)
    return sums.results()


def _tiles(problem: Problem, config, need_bias: bool) -> int:
    """How many programs one split has."""
    return (problem.kernel[0] + need_bias) * math.ceil(problem.c_out / config["BLOCK_C"])


def supports(problem: Problem, device: torch.device) -> str | None:
    taps, phases = problem.kernel[1] * problem.kernel[2], problem.stride[1] * problem.stride[2]
    if taps > MOST_TAPS or phases > depthwise.MOST_PLACES:
        return (
            f"{taps} taps and {phases} phases along h and w do not fit the registers "
            f"({MOST_TAPS} and {depthwise.MOST_PLACES} do)"
        )
    return refusal(problem, device) or depthwise.refused(problem)


def default(problem: Problem, device: torch.device):
    counts = depthwise.lane_counts(problem.out_size, problem.stride[1:])
    values = 4  # of one thread, for each of its taps
    while values > 1 and values * problem.kernel[1] * problem.kernel[2] > 100:
        values //= 2
    config = depthwise.tile_sizes(problem.layout, problem.c_out, counts, 128 * values)
    tiles = problem.n * problem.size[0]
    tiles *= math.ceil(counts[0] / config["BLOCK_H"]) * math.ceil(counts[1] / config["BLOCK_W"])
    roles = (problem.kernel[0] + 1) * math.ceil(problem.c_out / config["BLOCK_C"])
    return {**config, "SPLITS": max(1, min(tiles, WAVES * MULTIPROCESSORS // max(1, roles)))}


def space(problem: Problem, device: torch.device):
    base = default(problem, device)
    configs = depthwise.around(base, SPLITS=(max(1, base["SPLITS"] // 2), base["SPLITS"] * 2))
    taps = problem.kernel[1] * problem.kernel[2]
    return tuple(each for c in configs for each in with_arrivals(c, 4 * taps * c["BLOCK_C"]))


def workspace_bytes(problem: Problem) -> int:
    splits = 2 * default(problem, torch.device("cpu"))["SPLITS"]
    return 4 * splits * (math.prod(problem.kernel) + 1) * problem.c_out


def work(problem: Problem, config) -> Work:
    splits, taps = config["SPLITS"], math.prod(problem.kernel)
    programs, launches = splits * _tiles(problem, config, problem.bias), 1 if arrives(config) else 2
    moved = 8.0 * splits * (taps + 1) * problem.c_out
    return depthwise.work(problem, "backward_weight", config, programs, taps // problem.kernel[0], moved, launches)


VARIANT = Variant(
    "backward_weight_depthwise", "backward_weight",
    "one input channel per group: FMAs, split over voxels, summed in a fixed order", "triton",
    launches=launches, supports=supports, space=space, default=default, spreads_nonfinite=SPREADS_VOXELS,
    options=(ARRIVE,),
    workspace_bytes=workspace_bytes, work=work,
)  # fmt: skip
