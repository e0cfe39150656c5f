"""Forward where kernel <= stride, for columns that fill no power of two: all of them in one tile, in parts that do.

A patch decoder has 160 columns (phase, output channel), or 384: :mod:`~tritonconv.kernels.forward_shuffle` multiplies
160 as 256, with padding, and reads x twice for 384 in two tiles. Here a program has all columns, one after the other in
parts that are powers of two (:mod:`~tritonconv.kernels.triton_parts`): each step loads a tile of x once for all of
them, and a tile has room for more rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from tritonconv.kernels import forward_shuffle
from tritonconv.kernels import triton_phases as phases
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.triton_device import aligned, constant, load_voxels, widened
from tritonconv.kernels.triton_epilogue import computes, with_bias
from tritonconv.kernels.triton_launch import accounting
from tritonconv.kernels.triton_parts import part_sizes, part_start
from tritonconv.kernels.triton_phases import cells_of, column_count
from tritonconv.kernels.triton_shuffle import cell_rows, phase_taps, row_dividers
from tritonconv.kernels.triton_store import store_phases
from tritonconv.kernels.triton_target import pipeline_buffers, shared_bytes
from tritonconv.kernels.variant import Config, Variant
from tritonconv.kernels.work import WARP, Work
from tritonconv.problem import Problem

if TYPE_CHECKING:
    from tritonconv.epilogue import Epilogue

MOST_PARTS = 3
# Of a warp, by the bytes of an element. Beside 160 sums of a thread the addresses have registers; of float32 more than
# 80 spill without matrix units.
SUMS = {2: 160 * WARP, 4: 80 * WARP}

# Sums of a thread beside which an epilogue finds registers, those of all parts: they are finished part by part. With 80
# residual + gelu spills at most 32 bytes (pangu_patch_recovery3d in NDHWC, bfloat16, sm_90), with 160 up to 1676.
MOST_SUMS = 80


@triton.jit
def zero_part(CONFIG: tl.constexpr, SIZE: tl.constexpr):
    """The sums of a part before the first step, (BLOCK_M, SIZE)."""
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    return tl.zeros((BLOCK_M, SIZE), tl.float32)


@triton.jit
def part_columns(
    PARTS: tl.constexpr, PART: tl.constexpr, LAYER: tl.constexpr, CONFIG: tl.constexpr, WIDE: tl.constexpr
):
    """tap, channel, mask and those with a tap, each like the columns of a part."""
    offs_n = part_start(PARTS, PART) + tl.arange(0, constant(PARTS[PART]))
    return phase_taps(widened(offs_n, WIDE), LAYER, CONFIG)


@triton.jit(launch_metadata=accounting, do_not_specialize=phases.RUN_TIME)
def forward_shuffle_parts_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    w_ptr,  # (c_in, c_out, taps)
    bias_ptr,  # (c_out,) or None
    y_ptr,  # (n, c_out, od, oh, ow)
    residual_ptr, slopes,  # see triton_epilogue
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    by_d, by_h, by_w, shift_d, shift_h, shift_w,
    strides,  # of x, of the weight, of y
    LAYER: tl.constexpr, CONFIG: tl.constexpr, FACTS: tl.constexpr,
    UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows (cells) with all columns (phase, output channel), in parts; the depth is the input
    channels.
    """
    EPILOGUE: tl.constexpr = CONFIG.EPILOGUE  # Triton 3.6.0 hands no tuple with a name on as an attribute
    C_IN: tl.constexpr = LAYER.C_IN
    STRIDE: tl.constexpr = LAYER.STRIDE
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    PARTS: tl.constexpr = part_sizes(column_count(STRIDE, LAYER.C_OUT, CONFIG.ROWS))
    x_strides, w_strides, y_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    cells, first = cells_of(crop, out_size, STRIDE)
    tile = tl.program_id(0)
    offs_k = widened(tl.arange(0, BLOCK_K), WIDE)
    by = row_dividers(by_d, by_h, by_w, shift_d, shift_h, shift_w, CONFIG=CONFIG, WIDE=WIDE)
    rows, mask_m = cell_rows(tile, n, cells, first, size=size, strides=x_strides, CONFIG=CONFIG, WIDE=WIDE, by=by)
    columns, masks, sums = (), (), ()  # a tensor for each part
    for part in tl.static_range(len(PARTS)):
        tap, channel, _, tapped = part_columns(PARTS, part, LAYER, CONFIG, WIDE)
        columns = columns + (channel * w_strides[1] + tap * w_strides[2],)  # type: ignore[assignment]  # noqa: RUF005
        masks = masks + (tapped,)  # type: ignore[assignment]  # noqa: RUF005
        sums = sums + (zero_part(CONFIG, PARTS[part]),)  # type: ignore[assignment]  # noqa: RUF005

    # As many as without the maximum: of a constant number the compiler unrolls all steps, in many registers.
    steps = tl.maximum(tl.cdiv(C_IN, BLOCK_K), -n)
    for step in range(steps):
        k = step * BLOCK_K + offs_k
        mask_k = (k < C_IN) | (C_IN % BLOCK_K == 0)
        x_ptrs = x_ptr + rows[:, None] + (k * x_strides[1])[None, :]  # (BLOCK_M, BLOCK_K)
        x_tile = load_voxels(x_ptrs, mask_m[:, None] & mask_k[None, :], CONFIG.X_VOXELS_INNER)
        following = ()
        for part in tl.static_range(len(PARTS)):
            w_ptrs = w_ptr + columns[part][None, :] + (k * w_strides[0])[:, None]  # (BLOCK_K, columns of the part)
            w_tile = tl.load(w_ptrs, mask=masks[part][None, :] & mask_k[:, None], other=0.0)
            acc = tl.dot(x_tile, w_tile, sums[part], input_precision=PRECISION)
            following = following + (acc,)  # type: ignore[assignment]  # noqa: RUF005
        sums = following

    origin = (first[0] * STRIDE[0] - crop[0], first[1] * STRIDE[1] - crop[1], first[2] * STRIDE[2] - crop[2])
    for part in tl.static_range(len(PARTS)):
        acc = sums[part]
        if bias_ptr is not None:
            _, channel, mask_n, _ = part_columns(PARTS, part, LAYER, CONFIG, WIDE)
            acc = with_bias(acc, tl.load(bias_ptr + channel, mask=mask_n, other=0.0), y_ptr, EPILOGUE)
        store_phases(
            acc, y_ptr, first_channel=0, strides=y_strides, tile=tile, n=n, cells=cells, origin=origin,
            out_size=out_size, tile_n=part_start(PARTS, part) // PARTS[part], CHANNELS=LAYER.C_OUT, PHASES=STRIDE,
            STRIDE=STRIDE, FACTS=FACTS, CONFIG=CONFIG, WIDE=WIDE, by=by, residual_ptr=residual_ptr, slopes=slopes,
        )  # fmt: skip


def launches(problem, config, x, weight, bias, out=None, **epilogue):
    programs = tiles.tiles_of(problem.n, phases.cells(problem), config)
    return phases.forward(
        forward_shuffle_parts_kernel, problem, config, x, weight, bias, out, grid=programs, **epilogue
    )


def _parts(problem: Problem, rows: int) -> tuple[int, ...]:
    """Of the columns, in the order that ROWS says."""
    return part_sizes(phases.columns(problem, rows))


def supports(problem: Problem, device: torch.device) -> str | None:
    why_not = forward_shuffle.supports(problem, device)
    if why_not is None and problem.groups > 1:
        why_not = f"{problem.groups} groups: one is served"
    if why_not is not None:
        return why_not
    rows = phases.whole_rows(problem)
    sizes, of_columns = _parts(problem, rows), f"{phases.columns(problem, rows)} columns (phase, output channel)"
    if len(sizes) < 2:
        return f"{of_columns} fill one part of {sum(sizes)}: there is nothing to divide"
    if len(sizes) > MOST_PARTS:
        return f"{of_columns} are {len(sizes)} parts {sizes}: at most {MOST_PARTS} are served"
    if next(_fitting(problem, rows), None) is None:
        return f"{of_columns}: no tile of all parts {sizes} fits the registers and the shared memory of the target"
    return None


def _fitting(problem: Problem, rows: int) -> Iterator[dict[str, int]]:
    """The configs that fit the target, the best guess first."""
    wide, half = sum(_parts(problem, rows)), problem.dtype.itemsize == 2
    depths = dict.fromkeys(tiles.power_of_two(problem.c_in, 16, depth) for depth in ((64, 32) if half else (32, 16)))
    for stages, block_m in itertools.product((3, 2, 4), (128, 64, 256) if half else (64, 128)):
        first, then = (8, 4) if block_m * wide >= phases.LARGEST_ACCUMULATOR // (1 if half else 2) else (4, 8)
        for warps, depth in itertools.product((first, then), depths):
            loaded = (block_m + wide) * depth * problem.dtype.itemsize
            if (
                block_m * wide > SUMS[problem.dtype.itemsize] * warps
                or loaded > tiles.MOST_LOADED * warps
                or 8 * warps > block_m
            ):
                continue
            if loaded * pipeline_buffers(stages) <= shared_bytes():
                yield {
                    "BLOCK_M": block_m,
                    "BLOCK_K": depth,
                    "BLOCK_W": tiles.block_w(problem, phases.cells(problem), block_m),
                    "num_warps": warps,
                    "num_stages": stages,
                    "ROWS": rows,
                    "WEIGHT": phases.weight_order(problem, rows),
                }


def default(problem: Problem, device: torch.device):
    return next(_fitting(problem, phases.whole_rows(problem)))


def space(problem: Problem, device: torch.device):
    base = default(problem, device)
    configs = [*_fitting(problem, base["ROWS"]), *({**base, "WEIGHT": order} for order in (0, 1, 2))]
    if base["ROWS"] and len(_parts(problem, 0)) <= MOST_PARTS:
        configs += _fitting(problem, 0)
    width = phases.cells(problem)[2]
    rows = [(each, tiles.row_in_channels_last(problem, width, each["BLOCK_M"])) for each in configs]
    configs += [{**each, "BLOCK_W": row} for each, row in rows if row and each["BLOCK_W"] == 0]
    return tuple(config for index, config in enumerate(configs) if config not in configs[:index])


def _whole(problem: Problem, config: Config) -> dict[str, int]:
    """With BLOCK_N: the columns of all parts, whose sums a thread has at once."""
    return {**config, "BLOCK_N": sum(_parts(problem, config["ROWS"]))}


def work(problem: Problem, config: Config) -> Work:
    return phases.work(problem, _whole(problem, config), phases.cells(problem), [problem.c_in])


def epilogue(problem: Problem, config: Config, epilogue: Epilogue) -> bool:
    return computes(problem, _whole(problem, config), epilogue, MOST_SUMS)


VARIANT = Variant(
    "forward_shuffle_parts", "forward",
    "kernel <= stride: all columns in one tile, in parts that are powers of two", "triton",
    launches=launches, supports=supports, space=space, default=default, work=work,
    epilogue=epilogue,
)  # fmt: skip
