"""Backward-data where kernel = stride, the weight read in torch's order: one launch, for small layers.

As in :mod:`~tritonconv.kernels.forward_shuffle_given`: the depth of the GEMM is a row of the weight, (channel, tap),
in steps of whole channels with all their taps, and no launch packs the weight. In each step one of the two tiles is put
in the other's order between shared memory and the registers from which the dot takes its left operand. With ROWS that
is the tile of grad_y, which goes this way anyway. Else it is the weight's, as often the smaller one, and the sums are
(channel, voxel): grad_y's rows in registers would be read at the same banks of shared memory. To read whole sectors of
grad_y in channels_last_3d a step is twice as deep as that of :mod:`~tritonconv.kernels.backward_data_shuffle`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels import backward_data_shuffle
from tritonconv.kernels import triton_phases as phases
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.forward_shuffle_given import columns_of, fits, unfit
from tritonconv.kernels.triton_device import (
    aligned,
    ceil_div,
    product,
    settled,
    widened,
)
from tritonconv.kernels.triton_launch import accounting, refusal
from tritonconv.kernels.triton_phases import channels_first, load_phases, phases_first
from tritonconv.kernels.triton_shuffle import group_columns, own_tile, row_dividers, store_voxels
from tritonconv.kernels.variant import Config, Variant
from tritonconv.kernels.work import SECTOR, Work, tap_gemm
from tritonconv.problem import Problem

DEEPEST = {2: 128, 4: 64}  # columns of a step, by the bytes of an element
LOADED = {2: 128 * 64, 4: 64 * 64}  # elements of a step's tile; with twice as many 4 warps of sm_80 spill


@triton.jit(launch_metadata=accounting, do_not_specialize=phases.RUN_TIME)
def backward_data_shuffle_given_kernel(
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    w_ptr,  # (c_in, c_out, taps), dense
    grad_x_ptr,  # (n, c_in, d, h, w)
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    by_d, by_h, by_w, shift_d, shift_h, shift_w,
    strides,  # of grad_y, of grad_x
    LAYER: tl.constexpr, CONFIG: tl.constexpr, FACTS: tl.constexpr,
    UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows (voxels of grad_x) x BLOCK_N columns (input channels) of a group; the depth is
    (output channel, tap), as the weight has it.
    """
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    ROWS: tl.constexpr = CONFIG.ROWS
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    grad_y_strides, grad_x_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    TAPS: tl.constexpr = product(KERNEL)
    CHANNELS: tl.constexpr = BLOCK_K // TAPS  # of a step
    TILES_N: tl.constexpr = ceil_div(C_IN, BLOCK_N)
    tile_m, tile_n = own_tile(n, size, TILES_N, LAYER, CONFIG, WIDE)
    group, _, offs_n = group_columns(tile_n, TILES_N, CONFIG, WIDE)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < C_IN
    channel_x = group * C_IN + offs_n
    w_rows = w_ptr + channel_x * (C_OUT * TAPS)
    by = row_dividers(by_d, by_h, by_w, shift_d, shift_h, shift_w, CONFIG=CONFIG, WIDE=WIDE)

    acc = tl.zeros((BLOCK_M if ROWS else BLOCK_N, BLOCK_N if ROWS else BLOCK_M), tl.float32)
    for step in range(C_OUT // CHANNELS):
        channel = widened(step * CHANNELS, WIDE)
        grad_y_tile = load_phases(
            y_ptr=grad_y_ptr + (group * C_OUT + channel) * grad_y_strides[1], strides=grad_y_strides, tile=tile_m,
            n=n, cells=size, origin=(0 - crop[0], 0 - crop[1], 0 - crop[2]), out_size=out_size, tile_n=0,
            CHANNELS=CHANNELS, PHASES=KERNEL, STRIDE=STRIDE, ROWS=ROWS, FACTS=FACTS, BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_K, BLOCK_W=CONFIG.BLOCK_W, WIDE=WIDE, by=by,
        )  # fmt: skip
        w_ptrs = w_rows[:, None] + (channel * TAPS + offs_k)[None, :]
        w_tile = tl.load(w_ptrs, mask=mask_n[:, None], other=0.0)  # (BLOCK_N, BLOCK_K)
        if ROWS:
            acc = tl.dot(channels_first(grad_y_tile, KERNEL), tl.trans(w_tile), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(phases_first(w_tile, KERNEL, ROWS), tl.trans(grad_y_tile), acc, input_precision=PRECISION)
        acc = settled(acc, WAIT)
    if not ROWS:
        acc = tl.trans(acc)

    store_voxels(
        grad_x_ptr, grad_x_strides, tile_m, n=n, size=size, channel=channel_x, acc=acc, mask_n=mask_n,
        CONFIG=CONFIG, WIDE=WIDE, by=by,
    )  # fmt: skip


def launches(problem, config, grad_y, weight):
    if not weight.is_contiguous():  # channels_last_3d, or a slice: that kernel takes any strides, in the same tiles
        config = {**backward_data_shuffle.default(problem, grad_y.device), **config}
        return backward_data_shuffle.launches(problem, config, grad_y, weight)
    config = {**config, "BLOCK_K": columns_of(problem, config["BLOCK_K"])}
    channels = config["BLOCK_K"] // math.prod(problem.kernel)
    return phases.backward_data(backward_data_shuffle_given_kernel, problem, config, grad_y, weight, channels)


def supports(problem: Problem, device: torch.device) -> str | None:
    return refusal(problem, device) or unfit(problem, DEEPEST[problem.dtype.itemsize])


def default(problem: Problem, device: torch.device):
    base, itemsize = backward_data_shuffle.default(problem, device), problem.dtype.itemsize
    config = {key: value for key, value in base.items() if key != "WEIGHT"}
    sector = math.prod(problem.kernel) * SECTOR // itemsize if problem.layout == "ndhwc" else 0
    config["BLOCK_K"] = columns_of(problem, min(max(config["BLOCK_K"], sector), DEEPEST[itemsize]))
    most = LOADED[itemsize] // config["BLOCK_K"]
    widest = most if itemsize == 2 or config["ROWS"] else 64  # 128 spill on sm_80
    config |= {"BLOCK_M": min(config["BLOCK_M"], most), "BLOCK_N": min(config["BLOCK_N"], widest)}
    stage = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * itemsize
    config["num_stages"] = 3 if 3 * stage <= tiles.SHARED_BYTES else 2
    return config


def space(problem: Problem, device: torch.device):
    rows = (0, 1) if phases.whole_rows(problem) else ()
    configs = tiles.around(default(problem, device), problem, GROUP_M=(8,), ROWS=rows)
    return tuple(each for each in configs if fits(problem, each["BLOCK_K"]) and _loads(problem, each))


def _loads(problem: Problem, config: Config) -> bool:
    return max(config["BLOCK_M"], config["BLOCK_N"]) * config["BLOCK_K"] <= LOADED[problem.dtype.itemsize]


def work(problem: Problem, config: Config) -> Work:
    programs = tiles.programs(problem, problem.size, problem.c_in // problem.groups, config)
    steps = phases.columns(problem, config["ROWS"], problem.kernel) // config["BLOCK_K"]
    return tap_gemm(problem, "backward_data", config, programs, programs * steps)


VARIANT = Variant(
    "backward_data_shuffle_given", "backward_data",
    "kernel = stride, the weight as given: each step puts a tile in order, nothing is packed", "triton",
    launches=launches, supports=supports, space=space, default=default, work=work,
)  # fmt: skip
