"""Forward of a depthwise layer over cells: all taps of a channel stay in registers while a lane walks along d.

One program owns BLOCK_H x BLOCK_W cells along h and w x BLOCK_C channels x PLANES cells along d. Rows of its tiles are
cells, columns are channels. Each plane of x is loaded once for the cells of a lane, and each cell gives all of its
outputs, so that nothing but the products is done once per tap.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_depthwise as depthwise
from tritonconv.kernels import triton_depthwise_cells as cells
from tritonconv.kernels.triton_convolution import forward
from tritonconv.kernels.triton_depthwise import begun, filled, lanes, store_places, tile_of
from tritonconv.kernels.triton_depthwise_cells import floats, gated, load_slots, load_taps, slot_masks, tap_of
from tritonconv.kernels.triton_device import constant, inside, product
from tritonconv.kernels.triton_epilogue import computes
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, empty, refusal
from tritonconv.kernels.variant import SPREADS_WEIGHT, Variant
from tritonconv.kernels.work import Work
from tritonconv.problem import Problem


@triton.jit
def cell_plane(start, tiles, taps, PLACE_D: tl.constexpr, SLOTS: tl.constexpr, KERNEL: tl.constexpr,
               PLACES: tl.constexpr, TAPS_D: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr):  # fmt: skip
    """The outputs of a cell in its plane PLACE_D: a tuple of PLACES[1] * PLACES[2] tiles (BLOCK_M, BLOCK_C)."""
    AT: tl.constexpr = PLACE_D * PLACES[1] * PLACES[2]
    sums = ()
    for place in tl.static_range(constant(PLACES[1] * PLACES[2])):
        acc = start
        for slot in tl.static_range(constant(SLOTS[0] * SLOTS[1] * SLOTS[2])):
            if tap_of(slot, AT + place, SLOTS, KERNEL, PLACES, TAPS_D, along_h=TAPS_H, along_w=TAPS_W) >= 0:
                acc = acc + tiles[slot] * taps[
                    tap_of(slot, AT + place, SLOTS, KERNEL, PLACES, TAPS_D, along_h=TAPS_H, along_w=TAPS_W)
                ]  # fmt: skip
        sums = sums + (acc,)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit(launch_metadata=accounting, do_not_specialize=RUN_TIME)
def forward_depthwise_cells_kernel(
    x_ptr,  # (n, c, d, h, w)
    w_ptr,  # (c, 1, taps)
    bias_ptr,  # (c,) or None
    y_ptr,  # (n, c, od, oh, ow)
    residual_ptr, slopes,  # see triton_epilogue
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    strides,  # of x, of the weight, of y
    LAYER: tl.constexpr, CONFIG: tl.constexpr,
    FIRST: tl.constexpr, TAPS_D: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, INTERLEAVE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_H x BLOCK_W cells along h and w, the rows, x BLOCK_C channels, the columns, and PLANES cells
    along d. The depth is the taps.
    """
    EPILOGUE: tl.constexpr = CONFIG.EPILOGUE  # Triton 3.6.0 hands no tuple with a name on as an attribute
    GROUPS: tl.constexpr = LAYER.GROUPS
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    x_strides, w_strides, y_strides = strides
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    SLOTS: tl.constexpr = (len(TAPS_D) // STRIDE[0], len(TAPS_H) // STRIDE[1], len(TAPS_W) // STRIDE[2])
    ACROSS: tl.constexpr = (SLOTS[1], SLOTS[2])
    PLACES: tl.constexpr = (STRIDE[1], STRIDE[2])
    PLANE: tl.constexpr = SLOTS[1] * SLOTS[2]
    count = (tl.cdiv(out_size[0], STRIDE[0]), tl.cdiv(out_size[1], STRIDE[1]), tl.cdiv(out_size[2], STRIDE[2]))
    image, first, h, w, channel = tile_of(
        tl.program_id(0), n, count=(count[1], count[2]), planes=count[0], PLANES=PLANES, CHANNELS=GROUPS,
        BLOCK_H=BLOCK_H, BLOCK_W=BLOCK_W, BLOCK_C=BLOCK_C, WIDE=WIDE,
    )  # fmt: skip
    mask_c = channel < GROUPS
    row, column = lanes(
        h + crop[1] // STRIDE[1] + FIRST[1], w + crop[2] // STRIDE[2] + FIRST[2], BLOCK_H, BLOCK_W
    )  # (BLOCK_M, 1): slot (0, 0) of the window
    masks = slot_masks(row, column, mask_c, size, ACROSS)
    x_tile = x_ptr + image * x_strides[0] + (row * x_strides[3] + column * x_strides[4] + channel * x_strides[1])
    taps = load_taps(w_ptr + channel * w_strides[0], mask_c, w_strides[2], product(KERNEL))
    zero = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    start, bias = begun(zero, bias_ptr, channel, mask_c, EPILOGUE)

    last = tl.minimum(first + PLANES, count[0])
    plane = first + crop[0] // STRIDE[0] + FIRST[0]  # of x: slot 0 of the first cell along d
    tiles = filled(zero, PLANE)
    for _ in tl.static_range(constant(SLOTS[0] - 1)):
        tiles = tiles + floats(load_slots(x_tile, masks, plane, inside(plane, size[0]), x_strides, ACROSS))
        plane += 1
    ahead = load_slots(x_tile, masks, plane, inside(plane, size[0]), x_strides, ACROSS)
    for cell in range(first, last):
        tiles = tiles[PLANE:] + floats(ahead)
        plane += 1
        there = inside(plane, size[0]) & (cell + 1 < last)
        ahead = load_slots(x_tile, masks, plane, there, x_strides, ACROSS)
        for place_d in tl.static_range(constant(STRIDE[0])):
            out_plane = cell * STRIDE[0] + place_d
            sums = cell_plane(
                start, tiles, taps, PLACE_D=place_d, SLOTS=SLOTS, KERNEL=KERNEL, PLACES=STRIDE,
                TAPS_D=TAPS_D, TAPS_H=TAPS_H, TAPS_W=TAPS_W,
            )  # fmt: skip
            y_plane = y_ptr + image * y_strides[0] + out_plane * y_strides[2]
            residual_plane = residual_ptr
            if residual_ptr is not None:
                residual_plane = residual_ptr + image * y_strides[0] + out_plane * y_strides[2]
            store_places(
                sums, y_plane, h, w, channel, size=out_size, out_strides=y_strides,
                mask_c=gated(mask_c, out_plane < out_size[0]),
                PLACES=PLACES, INTERLEAVE=INTERLEAVE, BLOCK_H=BLOCK_H, BLOCK_W=BLOCK_W,
                bias=bias, residual_ptr=residual_plane, slopes=slopes, EPILOGUE=EPILOGUE,
            )  # fmt: skip


def launches(problem, config, x, weight, bias, out=None, **epilogue):
    y = empty(problem, problem.y_shape, x) if out is None else out
    return forward(
        forward_depthwise_cells_kernel, programs(problem, config), problem, config, x, weight, bias, y,
        **cells.windows(problem),
        INTERLEAVE=int(problem.stride[2] == 2 and problem.layout == "ncdhw"), **epilogue,
    )  # fmt: skip


def programs(problem: Problem, config) -> int:
    return depthwise.programs(problem.n, problem.c_out, cells.counts(problem), (1, 1), config)


def supports(problem: Problem, device: torch.device) -> str | None:
    return refusal(problem, device) or cells.refused(problem)


def default(problem: Problem, device: torch.device):
    config = cells.tile_sizes(problem.layout, problem.c_out, cells.counts(problem), problem.n)
    return {**config, "WEIGHT": depthwise.weight_order(problem)}


def space(problem: Problem, device: torch.device):
    return cells.space(problem.layout, default(problem, device), _kept(problem), WEIGHT=(0, 1))


def _kept(problem: Problem) -> float:
    slots = cells.slots(problem)
    sums, ahead = math.prod(problem.stride[1:]), slots[1] * slots[2] * problem.dtype.itemsize / 4
    return math.prod(problem.kernel) + math.prod(slots) + sums + ahead


def work(problem: Problem, config) -> Work:
    slots, count = cells.slots(problem), programs(problem, config)
    return cells.work(
        problem, "forward", config, columns=count, programs=count, loads=slots[1] * slots[2],
        stores=math.prod(problem.stride), products=math.prod(problem.kernel), kept=_kept(problem),
    )  # fmt: skip


VARIANT = Variant(
    "forward_depthwise_cells", "forward",
    "one channel per group: FMAs, all outputs of a cell from one window, taps in registers", "triton",
    launches=launches, supports=supports, space=space, default=default, spreads_nonfinite=SPREADS_WEIGHT, work=work,
    epilogue=computes,
)  # fmt: skip
