"""Backward-weight as one GEMM over all voxels, split into chunks, with the bias gradient from the same launch.

One program owns BLOCK_M rows (tap, output channel) x BLOCK_N input channels of grad_weight and one contiguous chunk of
the input voxels i, the depth: ``grad_weight[ci, co, t] = sum over i of grad_y[i*stride - crop + dilation*t, co] *
x[i, ci]``. Taps and output channels count together, so that few channels still fill a dot. Each chunk leaves a float32
partial, and the partials are added in a fixed order. More programs per chunk sum grad_y over the chunk's share of the
output voxels while the others read them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_launch, triton_taps
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.registry import Config, Variant
from tritonconv.kernels.triton_device import (
    ceil_div,
    chunk,
    inside,
    load_along,
    offset,
    product,
    voxel_tiles,
    voxels,
    widened,
)
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, geometry, precision, wide
from tritonconv.kernels.triton_launch import launch as run
from tritonconv.kernels.triton_reduce import sum_weights
from tritonconv.kernels.triton_tape import fresh
from tritonconv.kernels.triton_taps import tap_lanes, voxel_words
from tritonconv.kernels.work import Work, tap_gemm
from tritonconv.problem import Problem, Triple

WAVES = 2  # of programs in one launch, all chunks together
BIAS_BYTES = 16 * 1024  # of grad_y that a program of the bias gradient has in flight; half where loads are narrow
LEAST_STEPS = 8  # of BLOCK_K that a chunk is worth
# Elements of grad_weight, whose taps are neighbours, that tiles along its channels write themselves, each into a sector
# of its own: 8 MiB of sectors, which take about as long as a launch at the 4 TB/s of an H200's memory.
LARGEST_SCATTER = 1 << 18


@triton.jit
def channel_sums(
    grad_y_ptr, n, out_size, grad_y_strides, channel, mask, split, splits,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums of grad_y (BLOCK_C,) over the chunk's output voxels."""
    first, last = chunk(split, splits, voxel_tiles(n, out_size, BLOCK_V, BLOCK_W, WIDE))
    acc = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    for tile in range(first, last):
        image, d, h, w, mask_v = voxels(tile, n, out_size, BLOCK_V, BLOCK_W, WIDE)
        rows = grad_y_ptr + offset(grad_y_strides, image, 0, d, h, w)[:, None]
        wanted = mask_v[:, None] & mask[None, :]
        acc += tl.load(rows + (channel * grad_y_strides[1])[None, :], mask=wanted, other=0.0).to(tl.float32)
    return tl.sum(acc, 0)


@triton.jit(launch_metadata=accounting, do_not_specialize=(*RUN_TIME, "splits"))
def backward_weight_splitk_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    grad_w_ptr,  # (splits, c_in, c_out, taps)
    grad_b_ptr,  # (splits, c_out) or None
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    splits, x_strides, grad_y_strides, grad_w_strides,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, GROUPS: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    BIAS_V: tl.constexpr, BIAS_C: tl.constexpr, BIAS_W: tl.constexpr,
    Y_VOXELS_INNER: tl.constexpr, X_VOXELS_INNER: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    ROWS: tl.constexpr = product(KERNEL) * C_OUT
    SAME_TAP: tl.constexpr = C_OUT % 8 == 0  # of the channels that one load takes: cheap to mask one by one
    TILES_M: tl.constexpr = ceil_div(ROWS, BLOCK_M)
    TILES_N: tl.constexpr = ceil_div(C_IN, BLOCK_N)
    TILES: tl.constexpr = TILES_M * TILES_N * GROUPS
    BIAS_TILES: tl.constexpr = 0 if grad_b_ptr is None else ceil_div(C_OUT * GROUPS, BIAS_C)
    pid = tl.program_id(0)
    split, tile = pid // (TILES + BIAS_TILES), pid % (TILES + BIAS_TILES)
    if grad_b_ptr is not None:
        channel = widened(tile * BIAS_C + tl.arange(0, BIAS_C), WIDE)
        if tile < BIAS_TILES:
            mask_c = channel < C_OUT * GROUPS
            sums = channel_sums(
                grad_y_ptr, n, out_size, grad_y_strides, channel, mask_c, split, splits, BIAS_V, BIAS_C, BIAS_W, WIDE
            )
            grad_b_ptrs = grad_b_ptr + split * (C_OUT * GROUPS) + channel
            tl.store(grad_b_ptrs, sums.to(grad_b_ptr.dtype.element_ty), mask=mask_c)
            return

    tile -= BIAS_TILES
    group = tile // (TILES_M * TILES_N)
    offs_m = tile % TILES_M * BLOCK_M + tl.arange(0, BLOCK_M)  # (tap, output channel)
    offs_n = tile // TILES_M % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    group, offs_m, offs_n = widened(group, WIDE), widened(offs_m, WIDE), widened(offs_n, WIDE)
    tap, td, th, tw, co, wanted = tap_lanes(offs_m, C_OUT, KERNEL)
    mask_m, mask_n = offs_m < ROWS, offs_n < C_IN
    ci = group * C_IN + offs_n
    vd, vh, vw = td * DILATION[0], th * DILATION[1], tw * DILATION[2]
    # The voxels are the last axis of both operands, so that the lanes of a warp run along them wherever the channels
    # are not neighbours: near each other in memory, whatever the stride.
    grad_y_rows = grad_y_ptr + offset(grad_y_strides, 0, group * C_OUT + co, vd, vh, vw)[:, None]  # (BLOCK_M, 1)
    x_rows = x_ptr + (ci * x_strides[1])[:, None]  # (BLOCK_N, 1)
    first, last = chunk(split, splits, voxel_tiles(n, size, BLOCK_K, BLOCK_W, WIDE))
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile_k in range(first, last):
        image, d, h, w, mask_k = voxels(tile_k, n, size, BLOCK_K, BLOCK_W, WIDE)
        od, oh, ow = d * STRIDE[0] - crop[0], h * STRIDE[1] - crop[1], w * STRIDE[2] - crop[2]
        if SAME_TAP:
            hit = inside(od[None, :] + vd[:, None], out_size[0]) & inside(oh[None, :] + vh[:, None], out_size[1])
            hit = hit & inside(ow[None, :] + vw[:, None], out_size[2]) & mask_k[None, :] & mask_m[:, None]
        else:
            words = voxel_words(od, oh, ow, mask_k, out_size, KERNEL, DILATION)
            hit = (words[None, :] & wanted[:, None]) == wanted[:, None]  # (BLOCK_M, BLOCK_K)
        grad_y_columns = offset(grad_y_strides, image, 0, od, oh, ow)[None, :]
        if Y_VOXELS_INNER:
            grad_y_tile = load_along(grad_y_rows + grad_y_columns, hit, 1)  # (BLOCK_M, BLOCK_K)
        else:
            grad_y_tile = tl.load(grad_y_rows + grad_y_columns, mask=hit, other=0.0)
        x_columns = offset(x_strides, image, 0, d, h, w)[None, :]
        x_mask = mask_n[:, None] & mask_k[None, :]
        if X_VOXELS_INNER:
            x_tile = load_along(x_rows + x_columns, x_mask, 1)  # (BLOCK_N, BLOCK_K)
        else:
            x_tile = tl.load(x_rows + x_columns, mask=x_mask, other=0.0)
        acc = tl.dot(grad_y_tile, tl.trans(x_tile), acc, input_precision=PRECISION)

    rows = widened(split, WIDE) * grad_w_strides[0] + co * grad_w_strides[2] + tap * grad_w_strides[3]
    grad_w_ptrs = grad_w_ptr + rows[:, None] + (ci * grad_w_strides[1])[None, :]
    tl.store(grad_w_ptrs, acc.to(grad_w_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def launch(problem, config, x, grad_y, need_bias):
    grad_weight = fresh(problem.weight_shape, x)
    grad_bias = fresh((problem.c_out,), x) if need_bias else None
    if x.numel() == 0 or grad_y.numel() == 0:
        return grad_weight.zero_(), None if grad_bias is None else grad_bias.zero_()
    config = dict(config)
    splits = config.pop("SPLITS")
    by_row = grad_weight.flatten(2).permute(2, 1, 0)  # (taps, c_out, c_in), as the tiles lie
    partial, bias_partial = by_row[None, None], grad_bias
    if through_partials(problem, splits):
        partial = fresh((splits, 1, *by_row.shape), x, torch.float32 if splits > 1 else x.dtype)
    if splits > 1 and need_bias:
        bias_partial = fresh((splits, problem.c_out), x, torch.float32)
    step = partial.stride()
    run(
        backward_weight_splitk_kernel,
        splits * programs(problem, config, need_bias),
        config,
        x.device,
        x_ptr=x,
        grad_y_ptr=grad_y,
        grad_w_ptr=partial,
        grad_b_ptr=bias_partial,
        **geometry(problem),
        splits=splits,
        x_strides=x.stride(),
        grad_y_strides=grad_y.stride(),
        grad_w_strides=(step[0], step[4], step[3], step[2]),
        Y_VOXELS_INNER=grad_y.stride(1) != 1,
        X_VOXELS_INNER=x.stride(1) != 1 and config["BLOCK_W"] == 0,
        WIDE=wide(x, grad_y, partial),
        PRECISION=precision(problem.dtype),
    )
    if through_partials(problem, splits):
        sum_weights(partial, grad_weight, *((bias_partial, grad_bias) if splits > 1 else ()))
    return grad_weight, grad_bias


def through_partials(problem: Problem, splits: int) -> bool:
    """Whether a second launch writes grad_weight: it adds several chunks, or it puts a large one in order."""
    return splits > 1 or math.prod(problem.weight_shape) > LARGEST_SCATTER


def programs(problem: Problem, config: Config, need_bias: bool) -> int:
    """How many programs one chunk has."""
    c_in, c_out = problem.c_in // problem.groups, problem.weight_shape[1]
    rows, columns = math.prod(problem.kernel) * c_out, c_in
    found = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"]) * problem.groups
    return found + (triton.cdiv(problem.c_out, config["BIAS_C"]) if need_bias else 0)


def supports(problem: Problem, device: torch.device) -> str | None:
    return triton_launch.refusal(problem, device) or triton_taps.refusal(problem)


def default(problem: Problem, device: torch.device):
    c_in, c_out = problem.c_in // problem.groups, problem.weight_shape[1]
    half = problem.dtype.itemsize == 2
    block_m = tiles.power_of_two(math.prod(problem.kernel) * c_out, 16, 128 if half else 64)
    block_n = tiles.power_of_two(c_in, 16, 128 if half else 64)
    # A tile of 2-byte loads comes through registers: less deep and in more threads, so that none needs too many.
    through_registers = half and (problem.layout == "ncdhw" or c_out % 8 != 0)
    block_k = 64 if half and not through_registers else 32
    more_warps = block_m * block_n >= 128 * 128 or (through_registers and block_m == 128)
    config = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_W": block_w(problem, problem.size, block_k),
        **bias_tile(problem, block_m + block_n),
        "num_warps": 8 if more_warps else 4,
        "num_stages": 3,
    }
    return {**config, "SPLITS": splits_of(problem, config)}


def splits_of(problem: Problem, config: Config) -> int:
    """SPLITS: as many chunks as fill the waves, each worth its start."""
    steps = tiles.tiles_of(problem.n, problem.size, {**config, "BLOCK_M": config["BLOCK_K"]})
    most = WAVES * tiles.PROGRAMS // max(1, programs(problem, config, problem.bias))
    return max(1, min(most, steps // LEAST_STEPS))


def bias_tile(problem: Problem, width: int) -> dict[str, int]:
    """BIAS_V, BIAS_C, BIAS_W: the tile of the sums of grad_y.

    Few enough channels that a program reads about half of what its neighbours do, ``width`` elements per input voxel,
    but whole sectors of 32 bytes where the channels are contiguous.
    """
    outputs_per_input = math.prod(problem.out_size) / math.prod(problem.size)
    least = 1 if problem.layout == "ncdhw" else 32 // problem.dtype.itemsize
    channels = tiles.power_of_two(int(width / outputs_per_input / 2), least, 64)
    channels = min(channels, tiles.power_of_two(problem.c_out, 1, 64))
    narrow = problem.layout == "ncdhw" or channels % 8 != 0
    rows = BIAS_BYTES // problem.dtype.itemsize // channels // (2 if narrow else 1)
    return {"BIAS_V": rows, "BIAS_C": channels, "BIAS_W": block_w(problem, problem.out_size, rows)}


def block_w(problem: Problem, size: Triple, rows: int) -> int:
    """BLOCK_W: tiles along w also in NDHWC, where w nearly fills them: a tile then spans few rows to un-ravel."""
    width = size[2]
    if problem.layout == "ncdhw":
        return tiles.block_w(problem, size, rows)
    for block in (64, 32, 16, 8):
        if block <= rows and -(-width // block) * block * 8 <= width * 9:
            return block
    return 0


def space(problem: Problem, device: torch.device):
    base = default(problem, device)
    found = []
    for changed in tiles.around(base, problem, num_warps=(4, 8), BLOCK_W=(0, base["BLOCK_K"])):
        if changed["BLOCK_W"] <= changed["BLOCK_K"]:
            found.append({**changed, "SPLITS": splits_of(problem, changed)})  # other tiles are other programs
    for splits in (base["SPLITS"] // 4, base["SPLITS"] // 2, base["SPLITS"] * 2, base["SPLITS"] * 4):
        if splits > 0:
            found.append({**base, "SPLITS": splits})
    return tuple(config for i, config in enumerate(found) if config not in found[:i])


def workspace_bytes(problem: Problem) -> int:
    """Of the float32 partials, at the most chunks of the space."""
    splits = max(config["SPLITS"] for config in space(problem, torch.device("cuda")))
    return 4 * splits * (math.prod(problem.weight_shape) + problem.c_out) if through_partials(problem, splits) else 0


def work(problem: Problem, config: Config) -> Work:
    chunk_programs, splits = programs(problem, config, False), config["SPLITS"]
    steps = tiles.tiles_of(problem.n, problem.size, {**config, "BLOCK_M": config["BLOCK_K"]})
    twice = through_partials(problem, splits)
    each = 4 if splits > 1 else problem.dtype.itemsize
    return tap_gemm(
        problem,
        "backward_weight",
        config,
        splits * programs(problem, config, problem.bias),
        chunk_programs * max(steps, splits),
        moved=2.0 * each * splits * math.prod(problem.weight_shape) if twice else 0.0,
        launches=2 if twice else 1,
    )


VARIANT = Variant(
    name="backward_weight_splitk",
    pass_name="backward_weight",
    idea="one GEMM over all voxels, split into chunks; the bias gradient in the same launch",
    backend="triton",
    launch=launch,
    supports=supports,
    space=space,
    default=default,
    workspace_bytes=workspace_bytes,
    work=work,
)
