"""Phases that have programs of their own along the first APART axes (d first), and are columns along the others.

The outputs (cell j, phase) of an axis read ``x[j - delta] * weight[stride*delta + phase]``. A program of one phase has
the deltas of this phase's taps alone; where the phases are columns, all in the window of the cell.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl


@triton.constexpr_function
def apart_of(STRIDE, APART):
    """(d, h, w): phases that have programs of their own; 1 along an axis whose phases are columns."""
    return tuple(int(s) if axis < APART else 1 for axis, s in enumerate(STRIDE))


@triton.constexpr_function
def depth_of(WINDOW, CHANNELS, APART):
    """A divisor of the depth of each phase apart; the depth itself where none is."""
    return math.prod(WINDOW[APART:]) * CHANNELS


@triton.constexpr_function
def one_depth(KERNEL, STRIDE, APART):
    """Whether all phases apart have as many taps, so that the compiler knows the depth."""
    return all(int(k) % int(s) == 0 for k, s in zip(KERNEL[:APART], STRIDE[:APART], strict=True))


@triton.constexpr_function
def places_of(WINDOW, CHANNELS, BLOCK_K, APART):
    """Neighbours along w whose channels are a step of the depth: 1 in a part of one's channels, 0 where a step may be
    anything else.
    """
    if CHANNELS % BLOCK_K == 0:
        return 1
    places = BLOCK_K // CHANNELS
    return places if APART < 3 and BLOCK_K % CHANNELS == 0 and WINDOW[2] % places == 0 else 0


@triton.constexpr_function
def columns_of(STRIDE, APART):
    """(d, h, w): phases that are columns; 1 along an axis whose phases have programs of their own."""
    return tuple(1 if axis < APART else int(s) for axis, s in enumerate(STRIDE))


@triton.jit
def axis_cells(crop, out, phi, STRIDE: tl.constexpr, APART: tl.constexpr):
    """How many cells there are along an axis, and the first one's place among the input voxels.

    APART: those that hold an output of phase ``phi``. Each phase has as many, and the last of some is outside y.
    """
    if APART:
        cells, first = (out + STRIDE - 1) // STRIDE, (crop - phi + STRIDE - 1) // STRIDE
    else:
        cells, first = (crop + out - 1) // STRIDE - crop // STRIDE + 1, crop // STRIDE
    return cells, first


@triton.jit
def deltas(phi, KERNEL: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, APART: tl.constexpr):
    """How many voxels along an axis the outputs read: WINDOW, of a phase apart its taps, which may be one fewer."""
    if APART and KERNEL % STRIDE != 0:  # noqa: SIM108
        count = (KERNEL - phi + STRIDE - 1) // STRIDE
    else:
        count = WINDOW
    return count


@triton.jit
def without_inner(place, count, KERNEL: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, APART: tl.constexpr):
    """``place // count`` of the :func:`deltas` of an axis: divisions by constants, whatever the phase."""
    outer = place // WINDOW
    if APART and KERNEL % STRIDE != 0 and WINDOW > 1:
        outer = tl.where(count < WINDOW, place // (WINDOW - 1), outer)
    return outer
