"""Shared by the box kernels: tensor descriptors of channels_last_3d volumes, boxes of voxels, the loop over them.

A tensor descriptor (TMA on Hopper and later) fetches a box (1, d, h, w, channels) with one instruction and reads zero
outside the volume, so a tap is a shifted box and needs no mask.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl

from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_buffers import ALIGNMENT, Buffer, Descriptor, copied
from tritonconv.kernels.triton_device import next_step, offset, settled, widened
from tritonconv.kernels.triton_launch import multiprocessors, refusal
from tritonconv.kernels.triton_store import store_outputs
from tritonconv.kernels.triton_target import compute_capability, target
from tritonconv.kernels.triton_weights import packed, strides
from tritonconv.kernels.weight_orders import OUT_INNERMOST
from tritonconv.kernels.work import Work, parts, tap_gemm
from tritonconv.problem import Problem, Triple

# Of the base and of every stride but the last, in bytes: ALIGNMENT (CUDA driver API, cuTensorMapEncodeTiled).
TMA_FROM = 90  # compute capability (CUDA C++ programming guide, "Tensor Memory Access")
MOST_REGISTERS = 255  # of a thread


@triton.constexpr_function
def box_voxel_count(CONFIG):
    """BLOCK_M: the voxels of a box."""
    return int(CONFIG.BLOCK_D) * int(CONFIG.BLOCK_H) * int(CONFIG.BLOCK_W)


@triton.jit
def boxes(size, CONFIG: tl.constexpr):
    """How many boxes cover one volume."""
    return tl.cdiv(size[0], CONFIG.BLOCK_D) * tl.cdiv(size[1], CONFIG.BLOCK_H) * tl.cdiv(size[2], CONFIG.BLOCK_W)


@triton.jit
def box_corner(tile, size, CONFIG: tl.constexpr):
    """image, d, h, w of the first voxel of a box."""
    across = tl.cdiv(size[2], CONFIG.BLOCK_W)
    row = tile // across
    down = tl.cdiv(size[1], CONFIG.BLOCK_H)
    plane = row // down
    deep = tl.cdiv(size[0], CONFIG.BLOCK_D)
    return plane // deep, plane % deep * CONFIG.BLOCK_D, row % down * CONFIG.BLOCK_H, tile % across * CONFIG.BLOCK_W


@triton.jit
def box_voxels(d, h, w, size, CONFIG: tl.constexpr, WIDE: tl.constexpr):
    """d, h, w and mask, each (BLOCK_M,), of the voxels of a box with this corner."""
    lane = widened(tl.arange(0, box_voxel_count(CONFIG)), WIDE)
    d = d + lane // (CONFIG.BLOCK_H * CONFIG.BLOCK_W)
    h = h + lane // CONFIG.BLOCK_W % CONFIG.BLOCK_H
    w = w + lane % CONFIG.BLOCK_W
    return d, h, w, (d < size[0]) & (h < size[1]) & (w < size[2])


@triton.jit
def box_zeros(CONFIG: tl.constexpr, VOXELS_LAST: tl.constexpr):
    """The sums that :func:`box_gemm` begins with."""
    BLOCK_M: tl.constexpr = box_voxel_count(CONFIG)
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    ROWS: tl.constexpr = BLOCK_N if VOXELS_LAST else BLOCK_M
    return tl.zeros((ROWS, BLOCK_M * BLOCK_N // ROWS), tl.float32)


@triton.jit
def box_gemm(
    acc,  # of box_zeros
    volume,  # descriptor (n, d, h, w, k)
    weight,  # descriptor (tap, k, n), or (tap, n, k) where K_INNERMOST
    image, d, h, w,  # the corner that tap m = 0 reads
    tap, taps,  # (d, h, w): the first tap and how many there are
    column,
    TAP_STEP: tl.constexpr,  # (d, h, w): tap m is tap + m*TAP_STEP ...
    VOXEL_STEP: tl.constexpr,  # ... and reads the box at + m*VOXEL_STEP
    KERNEL: tl.constexpr,
    K: tl.constexpr,
    K_INNERMOST: tl.constexpr,
    CONFIG: tl.constexpr,
    VOXELS_LAST: tl.constexpr,  # of voxels_last
    PRECISION: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """acc plus the sum over taps and channels k of volume[voxel(tap), k] * weight[tap, k, n]."""
    BLOCK_M: tl.constexpr = box_voxel_count(CONFIG)
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    k, md, mh, mw = 0, 0, 0, 0
    for _ in range(taps[0] * taps[1] * taps[2] * tl.cdiv(K, BLOCK_K)):
        corner_d = d + md * VOXEL_STEP[0]
        corner_h = h + mh * VOXEL_STEP[1]
        corner_w = w + mw * VOXEL_STEP[2]
        plane = (tap[0] + md * TAP_STEP[0]) * KERNEL[1] + tap[1] + mh * TAP_STEP[1]
        index = plane * KERNEL[2] + tap[2] + mw * TAP_STEP[2]
        a_tile = tl.reshape(volume.load([image, corner_d, corner_h, corner_w, k]), (BLOCK_M, BLOCK_K))
        if K_INNERMOST:
            w_tile = tl.trans(tl.reshape(weight.load([index, column, k]), (BLOCK_N, BLOCK_K)))
        else:
            w_tile = tl.reshape(weight.load([index, k, column]), (BLOCK_K, BLOCK_N))
        if VOXELS_LAST:
            acc = tl.dot(tl.trans(w_tile), tl.trans(a_tile), acc, input_precision=PRECISION)
        else:
            acc = settled(tl.dot(a_tile, w_tile, acc, input_precision=PRECISION), WAIT)
        k, md, mh, mw = next_step(k, md, mh, mw, taps, K=K, BLOCK_K=BLOCK_K)
    return acc


@triton.jit
def store_box(
    out_ptr, strides, acc, image, d, h, w, mask_m, column, CHANNELS: tl.constexpr, CONFIG: tl.constexpr,
    WIDE: tl.constexpr, residual_ptr=None, slopes=None, EPILOGUE: tl.constexpr = None,
):  # fmt: skip
    """Stores the sums (BLOCK_M, BLOCK_N) at the voxels (BLOCK_M,) d, h, w and the channels from ``column`` on; the last
    three as of ``store_outputs``."""
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    channel = widened(column + tl.arange(0, BLOCK_N), WIDE)
    rows = offset(strides, widened(image, WIDE), 0, d, h, w)
    if EPILOGUE is None:
        out_ptrs = out_ptr + rows[:, None] + (channel * strides[1])[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & (channel < CHANNELS)[None, :])
    else:
        mask_n = channel < CHANNELS
        store_outputs(
            out_ptr, strides, rows, channel, acc, mask_m=mask_m, mask_n=mask_n, VOXELS_INNER=False,
            residual_ptr=residual_ptr, slopes=slopes, EPILOGUE=EPILOGUE,
        )  # fmt: skip


def box_refusal(problem: Problem, device: torch.device) -> str | None:
    """Why the box kernels do not serve the problem; None where they do."""
    why_not = refusal(problem, device)
    if why_not is not None:
        return why_not
    gpu = target()
    if gpu is not None and (gpu.backend != "cuda" or gpu.arch < TMA_FROM):
        return f"{gpu.backend} {gpu.arch} has no instruction that copies a box (sm_{TMA_FROM} and later have)"
    if problem.layout != "ndhwc":
        return "a box needs contiguous channels (channels_last_3d)"
    if problem.groups > 1:
        return f"a box does not stop at the edge of a group ({problem.groups} groups)"
    per_16_bytes = ALIGNMENT // problem.dtype.itemsize
    if problem.c_in % per_16_bytes or problem.c_out % per_16_bytes:
        return f"c_in={problem.c_in} and c_out={problem.c_out} must be multiples of {per_16_bytes} (16-byte strides)"
    if problem.c_in < 16 or problem.c_out < 16:
        return f"c_in={problem.c_in} and c_out={problem.c_out} must be at least 16 to fill a box"
    return None


def describable(volume: Buffer) -> Buffer:
    """The volume (n, c, d, h, w) if a descriptor can address it, else a dense channels_last_3d copy."""
    item, steps = volume.dtype.itemsize, volume.stride()
    outer = [step for axis, step in enumerate(steps) if axis != 1 and volume.shape[axis] > 1]
    fits = all(step > 0 and step * item % ALIGNMENT == 0 for step in outer)
    if fits and steps[1] == 1 and volume.aligned:
        return volume
    # Also a tensor that is dense already, wherever it starts.
    return copied(volume, partial(torch.clone, memory_format=torch.channels_last_3d), always=True)


def volume(buffer: Buffer, box: Triple, block_k: int) -> Descriptor:
    """Descriptor (n, d, h, w, c) of a volume, with boxes (1, *box, block_k)."""
    view = buffer.view(lambda tensor: tensor.permute(0, 2, 3, 4, 1))
    # The stride of an axis of size 1 is never used, but it must be aligned like the others.
    strides = [
        step if size > 1 else _aligned_stride(buffer) for size, step in zip(view.shape, view.stride(), strict=True)
    ]
    return Descriptor(view, view.shape, (*strides[:-1], 1), (1, *box, block_k))


def _aligned_stride(volume: Buffer) -> int:
    return max(1, ALIGNMENT // volume.dtype.itemsize) * math.ceil(volume.shape[1] * volume.dtype.itemsize / ALIGNMENT)


def taps_first(weight: Buffer, order: int, block: tuple[int, int]) -> Descriptor:
    """Descriptor of the packed weight: (tap, c_in, c_out), or (tap, c_out, c_in) for IN_INNERMOST."""
    weight = packed(weight, order)
    c_in, c_out, tap = strides(weight)
    if any(step * weight.dtype.itemsize % ALIGNMENT for step in (c_in + c_out - 1, tap)) or not weight.aligned:
        weight = packed(copied(weight, torch.Tensor.contiguous), order)
        c_in, c_out, tap = strides(weight)
    taps = math.prod(weight.shape[2:])
    if order == OUT_INNERMOST:
        return Descriptor(weight, (taps, *weight.shape[:2]), (tap, c_in, 1), (1, *block))
    return Descriptor(weight, (taps, weight.shape[1], weight.shape[0]), (tap, c_out, 1), (1, *block))


@lru_cache(4096)
def box_of(size: Triple, block_m: int) -> Triple:
    """(BLOCK_D, BLOCK_H, BLOCK_W), powers of two whose product is ``block_m``, that covers ``size`` with least waste.

    Among equals the one with the smallest surface wins, then the widest: fewer halo voxels, longer rows.
    """
    powers = [2**e for e in range(block_m.bit_length())]
    shapes = [(d, h, block_m // (d * h)) for d in powers for h in powers if d * h <= block_m]

    def cost(shape):
        covered = math.prod(math.ceil(s / b) * b for s, b in zip(size, shape, strict=True))
        d, h, w = shape
        return covered, d * h + h * w + d * w, -w

    return min(shapes, key=cost)


def voxels_last(config) -> bool:
    """VOXELS_LAST: whether the sums are (channels, voxels), and the box the right operand.

    For sm_90, where a left one goes through registers to be reshaped. The left one is then the weight's: 64 rows are
    the fewest that its products have. On sm_100 no operand does, and the sums so turned spill. The interpreter does as
    sm_90.
    """
    return config["BLOCK_N"] >= 64 and compute_capability() in (0, 90)


def programs(device: torch.device, tiles: int) -> int:
    """The persistent grid: one program per multiprocessor, or fewer where there are fewer tiles."""
    return min(tiles, multiprocessors(device))


def register_limit() -> dict[str, int]:
    """Of a launch, as an option of Triton's: on sm_100 all registers that a program of 8 warps may have.

    Without a limit ptxas keeps a program of the persistent grid to 64, 80 or 128 registers, so that there were room for
    others, and spills 4 to 20 bytes for it.
    """
    return {"maxnreg": MOST_REGISTERS} if compute_capability() >= 100 else {}


def box_shape(config) -> Triple:
    return config["BLOCK_D"], config["BLOCK_H"], config["BLOCK_W"]


def box_tiles(problem: Problem, size: Triple, channels: int, config) -> int:
    """How many boxes cover n images of ``size``, by the tiles of ``channels``."""
    along = [-(-s // b) for s, b in zip(size, box_shape(config), strict=True)]
    return problem.n * math.prod(along) * parts(channels, config["BLOCK_N"])


PER_LOAD = 7  # instructions for 16 bytes of each thread: one thread asks for whole boxes, but all wait at barriers


def boxes_work(problem: Problem, pass_name: str, config, size: Triple, channels: int, depth: int) -> Work:
    """Tiles over boxes of ``size``; ``depth`` is summed per tile over all phases. The weight is packed each time."""
    each = box_tiles(problem, size, channels, config)
    packed_weight = {**config, "WEIGHT": OUT_INNERMOST}
    counts = tap_gemm(
        problem, pass_name, packed_weight, min(each, MULTIPROCESSORS), each * math.ceil(depth / config["BLOCK_K"]),
        block_m=math.prod(box_shape(config)), per_load=PER_LOAD,
    )  # fmt: skip
    phases = math.prod(problem.stride) if pass_name == "forward" else 1
    return replace(counts, programs=min(each * phases, MULTIPROCESSORS))  # persistent: one per multiprocessor
