"""Forward for very few output channels: x times all taps once, then neighbouring products added in registers.

One program owns a box of BLOCK_D x BLOCK_H x BLOCK_W input voxels. It multiplies them with every tap, columns (phase,
channel, window delta), and adds to each voxel's products those of its neighbours before it, which the same program
holds: output (cell j, phase) of an axis is the sum over delta of ``x[j - delta] * weight[stride*delta + phase]``. So x
is read once and not once per delta; the first voxels of a box along an axis with two deltas are its halo, computed by
the box before them too.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_epilogue
from tritonconv.kernels import triton_phases as phases
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.triton_channels_last import copying
from tritonconv.kernels.triton_device import aligned, inside, offset, product, widened
from tritonconv.kernels.triton_epilogue import finished, with_bias
from tritonconv.kernels.triton_launch import (
    RUN_TIME,
    Y_STRIDES,
    accounting,
    empty,
    geometry,
    precision,
    refusal,
    scalar_strides,
    wide,
)
from tritonconv.kernels.triton_launch import launch as run
from tritonconv.kernels.triton_phases import cells_of, window_of
from tritonconv.kernels.triton_weights import oriented, packed, preferred
from tritonconv.kernels.variant import SPREADS_WEIGHT, Variant
from tritonconv.kernels.work import Work, tap_gemm
from tritonconv.problem import Problem, Triple

MOST_COLUMNS = 256
LEAST_BOX = 4  # voxels along an axis with a halo


@triton.constexpr_function
def next_power(value):
    """The power of two at or above."""
    return 1 << (int(value) - 1).bit_length()


@triton.jit
def shifted_rows(tile, by):
    """The rows of a tile moved ``by`` rows on; the first ones keep what they had."""
    source = tl.maximum(tl.arange(0, tile.shape[0]) - by, 0)
    return tl.gather(tile, tl.broadcast_to(source[:, None], tile.shape), axis=0)


@triton.jit
def add_neighbours(tile, by):
    """A tile of half the columns: of each pair the first, plus the second of the row ``by`` rows before."""
    first, second = tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))
    return first + shifted_rows(second, by)


@triton.jit
def summed_columns(column, C_OUT: tl.constexpr, STRIDE: tl.constexpr):
    """phase_d, phase_h, phase_w and channel of columns (phase_d, phase_h, channel, phase_w)."""
    CHANNELS: tl.constexpr = next_power(C_OUT)
    phase_w, channel = column % STRIDE[2], column // STRIDE[2] % CHANNELS
    phase_h = column // (STRIDE[2] * CHANNELS) % STRIDE[1]
    return column // (STRIDE[2] * CHANNELS * STRIDE[1]), phase_h, phase_w, channel


@triton.jit
def phases_as_rows(sums, PHASES: tl.constexpr):
    """A tile whose rows are (row, phase along w): of its columns the phases are the inner ones.

    The lanes of a warp then write a row of y.
    """
    M: tl.constexpr = sums.shape[0]
    N: tl.constexpr = sums.shape[1] // PHASES
    return tl.reshape(tl.permute(tl.reshape(sums, (M, N, PHASES)), (0, 2, 1)), (M * PHASES, N))


@triton.jit(launch_metadata=accounting, do_not_specialize=(*RUN_TIME, *Y_STRIDES))
def forward_overlap_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    w_ptr,  # (c_in, c_out, taps)
    bias_ptr,  # (c_out,) or None
    y_ptr,  # (n, c_out, od, oh, ow)
    residual_ptr, slopes,  # see triton_epilogue
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    strides, y_n, y_c, y_d, y_h, y_w,  # of x, of the weight; y's
    LAYER: tl.constexpr, CONFIG: tl.constexpr,
    UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns a box of BLOCK_D x BLOCK_H x BLOCK_W input voxels with its halo, the rows, and all columns (phase,
    channel, delta); the input channels are the depth.

    It stores the outputs of the cells whose deltas are all in the box, OWN_D x OWN_H x OWN_W of them.
    """
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    BLOCK_D: tl.constexpr = CONFIG.BLOCK_D
    BLOCK_H: tl.constexpr = CONFIG.BLOCK_H
    BLOCK_W: tl.constexpr = CONFIG.BLOCK_W
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    EPILOGUE: tl.constexpr = CONFIG.EPILOGUE
    x_strides, w_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    BLOCK_M: tl.constexpr = BLOCK_D * BLOCK_H * BLOCK_W
    WINDOW: tl.constexpr = window_of(KERNEL, STRIDE)
    DELTAS: tl.constexpr = product(WINDOW)
    CHANNELS: tl.constexpr = next_power(C_OUT)
    SUMS: tl.constexpr = product(STRIDE) * CHANNELS
    BLOCK_N: tl.constexpr = 16 if SUMS * DELTAS < 16 else SUMS * DELTAS
    OWN_D: tl.constexpr = BLOCK_D - (WINDOW[0] - 1)
    OWN_H: tl.constexpr = BLOCK_H - (WINDOW[1] - 1)
    OWN_W: tl.constexpr = BLOCK_W - (WINDOW[2] - 1)
    cells, first = cells_of(crop, out_size, STRIDE)
    boxes_h, boxes_w, boxes_d = tl.cdiv(cells[1], OWN_H), tl.cdiv(cells[2], OWN_W), tl.cdiv(cells[0], OWN_D)
    pid = tl.program_id(0)
    row = tl.arange(0, BLOCK_M)
    at_d, at_h, at_w = row // (BLOCK_H * BLOCK_W), row // BLOCK_W % BLOCK_H, row % BLOCK_W
    # A voxel counts as the cell whose delta 0 it is. The box begins with its halo.
    corner_w = pid % boxes_w * OWN_W - (WINDOW[2] - 1)
    cell_w = corner_w + at_w
    corner_h = pid // boxes_w % boxes_h * OWN_H - (WINDOW[1] - 1)
    cell_h = corner_h + at_h
    corner_d = pid // (boxes_w * boxes_h) % boxes_d * OWN_D - (WINDOW[0] - 1)
    cell_d = corner_d + at_d
    image = widened(pid // (boxes_w * boxes_h * boxes_d), WIDE)
    cell_d, cell_h, cell_w = widened(cell_d, WIDE), widened(cell_h, WIDE), widened(cell_w, WIDE)
    d, h, w = cell_d + first[0], cell_h + first[1], cell_w + first[2]
    mask_m = inside(d, size[0]) & inside(h, size[1]) & inside(w, size[2])
    x_rows = x_ptr + offset(x_strides, image, 0, d, h, w)  # (BLOCK_M,)

    column = tl.arange(0, BLOCK_N)
    delta, summed = column % DELTAS, column // DELTAS
    phase_d, phase_h, phase_w, channel = summed_columns(summed, C_OUT, STRIDE)
    tap_w = delta % WINDOW[2] * STRIDE[2] + phase_w
    tap_h = delta // WINDOW[2] % WINDOW[1] * STRIDE[1] + phase_h
    tap_d = delta // (WINDOW[2] * WINDOW[1]) * STRIDE[0] + phase_d
    tapped = (tap_d < KERNEL[0]) & (tap_h < KERNEL[1]) & (tap_w < KERNEL[2]) & (channel < C_OUT)
    tap = (tap_d * KERNEL[1] + tap_h) * KERNEL[2] + tap_w
    w_columns = w_ptr + widened(tap, WIDE) * w_strides[2] + channel * w_strides[1]  # (BLOCK_N,)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, C_IN, BLOCK_K):
        offs_k = widened(k + tl.arange(0, BLOCK_K), WIDE)
        x_mask, w_mask = mask_m[:, None], tapped[None, :]
        if C_IN % BLOCK_K != 0:
            x_mask = x_mask & (offs_k < C_IN)[None, :]
            w_mask = w_mask & (offs_k < C_IN)[:, None]
        x_tile = tl.load(x_rows[:, None] + (offs_k * x_strides[1])[None, :], mask=x_mask, other=0.0)
        w_tile = tl.load(w_columns[None, :] + (offs_k * w_strides[0])[:, None], mask=w_mask, other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)  # (BLOCK_M, BLOCK_K) x (BLOCK_K, BLOCK_N)

    # Each axis with two deltas halves the columns; (phase, channel) are left, and columns that are nothing.
    if WINDOW[2] == 2:
        acc = add_neighbours(acc, 1)
    if WINDOW[1] == 2:
        acc = add_neighbours(acc, BLOCK_W)
    if WINDOW[0] == 2:
        acc = add_neighbours(acc, BLOCK_H * BLOCK_W)

    acc = phases_as_rows(acc, STRIDE[2])  # rows (cell, phase_w), columns (phase_d, phase_h, channel)
    ROW_W: tl.constexpr = BLOCK_W * STRIDE[2]
    row = tl.arange(0, BLOCK_M * STRIDE[2])
    at_d, at_h, at_w = row // (BLOCK_H * ROW_W), row // ROW_W % BLOCK_H, row % ROW_W
    own = (at_d >= WINDOW[0] - 1) & (at_h >= WINDOW[1] - 1) & (at_w >= (WINDOW[2] - 1) * STRIDE[2])
    first_w, first_h, first_d = corner_w + first[2], corner_h + first[1], corner_d + first[0]
    out_w = widened(first_w * STRIDE[2] - crop[2] + at_w, WIDE)
    out_h = widened((first_h + at_h) * STRIDE[1] - crop[1], WIDE)
    out_d = widened((first_d + at_d) * STRIDE[0] - crop[0], WIDE)
    column = tl.arange(0, acc.shape[1])
    channel = column % CHANNELS
    out_h = out_h[:, None] + (column // CHANNELS % STRIDE[1])[None, :]
    out_d = out_d[:, None] + (column // (CHANNELS * STRIDE[1]))[None, :]
    mask = own[:, None] & ((channel < C_OUT) & (column < SUMS // STRIDE[2]))[None, :]
    mask = mask & inside(out_w, out_size[2])[:, None]
    mask = mask & inside(out_h, out_size[1]) & inside(out_d, out_size[0])
    if bias_ptr is not None:
        acc = with_bias(acc, tl.load(bias_ptr + channel, mask=channel < C_OUT, other=0.0), y_ptr, EPILOGUE)
    channel = widened(channel, WIDE)
    y_strides = (y_n, y_c, y_d, y_h, y_w)
    offsets = offset(y_strides, image, channel[None, :], out_d, out_h, out_w[:, None])
    if EPILOGUE is None:
        tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        channel = tl.where(channel < C_OUT, channel, 0)[None, :]
        acc = finished(acc, residual_ptr, offsets, mask, slopes=slopes, channel=channel, y_ptr=y_ptr, EPILOGUE=EPILOGUE)
        tl.store(y_ptr + offsets, acc, mask=mask)


def launches(problem, config, x, weight, bias, out=None, **epilogue):
    return forward(forward_overlap_kernel, boxes(problem, config), problem, config, x, weight, bias, out, **epilogue)


def forward(
    kernel, grid: int, problem: Problem, config, x, weight, bias, out,
    epilogue=None, residual=None, slopes=None, **more,
):  # fmt: skip
    """The launch of a kernel with this one's arguments and ``more`` of its own -> y."""
    y = empty(problem, problem.y_shape, x) if out is None else out
    if y.numel() == 0:
        return y
    if "residual_ptr" in kernel.arg_names:
        more |= triton_epilogue.arguments(problem, y, epilogue, residual, slopes)
    config = dict(config)
    weight = packed(weight, config.pop("WEIGHT"))
    run(
        kernel,
        grid,
        config,
        (y,),
        x_ptr=x,
        w_ptr=weight,
        bias_ptr=bias,
        y_ptr=y,
        **geometry(problem, kernel),
        **more,
        strides=(x.stride(), oriented(weight, "forward")),
        **scalar_strides(y),
        WIDE=wide(x, weight, y, of=problem),
        PRECISION=precision(problem.dtype),
    )
    return y


def boxes(problem: Problem, config) -> int:
    """How many programs there are."""
    own = (config[f"BLOCK_{axis}"] - (reads - 1) for axis, reads in zip("DHW", window(problem), strict=True))
    return problem.n * math.prod(-(-c // o) for c, o in zip(phases.cells(problem), own, strict=True))


def window(problem: Problem) -> Triple:
    return window_of(problem.kernel, problem.stride)


def columns(problem: Problem) -> int:
    """BLOCK_N: every (phase, channel, delta)."""
    return max(16, math.prod(problem.stride) * next_power(problem.c_out) * math.prod(window(problem)))


def supports(problem: Problem, device: torch.device) -> str | None:
    why_not = refusal(problem, device) or phases.dilation_refusal(problem)
    if why_not is not None:
        return why_not
    if problem.groups > 1:
        return f"{problem.groups} groups: the taps of one group fill no tile"
    if any(s not in (1, 2) or w > 2 for s, w in zip(problem.stride, window(problem), strict=True)):
        return f"kernel {problem.kernel}, stride {problem.stride}: strides 1 and 2 and kernels to twice them are served"
    if math.prod(window(problem)) == 1:
        return f"kernel {problem.kernel}, stride {problem.stride}: no outputs overlap"
    if columns(problem) > MOST_COLUMNS:
        return f"{columns(problem)} products per voxel: at most {MOST_COLUMNS} fit a tile"
    return None


@lru_cache(4096)
def box(cells: Triple, reads: Triple, block_m: int, least_w: int) -> Triple:
    """(BLOCK_D, BLOCK_H, BLOCK_W) whose boxes cover the cells with the fewest voxels, halos included."""
    powers = [2**each for each in range(block_m.bit_length())]
    shapes = [(d, h, block_m // (d * h)) for d, h in itertools.product(powers, powers) if d * h <= block_m]
    shapes = [s for s in shapes if all(b >= LEAST_BOX or r == 1 for b, r in zip(s, reads, strict=True))]
    wide_ones = [s for s in shapes if s[2] >= least_w]

    def voxels(shape: Triple) -> tuple[int, int]:
        counts = (-(-c // (b - (r - 1))) for c, b, r in zip(cells, shape, reads, strict=True))
        return math.prod(counts) * block_m, -shape[2]

    return min(wide_ones or shapes, key=voxels)


def default(problem: Problem, device: torch.device):
    return _config(problem, 128 if problem.dtype.itemsize == 2 else 64)


def _config(problem: Problem, block_m: int) -> dict[str, int]:
    half, last = problem.dtype.itemsize == 2, problem.layout == "ndhwc"
    block_n = columns(problem)
    d, h, w = box(phases.cells(problem), window(problem), block_m, 4 if last else 8)
    deep = 64 if half and last and block_n <= 128 else 32
    return {
        "BLOCK_D": d,
        "BLOCK_H": h,
        "BLOCK_W": w,
        "BLOCK_K": tiles.power_of_two(problem.c_in, 16, deep),
        "num_warps": 8 if block_m * block_n >= 128 * 128 else 4,
        "num_stages": 3,
        "WEIGHT": preferred(problem),
    }


def space(problem: Problem, device: torch.device):
    base = default(problem, device)
    configs = [
        base,
        *(_config(problem, block_m) for block_m in (64, 128, 256) if block_m * columns(problem) <= 256 * 128),
    ]
    configs += [{**base, "num_stages": stages} for stages in (1, 2, 4)]
    configs += [{**base, "num_warps": warps} for warps in (4, 8)]
    configs += [{**base, "WEIGHT": order} for order in (0, 1, 2)]
    configs.append({**base, "BLOCK_K": max(16, base["BLOCK_K"] // 2)})
    return tuple(config for index, config in enumerate(configs) if config not in configs[:index])


def work(problem: Problem, config) -> Work:
    block_m = config["BLOCK_D"] * config["BLOCK_H"] * config["BLOCK_W"]
    count, products = boxes(problem, config), columns(problem)
    steps = count * triton.cdiv(problem.c_in, config["BLOCK_K"])
    counts = tap_gemm(problem, "forward", {**config, "BLOCK_N": products}, count, steps, block_m=block_m)
    added = count * block_m * (products - products // math.prod(window(problem))) * problem.dtype.itemsize
    return replace(counts, cache_bytes=max(counts.memory_bytes, counts.cache_bytes - added))  # sums alone are stored


VARIANT = copying(Variant(
    "forward_overlap", "forward",
    "very few channels out: x times all taps once, overlapping products added in registers", "triton",
    launches=launches, supports=supports, space=space, default=default, spreads_nonfinite=SPREADS_WEIGHT, work=work,
    epilogue=triton_epilogue.computes,
), ("x",), "c_in")  # fmt: skip
