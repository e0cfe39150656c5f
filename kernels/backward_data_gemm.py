"""Backward-data as an implicit GEMM over all taps: an ordinary strided convolution of grad_y.

One program owns BLOCK_M input voxels x BLOCK_N input channels. Rows: the voxels i of grad_x; columns: input channels;
depth: taps x output channels. Tap t of voxel i reads output ``i*stride - crop + dilation*t``: every tap hits (but for
the border), so nothing is wasted, whatever the stride. With SKIP a tile leaves out the taps along d and h that all its
voxels have beyond the border: at a crop of 3 and 6 planes that is a third of them. The few voxels of a deep layer fill
few programs with a long depth each: there SPLITS programs share it, and their float32 partials are added in a fixed
order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_buffers import new
from tritonconv.kernels.triton_channels_last import copying
from tritonconv.kernels.triton_convolution import backward_data
from tritonconv.kernels.triton_device import (
    aligned,
    ceil_div,
    grouped_order,
    offset,
    store_tile,
    voxel_tiles,
    voxels,
    widened,
)
from tritonconv.kernels.triton_gemm import implicit_gemm
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, empty, refusal
from tritonconv.kernels.triton_reduce import sum_volumes
from tritonconv.kernels.triton_weights import preferred
from tritonconv.kernels.variant import SPREADS_WEIGHT, Config, Variant
from tritonconv.kernels.work import Work, parts, tap_gemm
from tritonconv.problem import Problem

LEAST_STEPS = 8  # of BLOCK_K that a program is worth
WORTH_SKIPPING = 0.9  # of the steps: a program finds out which taps to skip in about one of them


@triton.jit
def store_data_tile(
    pid, tiles_m, grad_y_ptr, w_ptr, grad_x_ptr, n, size, out_size, crop, splits, split_stride, strides,
    LAYER: tl.constexpr, CONFIG: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the tile of grad_x, or a chunk's part of it, of the program ``pid``.

    The arguments are those of :func:`backward_data_gemm_kernel`; ``tiles_m`` tiles cover the voxels.
    """
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    GROUPS: tl.constexpr = LAYER.GROUPS
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    DILATION: tl.constexpr = LAYER.DILATION
    PACK: tl.constexpr = CONFIG.PACK
    SPLIT: tl.constexpr = CONFIG.SPLIT
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    grad_y_strides, w_strides, grad_x_strides = strides
    TILES_N: tl.constexpr = ceil_div(PACK * C_IN, BLOCK_N)
    split = 0
    if SPLIT:
        split, pid = pid % splits, pid // splits
        grad_x_ptr += widened(split, WIDE) * split_stride
    tile_m, tile_n = grouped_order(pid, tiles_m, TILES_N * (GROUPS // PACK), CONFIG.GROUP_M)
    image, d, h, w, mask_m = voxels(tile_m, n, size, CONFIG.BLOCK_M, CONFIG.BLOCK_W, WIDE)
    group = tile_n // TILES_N * PACK
    offs_n = tile_n % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    if WIDE:
        group = group.to(tl.int64)
    acc = implicit_gemm(
        a_ptr=grad_y_ptr + group * C_OUT * grad_y_strides[1], a_strides=grad_y_strides,
        image=image, d=d * STRIDE[0] - crop[0], h=h * STRIDE[1] - crop[1], w=w * STRIDE[2] - crop[2],
        mask_m=mask_m, size=out_size,
        w_ptr=w_ptr + group * C_IN * w_strides[1], w_strides=w_strides,
        tap=(0, 0, 0), taps=KERNEL, offs_n=offs_n, TAP_STEP=(1, 1, 1), VOXEL_STEP=DILATION, MOST_TAPS=KERNEL,
        KERNEL=KERNEL, K_GROUP=C_OUT, N_GROUP=C_IN, WRAP_N=False, CONFIG=CONFIG, WIDE=WIDE, PRECISION=PRECISION,
        VOXELS_INNER=CONFIG.Y_VOXELS_INNER, split=split, splits=splits, SPLIT=SPLIT, SKIP=CONFIG.SKIP,
    )  # fmt: skip

    mask_n = offs_n < PACK * C_IN
    rows = offset(grad_x_strides, image, 0, d, h, w)  # (BLOCK_M,)
    columns = (group * C_IN + offs_n) * grad_x_strides[1]
    store_tile(grad_x_ptr, rows, columns, acc, mask_m, mask_n, VOXELS_INNER=CONFIG.X_VOXELS_INNER)


@triton.jit(launch_metadata=accounting, do_not_specialize=(*RUN_TIME, "splits"))
def backward_data_gemm_kernel(
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    w_ptr,  # (c_in, c_out, taps)
    grad_x_ptr,  # (splits, n, c_in, d, h, w)
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    splits, split_stride, strides,  # of grad_y, of the weight, of grad_x
    LAYER: tl.constexpr, CONFIG: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows, voxels of x, x BLOCK_N columns, input channels of PACK groups, and one of ``splits``
    chunks of the depth: (tap, output channel).
    """
    strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    tiles_m = voxel_tiles(n, size, CONFIG.BLOCK_M, CONFIG.BLOCK_W, WIDE)
    store_data_tile(
        tl.program_id(0), tiles_m, grad_y_ptr, w_ptr, grad_x_ptr, n=n, size=size, out_size=out_size, crop=crop,
        splits=splits, split_stride=split_stride, strides=strides,
        LAYER=LAYER, CONFIG=CONFIG, WIDE=WIDE, PRECISION=PRECISION,
    )  # fmt: skip


def launches(problem, config, grad_y, weight):
    nothing = math.prod(problem.x_shape) == 0 or grad_y.numel() == 0
    grad_x = empty(problem, problem.x_shape, grad_y, zero=nothing)
    if nothing:
        return grad_x
    config = dict(config)
    splits = config.pop("SPLITS")
    sums, strides = grad_x, (0, *grad_x.stride())
    if splits > 1:
        n, c_in, *size = problem.x_shape
        sums = new((splits, n, *size, c_in), grad_y, torch.float32)
        strides = sums.view(lambda tensor: tensor.permute(0, 1, 5, 2, 3, 4)).stride()
    backward_data(
        backward_data_gemm_kernel, programs(problem, config) * splits, problem, config, grad_y, weight, sums,
        splits=splits,
        split_stride=strides[0],
        grad_x_strides=strides[1:],
        Y_VOXELS_INNER=grad_y.stride(1) != 1,
        X_VOXELS_INNER=strides[2] != 1,
        SPLIT=splits > 1,
    )  # fmt: skip
    if splits > 1:
        sum_volumes(sums, grad_x)
    return grad_x


def programs(problem: Problem, config: Config) -> int:
    """How many programs one chunk of the depth has."""
    return tiles.tiles_of(problem.n, problem.size, config) * columns_of(problem, config)


def columns_of(problem: Problem, config: Config) -> int:
    """Tiles of columns, of all groups."""
    pack = config["PACK"]
    return parts(pack * problem.c_in // problem.groups, config["BLOCK_N"]) * (problem.groups // pack)


def steps_of(problem: Problem, config: Config) -> int:
    """Steps of BLOCK_K over the whole depth."""
    return math.prod(problem.kernel) * parts(config["PACK"] * problem.c_out // problem.groups, config["BLOCK_K"])


def kept(problem: Problem, config: Config) -> float:
    """The part of the steps that is left with SKIP: of the taps along d, where a tile lies in one plane."""
    axis, (_, height, width) = problem.axes[0], problem.size
    if not config["SKIP"] or height * width < config["BLOCK_M"]:
        return 1.0
    return axis.hits / (axis.size * axis.kernel)


def default(problem: Problem, device: torch.device):
    pack = tiles.packed_groups(problem)
    columns, depth = pack * problem.c_in // problem.groups, pack * problem.c_out // problem.groups
    base = tiles.gemm(problem, problem.size, columns, depth, problem.groups // pack)
    base["BLOCK_M"] = max(base["BLOCK_M"], 64)  # the rows of Hopper's matrix instruction
    large = 128 * 64 if problem.dtype.itemsize == 2 else 64 * 64
    if problem.layout == "ncdhw" and base["BLOCK_M"] * base["BLOCK_N"] >= large:
        # Narrow loads come through registers: of bfloat16 254 in 4 warps and 103 in 8 (sm_90); float32 spills on sm_80.
        base["num_warps"] = 8
    base |= {"GROUP_M": 8, "PACK": pack, "WEIGHT": preferred(problem, "backward_data")}
    base["SKIP"] = int(kept(problem, {**base, "SKIP": 1}) < WORTH_SKIPPING)
    return {**base, "SPLITS": splits_of(problem, base)}


def splits_of(problem: Problem, config: Config) -> int:
    """SPLITS: as many as give each multiprocessor a program, each worth its start."""
    most = MULTIPROCESSORS // max(1, programs(problem, config))
    return max(1, min(most, steps_of(problem, config) // LEAST_STEPS))


def space(problem: Problem, device: torch.device):
    base = default(problem, device)
    near = tiles.around(
        base, problem, width=problem.size[2], WEIGHT=(0, 1, 2), SKIP=(0, 1), num_stages=tiles.UNSTAGED,
        BLOCK_K=tiles.depths(base["PACK"] * problem.c_out // problem.groups),
        GROUP_M=tiles.orders(columns_of(problem, base)),
    )  # fmt: skip
    # Other tiles are other programs.
    configs = [{**changed, "SPLITS": splits_of(problem, changed)} for changed in near]
    if base["SPLITS"] > 1:
        configs += [{**base, "SPLITS": splits} for splits in (1, base["SPLITS"] // 2, base["SPLITS"] * 2)]
    return tuple(config for i, config in enumerate(configs) if config not in configs[:i])


def work(problem: Problem, config) -> Work:
    each, splits = programs(problem, config), config["SPLITS"]
    partials = 2.0 * splits * math.prod(problem.x_shape) * 4 if splits > 1 else 0.0
    steps, apart = round(each * steps_of(problem, config) * kept(problem, config)), (problem.stride[2], 1)
    return tap_gemm(problem, "backward_data", config, each * splits, steps, partials, 1 + (splits > 1), apart=apart)


def workspace_bytes(problem: Problem) -> int:
    """Of the partials: splitting stops at about one program per multiprocessor."""
    return 2 * MULTIPROCESSORS * tiles.LARGEST_TILE * 4


VARIANT = copying(Variant(
    "backward_data_gemm", "backward_data", "implicit GEMM over all taps: a strided convolution of grad_y", "triton",
    launches=launches, supports=refusal, space=space, default=default, spreads_nonfinite=SPREADS_WEIGHT,
    workspace_bytes=workspace_bytes, work=work,
), ("y",), "c_out")  # fmt: skip
