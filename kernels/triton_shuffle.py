"""Where a program of the kernels with columns (phase, channel) works: its tile, voxels, columns and their taps.

LAYER and CONFIG are the kernel's own. A tile has BLOCK_M voxels, or cells, of ``n`` images of ``size``, (d, h, w).
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonconv.kernels.triton_device import (
    given_dividers,
    grouped_order,
    inside,
    multiple,
    offset,
    store_tile,
    voxel_tiles,
    voxels,
    widened,
)
from tritonconv.kernels.triton_phases import decoded


@triton.jit
def row_dividers(by_d, by_h, by_w, shift_d, shift_h, shift_w, CONFIG: tl.constexpr, WIDE: tl.constexpr):
    """The dividers of a tile's voxels; None where it has rows along w, or WIDE is 2: see ``dividers``."""
    by = None
    if CONFIG.BLOCK_W == 0 and not CONFIG.ROWS and WIDE < 2:
        by = given_dividers(by_d, by_h, by_w, shift_d, shift_h, shift_w)
    return by


@triton.jit
def own_tile(
    n, size, TILES_N: tl.constexpr, LAYER: tl.constexpr, CONFIG: tl.constexpr, WIDE: tl.constexpr,
    pid=None, SHARED: tl.constexpr = 1,
):  # fmt: skip
    """(tile_m, tile_n) of a program, in GROUP_M's order; each group of channels has TILES_N tiles of columns.

    ``pid``: the program's number, where the kernel has asked for it; SHARED programs side by side have one tile.
    """
    tiles_m = voxel_tiles(n, size, CONFIG.BLOCK_M, CONFIG.BLOCK_W, WIDE)
    if pid is None:
        pid = tl.program_id(0)
    return grouped_order(pid // SHARED, tiles_m, TILES_N * LAYER.GROUPS, CONFIG.GROUP_M)


@triton.jit
def group_columns(tile_n, TILES_N: tl.constexpr, CONFIG: tl.constexpr, WIDE: tl.constexpr):
    """group, tile_n, offs_n: the group of a tile of columns, which of its tiles it is, and the columns, (BLOCK_N,)."""
    group, tile_n = tile_n // TILES_N, tile_n % TILES_N
    offs_n = tile_n * CONFIG.BLOCK_N + tl.arange(0, CONFIG.BLOCK_N)
    return widened(group, WIDE), tile_n, widened(offs_n, WIDE)


@triton.jit
def zero_sums(CONFIG: tl.constexpr):
    """The sums of a tile before its first step, (BLOCK_M, BLOCK_N)."""
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    return tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def cell_voxels(tile, n, cells, first, CONFIG: tl.constexpr, WIDE: tl.constexpr, by):
    """image, d, h and w, each (BLOCK_M,), of the voxel of x at delta 0 of each cell of a tile."""
    image, d, h, w, _ = voxels(tile, n, cells, CONFIG.BLOCK_M, CONFIG.BLOCK_W, WIDE, by=by)
    return image, d + first[0], h + first[1], w + first[2]


@triton.jit
def cell_rows(tile, n, cells, first, size, strides, CONFIG: tl.constexpr, WIDE: tl.constexpr, by):
    """Element offsets and mask, (BLOCK_M,), of the :func:`cell_voxels`: all that is read where kernel <= stride."""
    image, d, h, w = cell_voxels(tile, n, cells, first, CONFIG=CONFIG, WIDE=WIDE, by=by)
    mask = (image < n) & inside(d, size[0]) & inside(h, size[1]) & inside(w, multiple(size[2], CONFIG.X_STEP))
    return offset(strides, image, 0, d, h, w), mask


@triton.jit
def store_voxels(
    out_ptr, strides, tile, n, size, channel, acc, mask_n, CONFIG: tl.constexpr, WIDE: tl.constexpr, by
):  # fmt: skip
    """Stores the sums (BLOCK_M voxels, BLOCK_N channels) of a tile of grad_x."""
    image, d, h, w, _ = voxels(tile, n, size, CONFIG.BLOCK_M, CONFIG.BLOCK_W, WIDE, by=by)
    mask_m = (image < n) & inside(w, multiple(size[2], CONFIG.X_STEP))
    rows = offset(strides, image, 0, d, h, w)
    store_tile(out_ptr, rows, channel * strides[1], acc, mask_m, mask_n, VOXELS_INNER=CONFIG.VOXELS_INNER)


@triton.jit
def phase_taps(offs_n, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """tap, channel, mask and those with a tap, each like ``offs_n``, of columns (phase, channel), kernel <= stride."""
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    phase_d, phase_h, phase_w, channel, mask = decoded(offs_n, LAYER.C_OUT, STRIDE, CONFIG.ROWS)
    tapped = mask & (phase_d < KERNEL[0]) & (phase_h < KERNEL[1]) & (phase_w < KERNEL[2])
    return (phase_d * KERNEL[1] + phase_h) * KERNEL[2] + phase_w, channel, mask, tapped


@triton.jit
def taps(offs, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """tap, channel and mask, each like ``offs``, of columns (tap, channel)."""
    KERNEL: tl.constexpr = LAYER.KERNEL
    tap_d, tap_h, tap_w, channel, mask = decoded(offs, LAYER.C_OUT, KERNEL, CONFIG.ROWS)
    return (tap_d * KERNEL[1] + tap_h) * KERNEL[2] + tap_w, channel, mask
