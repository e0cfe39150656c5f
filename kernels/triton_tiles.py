"""Tile sizes of the GEMM-shaped kernels: the default for a problem and the candidates around it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import triton

from tritonconv.kernels.registry import Config
from tritonconv.kernels.triton_target import LEAST_SHARED_BYTES, pipeline_buffers, shared_bytes
from tritonconv.problem import Problem, Triple

SHARED_BYTES = LEAST_SHARED_BYTES  # a default config fits every listed target
RIDGE = 206  # FLOP per byte from which an H200 is compute-bound: 989 TFLOP/s (bf16) by 4.8 TB/s (its data sheet)
# Without a software pipeline loads go through L1, where what one tap read waits for the next; cp.async passes it by.
UNSTAGED = (1,)
PROGRAMS = 132  # of one wave on an H100 or H200; a smaller machine only sees more waves


def power_of_two(value: int, low: int, high: int) -> int:
    """The power of two at or above ``value``, held between ``low`` and ``high``."""
    return min(high, max(low, triton.next_power_of_2(max(1, value))))


def block_w(problem: Problem, size: Triple, block_m: int) -> int:
    """BLOCK_W: along w in NCDHW, where w is contiguous, unless most of a row of the tile would be empty."""
    width = size[2]
    if problem.layout == "ndhwc" or width < 8:
        return 0
    return power_of_two(width if width <= block_m else 32, 8, min(block_m, 64))


def gemm(problem: Problem, size: Triple, columns: int, depth: int, programs: int = 1) -> dict[str, int]:
    """The default tile of a GEMM with n * prod(size) rows, ``columns`` columns and ``depth`` per tap.

    ``programs`` is how many such GEMMs one launch holds (phases, groups).
    """
    rows = problem.n * math.prod(size)
    half = problem.dtype.itemsize == 2
    block_n = power_of_two(columns, 16, 128 if half else 64)
    block_m = 128 if half else 64
    while block_m > 32 and programs * math.ceil(rows / block_m) * math.ceil(columns / block_n) < PROGRAMS:
        block_m //= 2
    # In NCDHW neighbours of a tap start at any address: 2-byte loads through registers, so a half as deep tile.
    block_k = power_of_two(depth, 16, 64 if half and problem.layout == "ndhwc" else 32)
    width = block_w(problem, size, block_m)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_W": width if half else min(width, block_m // 2),  # one row of float32 spills on sm_80
        "num_warps": 8 if block_m * block_n >= 128 * 128 else 4,
        "num_stages": 3,
    }


def packed_groups(problem: Problem) -> int:
    """PACK: groups that share one tile, so that 16 channels fill the dot on both sides; divides ``groups``."""
    channels = max(1, min(problem.c_in, problem.c_out) // problem.groups)
    pack = 1
    while pack * 2 * channels <= 16 and problem.groups % (pack * 2) == 0:
        pack *= 2
    return pack


def fits(config: Config, itemsize: int) -> bool:
    """Whether the operands of the pipeline fit the shared memory of a block of the target."""
    stage = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * itemsize
    return stage * pipeline_buffers(config["num_stages"]) <= shared_bytes()


def tiles_of(n: int, size: Triple, config: Config) -> int:
    """How many tiles cover n images of ``size``: the host's side of ``triton_device.voxel_tiles``."""
    block_m, width = config["BLOCK_M"], config["BLOCK_W"]
    if width == 0:
        return math.ceil(n * math.prod(size) / block_m)
    return math.ceil(n * size[0] * size[1] / (block_m // width)) * math.ceil(size[2] / width)


def around(base: Config, problem: Problem, **more: tuple[int, ...]) -> tuple[Config, ...]:
    """``base`` and its neighbours that fit: halved and doubled tiles, other stages, ``more`` values of other keys."""
    found = [dict(base)]
    for changed in _neighbours(base, more):
        if changed not in found and fits(changed, problem.dtype.itemsize) and _sensible(changed):
            found.append(changed)
    return tuple(found)


def _neighbours(base: Config, more: dict[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
        for value in (base[key] // 2, base[key] * 2):
            yield {**base, key: value, "num_warps": 8 if _area(base, key, value) >= 128 * 128 else 4}
    for stages in (2, 4):
        yield {**base, "num_stages": stages}
    for key, values in more.items():
        for value in values:
            yield {**base, key: value}
    for key in (
        "BLOCK_M",
        "BLOCK_N",
    ):  # where a large tile leaves one program to a multiprocessor, it alone hides latency
        value = base[key] * 2
        yield {**base, key: value, "num_warps": 8 if _area(base, key, value) >= 128 * 128 else 4, "num_stages": 4}


def _area(base: Config, key: str, value: int) -> int:
    changed = {**base, key: value}
    return changed["BLOCK_M"] * changed["BLOCK_N"]


def _sensible(config: Config) -> bool:
    blocks = [config[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    return min(blocks) >= 16 and max(blocks) <= 256 and config.get("BLOCK_W", 0) <= config["BLOCK_M"]
