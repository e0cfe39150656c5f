"""Tiles of backward-weight where kernel = stride: how many there are, the default, its neighbours, their work.

Words of ``backward_weight_shuffle.py``: rows (tap, output channel) x columns (input channel), summed over the voxels of
x in chunks (SPLITS).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton

from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_arrival import arrives, with_arrivals
from tritonconv.kernels.variant import Config
from tritonconv.kernels.work import Work, parts, tap_gemm
from tritonconv.problem import Problem

FEWEST_CHANNELS = 4  # of a tile where there are so many: 8 bytes in NDHWC, the least that is worth a copy of its own
LEAST_VOXELS = 128  # that a chunk is worth


@triton.constexpr_function
def tile_taps(KERNEL, C_OUT, BLOCK_M, ROWS):
    """Taps of a tile, a power of two: all of them, or as many as leave it FEWEST_CHANNELS."""
    taps, channels = [int(k) for k in KERNEL], int(C_OUT)
    whole = 1 << (math.prod(taps) - 1).bit_length()
    least = taps[2] if ROWS else 1
    room = int(BLOCK_M) // min(FEWEST_CHANNELS, 1 << (channels - 1).bit_length())
    return min(whole, max(room, least))


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
    half, groups = problem.dtype.itemsize == 2, problem.groups
    c_in, c_out = problem.c_in // groups, problem.c_out // groups
    across = problem.kernel[2]
    rows = int(half and problem.layout == "ncdhw" and 1 < across <= 16 and across & (across - 1) == 0)
    places = triton.next_power_of_2(math.prod(problem.kernel))
    most = 256 if half else 64
    block_m = tiles.power_of_two(places * c_out, 64, most)
    if half and parts(c_out * places, 128) * 128 < parts(c_out * places, block_m) * block_m:
        block_m = 128  # fewer rows that stand for nothing
    block_n = tiles.power_of_two(c_in, 64 if rows else 16, 128 if half else 64)
    block_k = 32
    base = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_W": tiles.block_w(problem, problem.size, block_k),
        "ROWS": rows,
        "num_warps": 8,
        "num_stages": 4,
    }
    # Few voxels: narrower tiles, until there are programs enough without chunks that are not worth their start.
    while _enough(problem, base) < MULTIPROCESSORS * 3 // 4:
        if base["BLOCK_N"] > 64:
            base["BLOCK_N"] //= 2
        elif base["BLOCK_M"] > max(64, 4 * places):
            base["BLOCK_M"] //= 2
        else:
            break
    base["num_warps"] = 8 if base["BLOCK_M"] * base["BLOCK_N"] >= 128 * 128 else 4
    return {**base, "SPLITS": splits_of(problem, base)}


def _enough(problem: Problem, config: Config) -> int:
    return programs(problem, config) * _most_splits(problem, config)


def _most_splits(problem: Problem, config: Config) -> int:
    return max(1, steps(problem, config) * config["BLOCK_K"] // LEAST_VOXELS)


def splits_of(problem: Problem, config: Config, waves: int = 1) -> int:
    """SPLITS: as many chunks as fill the waves, each worth its start."""
    return max(1, min(waves * MULTIPROCESSORS // programs(problem, config), _most_splits(problem, config)))


def space(problem: Problem, device: torch.device) -> tuple[Config, ...]:
    """The configs around the default, each with the chunks of so many waves."""
    configs, base = {}, default(problem, device)
    for changed in tiles.around(base, problem, "BLOCK_K", num_warps=(4, 8), ROWS=(0, 1) if base["ROWS"] else ()):
        for waves in (1, 2, 4):  # other tiles are other programs
            counted = {**changed, "SPLITS": splits_of(problem, changed, waves)}
            tile_bytes = 4 * counted["BLOCK_M"] * counted["BLOCK_N"]
            whole = tap_tiles(problem, counted) == 1
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
    apart = problem.stride[2] if problem.layout == "ncdhw" and not config["ROWS"] else 1
    return tap_gemm(
        problem,
        "backward_weight",
        config,
        splits * count,
        count * max(steps(problem, config), splits),
        moved=8.0 * splits * math.prod(problem.weight_shape) if splits > 1 else 0.0,
        launches=2 if splits > 1 and not sums_itself(problem, config) else 1,
        apart=(apart, 1),
    )
