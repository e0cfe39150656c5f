"""Tiles of backward-weight where kernel = stride: how many there are, the default, its neighbours, their work.

Words of ``backward_weight_shuffle.py``: rows (tap, output channel) x columns (input channel), summed over the voxels of
x in chunks (SPLITS).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import triton

from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_arrival import arrives, with_arrivals
from tritonconv.kernels.variant import Config
from tritonconv.kernels.work import Work, parts, tap_gemm
from tritonconv.problem import Problem

# Channels of a tile where there are so many: with all taps 8 bytes in NDHWC, the least that is worth a copy of its own,
# else a sector.
FEWEST_CHANNELS, SECTOR_CHANNELS = 4, 16
BLOCK_K = 32  # voxels of a step: two programs of the largest tiles with one column tile fit a multiprocessor of sm_90
# Tiles of a quarter of the rows, and steps of twice the voxels, for layers of few voxels without chunks: with rows and
# columns up to NARROW together a step has as many instructions (228 of 64 x 32 x 64, 230 of 128 x 64 x 32).
DEEPER_K, NARROW = 64, 128
LEAST_COLUMNS = 16  # of a product: the bias by one with ones
LEAST_VOXELS = 128  # that a chunk is worth
FEWEST_UNSPLIT = 4  # multiprocessors for each program, at most, of a launch without chunks
RESIDENT = 2  # programs of a multiprocessor
CACHE_RATE, MEMORY_RATE = 5.95e12, 4.25e12  # bytes/s of an H200's L2 and memory (autotune/tables/nvidia_h200.v2.json)
# The part of the shorter of the two times that the longer does not hide: an H200's time of backward_weight_splitk on
# nnunet_dynunet_128_up4, whose reads are about those of a tile here.
UNHIDDEN = 0.1
TOLERANCE = 0.04
# Not measured: the share of these rates that one program of a multiprocessor reaches; a step that nothing hides, 250
# cycles; a second launch in a graph, its gap too.
ALONE, STEP_SECONDS, SECOND_LAUNCH_SECONDS = 0.95, 0.14e-6, 3e-6


@triton.constexpr_function
def tile_taps(KERNEL, C_OUT, BLOCK_M, ROWS):
    """Taps of a tile, a power of two: all of them where FEWEST_CHANNELS fit beside them, else few."""
    taps, channels = [int(k) for k in KERNEL], 1 << (int(C_OUT) - 1).bit_length()
    whole = 1 << (math.prod(taps) - 1).bit_length()
    if whole * min(FEWEST_CHANNELS, channels) <= int(BLOCK_M):
        return whole
    return max(int(BLOCK_M) // min(SECTOR_CHANNELS, channels), taps[2] if ROWS else 1)


def tap_tiles(problem: Problem, config: Config) -> int:
    """How many tiles the taps of an output channel take."""
    return parts(math.prod(problem.kernel), _tile_taps(problem, config["BLOCK_M"], config["ROWS"]))


@lru_cache(4096)  # a function of the compiler's costs more on the host than the rest of a count
def _tile_taps(problem: Problem, block_m: int, rows: int) -> int:
    return int(tile_taps(problem.kernel, problem.c_out // problem.groups, block_m, rows))


def programs(problem: Problem, config: Config) -> int:
    """How many programs one chunk has."""
    channels = config["BLOCK_M"] // _tile_taps(problem, config["BLOCK_M"], config["ROWS"])
    count = tap_tiles(problem, config) * parts(problem.c_out // problem.groups, channels)
    return count * parts(problem.c_in // problem.groups, config["BLOCK_N"]) * problem.groups


def steps(problem: Problem, config: Config) -> int:
    """Of BLOCK_K voxels, over all chunks."""
    return tiles.tiles_of(problem.n, problem.size, {**config, "BLOCK_M": config["BLOCK_K"]})


def sums_itself(problem: Problem, config: Config) -> bool:
    """Whether the main launch adds its partials: a bias in several tap tiles has none to do so."""
    return arrives(config) and tap_tiles(problem, config) == 1


def default(problem: Problem, device: torch.device) -> Config:
    """The largest tile in the fewest chunks for which :func:`seconds` counts hardly more than the least."""
    counts = [(seconds(problem, config), config) for config in _candidates(problem)]
    least = min(count for count, _ in counts)
    return next(config for count, config in counts if count <= (1 + TOLERANCE) * least)


def _candidates(problem: Problem) -> list[Config]:
    half, groups, across = problem.dtype.itemsize == 2, problem.groups, problem.kernel[2]
    rows = int(half and problem.layout == "ncdhw" and 1 < across <= 16 and across & (across - 1) == 0)
    most_m = triton.next_power_of_2(math.prod(problem.kernel)) * problem.c_out // groups
    block_m = tiles.power_of_two(most_m, 64, 256 if half else 64)
    narrow = not half or (problem.layout == "ncdhw" and _block_w(problem, bool(rows)) == 0)  # loads of an element each
    block_n = tiles.power_of_two(problem.c_in // groups, 64 if rows else 16, 64 if narrow else 128)
    configs: list[Config] = []
    widths = (block_n, block_n // 2, block_n // 4)
    for k, m, n in itertools.product((BLOCK_K, DEEPER_K), (block_m, block_m // 2, block_m // 4), widths):
        small = k == DEEPER_K or m == block_m // 4
        if m < min(64, block_m) or n < min(64 if rows else 32, block_n) or (small and (not half or m + n > NARROW)):
            continue
        config = {
            "BLOCK_M": m,
            "BLOCK_N": n,
            "BLOCK_K": k,
            "BLOCK_W": _block_w(problem, bool(rows)),
            "ROWS": rows,
            "num_warps": 8 if m * n >= 128 * 128 or m == 256 or (half and narrow) else 4,
            "num_stages": 4,
        }
        counts = list(chunks(problem, config)[:3])
        if small:
            counts = [1] if 3 * programs(problem, config) >= MULTIPROCESSORS else []
        configs += [{**config, "SPLITS": splits} for splits in counts]
    return configs


def _block_w(problem: Problem, rows: bool) -> int:
    """BLOCK_W: in NDHWC a whole step along w where w nearly fills it, so that no voxel of it is located by itself; with
    ROWS also short rows, if their loads are of several voxels."""
    width = problem.size[2]
    if problem.layout == "ndhwc":
        return BLOCK_K if parts(width, BLOCK_K) * BLOCK_K * 8 <= width * 9 else 0
    if rows and width < 8 and width % 2 == 0:
        return tiles.power_of_two(width, 2, 8)
    return tiles.block_w(problem, problem.size, BLOCK_K)


def seconds(problem: Problem, config: Config) -> float:
    """A count of an H200's time by which the default is chosen: bytes of tiles and partials at the rate of its L2, or
    the steps of the programs that stand in line, and the second launch."""
    splits, each = config["SPLITS"], max(1, programs(problem, config))
    in_line = parts(splits * each, RESIDENT * MULTIPROCESSORS)
    longest = parts(steps(problem, config), splits)
    loaded = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * problem.dtype.itemsize
    busy = min(ALONE, RESIDENT * splits * each / MULTIPROCESSORS)
    if splits * each >= RESIDENT * MULTIPROCESSORS:
        busy = 1.0
    cached, memory = each * splits * longest * loaded / CACHE_RATE, problem.bytes("backward_weight") / MEMORY_RATE
    moved = max(cached, memory) + UNHIDDEN * min(cached, memory)
    loop = max(moved / busy, in_line * longest * STEP_SECONDS)
    if splits == 1:
        return loop
    return loop + SECOND_LAUNCH_SECONDS + 8.0 * splits * math.prod(problem.weight_shape) / CACHE_RATE


def chunks(problem: Problem, config: Config) -> tuple[int, ...]:
    """SPLITS that are worth a trial: as many as give each multiprocessor 1, 2 or 4 programs; 1 where tiles are many."""
    each, most = max(1, programs(problem, config)), steps(problem, config) * config["BLOCK_K"] // LEAST_VOXELS
    counts = [max(1, min(waves * MULTIPROCESSORS // each, most)) for waves in (1, 2, 4)]
    if FEWEST_UNSPLIT * each >= MULTIPROCESSORS:
        counts.insert(0, 1)
    return tuple(dict.fromkeys(counts))


def space(problem: Problem, device: torch.device) -> tuple[Config, ...]:
    """The configs around the default, each with several numbers of chunks."""
    base = default(problem, device)
    configs = {tuple(base.items()): base}
    more: dict[str, Any] = {
        "num_warps": (4, 8),
        "ROWS": (0, 1) if base["ROWS"] else (),
        "BLOCK_W": (0, base["BLOCK_K"]),
    }
    for changed in tiles.around(base, problem, "BLOCK_K", **more):
        for splits in chunks(problem, changed):  # other tiles are other programs
            counted = {**changed, "SPLITS": splits}
            whole = tap_tiles(problem, counted) == 1
            tile_bytes = 4 * counted["BLOCK_M"] * counted["BLOCK_N"]
            for config in with_arrivals(counted, tile_bytes) if whole else (counted,):
                configs[tuple(config.items())] = config
    return tuple(configs.values())


def workspace_bytes(problem: Problem) -> int:
    """Of the float32 partials, at the most chunks of the space."""
    configs = space(problem, torch.device("cpu"))
    most = max(config["SPLITS"] for config in configs)
    biases = max(config["SPLITS"] * tap_tiles(problem, config) for config in configs)
    weights = most * math.prod(problem.weight_shape) if most > 1 else 0
    return 4 * (weights + (biases * problem.c_out if biases > 1 else 0))


def work(problem: Problem, config: Config) -> Work:
    splits, count = config["SPLITS"], programs(problem, config)
    ones = LEAST_COLUMNS if problem.bias and problem.dtype.itemsize == 2 and not config["ROWS"] else 0
    apart = problem.stride[2] if problem.layout == "ncdhw" and not config["ROWS"] else 1
    counts = tap_gemm(
        problem,
        "backward_weight",
        config,
        splits * count,
        count * max(steps(problem, config), splits),
        moved=8.0 * splits * math.prod(problem.weight_shape) if splits > 1 else 0.0,
        launches=2 if splits > 1 and not sums_itself(problem, config) else 1,
        apart=(apart, 1),
    )
    return replace(counts, flops=counts.flops * (1 + ones / config["BLOCK_N"]))
