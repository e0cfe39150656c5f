"""Forward with several phases in one tile and their taps packed into its depth: for few channels on either side.

One program owns BLOCK_M cells x BLOCK_N columns (phase, channel) of one group. Output (cell j, phase) of an axis reads
``x[j - delta] * weight[stride*delta + phase]`` for delta in [0, ceil(kernel/stride)), so the depth of the GEMM is
(window delta, c_in), flattened: three input channels fill it as well as 64, and one output channel gives a column per
phase. Where stride does not divide kernel some (delta, phase) have no tap and multiply by zero: at k3 s2, 27 of 64
products count; at k4 s2, all of them.

APART, a key of the config, is how many axes, d first, have programs of their own for each phase, as all have in
``forward_phases``: 0 packs all phases into the columns, 1 those along h and w, 2 those along w alone, 3 none. Along
such an axis a program has the deltas of its phase alone: no product is wasted, and x is read once for each tap.

| APART | columns, stride 2 | voxels of x read, k3 s2 | products for one that counts, k3 s2 |
| ---: | ---: | ---: | ---: |
| 0 | 8 c_out | 8 | 64/27 = 2.37 |
| 1 | 4 c_out | 12 | 48/27 = 1.78 |
| 2 | 2 c_out | 18 | 36/27 = 1.33 |
| 3 | c_out | 27 | 1 |
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_phases as phases
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.triton_apart import (
    apart_of,
    axis_cells,
    columns_of,
    deltas,
    depth_of,
    one_depth,
    places_of,
    without_inner,
)
from tritonconv.kernels.triton_channels_last import copying, last
from tritonconv.kernels.triton_device import (
    aligned,
    ceil_div,
    inside,
    load_voxels,
    multiple,
    offset,
    product,
    widened,
)
from tritonconv.kernels.triton_epilogue import computes, with_bias
from tritonconv.kernels.triton_gemm import fits_a_word
from tritonconv.kernels.triton_launch import accounting, refusal
from tritonconv.kernels.triton_phases import column_count, decoded
from tritonconv.kernels.triton_shuffle import cell_voxels, group_columns, own_tile, row_dividers, zero_sums
from tritonconv.kernels.triton_store import store_phases
from tritonconv.kernels.triton_taps import voxel_words
from tritonconv.kernels.variant import APART, SPREADS_VOXELS, SPREADS_WEIGHT, Variant
from tritonconv.kernels.work import Work, parts
from tritonconv.problem import Problem

MOST_WASTE = 8  # k1 s2; beyond it a kernel that knows which phases have no tap is the natural one


@triton.constexpr_function
def extent(kernel, stride, start):
    """How many input voxels the outputs of a cell read along an axis whose cells begin ``start`` outputs late."""
    return (kernel - 1 - start) // stride + (2 if start > 0 else 1)


@triton.constexpr_function
def started_window(KERNEL, STRIDE, CELL_START):
    """(d, h, w): input voxels that the outputs of one cell read; along w cells begin CELL_START outputs late."""
    return extent(KERNEL[0], STRIDE[0], 0), extent(KERNEL[1], STRIDE[1], 0), extent(KERNEL[2], STRIDE[2], CELL_START)


@triton.jit(launch_metadata=accounting, do_not_specialize=phases.RUN_TIME)
def forward_phases_packed_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    w_ptr,  # (c_in, c_out, taps)
    bias_ptr,  # (c_out,) or None
    y_ptr,  # (n, c_out, od, oh, ow)
    residual_ptr, slopes,  # see triton_epilogue
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    by_d, by_h, by_w, shift_d, shift_h, shift_w,
    strides,  # of x, of the weight, of y
    LAYER: tl.constexpr, CONFIG: tl.constexpr, FACTS: tl.constexpr, CELL_START: tl.constexpr,
    UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows, cells of y, x BLOCK_N columns (phase, output channel) of the phases that are packed;
    along the APART first axes it has one phase.

    Depth: (voxel of the window, input channel).
    """
    EPILOGUE: tl.constexpr = CONFIG.EPILOGUE  # Triton 3.6.0 hands no tuple with a name on as an attribute
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    X_STEP: tl.constexpr = CONFIG.X_STEP
    APART: tl.constexpr = CONFIG.APART
    x_strides, w_strides, y_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    WINDOW: tl.constexpr = started_window(KERNEL, STRIDE, CELL_START)
    ALONE: tl.constexpr = apart_of(STRIDE, APART)
    CELL: tl.constexpr = columns_of(STRIDE, APART)
    DEPTH: tl.constexpr = depth_of(WINDOW, C_IN, APART)
    CHANNELS_LAST: tl.constexpr = UNITS[0][1] == 0
    PLACES: tl.constexpr = places_of(WINDOW, C_IN, BLOCK_K, APART)
    TILES_N: tl.constexpr = ceil_div(column_count(CELL, C_OUT, CONFIG.ROWS), CONFIG.BLOCK_N)
    crop = (crop[0], crop[1], crop[2] - CELL_START)
    # The phases of a tile side by side: they read the same voxels. The first have the most taps.
    pid = tl.program_id(0)
    phi_d = pid // (ALONE[1] * ALONE[2]) % ALONE[0]
    phi_h = pid // ALONE[2] % ALONE[1]
    phi_w = pid % ALONE[2]
    cells_d, first_d = axis_cells(crop[0], out_size[0], phi_d, STRIDE[0], APART > 0)
    cells_h, first_h = axis_cells(crop[1], out_size[1], phi_h, STRIDE[1], APART > 1)
    cells_w, first_w = axis_cells(crop[2], out_size[2], phi_w, STRIDE[2], APART > 2)
    cells, first = (cells_d, cells_h, cells_w), (first_d, first_h, first_w)
    count_d = deltas(phi_d, KERNEL[0], STRIDE[0], WINDOW[0], APART > 0)
    count_h = deltas(phi_h, KERNEL[1], STRIDE[1], WINDOW[1], APART > 1)
    count_w = deltas(phi_w, KERNEL[2], STRIDE[2], WINDOW[2], APART > 2)
    depth = count_d * count_h * count_w * C_IN
    tile_m, tile_n = own_tile(
        n, cells, TILES_N=TILES_N, LAYER=LAYER, CONFIG=CONFIG, WIDE=WIDE, pid=pid, SHARED=product(ALONE)
    )
    group, tile_n, offs_n = group_columns(tile_n, TILES_N, CONFIG, WIDE)
    offs_k = widened(tl.arange(0, BLOCK_K), WIDE)
    by = row_dividers(by_d, by_h, by_w, shift_d, shift_h, shift_w, CONFIG=CONFIG, WIDE=WIDE)
    image, d, h, w = cell_voxels(tile_m, n, cells, first, CONFIG=CONFIG, WIDE=WIDE, by=by)
    mask_m = image < n
    rows = offset(x_strides, image, 0, d, h, w)
    width = multiple(size[2], X_STEP)
    # Neighbours along w have one mask only where the compiler sees comparisons with the width, and wide loads only
    # where no delta moves them.
    WORDS: tl.constexpr = fits_a_word(WINDOW) and (WINDOW[2] > 1 or X_STEP == 1)
    LATE: tl.constexpr = 1 if CELL_START > 0 else 0
    words = mask_m
    if WORDS:
        words = voxel_words(
            d - (WINDOW[0] - 1), h - (WINDOW[1] - 1), w - (WINDOW[2] - 1 - LATE), mask_m, size=size, KERNEL=WINDOW,
            DILATION=(1, 1, 1),
        )  # fmt: skip

    phase_d, phase_h, phase_w, channel, mask_n = decoded(offs_n, C_OUT, CELL, CONFIG.ROWS)
    phase_d, phase_h, phase_w = phase_d + phi_d, phase_h + phi_h, phase_w + (phi_w + CELL_START)
    phase_tap = (phase_d * KERNEL[1] + phase_h) * KERNEL[2] + phase_w
    columns = channel * w_strides[1] + phase_tap * w_strides[2]
    x_ptr, w_ptr = x_ptr + group * C_IN * x_strides[1], w_ptr + group * C_IN * w_strides[0]
    lane = offs_k // C_IN if PLACES > 1 else offs_k * 0  # the place of a lane behind the step's first
    x_lanes, w_lanes = (offs_k - lane * C_IN) * x_strides[1], (offs_k - lane * C_IN) * w_strides[0]
    if PLACES > 1:
        x_lanes, w_lanes = x_lanes - lane * x_strides[4], w_lanes + lane * (STRIDE[2] * w_strides[2])
    x_rows = (x_ptr + rows)[:, None]  # (BLOCK_M, 1)
    x_offsets = rows[:, None] + x_lanes[None, :]  # (BLOCK_M, BLOCK_K)
    w_offsets = w_lanes[:, None] + columns[None, :]  # (BLOCK_K, BLOCK_N)

    acc = zero_sums(CONFIG)
    steps = tl.cdiv(depth, BLOCK_K)
    MANY: tl.constexpr = product(WINDOW) > 1 and product(WINDOW) * C_IN > 2 * BLOCK_K
    if MANY and CHANNELS_LAST and one_depth(KERNEL, STRIDE, APART):
        steps = tl.maximum(steps, -n)  # as many anyway: of a constant all steps are unrolled, in many registers
    for step in range(steps):
        k = step * BLOCK_K + offs_k
        if PLACES == 1:
            c, place = step % (C_IN // BLOCK_K) * BLOCK_K, step // (C_IN // BLOCK_K)
        elif PLACES > 1:
            c, place = step * 0, step * PLACES
        else:
            c, place = k % C_IN, k // C_IN
        row = without_inner(place, count_w, KERNEL[2], STRIDE[2], WINDOW[2], APART > 2)
        delta_w = place - row * count_w
        delta_d = without_inner(row, count_h, KERNEL[1], STRIDE[1], WINDOW[1], APART > 1)
        delta_h = row - delta_d * count_h
        delta_d, delta_h, delta_w = widened(delta_d, WIDE), widened(delta_h, WIDE), widened(delta_w - LATE, WIDE)
        tap = ((delta_d * STRIDE[0] * KERNEL[1] + delta_h * STRIDE[1]) * KERNEL[2] + delta_w * STRIDE[2]) * w_strides[2]
        back = delta_d * x_strides[2] + delta_h * x_strides[3] + delta_w * x_strides[4]
        x_moved = widened(c, WIDE) * x_strides[1] - back
        w_moved = widened(c, WIDE) * w_strides[0] + tap
        x_d, x_h, x_w, w_d, w_h, w_w = delta_d, delta_h, delta_w, delta_d, delta_h, delta_w
        if PLACES > 0:  # the loop moves offsets that are made before it by one number
            w_ptrs = w_ptr + w_moved + w_offsets
            if CHANNELS_LAST:  # noqa: SIM108
                x_ptrs = x_ptr + x_moved + x_offsets
            else:  # elements that are loaded one by one: so many offsets would not fit the registers
                x_ptrs = x_rows + (x_lanes + x_moved)[None, :]
            if PLACES > 1:
                x_w, w_w = (delta_w + lane)[None, :], (delta_w + lane)[:, None]
        else:
            x_ptrs = x_rows + x_moved[None, :]
            w_ptrs = w_ptr + (w_moved[:, None] + columns[None, :])
            x_d, x_h, x_w = delta_d[None, :], delta_h[None, :], delta_w[None, :]
            w_d, w_h, w_w = delta_d[:, None], delta_h[:, None], delta_w[:, None]
        if WORDS:
            wanted = (1 << (WINDOW[0] - 1 - x_d)) | (1 << (WINDOW[0] + WINDOW[1] - 1 - x_h))
            wanted = (wanted | (1 << (WINDOW[0] + WINDOW[1] + WINDOW[2] - 1 - LATE - x_w))).to(tl.int32)
            if DEPTH % BLOCK_K != 0:
                wanted = tl.where((k < depth)[None, :], wanted, -1)  # bits that no voxel has
            x_mask = (words[:, None] & wanted) == wanted
        else:
            x_mask = mask_m[:, None] & inside(d[:, None] - x_d, size[0])
            x_mask = x_mask & inside(h[:, None] - x_h, size[1]) & inside(w[:, None] - x_w, width)
            if DEPTH % BLOCK_K != 0:
                x_mask = x_mask & (k < depth)[None, :]
        w_mask = mask_n[None, :]
        if DEPTH % BLOCK_K != 0:
            w_mask = w_mask & (k < depth)[:, None]
        if KERNEL[0] % STRIDE[0] != 0 and APART < 1:
            w_mask = w_mask & (w_d * STRIDE[0] + phase_d[None, :] < KERNEL[0])
        if KERNEL[1] % STRIDE[1] != 0 and APART < 2:
            w_mask = w_mask & (w_h * STRIDE[1] + phase_h[None, :] < KERNEL[1])
        if (KERNEL[2] % STRIDE[2] != 0 and APART < 3) or CELL_START > 0:
            w_mask = w_mask & inside(w_w * STRIDE[2] + phase_w[None, :], KERNEL[2])
        x_tile = load_voxels(x_ptrs, x_mask, CONFIG.X_VOXELS_INNER)  # (BLOCK_M, BLOCK_K)
        w_tile = tl.load(w_ptrs, mask=w_mask, other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + group * C_OUT + channel, mask=mask_n, other=0.0)
        acc = with_bias(acc, bias, y_ptr, EPILOGUE)
    origin = (
        first[0] * STRIDE[0] + phi_d - crop[0],
        first[1] * STRIDE[1] + phi_h - crop[1],
        first[2] * STRIDE[2] + phi_w - crop[2],
    )
    store_phases(
        acc, y_ptr, first_channel=group * C_OUT, strides=y_strides, tile=tile_m, n=n, cells=cells, origin=origin,
        out_size=out_size, tile_n=tile_n, CHANNELS=C_OUT, PHASES=CELL, STRIDE=STRIDE, FACTS=FACTS, CONFIG=CONFIG,
        WIDE=WIDE, by=by, residual_ptr=residual_ptr, slopes=slopes,
    )  # fmt: skip


def launches(problem, config, x, weight, bias, out=None, **epilogue):
    start, config = cell_start(problem, config), {**config, APART: apart(config)}
    return phases.forward(
        forward_phases_packed_kernel, problem, config, x, weight, bias, out,
        start=start, CELL_START=start, apart=config[APART], **epilogue,
    )  # fmt: skip


def apart(config) -> int:
    return config.get(APART, 0)


def cell_start(problem: Problem, config) -> int:
    """CELL_START: cells along w begin with the first output, where rows are stored and the window does not grow.

    At k3 s2 p1 the pairs of outputs (0, 1), (2, 3), ... read two voxels each, just as (-1, 0), (1, 2), ... do, and
    only the former start on the boundaries that wide stores need.
    """
    axis = problem.axes[2]
    late = axis.crop % axis.stride
    grows = extent(axis.kernel, axis.stride, late) > extent(axis.kernel, axis.stride, 0)
    return 0 if not config["ROWS"] or apart(config) > 2 or grows else late


def window(problem: Problem) -> tuple[int, int, int]:
    return started_window(problem.kernel, problem.stride, 0)


def supports(problem: Problem, device: torch.device) -> str | None:
    why_not = refusal(problem, device) or phases.dilation_refusal(problem)
    waste = math.prod(window(problem)) * math.prod(problem.stride) / math.prod(problem.kernel)
    if why_not is None and waste > MOST_WASTE:
        why_not = (
            f"{waste:.0f} products for each one that counts, at kernel {problem.kernel} and stride {problem.stride}: "
            f"most phases have no tap (at most {MOST_WASTE} are accepted)"
        )
    return why_not


def default(problem: Problem, device: torch.device):
    return _default(problem, 0)


def _default(problem: Problem, alone: int):
    rows = phases.whole_rows(problem)
    depth = max(_depths(problem, alone))
    size, columns = phases.cells(problem, apart=alone), phases.columns(problem, rows, columns_of(problem.stride, alone))
    base = phases.tile(problem, size, columns, depth)
    if problem.c_in // problem.groups % base["BLOCK_K"]:  # an address and a mask of its own for each element
        base["BLOCK_K"] = min(base["BLOCK_K"], 32)
    return {**base, "GROUP_M": 1, "ROWS": rows, "WEIGHT": phases.weight_order(problem, rows)}


def space(problem: Problem, device: torch.device):
    return _space(problem, _default)


def _default_of_copies(problem: Problem, alone: int):
    """The tile of an NDHWC layer, in runs along w, so that whole rows of y are stored."""
    own = _default(problem, alone)
    return {**_default(last(problem), alone), **{key: own[key] for key in ("BLOCK_W", "ROWS", "WEIGHT")}}


def _space(problem: Problem, default_of):
    rows = (0, 1) if phases.whole_rows(problem) else ()
    more: dict[str, Any] = {"GROUP_M": (8,), "WEIGHT": (0, 1, 2), "num_stages": tiles.UNSTAGED, "ROWS": rows}
    configs = tiles.around(default_of(problem, 0), problem, width=phases.cells(problem)[2], **more)
    for alone in (1, 2):
        if problem.stride[alone - 1] > 1:  # along an axis of stride 1 there is one phase, wherever it is counted
            configs += tiles.around({**default_of(problem, alone), APART: alone}, problem, **more)
    return configs


@lru_cache(64)  # a count asks for each config
def _depths(problem: Problem, alone: int) -> tuple[int, ...]:
    """The depth of each phase that has programs of its own; of all together, where none has."""
    taps = [
        [parts(k - phase, s) for phase in range(s)] if axis < alone else [extent(k, s, 0)]
        for axis, (k, s) in enumerate(zip(problem.kernel, problem.stride, strict=True))
    ]
    return tuple(math.prod(each) * problem.c_in // problem.groups for each in itertools.product(*taps))


def work(problem: Problem, config) -> Work:
    alone = apart(config)
    size = phases.cells(problem, cell_start(problem, config), alone)
    return phases.work(problem, config, size, _depths(problem, alone), columns_of(problem.stride, alone))


VARIANT = copying(Variant(
    "forward_phases_packed", "forward", "phases share a tile, taps packed into the depth: few channels", "triton",
    launches=launches, supports=supports, space=space, default=default, options=(APART,),
    spreads_nonfinite=f"{SPREADS_WEIGHT}; {SPREADS_VOXELS}", work=work, epilogue=computes,
), ("x",), "c_in", (
    lambda problem, device: _default_of_copies(problem, 0), lambda problem, device: _space(problem, _default_of_copies),
))  # fmt: skip
