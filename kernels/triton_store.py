"""How the forward kernels store a tile of y: at rows and columns, or at the phases of cells.

``residual_ptr``, ``slopes`` and EPILOGUE are those of :mod:`~tritonconv.kernels.triton_epilogue`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonconv.kernels.triton_device import store_tile, ties_last
from tritonconv.kernels.triton_epilogue import finished
from tritonconv.kernels.triton_phases import places, span


@triton.jit
def store_outputs(
    y_ptr, strides, rows, channel, acc, mask_m, mask_n, VOXELS_INNER: tl.constexpr,
    residual_ptr=None, slopes=None, EPILOGUE: tl.constexpr = None,
):  # fmt: skip
    """Writes sums (BLOCK_M voxels, BLOCK_N channels) as ``store_tile`` does, at ``rows`` and the channels of all y."""
    columns = channel * strides[1]
    if EPILOGUE is None:
        store_tile(y_ptr, rows, columns, acc, mask_m, mask_n, VOXELS_INNER=VOXELS_INNER)
    else:
        channel = tl.where(mask_n, channel, 0)
        if VOXELS_INNER and ties_last():
            offsets, mask = columns[:, None] + rows[None, :], mask_n[:, None] & mask_m[None, :]
            tile, channel = tl.trans(acc), channel[:, None]
        else:
            offsets, mask = rows[:, None] + columns[None, :], mask_m[:, None] & mask_n[None, :]
            tile, channel = acc, channel[None, :]
        tile = finished(
            tile, residual_ptr, offsets, mask, slopes=slopes, channel=channel, y_ptr=y_ptr, EPILOGUE=EPILOGUE
        )
        tl.store(y_ptr + offsets, tile, mask=mask)


@triton.jit
def store_phases(
    acc,  # (BLOCK_M, BLOCK_N)
    y_ptr, first_channel, strides, tile, n, cells, origin, out_size, tile_n,
    CHANNELS: tl.constexpr, PHASES: tl.constexpr, STRIDE: tl.constexpr, FACTS: tl.constexpr,
    CONFIG: tl.constexpr, WIDE: tl.constexpr,
    by,  # what the voxels are divided by: dividers of the cells, fine_dividers with ROWS
    residual_ptr, slopes,
):  # fmt: skip
    """Writes the outputs of a tile, of CHANNELS from ``first_channel`` on, rounded once."""
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = acc.shape[1]  # or a part of CONFIG.BLOCK_N
    EPILOGUE: tl.constexpr = CONFIG.EPILOGUE
    SPAN: tl.constexpr = span(PHASES, CONFIG.ROWS)
    y_ptr += first_channel * strides[1]
    offsets, mask, channel = places(
        strides, tile, n, cells=cells, origin=origin, out_size=out_size, tile_n=tile_n, CHANNELS=CHANNELS,
        PHASES=PHASES, STRIDE=STRIDE, ROWS=CONFIG.ROWS, FACTS=FACTS, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        BLOCK_W=CONFIG.BLOCK_W, WIDE=WIDE, by=by,
    )  # fmt: skip
    y_tile = acc
    if EPILOGUE is None:
        y_tile = acc.to(y_ptr.dtype.element_ty)
    if SPAN > 1:
        y_tile = y_tile.reshape(BLOCK_M, BLOCK_N // SPAN, SPAN).permute(0, 2, 1)
        y_tile = y_tile.reshape(BLOCK_M * SPAN, BLOCK_N // SPAN)
    if EPILOGUE is not None:
        if residual_ptr is not None:
            residual_ptr += first_channel * strides[1]
        channel = (first_channel + channel)[None, :]
        y_tile = finished(
            y_tile, residual_ptr, offsets, mask, slopes=slopes, channel=channel, y_ptr=y_ptr, EPILOGUE=EPILOGUE
        )
    tl.store(y_ptr + offsets, y_tile, mask=mask)
