"""Tiles whose columns are (phase, channel): one program computes several stride phases of the same input voxels.

Words: along an axis *cell* j holds the outputs o = stride*(first + j) + phase - crop, phase in [0, stride), with
first = crop // stride; the cells cover every output. A tile is BLOCK_M cells x BLOCK_N columns in one of two orders:

* ROWS = 0: (phase_d, phase_h, phase_w, channel): where channels are contiguous, so is (phase_w, channel).
* ROWS = 1: (phase_d, phase_h, channel, phase_w padded to a power of two). On its way to memory the tile becomes
  (BLOCK_M*span, BLOCK_N/span), so that with cells in runs along w whole rows of y are stored, phases interleaved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from tritonconv.kernels import triton_convolution, triton_launch
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_apart import columns_of
from tritonconv.kernels.triton_device import dividers, inside, load_along, multiple, product, voxels, widened
from tritonconv.kernels.triton_launch import BY, division, empty
from tritonconv.kernels.triton_target import compute_capability, step_of
from tritonconv.kernels.triton_weights import preferred
from tritonconv.kernels.variant import Config
from tritonconv.kernels.weight_orders import AS_GIVEN, IN_INNERMOST
from tritonconv.kernels.work import Work, parts, tap_gemm
from tritonconv.problem import Problem, Triple

# A crop stays specialised, unlike in triton_launch.RUN_TIME: a crop of 0 then counts as a multiple of 16, which is
# what lets a row of cells start on a 16-byte boundary.
RUN_TIME = (*(name for name in triton_launch.RUN_TIME if name not in triton_launch.CROPS), *BY)
LARGEST_ACCUMULATOR = 128 * 128  # float32 elements of a default tile: 64 registers in each of 8 warps' threads


@triton.constexpr_function
def span(PHASES, ROWS):
    """Columns that lie side by side in one row of y."""
    return 1 << (int(PHASES[2]) - 1).bit_length() if ROWS else 1


@triton.constexpr_function
def column_count(PHASES, CHANNELS, ROWS):
    """Columns of one group, the padded ones of ROWS included."""
    across = span(PHASES, ROWS) if ROWS else int(PHASES[2])
    return int(PHASES[0]) * int(PHASES[1]) * int(CHANNELS) * across


@triton.jit
def cells_of(crop, out_size, STRIDE: tl.constexpr):
    """(d, h, w): how many cells there are, and the first one's place among the input voxels."""
    first = (crop[0] // STRIDE[0], crop[1] // STRIDE[1], crop[2] // STRIDE[2])
    cells = (
        (crop[0] + out_size[0] - 1) // STRIDE[0] - first[0] + 1,
        (crop[1] + out_size[1] - 1) // STRIDE[1] - first[1] + 1,
        (crop[2] + out_size[2] - 1) // STRIDE[2] - first[2] + 1,
    )
    return cells, first


@triton.constexpr_function
def window_of(KERNEL, STRIDE):
    """(d, h, w): input voxels that the outputs of one cell read."""
    return tuple(-(-int(k) // int(s)) for k, s in zip(KERNEL, STRIDE, strict=True))


@triton.jit
def decoded(offs_n, CHANNELS: tl.constexpr, PHASES: tl.constexpr, ROWS: tl.constexpr):
    """phase_d, phase_h, phase_w, channel and mask, each like ``offs_n``, of columns."""
    # Each part is divided out of offs_n itself: the compiler follows one division, not a chain of them.
    SPAN: tl.constexpr = span(PHASES, ROWS)
    INNER: tl.constexpr = column_count((1, 1, PHASES[2]), CHANNELS, ROWS)
    mask = offs_n < INNER * PHASES[0] * PHASES[1]
    if ROWS:
        phase_w = offs_n % SPAN
        channel = offs_n // SPAN % CHANNELS
        if PHASES[2] != SPAN:
            mask = mask & (phase_w < PHASES[2])
    else:
        phase_w = offs_n // CHANNELS % PHASES[2]
        channel = offs_n % CHANNELS
    return offs_n // (INNER * PHASES[1]), offs_n // INNER % PHASES[1], phase_w, channel, mask


@triton.jit
def phases_first(tile, KERNEL: tl.constexpr, ROWS: tl.constexpr):
    """A tile (rows, columns) whose columns are (channel, tap), as a weight's are, with them in the order of ROWS."""
    TAPS: tl.constexpr = product(KERNEL)
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    if ROWS:
        return tile.reshape(M, N // TAPS, TAPS // KERNEL[2], KERNEL[2]).permute(0, 2, 1, 3).reshape(M, N)
    return tile.reshape(M, N // TAPS, TAPS).permute(0, 2, 1).reshape(M, N)


@triton.jit
def channels_first(tile, KERNEL: tl.constexpr):
    """A tile in the order of ROWS = 1 with its columns as (channel, tap)."""
    TAPS: tl.constexpr = product(KERNEL)
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tile.reshape(M, TAPS // KERNEL[2], N // TAPS, KERNEL[2]).permute(0, 2, 1, 3).reshape(M, N)


@triton.jit
def fine_dividers(cells, PHASES: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr):
    """The dividers of ``triton_store.store_phases`` and :func:`load_phases` in a loop, as :func:`dividers`."""
    SPAN: tl.constexpr = span(PHASES, ROWS)
    return dividers((cells[0], cells[1], cells[2] * SPAN), BLOCK_W * SPAN)


@triton.jit
def places(
    strides, tile, n, cells, origin, out_size, tile_n,
    CHANNELS: tl.constexpr, PHASES: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, FACTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, WIDE: tl.constexpr, by,
):  # fmt: skip
    """Element offsets and mask (BLOCK_M*span, BLOCK_N/span) of a tile of y, and the channels of its columns.

    Cell 0, phase 0 is output ``origin``; a cell's first PHASES of the STRIDE outputs along each axis are columns.
    """
    Y_STEP: tl.constexpr = FACTS.Y_STEP
    WHOLE: tl.constexpr = FACTS.WHOLE
    DENSE: tl.constexpr = FACTS.DENSE
    ACROSS: tl.constexpr = FACTS.ACROSS
    SPAN: tl.constexpr = span(PHASES, ROWS)
    CELL: tl.constexpr = (PHASES[0], PHASES[1], 1 if ROWS else PHASES[2])
    if ACROSS:
        strides = (strides[0], strides[1], strides[2], strides[3], ACROSS)
    fine = (cells[0], cells[1], cells[2] * SPAN)
    image, d, h, w, _ = voxels(tile, n, fine, BLOCK_M * SPAN, BLOCK_W * SPAN, WIDE, by=by)
    mask_m = image < n
    if ROWS and PHASES[2] != SPAN:
        mask_m = mask_m & (w % SPAN < PHASES[2])
    if STRIDE[2] != SPAN:
        w = w // SPAN * STRIDE[2] + w % SPAN
    d = d * STRIDE[0] + origin[0]
    h = h * STRIDE[1] + origin[1]
    w = w + origin[2]
    offs_n = tile_n * (BLOCK_N // SPAN) + tl.arange(0, BLOCK_N // SPAN)
    phase_d, phase_h, phase_w, channel, mask_n = decoded(offs_n, CHANNELS, CELL, False)
    phase_d, phase_h = widened(phase_d, WIDE), widened(phase_h, WIDE)
    phase_w, channel = widened(phase_w, WIDE), widened(channel, WIDE)
    if DENSE:
        inner = offs_n % (CELL[2] * CHANNELS)
        across = w * CHANNELS
    else:
        inner = phase_w * strides[4] + channel * strides[1]
        across = w * strides[4]
    rows = image * strides[0] + d * strides[2] + h * strides[3] + across
    columns = phase_d * strides[2] + phase_h * strides[3] + inner
    if WHOLE[0]:
        mask_m = mask_m & inside(d, out_size[0])
    if WHOLE[1]:
        mask_m = mask_m & inside(h, out_size[1])
    if WHOLE[2] or ROWS:
        mask_m = mask_m & inside(w, multiple(out_size[2], Y_STEP))
    mask = mask_m[:, None] & mask_n[None, :]
    if not WHOLE[0]:
        mask = mask & inside(d[:, None] + phase_d[None, :], out_size[0])
    if not WHOLE[1]:
        mask = mask & inside(h[:, None] + phase_h[None, :], out_size[1])
    if not (WHOLE[2] or ROWS):
        mask = mask & inside(w[:, None] + phase_w[None, :], out_size[2])
    return rows[:, None] + columns[None, :], mask, channel


@triton.jit
def load_phases(
    y_ptr,  # at channel 0 of the group
    strides, tile, n, cells, origin, out_size, tile_n,
    CHANNELS: tl.constexpr, PHASES: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, FACTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, WIDE: tl.constexpr,
    by=None,  # what the voxels are divided by: dividers of the cells, fine_dividers with ROWS
):  # fmt: skip
    """The tile (BLOCK_M, BLOCK_N) of y that ``triton_store.store_phases`` would write; 0 where there is no output."""
    SPAN: tl.constexpr = span(PHASES, ROWS)
    offsets, mask, _ = places(
        strides, tile, n, cells=cells, origin=origin, out_size=out_size, tile_n=tile_n, CHANNELS=CHANNELS,
        PHASES=PHASES, STRIDE=STRIDE, ROWS=ROWS, FACTS=FACTS, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_W=BLOCK_W,
        WIDE=WIDE, by=by,
    )  # fmt: skip
    if ROWS and SPAN == 1:  # one phase of a stride: no neighbours in sight
        y_tile = load_along(y_ptr + offsets, mask, 0)
    else:
        y_tile = tl.load(y_ptr + offsets, mask=mask, other=0.0)
    if SPAN > 1:
        y_tile = y_tile.reshape(BLOCK_M, SPAN, BLOCK_N // SPAN).permute(0, 2, 1)
        y_tile = y_tile.reshape(BLOCK_M, BLOCK_N)
    return y_tile


def cells(problem: Problem, start: int = 0, apart: int = 0) -> Triple:
    """(d, h, w): the host's side of :func:`cells_of`; they begin ``start`` outputs late along w.

    Along the first ``apart`` axes those of one phase: the most that any has.
    """
    depth, height, width = problem.crop
    axes = zip((depth, height, width - start), problem.out_size, problem.stride, strict=True)
    whole = [(crop + out - 1) // s - crop // s + 1 for crop, out, s in axes]
    one = [parts(out, s) for out, s in zip(problem.out_size, problem.stride, strict=True)]
    return (*one[:apart], *whole[apart:])  # type: ignore[return-value]


def dilation_refusal(problem: Problem) -> str | None:
    """The reason why cells cannot serve the problem's dilation; None where they can."""
    if any(axis.kernel > 1 and axis.dilation > 1 for axis in problem.axes):
        return f"with dilation {problem.dilation} the taps of an output are not neighbours in steps of the stride"
    return None


def columns(problem: Problem, rows: int, phases: Triple | None = None) -> int:
    """Columns of one group, by default of all phases: the host's side of :func:`column_count`."""
    return _columns(problem.stride if phases is None else phases, problem.c_out // problem.groups, rows)


@lru_cache(4096)  # a function of the compiler's costs more on the host than the rest of a count
def _columns(phases: Triple, channels: int, rows: int) -> int:
    return column_count(phases, channels, rows)


def whole_rows(problem: Problem) -> int:
    """The default ROWS: where w is y's contiguous axis, unless its phases would not fit the smallest tile."""
    contiguous = problem.layout == "ncdhw" or problem.c_out == 1
    return int(contiguous and 1 < problem.stride[2] <= 16)


def around(base: Config, problem: Problem, width: int = 0) -> tuple[Config, ...]:
    """The candidates of a kernel that shuffles: tiles, orders of the weight, and both orders of the columns.

    ``width`` as in ``triton_tiles.around``.
    """
    rows = (0, 1) if whole_rows(problem) else ()
    return tiles.around(base, problem, width=width, GROUP_M=(8,), WEIGHT=(0, 1, 2), ROWS=rows)


def width_step(width: int, config) -> int:
    """``triton_target.step_of`` the width, or 1: only tiles in runs along w gain from it."""
    return step_of(width) if config["BLOCK_W"] else 1


class Facts(NamedTuple):
    """The argument FACTS of a kernel: what is known of y, or of grad_y, for the compiler to load and store wide."""

    Y_STEP: int  # divides the width
    WHOLE: tuple[bool, ...]  # (d, h, w): all outputs of a cell are inside y, or none is
    DENSE: bool  # (phase_w, channel) is one contiguous stretch of a tile
    ACROSS: int  # the stride along w where that is the number of channels: a constant shows how it is aligned; or 0


def facts(problem: Problem, config, y, channels: int | None = None, apart: int = 0) -> Facts:
    """Of tiles of ``channels``, by default all of a group's, and of cells with one output along the first ``apart``
    axes.
    """
    axes = zip(problem.crop, problem.out_size, problem.stride, strict=True)
    whole = tuple(axis < apart or crop % s == out % s == 0 for axis, (crop, out, s) in enumerate(axes))
    group = problem.c_out // problem.groups
    last = y.stride(1) == 1 and not config["ROWS"]
    dense = last and y.stride(4) == group and channels in (None, group)
    across = problem.c_out if last and y.stride(4) == problem.c_out else 0
    return Facts(width_step(problem.out_size[2], config), whole, dense, across)


def weight_order(problem: Problem, rows: int) -> int:
    """The default WEIGHT: with ROWS two taps alternate along the columns, so only c_in can be contiguous in a tile."""
    order = preferred(problem)
    return IN_INNERMOST if rows and order != AS_GIVEN else order


def tile(problem: Problem, size: Triple, wide: int, depth: int) -> dict[str, int]:
    """The default tile for n * prod(size) rows and ``wide`` columns, all of them in one tile where they fit."""
    half = problem.dtype.itemsize == 2
    rows = problem.n * math.prod(size) * problem.groups
    block_n = tiles.power_of_two(wide, 16, 256 if half else 128)
    block_m = min(128, LARGEST_ACCUMULATOR // block_n) if half else 64
    while block_n > 64 and math.ceil(rows / block_m) * math.ceil(wide / block_n) < MULTIPROCESSORS // 2:
        block_n //= 2
    deep = half and problem.layout == "ndhwc" and not 0 < compute_capability() < 90  # 64 spills on sm_80
    block_k = tiles.power_of_two(depth, 16, 64 if deep else 32)
    width = tiles.block_w(problem, size, block_m)
    if width == 0 and problem.c_out == 1 and size[2] >= 8:
        width = tiles.rows_along_w(problem, size, block_m)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_W": width,
        "num_warps": 8 if block_m * block_n >= LARGEST_ACCUMULATOR // (1 if half else 2) else 4,
        "num_stages": 3 if (block_m + block_n) * block_k * problem.dtype.itemsize * 3 <= tiles.SHARED_BYTES else 2,
    }


def forward(kernel, problem: Problem, config, x, weight, bias, out, grid=None, start=0, channels=None, apart=0, **more):
    """Launches a forward kernel over tiles of (cells, columns): ``grid`` programs, by default one per tile -> y.

    ``start`` and ``apart`` as in :func:`cells`, ``channels`` as in :func:`facts`.
    """
    y = empty(problem, problem.y_shape, x) if out is None else out
    size = cells(problem, start, apart)
    if grid is None:
        wide = columns(problem, config["ROWS"], columns_of(problem.stride, apart))
        grid = math.prod(problem.stride[:apart]) * tiles.programs(problem, size, wide, config)
    return triton_convolution.forward(
        kernel, grid, problem, config, x, weight, bias, y, **division(size), **more,
        X_VOXELS_INNER=x.stride(1) != 1 and config["BLOCK_W"] == 0,
        X_STEP=width_step(problem.size[2], config),
        FACTS=facts(problem, config, y, channels, apart),
    )  # fmt: skip


def backward_data(kernel, problem: Problem, config, grad_y, weight, channels=None, grid=None):
    """Launches a backward-data kernel over tiles of (voxels, c_in) -> grad_x.

    ``grid`` programs, by default one per tile; ``channels`` as in :func:`facts`.
    """
    grad_x = empty(problem, problem.x_shape, grad_y)
    if grid is None:
        grid = tiles.programs(problem, problem.size, problem.c_in // problem.groups, config)
    return triton_convolution.backward_data(
        kernel, grid, problem, config, grad_y, weight, grad_x, **division(problem.size),
        X_STEP=width_step(problem.size[2], config),
        FACTS=facts(problem, config, grad_y, channels),
        VOXELS_INNER=grad_x.stride(1) != 1,
    )  # fmt: skip


def work(problem: Problem, config, size: Triple, depths: Sequence[int], phases: Triple | None = None) -> Work:
    """Of :func:`forward`: tiles over cells ``size`` and the columns of ``phases``; ``depths``: of each phase apart."""
    phases = problem.stride if phases is None else phases
    programs = tiles.programs(problem, size, columns(problem, config["ROWS"], phases), config)
    steps = programs * sum(parts(depth, config["BLOCK_K"]) for depth in depths)
    products = sum(depths) * math.prod(phases)  # of one cell and output channel, those with zeros included
    hit = math.prod(problem.kernel) * (problem.c_in // problem.groups) / products
    return tap_gemm(problem, "forward", config, programs * len(depths), steps, taps_hit=min(1.0, hit))
