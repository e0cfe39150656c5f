"""Backward-weight of a depthwise layer over cells: x and grad_y are read once, for all taps and for the bias gradient.

A program owns BLOCK_C channels and one of SPLITS shares of the columns of cells: BLOCK_H x BLOCK_W cells along h and w,
PLANES along d. Rows of its tiles are cells, columns are channels. A lane keeps a float32 sum for each tap of a channel
and walks along d as the forward over cells does. Its sums are added up at the end of the share, and those of the shares
in a fixed order by a second launch, or by the last program to arrive.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_depthwise as depthwise
from tritonconv.kernels import triton_depthwise_cells as cells
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_arrival import ARRIVE, ahead, arrives, last_to_arrive, sum_in_order, with_arrivals
from tritonconv.kernels.triton_depthwise import filled, lanes, replaced, tile_at
from tritonconv.kernels.triton_depthwise_cells import floats, load_slots, slot_masks, tap_of
from tritonconv.kernels.triton_device import ceil_div, chunk, constant, inside, product, widened
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, refusal, wide
from tritonconv.kernels.triton_partials import depthwise_gradients
from tritonconv.kernels.variant import SPREADS_VOXELS, Variant
from tritonconv.kernels.work import Work
from tritonconv.problem import Problem

WAVES = 3  # of programs with few channels


@triton.jit
def load_cell(pointers, masks, cell, last, planes, strides, STRIDE: tl.constexpr, SCATTERED: tl.constexpr):
    """The outputs of a cell as they are in memory, a tuple of tiles (BLOCK_M, BLOCK_C); zeros from cell ``last`` on.

    ``pointers``: to the first output in plane 0 of ``planes``.
    """
    PLACES: tl.constexpr = (STRIDE[1], STRIDE[2])
    tiles = ()
    for place in tl.static_range(constant(STRIDE[0])):
        plane = cell * STRIDE[0] + place
        there = (plane < planes) & (cell < last)
        tiles = tiles + load_slots(pointers, masks, plane, there, strides, SLOTS=PLACES, SCATTERED=SCATTERED)
    return tiles


@triton.jit
def correlated(sums, tiles, outputs, SLOTS: tl.constexpr, KERNEL: tl.constexpr, PLACES: tl.constexpr,
               TAPS_D: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr):  # fmt: skip
    """One sum per tap plus the products of a cell's outputs with its window; one sum more is that of the outputs."""
    for place in tl.static_range(constant(PLACES[0] * PLACES[1] * PLACES[2])):
        for slot in tl.static_range(constant(SLOTS[0] * SLOTS[1] * SLOTS[2])):
            if tap_of(slot, place, SLOTS, KERNEL, PLACES, TAPS_D, along_h=TAPS_H, along_w=TAPS_W) >= 0:
                sums = added(
                    sums, tap_of(slot, place, SLOTS, KERNEL, PLACES, TAPS_D, along_h=TAPS_H, along_w=TAPS_W),
                    tiles[slot] * outputs[place],
                )  # fmt: skip
        if len(sums) > KERNEL[0] * KERNEL[1] * KERNEL[2]:
            sums = added(sums, KERNEL[0] * KERNEL[1] * KERNEL[2], outputs[place])
    return sums


@triton.jit
def added(sums, PLACE: tl.constexpr, value):
    """The tuple with ``value`` added at PLACE."""
    return replaced(sums, PLACE, sums[PLACE] + value)


@triton.jit(launch_metadata=accounting, do_not_specialize=(*RUN_TIME, "splits"))
def backward_weight_depthwise_cells_kernel(
    x_ptr,  # (n, c, d, h, w)
    grad_y_ptr,  # (n, c, od, oh, ow)
    partial_ptr,  # (splits, taps, c) float32
    bias_partial_ptr,  # (splits, c) float32, or None
    arrivals_ptr,  # (blocks of channels,) int32, zeros: the last program of a block adds up its partials; or None
    total_ptr,  # (c, taps), dense, or None without arrivals
    total_bias_ptr,  # (c,), or None
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    splits, strides,  # of x, of grad_y
    GROUPS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    FIRST: tl.constexpr, SLOT_TAPS: tl.constexpr,  # (d, h, w), as cells.windows has them
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_C channels, the columns, with all their taps and their bias gradient, and one of ``splits``
    chunks of the boxes of PLANES x BLOCK_H x BLOCK_W cells, the depth. Rows are the cells of a plane of the box.
    """
    x_strides, grad_y_strides = strides
    TAPS_D: tl.constexpr = SLOT_TAPS[0]
    TAPS_H: tl.constexpr = SLOT_TAPS[1]
    TAPS_W: tl.constexpr = SLOT_TAPS[2]
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    BLOCKS_C: tl.constexpr = ceil_div(GROUPS, BLOCK_C)
    TAPS: tl.constexpr = product(KERNEL)
    SLOTS: tl.constexpr = (len(TAPS_D) // STRIDE[0], len(TAPS_H) // STRIDE[1], len(TAPS_W) // STRIDE[2])
    ACROSS: tl.constexpr = (SLOTS[1], SLOTS[2])
    PLANE: tl.constexpr = SLOTS[1] * SLOTS[2]
    PLACES: tl.constexpr = (STRIDE[1], STRIDE[2])
    SCATTERED: tl.constexpr = STRIDE[2] > 1
    block_c, split = tl.program_id(0) % BLOCKS_C, tl.program_id(0) // BLOCKS_C
    channel = widened(block_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :], WIDE)  # (1, BLOCK_C)
    split = widened(split, WIDE)
    mask_c = channel < GROUPS
    count = (tl.cdiv(out_size[0], STRIDE[0]), tl.cdiv(out_size[1], STRIDE[1]), tl.cdiv(out_size[2], STRIDE[2]))
    walks = tl.cdiv(count[0], PLANES)
    columns = n * walks * tl.cdiv(count[1], BLOCK_H) * tl.cdiv(count[2], BLOCK_W)
    low, high = chunk(split, splits, columns)
    zero = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)

    sums = filled(zero, TAPS + (bias_partial_ptr is not None))
    for index in range(low, high):
        image, walk_d, h, w = tile_at(index, walks, (count[1], count[2]), BLOCK_H, BLOCK_W, WIDE)
        first = walk_d * PLANES
        last = tl.minimum(first + PLANES, count[0])
        lane_h, lane_w = lanes(h, w, BLOCK_H, BLOCK_W)
        out_h, out_w = lane_h * STRIDE[1], lane_w * STRIDE[2]
        y_masks = slot_masks(out_h, out_w, mask_c, out_size, PLACES)
        y_tile = grad_y_ptr + image * grad_y_strides[0]
        y_tile += out_h * grad_y_strides[3] + out_w * grad_y_strides[4] + channel * grad_y_strides[1]
        row, column = lane_h + (crop[1] // STRIDE[1] + FIRST[1]), lane_w + (crop[2] // STRIDE[2] + FIRST[2])
        x_masks = slot_masks(row, column, mask_c, size, ACROSS)
        x_tile = x_ptr + image * x_strides[0] + (row * x_strides[3] + column * x_strides[4] + channel * x_strides[1])
        plane = first + crop[0] // STRIDE[0] + FIRST[0]  # of x: slot 0 of the first cell along d
        tiles = filled(zero, PLANE)
        for _ in tl.static_range(constant(SLOTS[0] - 1)):
            there = inside(plane, size[0])
            tiles = tiles + floats(load_slots(x_tile, x_masks, plane, there, x_strides, ACROSS))
            plane += 1
        next_x = load_slots(x_tile, x_masks, plane, inside(plane, size[0]), x_strides, ACROSS)
        next_y = load_cell(
            y_tile, y_masks, first, last=last, planes=out_size[0], strides=grad_y_strides,
            STRIDE=STRIDE, SCATTERED=SCATTERED,
        )  # fmt: skip
        for cell in range(first, last):
            tiles, outputs = tiles[PLANE:] + floats(next_x), floats(next_y)
            plane += 1
            there = inside(plane, size[0]) & (cell + 1 < last)
            next_x = load_slots(x_tile, x_masks, plane, there, x_strides, ACROSS)
            next_y = load_cell(
                y_tile, y_masks, cell + 1, last=last, planes=out_size[0], strides=grad_y_strides,
                STRIDE=STRIDE, SCATTERED=SCATTERED,
            )  # fmt: skip
            sums = correlated(
                sums, tiles, outputs, SLOTS=SLOTS, KERNEL=KERNEL, PLACES=STRIDE,
                TAPS_D=TAPS_D, TAPS_H=TAPS_H, TAPS_W=TAPS_W,
            )  # fmt: skip

    for tap in tl.static_range(TAPS):
        tl.store(partial_ptr + (split * TAPS + tap) * GROUPS + channel, tl.sum(sums[tap], 0)[None, :], mask=mask_c)
    if bias_partial_ptr is not None:
        tl.store(bias_partial_ptr + split * GROUPS + channel, tl.sum(sums[TAPS], 0)[None, :], mask=mask_c)
    if arrivals_ptr is not None:
        BLOCK_T: tl.constexpr = triton.next_power_of_2(TAPS)
        tap = tl.arange(0, BLOCK_T)[:, None]
        if last_to_arrive(arrivals_ptr, block_c, splits):
            mask = (tap < TAPS) & mask_c
            step = widened(TAPS * GROUPS, WIDE)
            total = sum_in_order(partial_ptr, step, splits, tap * GROUPS + channel, mask, ahead(BLOCK_T * BLOCK_C))
            tl.store(total_ptr + channel * TAPS + tap, total.to(total_ptr.dtype.element_ty), mask=mask)
            if bias_partial_ptr is not None:
                total = sum_in_order(bias_partial_ptr, GROUPS, splits, channel, mask_c, ahead(BLOCK_C))
                tl.store(total_bias_ptr + channel, total.to(total_bias_ptr.dtype.element_ty), mask=mask_c)


def launches(problem, config, x, grad_y, need_bias):
    sums = depthwise_gradients(problem, config, x, grad_y, need_bias)
    if not sums.nothing:
        windows, blocks = cells.windows(problem), math.ceil(problem.c_out / config["BLOCK_C"])
        sums.launch(
            backward_weight_depthwise_cells_kernel,
            blocks,
            FIRST=windows["FIRST"],
            SLOT_TAPS=tuple(windows[f"TAPS_{axis}"] for axis in "DHW"),
            WIDE=wide(x, grad_y, sums.partial, of=problem),
        )
    return sums.results()


def supports(problem: Problem, device: torch.device) -> str | None:
    return refusal(problem, device) or cells.refused(problem)


def default(problem: Problem, device: torch.device):
    counts = cells.counts(problem)
    config = cells.tile_sizes(problem.layout, problem.c_out, counts, problem.n)
    columns = depthwise.programs(problem.n, problem.c_out, counts, (1, 1), config)
    blocks = math.ceil(problem.c_out / config["BLOCK_C"])
    # The partials of many channels are long: one program for each that fits at a time, so that all end together.
    programs = cells.PROGRAMS * MULTIPROCESSORS * (1 if problem.layout == "ndhwc" else WAVES)
    splits = min(columns, programs) // max(1, blocks)
    return {**config, "SPLITS": max(1, splits)}


def space(problem: Problem, device: torch.device):
    base = default(problem, device)
    configs = cells.space(
        problem.layout, base, _kept(problem), SPLITS=(max(1, base["SPLITS"] // 2), base["SPLITS"] * 2)
    )
    taps = math.prod(problem.kernel)
    return tuple(each for c in configs for each in with_arrivals(c, 4 * (taps + 1) * c["BLOCK_C"]))


def _loads(problem: Problem) -> int:
    """Values of x and grad_y that a lane loads at each step."""
    slots = cells.slots(problem)
    return slots[1] * slots[2] + math.prod(problem.stride)


def _kept(problem: Problem) -> float:
    tiles = math.prod(cells.slots(problem)) + math.prod(problem.stride)
    return math.prod(problem.kernel) + 1 + tiles + _loads(problem) * problem.dtype.itemsize / 4


def workspace_bytes(problem: Problem) -> int:
    splits = 3 * default(problem, torch.device("cpu"))["SPLITS"]
    return 4 * splits * (math.prod(problem.kernel) + 1) * problem.c_out


def work(problem: Problem, config) -> Work:
    splits, taps = config["SPLITS"], math.prod(problem.kernel)
    columns = depthwise.programs(problem.n, problem.c_out, cells.counts(problem), (1, 1), config)
    return cells.work(
        problem, "backward_weight", config, columns=columns, loads=_loads(problem), stores=0,
        programs=splits * math.ceil(problem.c_out / config["BLOCK_C"]),
        products=taps + problem.bias * math.prod(problem.stride), kept=_kept(problem),
        moved=8.0 * splits * (taps + 1) * problem.c_out, launches=1 if arrives(config) else 2,
    )  # fmt: skip


VARIANT = Variant(
    "backward_weight_depthwise_cells", "backward_weight",
    "one channel per group: FMAs, all taps and the bias gradient from one read of x and grad_y", "triton",
    launches=launches, supports=supports, space=space, default=default, spreads_nonfinite=SPREADS_VOXELS,
    options=(ARRIVE,),
    workspace_bytes=workspace_bytes, work=work,
)  # fmt: skip
