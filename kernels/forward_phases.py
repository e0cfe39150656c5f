"""Forward as an implicit GEMM per phase: only the taps that hit, any stride, dilation, crop and groups.

One program owns BLOCK_M outputs of one phase x BLOCK_N output channels. Rows: the voxels j of the phase; columns:
output channels; depth: the taps of the phase x input channels.

A deep layer of few voxels has few tiles, and the phase with most taps has a long depth in each. There SPLITS programs,
a key of the config, share a tile's depth; their float32 partials are added in a fixed order. Absent or 0, as in all
entries from before, one program has the whole depth.
"""

from __future__ import annotations

import itertools
import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_buffers import new
from tritonconv.kernels.triton_channels_last import copying
from tritonconv.kernels.triton_convolution import forward
from tritonconv.kernels.triton_device import (
    aligned,
    ceil_div,
    grouped_order,
    offset,
    product,
    ranked_phase,
    voxel_tiles,
    voxels,
    widened,
)
from tritonconv.kernels.triton_epilogue import computes, with_bias
from tritonconv.kernels.triton_gemm import implicit_gemm
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, empty, refusal
from tritonconv.kernels.triton_reduce import sum_volumes
from tritonconv.kernels.triton_store import store_outputs
from tritonconv.kernels.triton_taps import backward, tap_steps, volume_phase, voxel_steps
from tritonconv.kernels.triton_target import compute_capability
from tritonconv.kernels.triton_weights import preferred
from tritonconv.kernels.variant import SPREADS_WEIGHT, Variant
from tritonconv.kernels.work import Work, parts, tap_gemm
from tritonconv.problem import Problem

LEAST_STEPS = 6  # of BLOCK_K in the deepest phase that a program is worth
MOST_RANKED = 64  # phases whose order is compiled into the kernel; more of them run in their natural order


@triton.jit(launch_metadata=accounting, do_not_specialize=RUN_TIME)
def forward_phases_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    w_ptr,  # (c_in, c_out, taps)
    bias_ptr,  # (c_out,) or None
    y_ptr,  # (n, c_out, od, oh, ow); of more than one split (SPLITS, n, od, oh, ow, c_out), dense float32
    residual_ptr, slopes,  # see triton_epilogue
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    strides,  # of x, of the weight, of y
    LAYER: tl.constexpr, CONFIG: tl.constexpr, ORDER: tl.constexpr,
    UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows, outputs of one phase, x BLOCK_N columns, output channels of PACK groups, and one of
    SPLITS chunks of the depth: (tap of the phase, input channel).
    """
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    GROUPS: tl.constexpr = LAYER.GROUPS
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    DILATION: tl.constexpr = LAYER.DILATION
    PACK: tl.constexpr = CONFIG.PACK
    SPLITS: tl.constexpr = CONFIG.SPLITS
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_W: tl.constexpr = CONFIG.BLOCK_W
    EPILOGUE: tl.constexpr = CONFIG.EPILOGUE
    x_strides, w_strides, y_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    PHASES: tl.constexpr = product(STRIDE)
    TILES_N: tl.constexpr = ceil_div(PACK * C_OUT, BLOCK_N)
    largest = (
        tl.cdiv(out_size[0], STRIDE[0]),
        tl.cdiv(out_size[1], STRIDE[1]),
        tl.cdiv(out_size[2], STRIDE[2]),
    )
    tiles_m = voxel_tiles(n, largest, BLOCK_M, BLOCK_W, WIDE)
    all_tiles_n = TILES_N * (GROUPS // PACK)
    pid = tl.program_id(0)
    split = 0
    if SPLITS > 1:
        split, pid = pid % SPLITS, pid // SPLITS
        y_ptr += widened(split * GROUPS * C_OUT, WIDE) * n * d_out * h_out * w_out
    if CONFIG.PHASE_INNER:
        rank, pid = pid % PHASES, pid // PHASES
    else:
        rank, pid = (pid // (tiles_m * all_tiles_n)).to(tl.int32), pid % (tiles_m * all_tiles_n)
    tile_m, tile_n = grouped_order(pid, tiles_m, all_tiles_n, CONFIG.GROUP_M)
    phase = ranked_phase(rank, ORDER)
    first, outs, tap, taps, start = volume_phase(phase, crop, out_size, KERNEL, STRIDE, DILATION)
    outs_d, outs_h, outs_w = outs
    if outs_d * outs_h * outs_w == 0:  # fewer outputs than the stride: a phase may be empty
        return
    if SPLITS > 1:  # a place in the depth is divided by the taps along h and w, so d alone says that there is none
        taps = (tl.where(taps[1] * taps[2] == 0, 0, taps[0]), tl.maximum(taps[1], 1), tl.maximum(taps[2], 1))
    image, d, h, w, mask_m = voxels(tile_m, n, (outs_d, outs_h, outs_w), BLOCK_M, BLOCK_W, WIDE)

    # From the last tap to the first, so that the voxels count upwards.
    TAP_STEP: tl.constexpr = tap_steps(STRIDE, DILATION)
    VOXEL_STEP: tl.constexpr = voxel_steps(STRIDE, DILATION)
    group = widened(tile_n // TILES_N * PACK, WIDE)
    offs_n = tile_n % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = implicit_gemm(
        a_ptr=x_ptr + group * C_IN * x_strides[1], a_strides=x_strides,
        image=image,
        d=d + start[0] - (taps[0] - 1) * VOXEL_STEP[0],
        h=h + start[1] - (taps[1] - 1) * VOXEL_STEP[1],
        w=w + start[2] - (taps[2] - 1) * VOXEL_STEP[2],
        mask_m=mask_m, size=size,
        w_ptr=w_ptr + group * C_IN * w_strides[0], w_strides=w_strides,
        tap=(
            tap[0] + (taps[0] - 1) * TAP_STEP[0],
            tap[1] + (taps[1] - 1) * TAP_STEP[1],
            tap[2] + (taps[2] - 1) * TAP_STEP[2],
        ),
        taps=taps, offs_n=offs_n,
        TAP_STEP=backward(TAP_STEP), VOXEL_STEP=VOXEL_STEP,
        MOST_TAPS=(
            ceil_div(KERNEL[0], TAP_STEP[0]), ceil_div(KERNEL[1], TAP_STEP[1]), ceil_div(KERNEL[2], TAP_STEP[2]),
        ),
        KERNEL=KERNEL, K_GROUP=C_IN, N_GROUP=C_OUT, WRAP_N=True, CONFIG=CONFIG, WIDE=WIDE, PRECISION=PRECISION,
        VOXELS_INNER=CONFIG.X_VOXELS_INNER, split=split, splits=SPLITS, SPLIT=SPLITS > 1,
    )  # fmt: skip

    mask_n = offs_n < PACK * C_OUT
    channel = group * C_OUT + offs_n
    if bias_ptr is not None:
        mask_b = mask_n
        if SPLITS > 1:
            mask_b = mask_n & (split + tl.zeros_like(offs_n) == 0)  # interpreted, a scalar's comparison is no mask
        acc = with_bias(acc, tl.load(bias_ptr + channel, mask=mask_b, other=0.0), y_ptr, EPILOGUE)
    rows = offset(
        y_strides, image, 0, first[0] + d * STRIDE[0], first[1] + h * STRIDE[1], first[2] + w * STRIDE[2]
    )  # (BLOCK_M,)
    store_outputs(
        y_ptr, y_strides, rows, channel, acc, mask_m=mask_m, mask_n=mask_n, VOXELS_INNER=CONFIG.Y_VOXELS_INNER,
        residual_ptr=residual_ptr, slopes=slopes, EPILOGUE=EPILOGUE,
    )  # fmt: skip


def phase_order(problem: Problem) -> tuple[int, ...]:
    """The phases (index of the residue of o + crop, w fastest), most taps first; () where there are very many."""
    if math.prod(problem.stride) > MOST_RANKED:
        return ()
    taps = [math.prod(combo) for combo in itertools.product(*_hits(problem))]
    return tuple(sorted(range(len(taps)), key=lambda phase: -taps[phase]))


def _hits(problem: Problem) -> list[list[int]]:
    """Along each axis, how many taps hit an output of each phase."""
    return [
        [sum((r * tap - phi) % s == 0 for tap in range(k)) for phi in range(s)]
        for k, s, r in zip(problem.kernel, problem.stride, problem.dilation, strict=True)
    ]


def most_taps(problem: Problem) -> int:
    """Of the phase that most taps hit."""
    return math.prod(max(hits) for hits in _hits(problem))


def largest_phase(problem: Problem) -> tuple[int, int, int]:
    return tuple(-(-out // s) for out, s in zip(problem.out_size, problem.stride, strict=True))  # type: ignore[return-value]


def programs(problem: Problem, config) -> int:
    """How many programs one phase has."""
    return tiles.tiles_of(problem.n, largest_phase(problem), config) * columns_of(problem, config)


def columns_of(problem: Problem, config) -> int:
    """Tiles of columns, of all groups."""
    pack = config["PACK"]
    return parts(pack * problem.c_out // problem.groups, config["BLOCK_N"]) * (problem.groups // pack)


def launches(problem, config, x, weight, bias, out=None, **epilogue):
    y = empty(problem, problem.y_shape, x) if out is None else out
    splits = splits_in(config) if out is None else 1  # a given y may be a slice, and sums are written side by side
    sums, strides = y, y.stride()
    if splits > 1:
        n, c_out, *size = problem.y_shape
        sums = new((splits, n, *size, c_out), x, torch.float32)
        strides = sums.view(lambda tensor: tensor[0].permute(0, 4, 1, 2, 3)).stride()
    grid = splits * math.prod(problem.stride) * programs(problem, config)
    forward(
        forward_phases_kernel, grid, problem, {**config, "SPLITS": splits}, x, weight, bias, sums,
        y_strides=strides,
        ORDER=phase_order(problem),
        X_VOXELS_INNER=x.stride(1) != 1 and config["BLOCK_W"] == 0,
        Y_VOXELS_INNER=strides[1] != 1,
        **epilogue,
    )  # fmt: skip
    if splits > 1 and y.numel() > 0:
        sum_volumes(sums, y)
    return y


def splits_in(config) -> int:
    """How many programs share the depth of a tile."""
    return max(1, config.get("SPLITS", 0))


def splits_worth(problem: Problem, config) -> int:
    """SPLITS that the tuner tries: as many as let the deepest phase end with the others, each worth its start; or 1.

    Where all phases have the same taps, each multiprocessor has a program then.
    """
    deepest, whole = (steps_of(problem, config, taps) for taps in (most_taps(problem), problem.phase_taps))
    fill = MULTIPROCESSORS * deepest // max(1, programs(problem, config) * whole)
    return max(1, min(fill, deepest // LEAST_STEPS))


def steps_of(problem: Problem, config, taps: int) -> int:
    """Steps of BLOCK_K over the depth of a phase with so many taps."""
    return taps * parts(config["PACK"] * problem.c_in // problem.groups, config["BLOCK_K"])


def default(problem: Problem, device: torch.device):
    pack = tiles.packed_groups(problem)
    columns, depth = pack * problem.c_out // problem.groups, pack * problem.c_in // problem.groups
    programs = math.prod(problem.stride) * problem.groups // pack
    base = tiles.gemm(problem, largest_phase(problem), columns, depth, programs)
    # Memory-bound: the phases of a tile side by side, x comes from L2 for all but the first, and y's sectors are filled
    # while they are there. Compute-bound: the heaviest phase first over all tiles, so that the last wave is short.
    inner = int(problem.intensity() < tiles.RIDGE)
    if problem.layout == "ncdhw" and problem.dtype.itemsize == 2 and base["BLOCK_M"] * base["BLOCK_N"] >= 128 * 64:
        base["num_warps"] = 8  # narrow loads come through registers: with 4 it spills on sm_100
    if problem.dtype.itemsize == 2 and 0 < compute_capability() < 90 and base["BLOCK_M"] * base["BLOCK_N"] >= 128 * 64:
        base["num_warps"] = 8  # 254 registers in 4, or spills
    if problem.dtype.itemsize == 4 and compute_capability() >= 100:  # TF32 has 80 registers in 4 warps: spills
        base["num_warps"] = 8
    return {**base, "GROUP_M": 8, "PACK": pack, "PHASE_INNER": inner, "WEIGHT": preferred(problem)}


def space(problem: Problem, device: torch.device):
    base = default(problem, device)
    width = parts(problem.out_size[2], problem.stride[2])
    configs = tiles.around(
        base, problem, width=width, PHASE_INNER=(0, 1), WEIGHT=(0, 1, 2), num_stages=tiles.UNSTAGED,
        BLOCK_K=tiles.depths(base["PACK"] * problem.c_in // problem.groups),
        GROUP_M=tiles.orders(columns_of(problem, base)),
    )  # fmt: skip
    split = [{**config, "SPLITS": splits_worth(problem, config)} for config in configs]
    return (*configs, *(config for config in split if config["SPLITS"] > 1))


def work(problem: Problem, config) -> Work:
    each, splits = programs(problem, config), splits_in(config)
    steps = each * steps_of(problem, config, problem.phase_taps)
    partials = 2.0 * splits * math.prod(problem.y_shape) * 4 if splits > 1 else 0.0
    return tap_gemm(
        problem, "forward", config, splits * each * math.prod(problem.stride), steps, partials, 1 + (splits > 1),
        apart=(1, problem.stride[2]),
    )  # fmt: skip


def workspace_bytes(problem: Problem) -> int:
    """Of the partials: :func:`splits_worth` stops where the deepest phase alone fills the multiprocessors."""
    uneven = parts(most_taps(problem) * math.prod(problem.stride), max(1, problem.phase_taps))
    return MULTIPROCESSORS * uneven * tiles.LARGEST_TILE * 4


VARIANT = copying(Variant(
    "forward_phases", "forward", "implicit GEMM per phase: only the taps that hit", "triton",
    launches=launches, supports=refusal, space=space, default=default, options=("SPLITS",),
    spreads_nonfinite=SPREADS_WEIGHT, workspace_bytes=workspace_bytes, work=work, epilogue=computes,
), ("x",), "c_in")  # fmt: skip
