"""Backward-data for very few output channels: patches of grad_y, loaded once, times the weight.

Where few output channels meet many input channels, grad_y is small beside grad_x, which is ``patches (voxels, places)
times weight (places, input channels)``: see :mod:`~tritonconv.kernels.triton_patches`.
:mod:`~tritonconv.kernels.backward_data_packed` computes the same product. Each thread of it works out voxels and taps
of many rows, for one tile alone; here a thread has one voxel, and a program takes tiles in turn.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_patches as patch
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_device import aligned, ceil_div, dividers, product, store_tile, voxel_tiles, widened
from tritonconv.kernels.triton_launch import (
    RUN_TIME,
    Y_STRIDES,
    accounting,
    empty,
    geometry,
    multiprocessors,
    precision,
    scalar_strides,
    wide,
)
from tritonconv.kernels.triton_launch import launch as run
from tritonconv.kernels.triton_patches import (
    dense_places,
    multiplied,
    part_count,
    part_places,
    patches,
    refused,
    tile_voxels,
    voxel_count,
)
from tritonconv.kernels.triton_weights import oriented, packed
from tritonconv.kernels.variant import SPREADS_WEIGHT, Config, Variant
from tritonconv.kernels.weight_orders import AS_GIVEN
from tritonconv.kernels.work import Work, parts, size_of
from tritonconv.problem import Problem

LEAST_DEPTH = 16  # of a product


@triton.jit(launch_metadata=accounting, do_not_specialize=(*RUN_TIME, *Y_STRIDES))
def backward_data_patches_kernel(
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    w_ptr,  # (c_in, c_out, taps)
    grad_x_ptr,  # (n, c_in, d, h, w), dense, or (n, d, h, w, c_in) where X_STEP is 0
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    strides, y_n, y_c, y_d, y_h, y_w,  # of the weight; grad_y's
    LAYER: tl.constexpr, PATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    X_STEP: tl.constexpr,  # divides d_in * h_in * w_in where these lie innermost; 0 where the channels do
    UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N input channels of every so many-th tile of BLOCK_M voxels of grad_x.

    Rows: the voxels; columns: input channels; depth: (tap, output channel), all of it.
    """
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    BLOCK_K: tl.constexpr = PATCH.PLACES
    FLIPPED: tl.constexpr = PATCH.FLIPPED
    PARTS: tl.constexpr = part_count(product(LAYER.KERNEL) * C_OUT, BLOCK_K)
    (w_strides,) = aligned(strides, UNITS)
    grad_y_strides = (y_n, y_c, y_d, y_h, y_w)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    TILES_N: tl.constexpr = ceil_div(C_IN, BLOCK_N)
    first, walkers = tl.program_id(0) // TILES_N, tl.num_programs(0) // TILES_N
    offs_n = widened(tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N), WIDE)
    mask_n = offs_n < C_IN
    w_tiles = ()
    for part in tl.static_range(PARTS):
        place, there = part_places(LAYER, BLOCK_K, part)
        w_rows = widened(place % C_OUT, WIDE) * w_strides[0] + widened(place // C_OUT, WIDE) * w_strides[2]
        w_mask = there[:, None] & mask_n[None, :]
        w_tile = tl.load(w_ptr + (w_rows[:, None] + (offs_n * w_strides[1])[None, :]), mask=w_mask, other=0.0)
        w_tiles = w_tiles + (w_tile,)  # type: ignore[assignment]  # noqa: RUF005
    count = voxel_count(size, X_STEP, WIDE)
    by = None
    if WIDE < 2:
        by = dividers(size, 0)
    # The next tile's patches are on their way while this one's sums are stored. Carried by the loop they are an operand
    # in shared memory; made in their own turn they would be one in registers.
    following = patches(
        grad_y_ptr, grad_y_strides, first, n=n, size=size, out_size=out_size, crop=crop, by=by, LAYER=LAYER,
        BLOCK=BLOCK_M, PLACES=BLOCK_K, WIDE=WIDE,
    )  # fmt: skip
    for tile in range(first, voxel_tiles(n, size, BLOCK_M, 0, WIDE), walkers):
        acc = multiplied(following, w_tiles[0], None, FLIPPED, PRECISION)  # type: ignore[misc]
        for part in tl.static_range(1, PARTS):
            following = patches(
                grad_y_ptr, grad_y_strides, tile, n=n, size=size, out_size=out_size, crop=crop, by=by, LAYER=LAYER,
                BLOCK=BLOCK_M, PLACES=BLOCK_K, WIDE=WIDE, PART=part,
            )  # fmt: skip
            acc = multiplied(following, w_tiles[part], acc, FLIPPED, PRECISION)
        if FLIPPED:
            acc = tl.trans(acc)
        following = patches(
            grad_y_ptr, grad_y_strides, tile + walkers, n=n, size=size, out_size=out_size, crop=crop, by=by,
            LAYER=LAYER, BLOCK=BLOCK_M, PLACES=BLOCK_K, WIDE=WIDE,
        )  # fmt: skip
        voxel = tile_voxels(tile, BLOCK_M, WIDE)
        rows, columns = dense_places(voxel, offs_n, count, C_IN, X_STEP, WIDE)
        store_tile(grad_x_ptr, rows, columns, acc, voxel < n * count, mask_n, VOXELS_INNER=X_STEP > 0)


def launches(problem, config, grad_y, weight):
    grad_x = empty(problem, problem.x_shape, grad_y, zero=grad_y.numel() == 0)
    if grad_x.zero:
        return grad_x
    config = dict(config)
    weight = packed(weight, config.pop("WEIGHT"))
    run(
        backward_data_patches_kernel,
        programs(problem, config, multiprocessors(grad_y.device) * config.pop("RESIDENT")),
        config,
        (grad_x,),
        grad_y_ptr=grad_y,
        w_ptr=weight,
        grad_x_ptr=grad_x,
        **geometry(problem, backward_data_patches_kernel),
        strides=(oriented(weight, "backward_data"),),
        **scalar_strides(grad_y),
        PATCH=patch.form(problem, LEAST_DEPTH),
        X_STEP=patch.voxel_step(problem),
        WIDE=wide(grad_y, weight, grad_x, of=problem),
        PRECISION=precision(problem.dtype),
    )
    return grad_x


def _columns(problem: Problem, config: Config) -> int:
    return parts(problem.c_in, config["BLOCK_N"])


def _tiles(problem: Problem, config: Config) -> int:
    """Of voxels."""
    return parts(problem.n * math.prod(problem.size), config["BLOCK_M"])


def programs(problem: Problem, config: Config, slots: int) -> int:
    """As many as there is room for, and no more than there are tiles; a multiple of the tiles side by side."""
    return _columns(problem, config) * max(1, min(_tiles(problem, config), slots // _columns(problem, config)))


def _config(problem: Problem, warps: int, block_n: int, resident: int | None = None) -> dict[str, int]:
    """A voxel for each thread, or for each two; without ``resident`` as many programs as fit."""
    config = {
        "BLOCK_M": patch.voxels_of(problem, warps),
        "BLOCK_N": block_n,
        "num_warps": warps,
        "num_stages": 1,  # all loads of the loop are narrow: they come through registers
        "WEIGHT": AS_GIVEN,  # read once by a program, taps side by side
    }
    sums = block_n // patch.sides(problem)
    fit = resident or patch.resident(problem, config, LEAST_DEPTH, sums, "backward_data")
    return {**config, "RESIDENT": fit}


def _too_large(problem: Problem, config: Config) -> str | None:
    return patch.too_large(problem, config, LEAST_DEPTH, "backward_data")


def supports(problem: Problem, device: torch.device) -> str | None:
    return refused(problem, device) or _too_large(problem, default(problem, device))


def default(problem: Problem, device: torch.device):
    columns = patch.columns(problem)
    while _too_large(problem, _config(problem, 4, columns)) and columns > 16:
        columns //= 2
    return _config(problem, 4, columns)


def space(problem: Problem, device: torch.device):
    base = default(problem, device)
    widths = [n for n in (base["BLOCK_N"], base["BLOCK_N"] // 2) if n >= 16]
    configs = [base, *(_config(problem, warps, n) for warps in (4, 8) for n in widths)]
    configs += [{**base, "RESIDENT": programs} for programs in range(1, patch.MOST_RESIDENT + 1)]
    configs += [{**base, "WEIGHT": order} for order in (0, 1, 2)]
    fitting = [config for config in configs if not _too_large(problem, config)]
    return tuple(config for index, config in enumerate(fitting) if config not in fitting[:index])


def work(problem: Problem, config: Config) -> Work:
    count = programs(problem, config, MULTIPROCESSORS * config["RESIDENT"])
    again, sums = 1 if config["WEIGHT"] else 0, config["BLOCK_N"] // patch.sides(problem)
    return patch.patch_work(
        problem, "backward_data", config, _tiles(problem, config) * _columns(problem, config), count,
        least=LEAST_DEPTH, sums=sums, moved=2 * again * size_of(problem, "weight"), launches=1 + again,
    )  # fmt: skip


VARIANT = Variant(
    "backward_data_patches", "backward_data",
    "very few output channels: patches of grad_y, loaded once, times a weight that stays", "triton",
    launches=launches, supports=supports, space=space, default=default, spreads_nonfinite=SPREADS_WEIGHT, work=work,
)  # fmt: skip
