"""Backward-weight as one GEMM over cells, stride phases on one side and window deltas on the other: few channels.

Words of ``triton_phases.py``: cell j holds the outputs o = stride*(first + j) + phase - crop, and reads x[first + j -
delta] for delta in [0, ceil(kernel/stride)); that product belongs to tap stride*delta + phase. One program owns BLOCK_M
rows (phase, output channel) x BLOCK_N columns (delta, input channel) and one chunk of the cells, the depth. grad_y is
loaded once per cell and column tile, not once per tap, and few input channels fill a wide tile. Where stride does not
divide kernel some (phase, delta) have no tap: a tile with none is left out, of the others the products are dropped.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_phases, triton_taps
from tritonconv.kernels.triton_arrival import ARRIVE
from tritonconv.kernels.triton_channels_last import copying
from tritonconv.kernels.triton_device import (
    aligned,
    ceil_div,
    chunk,
    dividers,
    entered,
    load_lanes,
    offset,
    product,
    voxel_tiles,
    voxels,
    widened,
)
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, refusal
from tritonconv.kernels.triton_phases import cells_of, window_of
from tritonconv.kernels.triton_split_gemm import SplitGemm, store_channel_sums, store_weights, strided
from tritonconv.kernels.triton_taps import lanes_inside, spans, tap_lanes
from tritonconv.kernels.variant import SPREADS_VOXELS, Config, Variant
from tritonconv.kernels.work import Work
from tritonconv.problem import Problem, Triple

LOAD_INSTRUCTIONS = 28  # every step finds its cells anew, and of both operands which are inside
MOST_WASTE = 4  # products for each one that counts


@triton.jit
def tapped(phase, delta, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """Whether (phase, delta), each (d, h, w), have a tap."""
    found = phase[0] + delta[0] * STRIDE[0] < KERNEL[0]
    found = found & (phase[1] + delta[1] * STRIDE[1] < KERNEL[1])
    return found & (phase[2] + delta[2] * STRIDE[2] < KERNEL[2])


@triton.jit(launch_metadata=accounting, do_not_specialize=(*RUN_TIME, "splits"))
def backward_weight_cells_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    partial_ptr,  # (splits, c_in, c_out, taps): the sums of chunks, or grad_weight itself
    bias_partial_ptr,  # (splits, c_out): those of grad_bias, or None
    arrivals_ptr,  # (programs of one split,) int32, zeros: the last one of a tile adds up its partials; or None
    total_ptr,  # (c_in, c_out, taps), dense, or None without arrivals
    total_bias_ptr,  # (c_out,), or None
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    splits, strides,  # of x, of grad_y, of the partials
    LAYER: tl.constexpr, CONFIG: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns one of ``splits`` chunks of the cells, the depth, and of that chunk's grad_weight BLOCK_M rows
    (phase, output channel) x BLOCK_N columns (slot of the window, input channel), or BIAS_C channels of its
    grad_bias.
    """
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    GROUPS: tl.constexpr = LAYER.GROUPS
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    BLOCK_W: tl.constexpr = CONFIG.BLOCK_W
    BIAS_V: tl.constexpr = CONFIG.BIAS_V
    BIAS_C: tl.constexpr = CONFIG.BIAS_C
    BIAS_W: tl.constexpr = CONFIG.BIAS_W
    Y_VOXELS_INNER: tl.constexpr = CONFIG.Y_VOXELS_INNER
    X_VOXELS_INNER: tl.constexpr = CONFIG.X_VOXELS_INNER
    x_strides, grad_y_strides, partial_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    WINDOW: tl.constexpr = window_of(KERNEL, STRIDE)
    M: tl.constexpr = product(STRIDE) * C_OUT
    N: tl.constexpr = product(WINDOW) * C_IN
    TILES_M: tl.constexpr = ceil_div(M, BLOCK_M)
    TILES_N: tl.constexpr = ceil_div(N, BLOCK_N)
    TILES: tl.constexpr = TILES_M * TILES_N * GROUPS
    BIAS_TILES: tl.constexpr = 0 if bias_partial_ptr is None else ceil_div(C_OUT * GROUPS, BIAS_C)
    pid = tl.program_id(0)
    split, tile = pid // (TILES + BIAS_TILES), pid % (TILES + BIAS_TILES)
    if bias_partial_ptr is not None:  # noqa: SIM102
        if tile < BIAS_TILES:
            store_channel_sums(
                grad_y_ptr, bias_partial_ptr, arrivals_ptr, total_bias_ptr, n=n, out_size=out_size,
                grad_y_strides=grad_y_strides, tile=tile, split=split, splits=splits, CHANNELS=C_OUT * GROUPS,
                VOXELS_INNER=Y_VOXELS_INNER, BLOCK_V=BIAS_V, BLOCK_C=BIAS_C, BLOCK_W=BIAS_W, WIDE=WIDE,
            )  # fmt: skip
            return

    tile -= BIAS_TILES
    group = widened(tile // (TILES_M * TILES_N), WIDE)
    offs_m = widened(tile % TILES_M * BLOCK_M + tl.arange(0, BLOCK_M), WIDE)  # (phase, output channel)
    offs_n = widened(tile // TILES_M % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N), WIDE)  # (slot, input channel)
    _, phase_d, phase_h, phase_w, co, phase_word = tap_lanes(offs_m, C_OUT, STRIDE)
    # The slots of a window are its voxels, counted upwards from the one of the last delta.
    _, slot_d, slot_h, slot_w, ci, slot_word = tap_lanes(offs_n, C_IN, WINDOW)
    delta_d, delta_h, delta_w = WINDOW[0] - 1 - slot_d, WINDOW[1] - 1 - slot_h, WINDOW[2] - 1 - slot_w
    mask_m, mask_n = offs_m < M, offs_n < N
    if KERNEL[0] % STRIDE[0] + KERNEL[1] % STRIDE[1] + KERNEL[2] % STRIDE[2] > 0:
        least_phase = (tl.min(phase_d), tl.min(phase_h), tl.min(phase_w))
        least_delta = (tl.min(delta_d), tl.min(delta_h), tl.min(delta_w))
        if not tapped(least_phase, least_delta, KERNEL, STRIDE):
            return

    # Of each address the loop adds only the cell's part. Cell 0, phase 0 lies at -y_cut of grad_y; it reads at slot 0
    # the voxel -x_cut of x.
    cells, first_cell = cells_of(crop, out_size, STRIDE)
    y_cut = (
        crop[0] - first_cell[0] * STRIDE[0], crop[1] - first_cell[1] * STRIDE[1], crop[2] - first_cell[2] * STRIDE[2],
    )  # fmt: skip
    x_cut = (WINDOW[0] - 1 - first_cell[0], WINDOW[1] - 1 - first_cell[1], WINDOW[2] - 1 - first_cell[2])
    y_lanes = spans((phase_d, phase_h, phase_w), y_cut, out_size, mask_m, STRIDE)
    x_lanes = spans((slot_d, slot_h, slot_w), x_cut, size, mask_n, (1, 1, 1))
    grad_y_rows = offset(
        grad_y_strides, 0, group * C_OUT + co, phase_d - y_cut[0], phase_h - y_cut[1], phase_w - y_cut[2]
    )  # (BLOCK_M,)
    ci = group * C_IN + ci
    x_rows = offset(x_strides, 0, ci, slot_d - x_cut[0], slot_h - x_cut[1], slot_w - x_cut[2])  # (BLOCK_N,)
    y_strides = strided(grad_y_strides, STRIDE, WIDE)
    by = None
    if WIDE < 2 and not Y_VOXELS_INNER:
        by = dividers(cells, BLOCK_W)
    first, last = chunk(split, splits, voxel_tiles(n, cells, BLOCK_K, BLOCK_W, WIDE))
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile_k in range(first, entered(first, last, CONFIG.ENTER)):
        image, d, h, w, mask_k = voxels(tile_k, n, cells, BLOCK_K, BLOCK_W, WIDE, by=by)
        y_hit = lanes_inside(
            d, h, w, mask_k, y_lanes, phase_word, cut=y_cut, size=out_size,
            CHANNELS=C_OUT, STRIDE=STRIDE, KERNEL=STRIDE, DILATION=(1, 1, 1), WIDE=WIDE,
        )  # fmt: skip
        x_hit = lanes_inside(
            d, h, w, mask_k, x_lanes, slot_word, cut=x_cut, size=size,
            CHANNELS=C_IN, STRIDE=(1, 1, 1), KERNEL=WINDOW, DILATION=(1, 1, 1), WIDE=WIDE,
        )  # fmt: skip
        grad_y_ptrs = grad_y_ptr + (grad_y_rows[:, None] + offset(y_strides, image, 0, d, h, w)[None, :])
        x_ptrs = x_ptr + (x_rows[:, None] + offset(x_strides, image, 0, d, h, w)[None, :])
        grad_y_tile = load_lanes(grad_y_ptrs, y_hit, Y_VOXELS_INNER)  # (BLOCK_M, BLOCK_K)
        x_tile = load_lanes(x_ptrs, x_hit, X_VOXELS_INNER)  # (BLOCK_N, BLOCK_K)
        acc = tl.dot(grad_y_tile, tl.trans(x_tile), acc, input_precision=PRECISION)

    tap_m = (phase_d * KERNEL[1] + phase_h) * KERNEL[2] + phase_w
    tap_n = (delta_d * STRIDE[0] * KERNEL[1] + delta_h * STRIDE[1]) * KERNEL[2] + delta_w * STRIDE[2]
    phase = (phase_d[:, None], phase_h[:, None], phase_w[:, None])
    delta = (delta_d[None, :], delta_h[None, :], delta_w[None, :])
    mask = mask_m[:, None] & mask_n[None, :] & tapped(phase, delta, KERNEL, STRIDE)
    store_weights(
        acc, partial_ptr, arrivals_ptr, total_ptr, partial_strides, tile=tile + BIAS_TILES, split=split, splits=splits,
        co=co, tap_m=tap_m, ci=ci, tap_n=tap_n, mask=mask, C_OUT=C_OUT, TAPS=product(KERNEL), WIDE=WIDE,
    )  # fmt: skip


def gemm(problem: Problem) -> SplitGemm:
    rows = math.prod(problem.stride) * problem.c_out // problem.groups
    columns = math.prod(window_of(problem.kernel, problem.stride)) * problem.c_in // problem.groups
    return SplitGemm(problem, rows, columns, triton_phases.cells(problem))


def launches(problem, config, x, grad_y, need_bias):
    return gemm(problem).launches(backward_weight_cells_kernel, config, x, grad_y, need_bias)


def default(problem: Problem, device: torch.device):
    config = gemm(problem).default()
    if problem.dtype.itemsize == 4:  # a longer row spills on sm_100
        config["BLOCK_W"] = min(config["BLOCK_W"], 16)
    return config


def supports(problem: Problem, device: torch.device) -> str | None:
    window = window_of(problem.kernel, problem.stride)
    why_not = refusal(problem, device) or triton_taps.refusal(problem.stride) or triton_taps.refusal(window)
    why_not = why_not or triton_phases.dilation_refusal(problem)
    if why_not is not None:
        return why_not
    if math.prod(window) == 1 or math.prod(problem.stride) == 1:
        return f"kernel {problem.kernel}, stride {problem.stride}: one delta or one phase, the taps count as well"
    waste = math.prod(window) * math.prod(problem.stride) / math.prod(problem.kernel)
    if waste > MOST_WASTE:
        return f"{waste:.0f} products for each one that counts, of which at most {MOST_WASTE} are accepted"
    return None


def work(problem: Problem, config: Config) -> Work:
    counts, share = gemm(problem).work(config, LOAD_INSTRUCTIONS), _share(problem, config["BLOCK_M"], config["BLOCK_N"])
    return replace(
        counts,
        flops=counts.flops * share,
        cache_bytes=max(counts.memory_bytes, counts.cache_bytes * share),
        sram_bytes=counts.sram_bytes * share,
        instructions=counts.instructions * share,
    )


@lru_cache(maxsize=4096)
def _share(problem: Problem, block_m: int, block_n: int) -> float:
    """The share of the tiles that have a tap, by the least phase and delta along each axis, as in the kernel."""
    window, (_, rows, columns, _) = window_of(problem.kernel, problem.stride), gemm(problem)
    if not rows or not columns:
        return 1.0
    phases = _least(rows, block_m, problem.c_out // problem.groups, problem.stride, last=False)
    deltas = _least(columns, block_n, problem.c_in // problem.groups, window, last=True)
    tapped_tiles = 0
    for (phase, count), (step, times) in itertools.product(phases.items(), deltas.items()):
        taps = (p + (w - 1 - s) * stride for p, s, w, stride in zip(phase, step, window, problem.stride, strict=True))
        tapped_tiles += count * times * all(tap < k for tap, k in zip(taps, problem.kernel, strict=True))
    return tapped_tiles / (phases.total() * deltas.total())


def _least(lanes: int, block: int, channels: int, places: Triple, last: bool) -> Counter:
    """For the tiles of lanes (place, channel) the least place along each axis, or the last, and how many have it."""
    counts: Counter = Counter()
    for first in range(0, lanes, block):
        covered = range(first // channels, (min(first + block, lanes) - 1) // channels + 1)
        at = [(p // (places[1] * places[2]), p // places[2] % places[1], p % places[2]) for p in covered]
        counts[tuple((max if last else min)(axis) for axis in zip(*at, strict=True))] += 1
    return counts


VARIANT = copying(Variant(
    "backward_weight_cells", "backward_weight",
    "kernel > stride, few channels: one GEMM over cells, phases times window deltas", "triton",
    launches=launches, supports=supports, space=lambda problem, device: gemm(problem).space(default(problem, device)),
    default=default, spreads_nonfinite=SPREADS_VOXELS, options=(ARRIVE,),
    workspace_bytes=lambda problem: gemm(problem).workspace_bytes(), work=work,
), ("x", "y"), "c_out")  # fmt: skip
