"""Backward-data of a depthwise layer over planes: all taps of a channel stay in registers while a lane walks along d.

One program owns BLOCK_H x BLOCK_W voxels of grad_x along h and w x BLOCK_C channels x PLANES along d. Rows of its tiles
are voxels, columns are channels. From one voxel to the next along d the window of grad_y moves by stride_d planes. Only
these are loaded, one step before they are needed, and added to the sums of all voxels whose windows hold them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_depthwise as depthwise
from tritonconv.kernels import triton_depthwise_cells as cells
from tritonconv.kernels.triton_convolution import backward_data
from tritonconv.kernels.triton_depthwise import filled, lanes, replaced, store_places, tile_of
from tritonconv.kernels.triton_depthwise_cells import floats, load_slots, load_taps, slot_masks
from tritonconv.kernels.triton_device import ceil_div, constant, inside, product
from tritonconv.kernels.triton_launch import RUN_TIME, WIDE_FROM, accounting, empty, refusal
from tritonconv.kernels.variant import SPREADS_WEIGHT, Variant
from tritonconv.kernels.work import Work
from tritonconv.problem import Problem


@triton.jit
def load_planes(pointers, masks, first, wanted, planes, strides, COUNT: tl.constexpr, SLOTS: tl.constexpr,
                SCATTERED: tl.constexpr):  # fmt: skip
    """COUNT of ``planes`` from ``first`` on, as they are in memory: a tuple of tiles, zeros where not ``wanted``."""
    tiles = ()
    for place in tl.static_range(constant(COUNT)):
        there = inside(first + place, planes) & wanted
        tiles = tiles + load_slots(pointers, masks, first + place, there, strides, SLOTS=SLOTS, SCATTERED=SCATTERED)
    return tiles


@triton.jit
def add_planes(sums, tiles, taps, FIRST: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """The sums of voxels that follow each other along d plus the taps that meet a window's planes from FIRST on.

    Plane t of the first voxel's window is plane ``t - step*STRIDE`` of the window of the one ``step`` behind.
    """
    PLANE: tl.constexpr = KERNEL[1] * KERNEL[2]
    for step in tl.static_range(len(sums)):
        for place in tl.static_range(len(tiles)):
            if FIRST * PLANE + place >= step * STRIDE * PLANE:
                value = tiles[place] * taps[FIRST * PLANE + place - step * STRIDE * PLANE]
                sums = replaced(sums, step, sums[step] + value)
    return sums


@triton.jit(launch_metadata=accounting, do_not_specialize=RUN_TIME)
def backward_data_depthwise_cells_kernel(
    grad_y_ptr,  # (n, c, od, oh, ow)
    w_ptr,  # (c, 1, taps)
    grad_x_ptr,  # (n, c, d, h, w)
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    strides,  # of grad_y, of the weight, of grad_x
    C_IN: tl.constexpr, C_OUT: tl.constexpr, GROUPS: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_H x BLOCK_W voxels of grad_x along h and w, the rows, x BLOCK_C channels, the columns, and
    PLANES planes. The depth is the taps.
    """
    grad_y_strides, w_strides, grad_x_strides = strides
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    SLOTS: tl.constexpr = (KERNEL[1], KERNEL[2])
    NEW: tl.constexpr = KERNEL[0] if KERNEL[0] < STRIDE[0] else STRIDE[0]  # planes of a step; the others came before
    KEPT: tl.constexpr = KERNEL[0] - NEW
    VOXELS: tl.constexpr = ceil_div(KERNEL[0], STRIDE[0])  # whose windows hold one plane
    ALONE: tl.constexpr = (1, 1)
    SCATTERED: tl.constexpr = STRIDE[2] > 1
    image, first, h, w, channel = tile_of(
        tl.program_id(0), n, count=(size[1], size[2]), planes=size[0], PLANES=PLANES, CHANNELS=GROUPS,
        BLOCK_H=BLOCK_H, BLOCK_W=BLOCK_W, BLOCK_C=BLOCK_C, WIDE=WIDE,
    )  # fmt: skip
    mask_c = channel < GROUPS
    lane_h, lane_w = lanes(h, w, BLOCK_H, BLOCK_W)
    row, column = lane_h * STRIDE[1] - crop[1], lane_w * STRIDE[2] - crop[2]  # (BLOCK_M, 1): slot (0, 0)
    masks = slot_masks(row, column, mask_c, out_size, SLOTS)
    y_tile = grad_y_ptr + image * grad_y_strides[0]
    y_tile += row * grad_y_strides[3] + column * grad_y_strides[4] + channel * grad_y_strides[1]
    taps = load_taps(w_ptr + channel * w_strides[1], mask_c, w_strides[2], product(KERNEL))
    zero = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)

    last = tl.minimum(first + PLANES, size[0])
    plane = first * STRIDE[0] - crop[0]  # of grad_y: slot 0 of the first voxel along d
    sums = filled(zero, VOXELS)
    before = load_planes(
        y_tile, masks, plane, wanted=True, planes=out_size[0], strides=grad_y_strides,
        COUNT=KEPT, SLOTS=SLOTS, SCATTERED=SCATTERED,
    )  # fmt: skip
    sums = add_planes(sums, floats(before), taps, 0, KERNEL, STRIDE[0])
    plane += KEPT
    ahead = load_planes(
        y_tile, masks, plane, wanted=True, planes=out_size[0], strides=grad_y_strides,
        COUNT=NEW, SLOTS=SLOTS, SCATTERED=SCATTERED,
    )  # fmt: skip
    for voxel in range(first, last):
        tiles = floats(ahead)
        plane += STRIDE[0]
        ahead = load_planes(
            y_tile, masks, plane, wanted=voxel + 1 < last, planes=out_size[0], strides=grad_y_strides,
            COUNT=NEW, SLOTS=SLOTS, SCATTERED=SCATTERED,
        )  # fmt: skip
        sums = add_planes(sums, tiles, taps, KEPT, KERNEL, STRIDE[0])
        x_plane = grad_x_ptr + image * grad_x_strides[0] + voxel * grad_x_strides[2]
        store_places(
            sums[:1], x_plane, h, w, channel, size=size, out_strides=grad_x_strides, mask_c=mask_c,
            PLACES=ALONE, INTERLEAVE=False, BLOCK_H=BLOCK_H, BLOCK_W=BLOCK_W,
        )  # fmt: skip
        sums = sums[1:] + (zero,)  # noqa: RUF005


def launches(problem, config, grad_y, weight):
    return backward_data(
        backward_data_depthwise_cells_kernel, programs(problem, config), problem, config, grad_y, weight,
        empty(problem, problem.x_shape, grad_y),
    )  # fmt: skip


def programs(problem: Problem, config) -> int:
    return depthwise.programs(problem.n, problem.c_in, problem.size, (1, 1), config)


def supports(problem: Problem, device: torch.device) -> str | None:
    return refusal(problem, device) or cells.refused(problem)


def default(problem: Problem, device: torch.device):
    config = cells.tile_sizes(problem.layout, problem.c_in, problem.size, problem.n)
    if problem.layout == "ndhwc" and problem.dtype.itemsize == 2:
        # Four channels in a thread take most of its registers, and issue two thirds of the instructions of two.
        four = cells.tile_sizes(problem.layout, problem.c_in, problem.size, problem.n, 4)
        config = four if cells.fits(problem.layout, four, _kept(problem)) else config
    return {**config, "WEIGHT": depthwise.weight_order(problem)}


def space(problem: Problem, device: torch.device):
    return cells.space(problem.layout, default(problem, device), _kept(problem), WEIGHT=(0, 1))


def _loads(problem: Problem) -> int:
    """Values of grad_y that a lane loads at each step."""
    return min(problem.kernel[0], problem.stride[0]) * problem.kernel[1] * problem.kernel[2]


def _kept(problem: Problem) -> float:
    loads, sums = _loads(problem), math.ceil(problem.kernel[0] / problem.stride[0])
    far = math.prod(problem.y_shape) >= WIDE_FROM  # offsets of 64 bits
    return math.prod(problem.kernel) + sums + loads * (1 + problem.dtype.itemsize / 4) + far


def work(problem: Problem, config) -> Work:
    count = programs(problem, config)
    return cells.work(
        problem, "backward_data", config, columns=count, programs=count, loads=_loads(problem), stores=1,
        products=math.prod(problem.kernel), kept=_kept(problem),
    )  # fmt: skip


VARIANT = Variant(
    "backward_data_depthwise_cells", "backward_data",
    "one channel per group: FMAs, each plane of grad_y from one load, taps in registers", "triton",
    launches=launches, supports=supports, space=space, default=default, spreads_nonfinite=SPREADS_WEIGHT, work=work,
)  # fmt: skip
