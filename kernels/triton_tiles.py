"""Tile sizes of the GEMM-shaped kernels: the default for a problem and the candidates around it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import triton

from tritonconv.kernels.targets import LEAST_SHARED_BYTES, MULTIPROCESSORS
from tritonconv.kernels.triton_target import pipeline_buffers, shared_bytes
from tritonconv.kernels.variant import Config
from tritonconv.kernels.work import AS_GIVEN, SECTOR, parts
from tritonconv.problem import Problem, Triple

SHARED_BYTES = LEAST_SHARED_BYTES  # a default config fits every listed target
RIDGE = 206  # FLOP per byte from which an H200 is compute-bound: 989 TFLOP/s (bf16) by 4.8 TB/s (its data sheet)
# Without a software pipeline loads go through L1, where what one tap read waits for the next; cp.async passes it by.
UNSTAGED = (1,)
LARGEST_TILE = 256 * 128  # float32 sums: 128 registers in each of 8 warps' threads
LEAST_ROW = 32  # voxels along w of an NDHWC layer's tile: with shorter rows a thread stores to as many of them
MOST_LOADED = 10 * 1024  # bytes that a warp loads in one step: of more the addresses and masks spill


def power_of_two(value: int, low: int, high: int) -> int:
    """The power of two at or above ``value``, held between ``low`` and ``high``."""
    return min(high, max(low, triton.next_power_of_2(max(1, value))))


def block_w(problem: Problem, size: Triple, block_m: int) -> int:
    """BLOCK_W: along w in NCDHW, where w is contiguous, unless most of a row of the tile would be empty."""
    if problem.layout == "ndhwc" or size[2] < 8:
        return 0
    return rows_along_w(problem, size, block_m)


def rows_along_w(problem: Problem, size: Triple, block_m: int) -> int:
    """The BLOCK_W whose rows cover the width with the fewest voxels and sectors, counted alike; of equals the widest.

    A row of b voxels begins anywhere in a sector of e elements and touches (b + e/2) / e of them on average.
    """
    half = SECTOR / problem.dtype.itemsize / 2
    blocks = [b for b in (64, 32, 16, 8) if b <= block_m]
    return min(blocks, key=lambda b: math.ceil(size[2] / b) * (b + b + half))


def filling(width: int, most: int, least: int = 8) -> int:
    """The widest BLOCK_W from ``least`` to ``most`` whose rows a width nearly fills; 0 where none does."""
    return next((b for b in (64, 32, 16, 8) if least <= b <= most and parts(width, b) * b * 8 <= width * 9), 0)


def row_in_channels_last(problem: Problem, width: int, block: int) -> int:
    """BLOCK_W of an NDHWC layer's tile in rows along w, of ``block`` voxels at most; 0 where none is worth trying."""
    return filling(width, block, LEAST_ROW) if problem.layout == "ndhwc" else 0


def gemm(problem: Problem, size: Triple, columns: int, depth: int, programs: int = 1) -> dict[str, int]:
    """The default tile of a GEMM with n * prod(size) rows, ``columns`` columns and ``depth`` per tap.

    ``programs`` is how many such GEMMs one launch holds (phases, groups).
    """
    rows = problem.n * math.prod(size)
    half = problem.dtype.itemsize == 2
    block_n = power_of_two(columns, 16, 128 if half else 64)
    block_m = 128 if half else 64
    while block_m > 32 and programs * math.ceil(rows / block_m) * math.ceil(columns / block_n) < MULTIPROCESSORS:
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


def depths(channels: int) -> tuple[int]:
    """Of BLOCK_K besides the default's: the one that pads the channels least, of equals the deepest.

    Of 48, 80 or 112 channels in blocks of 64 a fourth, three eighths or an eighth of the products are of zeros.
    """
    return (min((64, 32, 16), key=lambda block: parts(channels, block) * block),)


def orders(columns: int) -> tuple[int, ...]:
    """Values of GROUP_M besides the default's, where so many tiles of columns leave an order to choose."""
    return (1, 2, 4) if columns > 1 else ()


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


def programs(problem: Problem, size: Triple, columns: int, config: Config) -> int:
    """How many tiles cover n images of ``size`` by ``columns`` in all groups."""
    return tiles_of(problem.n, size, config) * parts(columns, config["BLOCK_N"]) * problem.groups


def around(
    base: Config, problem: Problem, along: str = "BLOCK_M", width: int = 0, **more: tuple[int, ...]
) -> tuple[Config, ...]:
    """``base`` and the configs around it that fit.

    Its neighbours, with halved and doubled tiles, other stages or ``more`` values of other keys, come first; then every
    combination of tiles, of stages and depths that ``more`` may add to, and of these with the weight in torch's order,
    for the cost model to choose from. ``along`` is the block of voxels, which a row of BLOCK_W fits in. ``width``: of
    voxels; where rows of 32 or more nearly fill it, the pipelined configs of an NDHWC layer come with such rows too,
    for the place of a voxel in a row takes no division (0: they do not).
    """
    configs = {frozenset(base.items()): dict(base)}
    for changed in itertools.chain(_neighbours(base, more), _grid(base, more)):
        if "BLOCK_W" in changed:
            changed["BLOCK_W"] = min(changed["BLOCK_W"], changed[along])
        key = frozenset(changed.items())
        if key not in configs and sensible(changed, problem.dtype.itemsize):
            configs[key] = changed
    return (*configs.values(), *_in_rows(configs.values(), base, problem, along, width))


def _in_rows(
    configs: Iterable[dict[str, int]], base: Config, problem: Problem, along: str, width: int
) -> Iterator[dict[str, int]]:
    """The pipelined ones with other tiles and stages than ``base`` alone, of an NDHWC layer, with rows along w."""
    if width == 0 or base["BLOCK_W"] > 0:
        return
    others = [key for key in base if not key.startswith(("BLOCK_", "num_"))]
    for config in configs:
        # Of float32 half a tile at most is one row, as in the default of NCDHW.
        row = row_in_channels_last(problem, width, config[along] // (1 if problem.dtype.itemsize == 2 else 2))
        if row and config["num_stages"] > 1 and all(config[key] == base[key] for key in others):
            yield {**config, "BLOCK_W": row}


def _neighbours(base: Config, more: dict[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
        for value in (base[key] // 2, base[key] * 2):
            yield {**base, key: value, "num_warps": 8 if _area(base, key, value) >= 128 * 128 else 4}
    for stages in (2, 4):
        yield {**base, "num_stages": stages}
    if base.get("BLOCK_W"):
        yield from ({**base, "BLOCK_W": width} for width in (base["BLOCK_W"] // 2, base["BLOCK_W"] * 2) if width >= 8)
    for key, values in more.items():
        for value in values:
            yield {**base, key: value}


def _grid(base: Config, more: dict[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    stages = (*more.get("num_stages", ()), 2, 3, 4)
    orders = [{}] if "WEIGHT" not in more else [{}, {"WEIGHT": AS_GIVEN}]
    depths, columns = ([base[key] // 2, base[key], base[key] * 2] for key in ("BLOCK_K", "BLOCK_N"))
    depths += more.get("BLOCK_K", ())
    for m, n, k, depth, order in itertools.product((64, 128, 256), columns, depths, stages, orders):
        changed = {**base, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_stages": depth, **order}
        if m * n <= LARGEST_TILE:
            yield {**changed, "num_warps": 8 if m * n >= 128 * 128 else 4}


def _area(base: Config, key: str, value: int) -> int:
    changed = {**base, key: value}
    return changed["BLOCK_M"] * changed["BLOCK_N"]


def sensible(config: Config, itemsize: int) -> bool:
    """Whether the tiles fit the target, fill a product and spill no addresses."""
    m, n, k = (config[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    if not fits(config, itemsize) or (m + n) * k * itemsize > MOST_LOADED * config["num_warps"]:
        return False
    return min(m, n, k) >= 16 and max(m, n, k) <= 256
