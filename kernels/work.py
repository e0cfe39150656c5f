"""What a launch executes, counted from the problem and the config: the input of the cost model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tritonconv.kernels.triton_weights import AS_GIVEN, CACHED_BYTES, OUT_INNERMOST
from tritonconv.problem import Problem

BASE_REGISTERS = 40  # addresses, masks and counters of a thread, besides tiles
WARP = 32
MULTIPROCESSORS = 132  # of an H100 or H200
L1_BYTES = 128 * 1024  # of a multiprocessor, besides what its programs have as shared memory
HALO = 1.5  # voxels of a tile with its neighbours, by its voxels
SECTOR = 32  # bytes: what L2 hands out
L1_OVER_L2 = 4  # an L1 hands out 128 bytes per cycle: 28 TB/s of an H100's 132 at 1.7 GHz, and its L2 about 6


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of all launches of one call.

    ``flops`` are executed ones: padding of tiles and masked taps included. ``memory_bytes`` cross DRAM once;
    ``cache_bytes`` are what the programs load and store, most of it from L2. ``programs`` is the grid of the main
    launch (0: torch's own, whose grid is not known), ``shared_bytes`` and ``registers`` (per thread) of one program,
    ``matrix`` whether products go through the matrix units. ``depth``: how many loads of tiles a program waits for, one
    after the other, with ``ahead`` more of them on their way meanwhile.
    """

    flops: float
    memory_bytes: float
    cache_bytes: float
    programs: int = 0
    shared_bytes: int = 0
    registers: int = 0
    warps: int = 4
    launches: int = 1
    matrix: bool = True
    depth: float = 0.0
    ahead: int = 0
    pipelined: bool = True


def by_torch(problem: Problem, pass_name: str, moved: float = 0.0, launches: int = 1, flops: float = 0.0) -> Work:
    """A torch formulation: useful FLOPs unless ``flops`` are given, compulsory bytes and ``moved`` more for copies."""
    nbytes = problem.bytes(pass_name) + moved
    return Work(flops or problem.flops, nbytes, nbytes, launches=launches, matrix=not problem.depthwise)


def size_of(problem: Problem, *names: str) -> float:
    """Bytes of the named operands together: ``x``, ``weight``, ``y``."""
    return float(sum(math.prod(getattr(problem, f"{name}_shape")) for name in names) * problem.dtype.itemsize)


def tap_gemm(
    problem: Problem,
    pass_name: str,
    config: Mapping[str, int],
    programs: int,
    steps: int,
    moved: float = 0.0,
    launches: int = 1,
    block_m: int | None = None,
    taps_hit: float = 1.0,
) -> Work:
    """A kernel of BLOCK_M x BLOCK_N tiles that takes ``steps`` steps of BLOCK_K, summed over all ``programs``.

    ``moved`` and ``launches`` count what comes besides: a second kernel, its traffic. A packed weight (config key
    WEIGHT) is one more launch that reads and writes the weight; as it is given, whole sectors of it are loaded for one
    tap each. ``taps_hit``: the part of the weight's tiles that is no zero for want of a tap, and is loaded.
    """
    from tritonconv.kernels.triton_target import pipeline_buffers  # needs Triton, as all that comes here

    m, n, k = block_m or config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    item, threads = problem.dtype.itemsize, config["num_warps"] * WARP
    if config.get("WEIGHT"):
        moved, launches = moved + 2 * size_of(problem, "weight"), launches + 1
    memory = problem.bytes(pass_name) + moved
    operands = (m + n) * k * item
    a_tile, w_tile = m * k * item, n * k * taps_hit * _weight_bytes(problem, config)
    cached = float(steps) * (a_tile + w_tile)
    if config["num_stages"] == 1 and pass_name != "backward_weight":
        cached = max(cached / L1_OVER_L2, _through_l1(problem, pass_name, programs, steps, m, w_tile))
    return Work(
        flops=2.0 * m * n * k * steps,
        memory_bytes=memory,
        cache_bytes=max(memory, cached + float(programs) * m * n * item),
        programs=programs,
        shared_bytes=operands * pipeline_buffers(config["num_stages"]),
        registers=BASE_REGISTERS + math.ceil((m * n + operands / 4 / 2) / threads),
        warps=config["num_warps"],
        launches=launches,
        depth=steps / max(1, programs),
        ahead=max(0, config["num_stages"] - 2),
        pipelined=config["num_stages"] > 1,
    )


def _through_l1(problem: Problem, pass_name: str, programs: int, steps: int, m: int, w_tile: float) -> float:
    """Bytes from L2 of a kernel without a pipeline: its loads go through L1, which keeps a tap's for the next.

    The voxels of a tile and of its halo once per program; the weight once per program, or, where it stays in L1, once
    per multiprocessor.
    """
    forward = pass_name == "forward"
    channels = (problem.c_in if forward else problem.c_out * math.prod(problem.stride)) // problem.groups
    halo = HALO if math.prod(problem.kernel) > 1 else 1.0
    weight = steps / max(1, programs) * w_tile
    weights = min(programs, MULTIPROCESSORS) if weight <= L1_BYTES else programs
    return programs * m * channels * halo * problem.dtype.itemsize + weights * weight


def _weight_bytes(problem: Problem, config: Mapping[str, int]) -> float:
    """Bytes that come from L2 for one element of the weight."""
    item, given = problem.dtype.itemsize, config.get("WEIGHT", OUT_INNERMOST) == AS_GIVEN
    if not given or size_of(problem, "weight") <= CACHED_BYTES:
        return item
    return min(SECTOR, math.prod(problem.kernel) * item)


def direct(
    problem: Problem, pass_name: str, config: Mapping[str, int], programs: int, values: int, moved: float = 0.0,
    launches: int = 1,
) -> Work:  # fmt: skip
    """A kernel of FMAs without a dot: each product loads one value, mostly from L1; a thread keeps ``values`` sums."""
    memory = problem.bytes(pass_name) + moved
    if config.get("WEIGHT"):
        launches += 1
    return Work(
        flops=float(problem.flops),
        memory_bytes=memory,
        cache_bytes=max(memory, problem.flops / 2 * problem.dtype.itemsize / L1_OVER_L2),
        programs=programs,
        registers=BASE_REGISTERS + 2 * values,
        warps=config["num_warps"],
        launches=launches,
        matrix=False,
    )
