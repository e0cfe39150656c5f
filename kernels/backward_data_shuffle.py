"""Backward-data where kernel <= stride: one GEMM, voxels x taps*c_out times taps*c_out x c_in, unshuffled by the load.

One program owns BLOCK_M voxels of x x BLOCK_N of its channels in one group. Each element of grad_y belongs to one
voxel: it is loaded once where BLOCK_N covers c_in, else by programs that stand side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_phases as phases
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.forward_shuffle import supports
from tritonconv.kernels.triton_device import aligned, ceil_div, settled, widened
from tritonconv.kernels.triton_fold import folded, folded_outputs, folded_weight
from tritonconv.kernels.triton_fold import pays as fold_pays
from tritonconv.kernels.triton_launch import accounting
from tritonconv.kernels.triton_phases import column_count, load_phases
from tritonconv.kernels.triton_shuffle import group_columns, own_tile, row_dividers, store_voxels, taps, zero_sums
from tritonconv.kernels.triton_target import compute_capability
from tritonconv.kernels.triton_weights import preferred
from tritonconv.kernels.variant import FOLD, Variant
from tritonconv.kernels.weight_orders import AS_GIVEN, IN_INNERMOST, OUT_INNERMOST
from tritonconv.kernels.work import Work, tap_gemm
from tritonconv.problem import Problem


@triton.jit(launch_metadata=accounting, do_not_specialize=phases.RUN_TIME)
def backward_data_shuffle_kernel(
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    w_ptr,  # (c_in, c_out, taps)
    grad_x_ptr,  # (n, c_in, d, h, w)
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    by_d, by_h, by_w, shift_d, shift_h, shift_w,
    strides,  # of grad_y, of the weight, of grad_x
    LAYER: tl.constexpr, CONFIG: tl.constexpr, FACTS: tl.constexpr,
    UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows (voxels of grad_x) x BLOCK_N columns (input channels) of a group; the depth is (tap,
    output channel).
    """
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    grad_y_strides, w_strides, grad_x_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    TILES_N: tl.constexpr = ceil_div(C_IN, CONFIG.BLOCK_N)
    tile_m, tile_n = own_tile(n, size, TILES_N, LAYER, CONFIG, WIDE)
    group, _, offs_n = group_columns(tile_n, TILES_N, CONFIG, WIDE)
    offs_k = widened(tl.arange(0, BLOCK_K), WIDE)
    mask_n = offs_n < C_IN
    channel_x = group * C_IN + offs_n
    grad_y_group = grad_y_ptr + group * C_OUT * grad_y_strides[1]
    w_columns = w_ptr + channel_x * w_strides[1]
    by = row_dividers(by_d, by_h, by_w, shift_d, shift_h, shift_w, CONFIG=CONFIG, WIDE=WIDE)

    acc = zero_sums(CONFIG)
    for step in range(tl.cdiv(column_count(KERNEL, C_OUT, CONFIG.ROWS), BLOCK_K)):
        grad_y_tile = load_phases(
            grad_y_group, grad_y_strides, tile_m, n=n, cells=size, origin=(0 - crop[0], 0 - crop[1], 0 - crop[2]),
            out_size=out_size, tile_n=step, CHANNELS=C_OUT, PHASES=KERNEL, STRIDE=STRIDE, ROWS=CONFIG.ROWS,
            FACTS=FACTS, BLOCK_M=CONFIG.BLOCK_M, BLOCK_N=BLOCK_K, BLOCK_W=CONFIG.BLOCK_W, WIDE=WIDE, by=by,
        )  # fmt: skip
        tap, channel, mask_k = taps(step * BLOCK_K + offs_k, LAYER, CONFIG)
        w_rows = channel * w_strides[0] + tap * w_strides[2]
        w_mask = mask_k[:, None] & mask_n[None, :]
        w_tile = tl.load(w_columns[None, :] + w_rows[:, None], mask=w_mask, other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = settled(tl.dot(grad_y_tile, w_tile, acc, input_precision=PRECISION), WAIT)

    store_voxels(
        grad_x_ptr, grad_x_strides, tile_m, n=n, size=size, channel=channel_x, acc=acc, mask_n=mask_n,
        CONFIG=CONFIG, WIDE=WIDE, by=by,
    )  # fmt: skip


def launches(problem, config, grad_y, weight):
    config = dict(config)
    if config.pop(FOLD, 0):
        grad_y, weight = folded_outputs(grad_y, problem.kernel[2]), folded_weight(weight)
        problem = folded(problem)
    return phases.backward_data(backward_data_shuffle_kernel, problem, config, grad_y, weight)


def default(problem: Problem, device: torch.device):
    rows = phases.whole_rows(problem)
    depth = phases.columns(problem, rows, problem.kernel)
    base = phases.tile(problem, problem.size, problem.c_in // problem.groups, depth)
    if base["BLOCK_M"] * depth >= 128 * 64:  # the loads of a step take as many registers as the sums
        base["num_warps"] = 8
    if problem.dtype.itemsize == 4 and compute_capability() >= 100:  # spills in 4
        base["num_warps"] = 8
    if rows and base["BLOCK_W"] == 0:
        base["BLOCK_W"] = _short_rows(problem)
    order = preferred(problem)
    if order != AS_GIVEN:  # the columns are c_in, the depth c_out
        order = IN_INNERMOST if problem.dtype.itemsize == 2 or rows else OUT_INNERMOST
    return {**base, "GROUP_M": 1, "ROWS": rows, "WEIGHT": order}


def _short_rows(problem: Problem) -> int:
    """BLOCK_W where a row of x has fewer than 8 voxels: a divisor of them whose outputs are a multiple of 8, else 0.

    These are loads of 16 bytes then. With 0 Triton 3.6 and 3.9 do not compile such a layer in half precision for sm_100
    ("Illegal shared layout").
    """
    width, stride = problem.size[2], problem.stride[2]
    run = width & -width  # the largest power of two that divides it
    neighbours = problem.kernel[2] == stride and problem.out_size[2] == width * stride
    return run if neighbours and run > 1 and run * stride % 8 == 0 else 0


def space(problem: Problem, device: torch.device):
    configs = phases.around(default(problem, device), problem)
    if fold_pays(problem):  # packed so that c_in is innermost
        other = folded(problem)
        around = phases.around({**default(other, device), "WEIGHT": IN_INNERMOST}, other)
        configs += tuple({**config, FOLD: 1} for config in around if config["WEIGHT"] == IN_INNERMOST)
    return configs


def work(problem: Problem, config) -> Work:
    if config.get(FOLD):
        problem = folded(problem)
    programs = tiles.programs(problem, problem.size, problem.c_in // problem.groups, config)
    depth = phases.columns(problem, config["ROWS"], problem.kernel)
    return tap_gemm(problem, "backward_data", config, programs, programs * triton.cdiv(depth, config["BLOCK_K"]))


VARIANT = Variant(
    "backward_data_shuffle", "backward_data",
    "kernel <= stride: one GEMM over all taps, unshuffled while it is loaded", "triton",
    launches=launches, supports=supports, space=space, default=default, work=work, options=(FOLD,),
)  # fmt: skip
