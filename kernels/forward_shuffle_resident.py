"""Forward where kernel <= stride, for large layers of few channels: each program keeps the weight and takes many tiles.

As :mod:`~tritonconv.kernels.forward_shuffle`, but where c_in fits one step of the depth the weight's tile is the same
for all tiles of a column. There a program per tile loads as many bytes of weight as it writes of y; here a persistent
grid loads them once, and the next tiles of x are on their way while one is multiplied and stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from tritonconv.kernels import forward_shuffle
from tritonconv.kernels import triton_phases as phases
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_device import aligned, ceil_div, load_voxels, voxel_tiles, widened
from tritonconv.kernels.triton_epilogue import computes, with_bias
from tritonconv.kernels.triton_launch import accounting, multiprocessors
from tritonconv.kernels.triton_phases import cells_of, column_count
from tritonconv.kernels.triton_shuffle import cell_rows, phase_taps, row_dividers
from tritonconv.kernels.triton_store import store_phases
from tritonconv.kernels.triton_target import BARRIERS, pipeline_buffers, shared_bytes
from tritonconv.kernels.variant import Config, Variant
from tritonconv.kernels.work import Work, size_of
from tritonconv.problem import Problem

DEEPEST = {2: 128, 4: 64}  # channels of x, by the bytes of an element: one step of the depth


@triton.jit(launch_metadata=accounting, do_not_specialize=phases.RUN_TIME)
def forward_shuffle_resident_kernel(
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
    """A program owns BLOCK_N columns (phase, output channel), whose weight it keeps, of every tile of BLOCK_M rows
    (cells) that no other program of these columns takes; the depth is the input channels, in one step.
    """
    EPILOGUE: tl.constexpr = CONFIG.EPILOGUE  # Triton 3.6.0 hands no tuple with a name on as an attribute
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    STRIDE: tl.constexpr = LAYER.STRIDE
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    x_strides, w_strides, y_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    TILES_N: tl.constexpr = ceil_div(column_count(STRIDE, C_OUT, CONFIG.ROWS), BLOCK_N)
    cells, first = cells_of(crop, out_size, STRIDE)
    origin = (first[0] * STRIDE[0] - crop[0], first[1] * STRIDE[1] - crop[1], first[2] * STRIDE[2] - crop[2])
    tiles_m = voxel_tiles(n, cells, CONFIG.BLOCK_M, CONFIG.BLOCK_W, WIDE)
    tile_n = tl.program_id(0) % TILES_N
    offs_n = widened(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), WIDE)
    offs_k = widened(tl.arange(0, BLOCK_K), WIDE)
    mask_k = offs_k < C_IN

    tap, channel, mask_n, tapped = phase_taps(offs_n, LAYER, CONFIG)
    columns = channel * w_strides[1] + tap * w_strides[2]
    w_ptrs = w_ptr + columns[None, :] + (offs_k * w_strides[0])[:, None]
    w_tile = tl.load(w_ptrs, mask=tapped[None, :] & mask_k[:, None], other=0.0)  # (BLOCK_K, BLOCK_N)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=mask_n, other=0.0).to(tl.float32)

    by = row_dividers(by_d, by_h, by_w, shift_d, shift_h, shift_w, CONFIG=CONFIG, WIDE=WIDE)
    for tile_m in range(tl.program_id(0) // TILES_N, tiles_m, tl.num_programs(0) // TILES_N):
        rows, mask_m = cell_rows(tile_m, n, cells, first, size=size, strides=x_strides, CONFIG=CONFIG, WIDE=WIDE, by=by)
        x_mask = mask_m[:, None]
        if C_IN != BLOCK_K:
            x_mask = x_mask & mask_k[None, :]
        x_ptrs = x_ptr + rows[:, None] + (offs_k * x_strides[1])[None, :]
        x_tile = load_voxels(x_ptrs, x_mask, CONFIG.X_VOXELS_INNER)
        acc = tl.dot(x_tile, w_tile, input_precision=PRECISION)  # (BLOCK_M, BLOCK_K) x (BLOCK_K, BLOCK_N)
        if bias_ptr is not None:
            acc = with_bias(acc, bias, y_ptr, EPILOGUE)
        store_phases(
            acc, y_ptr, first_channel=0, strides=y_strides, tile=tile_m, n=n, cells=cells, origin=origin,
            out_size=out_size, tile_n=tile_n, CHANNELS=C_OUT, PHASES=STRIDE, STRIDE=STRIDE, FACTS=FACTS,
            CONFIG=CONFIG, WIDE=WIDE, by=by, residual_ptr=residual_ptr, slopes=slopes,
        )  # fmt: skip


def launches(problem, config, x, weight, bias, out=None, **epilogue):
    config = _deep(problem, config)
    programs = grid(problem, config, multiprocessors(x.device) * config.pop("RESIDENT"))
    return phases.forward(
        forward_shuffle_resident_kernel, problem, config, x, weight, bias, out, grid=programs, **epilogue
    )


def grid(problem: Problem, config: Config, slots: int) -> int:
    """Programs: as many as there is room for, a multiple of the columns' tiles, and no more than there are tiles."""
    across = triton.cdiv(phases.columns(problem, config["ROWS"]), config["BLOCK_N"])
    return min(tiles.tiles_of(problem.n, phases.cells(problem), config), max(1, slots // max(1, across))) * across


def supports(problem: Problem, device: torch.device) -> str | None:
    why_not = forward_shuffle.supports(problem, device)
    if why_not is None and problem.groups > 1:
        why_not = f"{problem.groups} groups: each has a weight of its own"
    if why_not is None and problem.c_in > DEEPEST[problem.dtype.itemsize]:
        why_not = f"c_in={problem.c_in}: at most {DEEPEST[problem.dtype.itemsize]} channels fit one step of the depth"
    return why_not


def default(problem: Problem, device: torch.device):
    base = forward_shuffle.default(problem, device)
    config = {key: value for key, value in base.items() if key not in ("BLOCK_K", "GROUP_M")}
    # For sm_90 64 to 99 registers in 8 warps, 3 programs in a multiprocessor; twice the columns take 142 and spill on
    # sm_100.
    config["BLOCK_N"] = min(config["BLOCK_N"], 128 if problem.dtype.itemsize == 2 else 64)
    config["num_warps"] = 8
    while config["num_stages"] > 1 and not _fits(problem, config):
        config["num_stages"] -= 1
    return {**config, "RESIDENT": 3}


def _deep(problem: Problem, config: Config) -> dict[str, int]:
    """With BLOCK_K: all of c_in in one step."""
    return {**config, "BLOCK_K": tiles.power_of_two(problem.c_in, 16, DEEPEST[problem.dtype.itemsize])}


def _shared_bytes(problem: Problem, config: Config) -> int:
    """The weight, the pipeline of x, and a tile of y, which threads exchange before they store it."""
    rows = config["BLOCK_N"] + config["BLOCK_M"] * pipeline_buffers(config["num_stages"])
    elements = rows * _deep(problem, config)["BLOCK_K"] + config["BLOCK_M"] * config["BLOCK_N"]
    return elements * problem.dtype.itemsize + BARRIERS


def _fits(problem: Problem, config: Config) -> bool:
    """The target; the tiles alone fit every one, so that a multiprocessor of an H100 has room for two programs."""
    rows = config["BLOCK_N"] + config["BLOCK_M"] * config["num_stages"]
    loaded = rows * _deep(problem, config)["BLOCK_K"] * problem.dtype.itemsize
    return loaded <= tiles.SHARED_BYTES and _shared_bytes(problem, config) <= shared_bytes()


def space(problem: Problem, device: torch.device):
    base = _deep(problem, default(problem, device))
    more: dict[str, Any] = {
        "WEIGHT": (0, 1, 2),
        "ROWS": (0, 1) if phases.whole_rows(problem) else (),
        "RESIDENT": (1, 2, 3, 4),
    }
    configs = tiles.around(base, problem, width=phases.cells(problem)[2], **more)
    deep = (each for each in configs if each["BLOCK_K"] == base["BLOCK_K"])
    shallow = ({key: value for key, value in each.items() if key != "BLOCK_K"} for each in deep)
    return tuple(each for each in shallow if _fits(problem, each))


def work(problem: Problem, config: Config) -> Work:
    deep = _deep(problem, config)
    counts, slots = forward_shuffle.work(problem, deep), grid(problem, config, MULTIPROCESSORS * config["RESIDENT"])
    weight_bytes = float(slots * deep["BLOCK_K"] * config["BLOCK_N"] * problem.dtype.itemsize)
    across = triton.cdiv(phases.columns(problem, config["ROWS"]), config["BLOCK_N"])
    moved = size_of(problem, "x") * across + size_of(problem, "y") + weight_bytes
    return replace(
        counts,
        cache_bytes=max(counts.memory_bytes, moved),
        programs=slots,
        shared_bytes=_shared_bytes(problem, config),
    )


VARIANT = Variant(
    "forward_shuffle_resident", "forward",
    "kernel <= stride, few channels in: a persistent grid that keeps the weight", "triton",
    launches=launches, supports=supports, space=space, default=default, work=work,
    epilogue=computes,
)  # fmt: skip
