"""Backward-weight for very few output channels: whole patches of grad_y, loaded once, times x, read once.

grad_weight is ``patches (voxels, taps x output channels) transposed times x (voxels, input channels)``. All of its rows
are in one tile, so x is read once; the voxels, the depth, are split into chunks.
:mod:`~tritonconv.kernels.backward_weight_splitk` has the same product, with the lanes of a step found anew in each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_patches as patch
from tritonconv.kernels.triton_buffers import copied
from tritonconv.kernels.triton_device import ceil_div, chunk, dividers, product, voxel_tiles, widened
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, precision, wide
from tritonconv.kernels.triton_partials import WeightGradients
from tritonconv.kernels.triton_patches import (
    dense_places,
    multiplied,
    padded,
    part_count,
    part_places,
    patches,
    refused,
    tile_voxels,
    voxel_count,
)
from tritonconv.kernels.triton_split_gemm import SplitGemm, store_channel_sums
from tritonconv.kernels.triton_target import compute_capability
from tritonconv.kernels.variant import SPREADS_VOXELS, Config, Variant
from tritonconv.kernels.work import WARP, Work, parts
from tritonconv.problem import Problem

LEAST_ROWS = 64  # of a product on Hopper
MOST_SUMS = 128  # of a thread, beside the patches of two parts
FEW_SUMS = 16  # of a thread to which the compiler gives 128 registers on sm_80, four programs of a multiprocessor


# The strides of grad_y are specialised: without, it spills for sm_100 in NCDHW (Triton 3.9.0).
@triton.jit(launch_metadata=accounting, do_not_specialize=(*RUN_TIME, "splits"))
def backward_weight_patches_kernel(
    x_ptr,  # (n, c_in, d, h, w), dense, or (n, d, h, w, c_in) where X_STEP is 0
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    partial_ptr,  # (splits, taps, c_out, c_in), dense, float32
    bias_partial_ptr,  # (splits, c_out), dense, float32, or None
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    splits, y_n, y_c, y_d, y_h, y_w,  # grad_y's strides
    LAYER: tl.constexpr, PATCH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BIAS_V: tl.constexpr, BIAS_C: tl.constexpr, BIAS_W: tl.constexpr,
    X_STEP: tl.constexpr,  # divides d_in * h_in * w_in where these lie innermost; 0 where the channels do
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N input channels of grad_weight, all taps and output channels, and one of ``splits`` chunks
    of the voxels; others own BIAS_C channels of grad_bias and a chunk of the voxels of grad_y.

    Rows: (tap, output channel); columns: input channels; depth: voxels of x.
    """
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    BLOCK_M: tl.constexpr = PATCH.PLACES
    FLIPPED: tl.constexpr = PATCH.FLIPPED
    grad_y_strides = (y_n, y_c, y_d, y_h, y_w)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    M: tl.constexpr = product(LAYER.KERNEL) * C_OUT
    PARTS: tl.constexpr = part_count(M, BLOCK_M)
    TILES_N: tl.constexpr = ceil_div(C_IN, BLOCK_N)
    BIAS_TILES: tl.constexpr = 0 if bias_partial_ptr is None else ceil_div(C_OUT, BIAS_C)
    pid = tl.program_id(0)
    split, column = pid // (TILES_N + BIAS_TILES), pid % (TILES_N + BIAS_TILES) - BIAS_TILES
    if bias_partial_ptr is not None:  # noqa: SIM102
        if column < 0:
            store_channel_sums(
                grad_y_ptr, bias_partial_ptr, None, None, n=n, out_size=out_size, grad_y_strides=grad_y_strides,
                tile=column + BIAS_TILES, split=split, splits=splits, CHANNELS=C_OUT, VOXELS_INNER=X_STEP > 0,
                BLOCK_V=BIAS_V, BLOCK_C=BIAS_C, BLOCK_W=BIAS_W, WIDE=WIDE,
            )  # fmt: skip
            return

    offs_n = widened(column * BLOCK_N + tl.arange(0, BLOCK_N), WIDE)
    mask_n = offs_n < C_IN
    count = voxel_count(size, X_STEP, WIDE)
    by = None
    if WIDE < 2:
        by = dividers(size, 0)
    first, last = chunk(split, splits, voxel_tiles(n, size, BLOCK_K, 0, WIDE))
    # The next tile's patches are on their way during this one's product.
    following = patches(
        grad_y_ptr, grad_y_strides, first, n=n, size=size, out_size=out_size, crop=crop, by=by, LAYER=LAYER,
        BLOCK=BLOCK_K, PLACES=BLOCK_M, WIDE=WIDE,
    )  # fmt: skip
    accs = ()
    for _ in tl.static_range(PARTS):
        acc = tl.zeros((BLOCK_N, BLOCK_M) if FLIPPED else (BLOCK_M, BLOCK_N), tl.float32)
        accs = accs + (acc,)  # type: ignore[assignment]  # noqa: RUF005
    for tile in range(first, last):
        voxel = tile_voxels(tile, BLOCK_K, WIDE)
        mask_k = voxel < n * count
        rows, columns = dense_places(voxel, offs_n, count, C_IN, X_STEP, WIDE)
        if X_STEP > 0:
            x_ptrs = x_ptr + (columns[:, None] + rows[None, :])
            x_tile = tl.trans(tl.load(x_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0))
        else:
            x_ptrs = x_ptr + (rows[:, None] + columns[None, :])
            x_tile = tl.load(x_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        sums = (multiplied(tl.trans(following), x_tile, accs[0], FLIPPED, PRECISION),)  # type: ignore[misc]
        for part in tl.static_range(1, PARTS):
            following = patches(
                grad_y_ptr, grad_y_strides, tile, n=n, size=size, out_size=out_size, crop=crop, by=by, LAYER=LAYER,
                BLOCK=BLOCK_K, PLACES=BLOCK_M, WIDE=WIDE, PART=part,
            )  # fmt: skip
            acc = multiplied(tl.trans(following), x_tile, accs[part], FLIPPED, PRECISION)
            sums = sums + (acc,)  # type: ignore[assignment]  # noqa: RUF005
        accs = sums  # type: ignore[assignment]
        following = patches(
            grad_y_ptr, grad_y_strides, tile + 1, n=n, size=size, out_size=out_size, crop=crop, by=by, LAYER=LAYER,
            BLOCK=BLOCK_K, PLACES=BLOCK_M, WIDE=WIDE,
        )  # fmt: skip

    for part in tl.static_range(PARTS):
        row, there = part_places(LAYER, BLOCK_M, part)
        places = widened(split, WIDE) * (M * C_IN) + (row * C_IN)[:, None] + offs_n[None, :]
        acc = tl.trans(accs[part]) if FLIPPED else accs[part]  # type: ignore[misc]
        tl.store(partial_ptr + places, acc, mask=there[:, None] & mask_n[None, :])


def gemm(problem: Problem) -> SplitGemm:
    return SplitGemm(problem, math.prod(problem.kernel) * problem.c_out, problem.c_in, problem.size)


def launches(problem, config, x, grad_y, need_bias):
    sums = WeightGradients(problem, config, x, grad_y, need_bias)
    if sums.nothing:
        return sums.results()
    sums.x = copied(x, lambda tensor: tensor.contiguous(memory_format=problem.memory_format))
    sums.split_weight(1, math.prod(problem.kernel), problem.c_out, problem.c_in)
    sums.split_bias(sums.splits)
    sums.launch(
        backward_weight_patches_kernel,
        gemm(problem).programs(_whole(problem, config), need_bias),
        PATCH=patch.form(problem, LEAST_ROWS),
        X_STEP=patch.voxel_step(problem),
        WIDE=wide(sums.x, grad_y, sums.partial, of=problem),
        PRECISION=precision(problem.dtype),
    )
    return sums.results()


def _whole(problem: Problem, config: Config) -> dict[str, int]:
    """With the rows, all of them, and no rows of voxels along w."""
    return {**config, "BLOCK_M": padded(problem, LEAST_ROWS) * patch.patch_parts(problem), "BLOCK_W": 0}


def _config(problem: Problem, warps: int, block_n: int, waves: int | None = None) -> dict[str, int]:
    """A voxel for each thread, or for each two; without ``waves`` as many programs as fit."""
    stages = 3 if problem.dtype.itemsize == 2 else 2
    bias = {key: value for key, value in gemm(problem).default().items() if key.startswith("BIAS_")}
    voxels = patch.voxels_of(problem, warps)
    config = {"BLOCK_N": block_n, "BLOCK_K": voxels, **bias, "num_warps": warps, "num_stages": stages}
    sums = _sums(problem, config)
    waves = waves or patch.resident(problem, config, LEAST_ROWS, sums, "backward_weight")
    # Those of the bias are short, and make room for others: they do not count.
    unbiased = gemm(replace(problem, bias=False))
    return {**config, "SPLITS": unbiased.splits(_whole(problem, config), waves)}


def _sums(problem: Problem, config: Config) -> int:
    """Of a thread."""
    rows = padded(problem, LEAST_ROWS) * patch.patch_parts(problem)
    return rows * config["BLOCK_N"] // (config["num_warps"] * WARP)


def _too_large(problem: Problem, config: Config) -> str | None:
    return patch.too_large(problem, config, LEAST_ROWS, "backward_weight")


def _crowded(problem: Problem, config: Config) -> bool:
    """Whether a thread spills its sums beside a part of a long patch."""
    if patch.sides(problem) == 1:
        return False
    capability, columns = compute_capability(), config["BLOCK_N"]
    if 0 < capability < 90 or capability >= 120:  # operands are in registers (HMMA): seen in the compiled kernels
        spills = columns in (32, 64) if config["num_warps"] > 4 else columns > 32
        return spills or _sums(problem, config) > MOST_SUMS
    return _sums(problem, config) > MOST_SUMS


def _fits(problem: Problem, config: Config) -> bool:
    return not _crowded(problem, config) and _too_large(problem, config) is None


def _guesses(problem: Problem) -> Iterator[dict[str, int]]:
    """Configs of fewer and fewer columns, best guess first; of a long patch in 8 warps, then in 4."""
    sides, columns = patch.sides(problem), patch.columns(problem)
    if 0 < compute_capability() < 90 and _spills(problem, _config(problem, 4 * sides, columns)):
        columns = max(16, columns // 2)
    while columns >= 16:
        for warps in range(4 * sides, 0, -4):
            yield _config(problem, warps, columns)
        columns //= 2


def _spills(problem: Problem, config: Config) -> bool:
    """Whether it may on sm_80: float32, and few sums beside a patch of several output channels."""
    return problem.dtype.itemsize == 4 or (problem.c_out > 1 and _sums(problem, config) <= FEW_SUMS)


def supports(problem: Problem, device: torch.device) -> str | None:
    return refused(problem, device) or _too_large(problem, default(problem, device))


def default(problem: Problem, device: torch.device):
    guesses = list(_guesses(problem))
    return next((config for config in guesses if _fits(problem, config)), guesses[-1])


def space(problem: Problem, device: torch.device):
    base = default(problem, device)
    own = base["num_warps"]
    widths = [n for n in (base["BLOCK_N"], base["BLOCK_N"] // 2, base["BLOCK_N"] * 2) if 16 <= n <= 2 * patch.WIDEST]
    configs = [base, *(_config(problem, warps, n) for warps in (4, 8) for n in widths)]
    configs += [_config(problem, own, base["BLOCK_N"], waves) for waves in (1, 2, 4, 8)]
    configs += [{**base, "num_stages": stages} for stages in (2, 4)]
    fitting = [config for config in configs if _fits(problem, config)]
    return tuple(config for index, config in enumerate(fitting) if config not in fitting[:index])


def work(problem: Problem, config: Config) -> Work:
    whole, splits = _whole(problem, config), config["SPLITS"]
    steps = max(gemm(problem).steps(whole), splits) * parts(problem.c_in, config["BLOCK_N"])
    partials = 4.0 * splits * math.prod(problem.weight_shape)
    return patch.patch_work(
        problem, "backward_weight", config, steps, splits * gemm(problem).programs(whole, problem.bias),
        least=LEAST_ROWS, sums=_sums(problem, config), moved=2 * partials, launches=2,
    )  # fmt: skip


def workspace_bytes(problem: Problem) -> int:
    """Of the partials, at the most chunks of the space."""
    splits = max(config["SPLITS"] for config in space(problem, torch.device("cuda")))
    return 4 * splits * (math.prod(problem.weight_shape) + problem.c_out)


VARIANT = Variant(
    "backward_weight_patches", "backward_weight",
    "very few output channels: patches of grad_y, gathered once, times x, read once", "triton",
    launches=launches, supports=supports, space=space, default=default, spreads_nonfinite=SPREADS_VOXELS,
    workspace_bytes=workspace_bytes, work=work,
)  # fmt: skip
