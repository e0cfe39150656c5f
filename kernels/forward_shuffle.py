"""Forward where kernel <= stride: one GEMM over all phases, voxels x c_in times c_in x phases*c_out, then a shuffle.

One program owns BLOCK_M cells x BLOCK_N columns (phase, channel) of one group. An output has at most one tap, and all
the outputs of a cell read the same voxel of x: it is loaded once per column tile, whose programs stand side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_phases as phases
from tritonconv.kernels.triton_device import aligned, ceil_div, load_voxels, product, widened
from tritonconv.kernels.triton_epilogue import computes, with_bias
from tritonconv.kernels.triton_launch import accounting, refusal
from tritonconv.kernels.triton_phases import cells_of, column_count
from tritonconv.kernels.triton_shuffle import cell_rows, group_columns, own_tile, phase_taps, row_dividers, zero_sums
from tritonconv.kernels.triton_store import store_phases
from tritonconv.kernels.variant import Variant
from tritonconv.kernels.work import Work
from tritonconv.problem import Problem


@triton.jit(launch_metadata=accounting, do_not_specialize=phases.RUN_TIME)
def forward_shuffle_kernel(
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
    """A program owns BLOCK_M rows (cells) x BLOCK_N columns (phase, output channel) of a group; the depth is its input
    channels.
    """
    EPILOGUE: tl.constexpr = CONFIG.EPILOGUE  # Triton 3.6.0 hands no tuple with a name on as an attribute
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    STRIDE: tl.constexpr = LAYER.STRIDE
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    x_strides, w_strides, y_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    TILES_N: tl.constexpr = ceil_div(column_count(STRIDE, C_OUT, CONFIG.ROWS), CONFIG.BLOCK_N)
    cells, first = cells_of(crop, out_size, STRIDE)
    tile_m, tile_n = own_tile(n, cells, TILES_N, LAYER, CONFIG, WIDE)
    group, tile_n, offs_n = group_columns(tile_n, TILES_N, CONFIG, WIDE)
    offs_k = widened(tl.arange(0, BLOCK_K), WIDE)
    by = row_dividers(by_d, by_h, by_w, shift_d, shift_h, shift_w, CONFIG=CONFIG, WIDE=WIDE)
    rows, mask_m = cell_rows(tile_m, n, cells, first, size=size, strides=x_strides, CONFIG=CONFIG, WIDE=WIDE, by=by)
    x_rows = x_ptr + group * C_IN * x_strides[1] + rows
    tap, channel, mask_n, tapped = phase_taps(offs_n, LAYER, CONFIG)
    columns = channel * w_strides[1] + tap * w_strides[2]
    w_columns = w_ptr + group * C_IN * w_strides[0] + columns

    steps = tl.cdiv(C_IN, BLOCK_K)
    if product(LAYER.KERNEL) != product(STRIDE):  # a tile of columns without any tap is bias alone
        steps = steps * tl.max(tapped.to(tl.int32), axis=0)
    acc = zero_sums(CONFIG)
    for step in range(steps):
        k = step * BLOCK_K + offs_k
        x_mask = mask_m[:, None]
        w_mask = tapped[None, :]
        if C_IN % BLOCK_K != 0:
            x_mask = x_mask & (k < C_IN)[None, :]
            w_mask = w_mask & (k < C_IN)[:, None]
        x_ptrs = x_rows[:, None] + (k * x_strides[1])[None, :]  # (BLOCK_M, BLOCK_K)
        x_tile = load_voxels(x_ptrs, x_mask, CONFIG.X_VOXELS_INNER)
        w_tile = tl.load(w_columns[None, :] + (k * w_strides[0])[:, None], mask=w_mask, other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + group * C_OUT + channel, mask=mask_n, other=0.0)
        acc = with_bias(acc, bias, y_ptr, EPILOGUE)
    origin = (first[0] * STRIDE[0] - crop[0], first[1] * STRIDE[1] - crop[1], first[2] * STRIDE[2] - crop[2])
    store_phases(
        acc, y_ptr, first_channel=group * C_OUT, strides=y_strides, tile=tile_m, n=n, cells=cells, origin=origin,
        out_size=out_size, tile_n=tile_n, CHANNELS=C_OUT, PHASES=STRIDE, STRIDE=STRIDE, FACTS=FACTS, CONFIG=CONFIG,
        WIDE=WIDE, by=by, residual_ptr=residual_ptr, slopes=slopes,
    )  # fmt: skip


def launches(problem, config, x, weight, bias, out=None, **epilogue):
    return phases.forward(forward_shuffle_kernel, problem, config, x, weight, bias, out, **epilogue)


def supports(problem: Problem, device: torch.device) -> str | None:
    why_not = refusal(problem, device)
    if why_not is None and any(axis.kernel > axis.stride for axis in problem.axes):
        return f"an output of kernel {problem.kernel}, stride {problem.stride} has several taps along one axis"
    return why_not or phases.dilation_refusal(problem)


def default(problem: Problem, device: torch.device):
    rows = phases.whole_rows(problem)
    base = phases.tile(problem, phases.cells(problem), phases.columns(problem, rows), problem.c_in // problem.groups)
    return {**base, "GROUP_M": 1, "ROWS": rows, "WEIGHT": phases.weight_order(problem, rows)}


def space(problem: Problem, device: torch.device):
    return phases.around(default(problem, device), problem, width=phases.cells(problem)[2])


def work(problem: Problem, config) -> Work:
    return phases.work(problem, config, phases.cells(problem), [problem.c_in // problem.groups])


VARIANT = Variant(
    "forward_shuffle", "forward", "kernel <= stride: one GEMM over all phases, shuffled while it is stored", "triton",
    launches=launches, supports=supports, space=space, default=default, work=work,
    epilogue=computes,
)  # fmt: skip
