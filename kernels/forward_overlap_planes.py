"""Forward for very few output channels, plane after plane: as forward_overlap, and what overlaps along d is carried on.

:mod:`~tritonconv.kernels.forward_overlap` multiplies a box of voxels with every tap and adds neighbours. In a
box of 128 voxels about half are halo, and each program waits for its one load. Here a program walks along d: the
products that belong to the next cell stay in registers, no plane but the first is a halo, and the next planes of x are
on their way while one is multiplied.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from tritonconv.kernels import forward_overlap
from tritonconv.kernels import triton_phases as phases
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.forward_overlap import (
    add_neighbours,
    columns,
    next_power,
    phases_as_rows,
    summed_columns,
    window,
)
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_channels_last import copying
from tritonconv.kernels.triton_device import aligned, inside, offset, product, widened
from tritonconv.kernels.triton_epilogue import computes, finished, with_bias
from tritonconv.kernels.triton_launch import RUN_TIME, Y_STRIDES, accounting, refusal
from tritonconv.kernels.triton_phases import cells_of, window_of
from tritonconv.kernels.triton_target import BARRIERS, pipeline_buffers, shared_bytes
from tritonconv.kernels.triton_weights import preferred
from tritonconv.kernels.variant import SPREADS_WEIGHT, Config, Variant
from tritonconv.kernels.work import WARP, Work, tap_gemm
from tritonconv.problem import Problem

DEEPEST = {2: 256, 4: 128}  # channels of x, by the bytes of an element: one step of the depth
NARROW = 32  # such channels at most where they come one by one, through registers
WAVES = 8  # programs per multiprocessor, at least, before one walks over more planes; about three fit at once
FEWEST_PLANES = 4  # that a program walks over: the first one is a halo
PER_SUM = 3.5  # instructions for each sum of a thread, folds and stores (Triton 3.6.0 and 3.9.0, sm_90)


@triton.jit(launch_metadata=accounting, do_not_specialize=(*RUN_TIME, *Y_STRIDES))
def forward_overlap_planes_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    w_ptr,  # (c_in, c_out, taps)
    bias_ptr,  # (c_out,) or None
    y_ptr,  # (n, c_out, od, oh, ow)
    residual_ptr, slopes,  # see triton_epilogue
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    strides, y_n, y_c, y_d, y_h, y_w,  # of x, of the weight; y's
    LAYER: tl.constexpr, CONFIG: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
    UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns PLANES planes of cells along d, in each BLOCK_H x BLOCK_W input voxels with their halo.

    Rows: the voxels of a plane; columns: (phase, channel, delta along h, w and d); depth: input channels. A cell's
    outputs are the sum over delta of ``x[cell - delta] * weight[stride * delta + phase]``.
    """
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    PLANES: tl.constexpr = CONFIG.PLANES
    EPILOGUE: tl.constexpr = CONFIG.EPILOGUE
    x_strides, w_strides = aligned(strides, UNITS)
    y_strides = (y_n, y_c, y_d, y_h, y_w)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    BLOCK_M: tl.constexpr = BLOCK_H * BLOCK_W
    WINDOW: tl.constexpr = window_of(KERNEL, STRIDE)
    DELTAS: tl.constexpr = product(WINDOW)
    CHANNELS: tl.constexpr = next_power(C_OUT)
    SUMS: tl.constexpr = product(STRIDE) * CHANNELS
    BLOCK_N: tl.constexpr = 16 if SUMS * DELTAS < 16 else SUMS * DELTAS
    cells, first = cells_of(crop, out_size, STRIDE)
    boxes_h = tl.cdiv(cells[1], BLOCK_H - (WINDOW[1] - 1))
    boxes_w = tl.cdiv(cells[2], BLOCK_W - (WINDOW[2] - 1))
    walks = tl.cdiv(cells[0], PLANES)
    pid = tl.program_id(0)
    # The cell of a voxel is the one whose delta 0 it is.
    corner_w = pid % boxes_w * (BLOCK_W - (WINDOW[2] - 1)) - (WINDOW[2] - 1)
    corner_h = pid // boxes_w % boxes_h * (BLOCK_H - (WINDOW[1] - 1)) - (WINDOW[1] - 1)
    corner_d = pid // (boxes_w * boxes_h) % walks * PLANES
    image = widened(pid // (boxes_w * boxes_h * walks), WIDE)
    row = tl.arange(0, BLOCK_M)
    h, w = first[1] + corner_h + row // BLOCK_W, first[2] + corner_w + row % BLOCK_W
    mask_m = inside(h, size[1]) & inside(w, size[2])
    offs_k = widened(tl.arange(0, BLOCK_K), WIDE)
    mask_k = offs_k < C_IN
    x_rows = offset(x_strides, image, 0, 0, widened(h, WIDE), widened(w, WIDE))
    x_ptrs = x_ptr + x_rows[:, None] + (offs_k * x_strides[1])[None, :]

    column = tl.arange(0, BLOCK_N)
    delta, summed = column % DELTAS, column // DELTAS
    phase_d, phase_h, phase_w, channel = summed_columns(summed, C_OUT, STRIDE)
    tap_d = delta % WINDOW[0] * STRIDE[0] + phase_d  # innermost: a thread of the product holds neighbouring columns
    tap_w = delta // WINDOW[0] % WINDOW[2] * STRIDE[2] + phase_w
    tap_h = delta // (WINDOW[0] * WINDOW[2]) * STRIDE[1] + phase_h
    tapped = (tap_d < KERNEL[0]) & (tap_h < KERNEL[1]) & (tap_w < KERNEL[2]) & (channel < C_OUT)
    tap = (tap_d * KERNEL[1] + tap_h) * KERNEL[2] + tap_w
    w_columns = w_ptr + widened(tap, WIDE) * w_strides[2] + channel * w_strides[1]
    w_mask = tapped[None, :] & mask_k[:, None]
    w_tile = tl.load(w_columns[None, :] + (offs_k * w_strides[0])[:, None], mask=w_mask, other=0.0)

    # A voxel and its phases along w become rows of the sums, so that the lanes of a warp write a row of y.
    PAIR: tl.constexpr = STRIDE[2]
    COLUMNS: tl.constexpr = BLOCK_N // (DELTAS * PAIR)  # SUMS / PAIR, or more of them that are nothing
    row = tl.arange(0, BLOCK_M * PAIR)
    at_h, at_w = row // (BLOCK_W * PAIR), row % (BLOCK_W * PAIR)
    own = (at_h >= WINDOW[1] - 1) & (at_w >= (WINDOW[2] - 1) * PAIR)
    out_w = (first[2] + corner_w) * PAIR - crop[2] + at_w
    column = tl.arange(0, COLUMNS)
    channel = column % CHANNELS
    out_h = ((first[1] + corner_h + at_h) * STRIDE[1] - crop[1])[:, None] + (column // CHANNELS % STRIDE[1])[None, :]
    ahead_d = column // (CHANNELS * STRIDE[1]) - crop[0]  # (COLUMNS,): of the cell's first output along d
    lowest = tl.maximum((first[0] + corner_d) * STRIDE[0] - crop[0], 0)  # along d; the plane before is a halo
    y_mask = own[:, None] & ((channel < C_OUT) & (column < SUMS // PAIR))[None, :] & inside(out_w, out_size[2])[:, None]
    y_mask = y_mask & inside(out_h, out_size[1])
    offsets = offset(
        y_strides, image, widened(channel, WIDE)[None, :], 0, widened(out_h, WIDE), widened(out_w, WIDE)[:, None]
    )
    y_ptrs = y_ptr + offsets
    bias = tl.zeros((COLUMNS,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channel, mask=channel < C_OUT, other=0.0).to(tl.float32)

    carried = tl.zeros((BLOCK_M, BLOCK_N // WINDOW[0]), tl.float32)  # the plane before: products of delta 1 along d
    for cell in range(corner_d - (WINDOW[0] - 1), tl.minimum(corner_d + PLANES, cells[0])):
        d = tl.zeros((1,), tl.int32) + (cell + first[0])
        x_mask = (mask_m & inside(d, size[0]))[:, None]
        if C_IN != BLOCK_K:
            x_mask = x_mask & mask_k[None, :]
        x_tile = tl.load(x_ptrs + (widened(d, WIDE) * x_strides[2])[:, None], mask=x_mask, other=0.0)
        sums = tl.dot(x_tile, w_tile, input_precision=PRECISION)  # (BLOCK_M, BLOCK_K) x (BLOCK_K, BLOCK_N)
        if WINDOW[0] == 2:
            mine, later = tl.split(tl.reshape(sums, (BLOCK_M, BLOCK_N // 2, 2)))
            sums = mine + carried
            carried = later
        if WINDOW[2] == 2:
            sums = add_neighbours(sums, 1)
        if WINDOW[1] == 2:
            sums = add_neighbours(sums, BLOCK_W)
        sums = with_bias(phases_as_rows(sums, PAIR), bias, y_ptr, EPILOGUE)
        out_d = d * STRIDE[0] + ahead_d
        stored = y_mask & ((out_d >= lowest) & (out_d < out_size[0]))[None, :]
        if EPILOGUE is None:
            tl.store(y_ptrs + (widened(out_d, WIDE) * y_d)[None, :], sums.to(y_ptr.dtype.element_ty), mask=stored)
        else:
            at = offsets + (widened(out_d, WIDE) * y_d)[None, :]
            own_channel = tl.where(channel < C_OUT, channel, 0)[None, :]
            y_tile = finished(
                sums, residual_ptr, at, stored, slopes=slopes, channel=own_channel, y_ptr=y_ptr, EPILOGUE=EPILOGUE
            )
            tl.store(y_ptr + at, y_tile, mask=stored)


def launches(problem, config, x, weight, bias, out=None, **epilogue):
    return forward_overlap.forward(
        forward_overlap_planes_kernel, programs(problem, config), problem, config, x, weight, bias, out,
        BLOCK_K=_block_k(problem), **epilogue,
    )  # fmt: skip


def _block_k(problem: Problem) -> int:
    """All input channels."""
    return tiles.power_of_two(problem.c_in, 16, DEEPEST[problem.dtype.itemsize])


def programs(problem: Problem, config: Config) -> int:
    """How many programs there are."""
    (depth, *cells), (_, *reads) = phases.cells(problem), window(problem)
    own = [config[f"BLOCK_{axis}"] - (r - 1) for axis, r in zip("HW", reads, strict=True)]
    across = math.prod(-(-c // o) for c, o in zip(cells, own, strict=True))
    return problem.n * -(-depth // config["PLANES"]) * across


def supports(problem: Problem, device: torch.device) -> str | None:
    why_not = refusal(problem, device) or forward_overlap.supports(problem, device)
    if why_not is not None:
        return why_not
    most = DEEPEST[problem.dtype.itemsize] if problem.layout == "ndhwc" else NARROW
    if problem.c_in > most:
        return f"c_in={problem.c_in}: at most {most} channels fit one step of the depth in {problem.layout}"
    least = _shared_bytes(problem, {**default(problem, device), "num_stages": 1})
    if least > shared_bytes():
        return f"weight and tiles would take {least} bytes of shared memory, and a block has {shared_bytes()}"
    return None


def _config(problem: Problem, block_m: int, planes: int | None = None) -> dict[str, int]:
    """``block_m`` voxels of a plane; without ``planes`` as many as leave :data:`WAVES` of programs."""
    (depth, *cells), (_, *reads) = phases.cells(problem), window(problem)
    least = 4 if problem.layout == "ndhwc" else 8
    shapes = [(block_m // w, w) for w in (2**bit for bit in range(block_m.bit_length()))]
    shapes = [s for s in shapes if s[1] >= least and all(b >= 4 or r == 1 for b, r in zip(s, reads, strict=True))]

    def voxels(shape: tuple[int, int]) -> tuple[int, int]:
        counts = (-(-c // (b - (r - 1))) for c, b, r in zip(cells, shape, reads, strict=True))
        return math.prod(counts), -shape[1]

    block_h, block_w = min(shapes, key=voxels)
    config = {
        "BLOCK_H": block_h,
        "BLOCK_W": block_w,
        "PLANES": planes or depth,
        "num_warps": 8 if block_m * columns(problem) >= 128 * 128 else 4,
        "num_stages": 3,
        "WEIGHT": preferred(problem),
    }
    while not planes and config["PLANES"] > FEWEST_PLANES and programs(problem, config) < WAVES * MULTIPROCESSORS:
        config["PLANES"] = -(-config["PLANES"] // 2)
    return config


def default(problem: Problem, device: torch.device):
    item = problem.dtype.itemsize
    config = _config(problem, 128 if max(columns(problem), problem.c_in) * item <= 256 else 64)
    while config["num_stages"] > 1 and _shared_bytes(problem, config) > shared_bytes():
        config["num_stages"] -= 1
    return config


def space(problem: Problem, device: torch.device):
    base = default(problem, device)
    configs = [base, *(_config(problem, m) for m in (64, 128, 256) if m * columns(problem) <= 256 * 128)]
    near = (-(-base["PLANES"] // 2), base["PLANES"] * 2)
    configs += [_config(problem, base["BLOCK_H"] * base["BLOCK_W"], planes) for planes in near]
    configs += [{**base, key: value} for key, values in (("num_stages", (1, 2, 3, 4)), ("num_warps", (4, 8)),
                                                         ("WEIGHT", (0, 1, 2))) for value in values]  # fmt: skip
    fitting = [c for c in configs if _shared_bytes(problem, c) <= shared_bytes()]
    return tuple(config for index, config in enumerate(fitting) if config not in fitting[:index])


def _shared_bytes(problem: Problem, config: Config) -> int:
    """Of the weight's tile, of those of x on their way, and of the sums of a plane, which threads exchange through it.

    Compiled for sm_80 and sm_90 in two stages and more, bfloat16 in NDHWC takes just that; the others take less.
    Without a pipeline the one tile of x has been read when the sums need the room.
    """
    voxels = config["BLOCK_H"] * config["BLOCK_W"]
    row = _block_k(problem) * problem.dtype.itemsize
    tile, sums = voxels * row, 4 * voxels * columns(problem) // window(problem)[0]
    stages = config["num_stages"]
    beside = max(tile, sums) if stages == 1 else pipeline_buffers(stages) * tile + sums
    return columns(problem) * row + beside + BARRIERS


def work(problem: Problem, config: Config) -> Work:
    voxels, products = config["BLOCK_H"] * config["BLOCK_W"], columns(problem)
    count, halo = programs(problem, config), window(problem)[0] - 1
    steps = count * (min(config["PLANES"], phases.cells(problem)[0]) + halo)
    tile = {**config, "BLOCK_N": products, "BLOCK_K": _block_k(problem)}
    counts = tap_gemm(problem, "forward", tile, count, steps, block_m=voxels)
    # The weight's tile is loaded once by a program, and the sums of a plane alone are stored.
    item = problem.dtype.itemsize
    again = (steps - count) * products * _block_k(problem) * item
    stored = (steps - count * halo) * voxels * products // math.prod(window(problem)) * item
    cached = counts.cache_bytes - again - count * voxels * products * item + stored
    return replace(
        counts,
        cache_bytes=max(counts.memory_bytes, cached),
        shared_bytes=_shared_bytes(problem, config),
        instructions=counts.instructions + steps * voxels * products / WARP * PER_SUM,
    )


VARIANT = copying(Variant(
    "forward_overlap_planes", "forward",
    "very few channels out: plane after plane along d, overlapping products carried and added in registers", "triton",
    launches=launches, supports=supports, space=space, default=default, spreads_nonfinite=SPREADS_WEIGHT, work=work,
    epilogue=computes,
), ("x",), "c_in")  # fmt: skip
