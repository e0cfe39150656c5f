"""Backward-data where kernel = stride in channels-last: each program keeps the weight and takes many tiles.

As :mod:`~tritonconv.kernels.backward_data_shuffle`, whose program for a tile of voxels loads the whole weight: more
bytes than its grad_y where the tile has fewer voxels than there are input channels. Here a persistent grid loads it
once, all taps and output channels in one step of the depth, and the next tile of grad_y is on its way meanwhile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_phases as phases
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_device import aligned, voxel_tiles, widened
from tritonconv.kernels.triton_launch import WIDE_FROM, accounting, multiprocessors, refusal
from tritonconv.kernels.triton_phases import load_phases
from tritonconv.kernels.triton_shuffle import row_dividers, store_voxels, taps
from tritonconv.kernels.triton_target import BARRIERS, pipeline_buffers, shared_bytes
from tritonconv.kernels.variant import Config, Variant
from tritonconv.kernels.weight_orders import IN_INNERMOST, OUT_INNERMOST
from tritonconv.kernels.work import Work, size_of, tap_gemm
from tritonconv.problem import Problem

WIDEST, DEEPEST = 256, {2: 1024, 4: 128}  # columns of one product, and its depth by the bytes of an element


@triton.jit(launch_metadata=accounting, do_not_specialize=phases.RUN_TIME)
def backward_data_shuffle_resident_kernel(
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    w_ptr,  # (c_in, c_out, taps)
    grad_x_ptr,  # (n, c_in, d, h, w)
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    by_d, by_h, by_w, shift_d, shift_h, shift_w,
    strides,  # of grad_y, of the weight, of grad_x
    LAYER: tl.constexpr, CONFIG: tl.constexpr, FACTS: tl.constexpr,
    UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns every ``num_programs``-th tile. Rows: BLOCK_M voxels; columns: input channels; depth: (tap, output
    channel), all of them in one step.
    """
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    BLOCK_W: tl.constexpr = CONFIG.BLOCK_W
    grad_y_strides, w_strides, grad_x_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    offs_n, offs_k = tl.arange(0, CONFIG.BLOCK_N), tl.arange(0, BLOCK_K)
    offs_n, offs_k = widened(offs_n, WIDE), widened(offs_k, WIDE)
    mask_n = offs_n < LAYER.C_IN
    tap, channel, mask_k = taps(offs_k, LAYER, CONFIG)
    w_ptrs = w_ptr + (channel * w_strides[0] + tap * w_strides[2])[:, None] + (offs_n * w_strides[1])[None, :]
    w_tile = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_K, BLOCK_N)

    by = row_dividers(by_d, by_h, by_w, shift_d, shift_h, shift_w, CONFIG=CONFIG, WIDE=WIDE)
    for tile in range(tl.program_id(0), voxel_tiles(n, size, BLOCK_M, BLOCK_W, WIDE), tl.num_programs(0)):
        grad_y_tile = load_phases(
            grad_y_ptr, grad_y_strides, tile, n=n, cells=size, origin=(0 - crop[0], 0 - crop[1], 0 - crop[2]),
            out_size=out_size, tile_n=0, CHANNELS=LAYER.C_OUT, PHASES=KERNEL, STRIDE=STRIDE, ROWS=CONFIG.ROWS,
            FACTS=FACTS, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_K, BLOCK_W=BLOCK_W, WIDE=WIDE, by=by,
        )  # fmt: skip
        acc = tl.dot(grad_y_tile, w_tile, input_precision=PRECISION)
        store_voxels(
            grad_x_ptr, grad_x_strides, tile, n=n, size=size, channel=offs_n, acc=acc, mask_n=mask_n, CONFIG=CONFIG,
            WIDE=WIDE, by=by,
        )  # fmt: skip


def launches(problem, config, grad_y, weight):
    config = _whole(problem, config)
    programs = grid(problem, config, multiprocessors(grad_y.device) * config.pop("RESIDENT"))
    return phases.backward_data(backward_data_shuffle_resident_kernel, problem, config, grad_y, weight, grid=programs)


def grid(problem: Problem, config: Config, slots: int) -> int:
    """Programs: as many as there is room for, and no more than there are tiles."""
    return max(1, min(tiles.tiles_of(problem.n, problem.size, _whole(problem, config)), slots))


def supports(problem: Problem, device: torch.device) -> str | None:
    why_not = refusal(problem, device)
    if why_not is None and not problem.tiles_exactly:
        why_not = "each output has one tap, and each tap one output, only where kernel = stride and nothing is cropped"
    if why_not is None and (problem.layout != "ndhwc" or problem.groups > 1):
        why_not = f"one group in ndhwc is served, not {problem.groups} in {problem.layout}"
    if why_not is not None:
        return why_not
    depth = phases.columns(problem, 0, problem.kernel)
    deepest = DEEPEST[problem.dtype.itemsize]
    if problem.c_in > WIDEST or depth > deepest:
        return f"{problem.c_in} input channels and {depth} taps and output channels: at most {WIDEST} and {deepest} fit"
    if not list(_fitting(problem)):
        return f"weight and tiles of {problem.c_in} x {depth} do not fit the shared memory of {shared_bytes()} bytes"
    return None


def _whole(problem: Problem, config: Config) -> dict[str, int]:
    """With BLOCK_N, BLOCK_K: all columns, all of the depth; and no rows along w."""
    depth = phases.columns(problem, 0, problem.kernel)
    return {
        **config,
        "BLOCK_N": tiles.power_of_two(problem.c_in, 16, WIDEST),
        "BLOCK_K": tiles.power_of_two(depth, 16, DEEPEST[problem.dtype.itemsize]),
        "BLOCK_W": 0,
        "ROWS": 0,
    }


def _shared_bytes(problem: Problem, config: Config) -> int:
    """The weight, the pipeline of grad_y, and a tile of grad_x, which threads exchange before they store it."""
    whole = _whole(problem, config)
    rows = whole["BLOCK_N"] + config["BLOCK_M"] * pipeline_buffers(config["num_stages"])
    elements = rows * whole["BLOCK_K"] + config["BLOCK_M"] * whole["BLOCK_N"]
    return elements * problem.dtype.itemsize + BARRIERS


def _fitting(problem: Problem) -> Iterator[dict[str, int]]:
    """The configs that fit the target, best guess first: the most programs that share a multiprocessor, then rows."""
    order = IN_INNERMOST if problem.dtype.itemsize == 2 else OUT_INNERMOST  # as of backward_data_shuffle
    whole, far = _whole(problem, {}), math.prod(problem.y_shape) >= WIDE_FROM  # offsets of 64 bits
    wide, row_bytes = whole["BLOCK_N"], whole["BLOCK_K"] * problem.dtype.itemsize
    rows = (64, 128) if problem.dtype.itemsize == 2 else (64,)  # 128 of float32 spill on sm_100
    for block_m, stages in itertools.product(rows, (2, 3)):
        # A step loads whole rows of grad_y: each address takes a register, two where it is of 64 bits.
        much = block_m * row_bytes * (2 if far else 1) > 4 * tiles.MOST_LOADED
        warps = 8 if much or block_m * wide >= 128 * 64 or problem.dtype.itemsize == 4 else 4
        config = {"BLOCK_M": block_m, "num_warps": warps, "num_stages": stages, "WEIGHT": order, "RESIDENT": 1}
        resident = shared_bytes() // _shared_bytes(problem, config)
        if resident:
            yield {**config, "RESIDENT": min(4, resident)}


def default(problem: Problem, device: torch.device):
    return max(_fitting(problem), key=lambda config: (config["RESIDENT"] * config["BLOCK_M"], -config["num_stages"]))


def space(problem: Problem, device: torch.device):
    base = default(problem, device)
    configs = [base, *_fitting(problem)]
    configs += [{**base, key: value} for key, values in (("RESIDENT", (1, 2, 3, 4)), ("num_warps", (4, 8)))
                for value in values]  # fmt: skip
    return tuple(config for index, config in enumerate(configs) if config not in configs[:index])


def work(problem: Problem, config: Config) -> Work:
    whole, slots = _whole(problem, config), grid(problem, config, MULTIPROCESSORS * config["RESIDENT"])
    counts = tap_gemm(problem, "backward_data", whole, slots, tiles.tiles_of(problem.n, problem.size, whole))
    weight_bytes = float(slots * whole["BLOCK_K"] * whole["BLOCK_N"] * problem.dtype.itemsize)
    return replace(
        counts,
        cache_bytes=max(counts.memory_bytes, size_of(problem, "x", "y") + weight_bytes),
        shared_bytes=_shared_bytes(problem, config),
    )


VARIANT = Variant(
    "backward_data_shuffle_resident", "backward_data",
    "kernel = stride, channels-last: a persistent grid that keeps the weight", "triton",
    launches=launches, supports=supports, space=space, default=default, work=work,
)  # fmt: skip
