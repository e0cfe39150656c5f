"""The work of a launch, counted from the problem and the config: the input of the cost model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.weight_orders import AS_GIVEN, CACHED_BYTES, OUT_INNERMOST
from tritonconv.problem import Problem

BASE_REGISTERS = 40  # addresses, masks and counters of a thread, besides tiles
WARP = 32
L1_BYTES = 128 * 1024  # of a multiprocessor, besides what its programs have as shared memory
L1_SHARERS = 2  # resident programs per multiprocessor assumed when checking whether tiles stay in L1
HALO = 1.5  # voxels of a tile with its neighbours, by its voxels
SECTOR = 32  # bytes: what L2 hands out
LEAST_ASYNC = 4  # bytes: smaller loads are not asynchronous (PTX ISA, cp.async)
LINE = 128  # bytes: what L1 and shared memory hand out per cycle
VECTOR = 16  # bytes that a thread loads at most
# Instructions of a warp, seen in the compiled loops (kernels/README.md, column "loop"): of a step besides its loads, of
# a load with its address and mask, and of an element that is loaded by itself.
STEP_INSTRUCTIONS, LOAD_INSTRUCTIONS, ELEMENT_INSTRUCTIONS = 70, 9, 7
MATRIX_ROWS = 64  # of one product of a Hopper warp group: each of them reads the whole tile of columns again


def parts(whole: int, size: int) -> int:
    """How many parts of a size cover the whole: ``triton.cdiv`` in a tenth of its time."""
    return -(-whole // size)


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of all launches of one call.

    ``flops`` are executed ones: padding of tiles and masked taps included. ``memory_bytes`` cross DRAM once;
    ``cache_bytes`` are what the programs load and store, most of it from L2. ``programs`` is the grid of the main
    launch (0: torch's own, whose grid is not known), ``shared_bytes`` and ``registers`` (per thread) of one program,
    ``matrix`` whether products go through the matrix units. ``depth``: how many loads of tiles a program waits for, one
    after the other, with ``ahead`` more of them on their way meanwhile. ``sram_bytes`` pass through the memory that is
    L1 and shared memory in one. ``instructions`` are those of all warps' main loops.
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
    sram_bytes: float = 0.0
    instructions: float = 0.0


def by_torch(problem: Problem, pass_name: str, moved: float = 0.0, launches: int = 1, flops: float = 0.0) -> Work:
    """A torch formulation: useful FLOPs unless ``flops`` are given, compulsory bytes and ``moved`` more for copies."""
    nbytes = problem.bytes(pass_name) + moved
    return Work(flops or problem.flops, nbytes, nbytes, launches=launches, matrix=not problem.depthwise)


def size_of(problem: Problem, *names: str) -> float:
    """Bytes of the named operands together: ``x``, ``weight``, ``y``."""
    return float(sum(math.prod(getattr(problem, f"{name}_shape")) for name in names) * problem.dtype.itemsize)


def bytes_spared(problem: Problem) -> int:
    """The bytes that torch's separate operations move more than a forward that computes its epilogue itself."""
    epilogue = problem.epilogue
    return 0 if epilogue is None else (epilogue.apart - epilogue.beside) * int(size_of(problem, "y"))


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
    apart: tuple[int, int] = (1, 1),
    per_load: int = LOAD_INSTRUCTIONS,
) -> Work:
    """A kernel of BLOCK_M x BLOCK_N tiles that takes ``steps`` steps of BLOCK_K, summed over all ``programs``.

    ``moved`` and ``launches`` count what comes besides: a second kernel, its traffic. A packed weight (config key
    WEIGHT) is one more launch that reads and writes the weight; as it is given, whole sectors of it are loaded for one
    tap each. ``taps_hit``: the part of the weight's tiles that is no zero for want of a tap, and is loaded. ``apart``:
    steps along w from one voxel of a tile to the next, of the gathered operand and of the output. ``per_load``:
    instructions of a load.
    """
    from tritonconv.kernels.triton_target import pipeline_buffers  # needs Triton, as all that comes here

    m, n, k = block_m or config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    item, threads = problem.dtype.itemsize, config["num_warps"] * WARP
    if config.get("WEIGHT"):
        moved, launches = moved + 2 * size_of(problem, "weight"), launches + 1
    memory = problem.bytes(pass_name) + moved
    operands = (m + n) * k * item
    a_tile, w_tile = m * k * item, n * k * item
    touched = a_tile * _sectors(problem, config, apart[0])
    loaded = n * k * taps_hit * _weight_bytes(problem, config)
    cached = float(steps) * (touched + loaded)
    pipelined, narrow = config["num_stages"] > 1, _narrow(problem, config)
    scattered = "WEIGHT" in config and _scattered(problem, config["WEIGHT"])
    # Where one operand comes through registers, the loop waits for each product, however the other one comes.
    waits = item < LEAST_ASYNC and (narrow or scattered)
    if (narrow or not pipelined) and pass_name != "backward_weight":
        cached = min(cached, _through_l1(problem, pass_name, programs, steps, m, touched, loaded))
    # A tile that is loaded asynchronously goes straight to shared memory; through registers it passes twice, and loads
    # of one element per lane fill a part of the line.
    filled = a_tile * (1 + LINE // (WARP * item) if narrow else 1 if pipelined else 2)
    filled += w_tile * (1 if pipelined else 2)
    # Elements that come one by one have a register and an address each, others one for every 4 bytes on their way.
    loaded_registers = (m + n) * k * 2 if narrow and item < LEAST_ASYNC else operands / 4 / 2
    loads = w_tile / VECTOR / threads * per_load
    loads += m * k / threads * ELEMENT_INSTRUCTIONS if narrow else a_tile / VECTOR / threads * per_load
    read = a_tile + w_tile * math.ceil(m / MATRIX_ROWS)
    stored = float(programs) * m * n * item * _sectors(problem, config, apart[1])
    return Work(
        flops=2.0 * m * n * k * steps,
        memory_bytes=memory,
        cache_bytes=max(memory, cached + stored),
        programs=programs,
        shared_bytes=operands * pipeline_buffers(config["num_stages"]),
        registers=BASE_REGISTERS + math.ceil((m * n + loaded_registers) / threads),
        warps=config["num_warps"],
        launches=launches,
        depth=steps / max(1, programs),
        ahead=0 if waits else max(0, config["num_stages"] - 2),
        pipelined=pipelined,
        sram_bytes=float(steps) * (filled + read),
        instructions=float(steps) * config["num_warps"] * (STEP_INSTRUCTIONS + loads),
    )


def _sectors(problem: Problem, config: Mapping[str, int], step: int) -> float:
    """Bytes of the sectors that a tile touches, by its own: in NCDHW rows along w, of voxels ``step`` apart."""
    if problem.layout != "ncdhw":
        return 1.0
    elements = SECTOR // problem.dtype.itemsize
    torn = elements / 2 / (config.get("BLOCK_W") or problem.size[2]) if _moved(problem) else 0.0
    return min(elements, step + torn)


def _moved(problem: Problem) -> bool:
    """Whether taps move a tile's rows along w: they begin anywhere in a sector, half a sector more on average."""
    return problem.kernel[2] > problem.stride[2]


def _narrow(problem: Problem, config: Mapping[str, int]) -> bool:
    """Whether the gathered operand is loaded one element at a time, through L1."""
    return problem.layout == "ncdhw" and (_moved(problem) or not config.get("BLOCK_W"))


def _scattered(problem: Problem, order: int) -> bool:
    """Whether the weight is loaded one element at a time: its taps, or an odd number of channels, are neighbours."""
    c_in, c_out = problem.c_in // problem.groups, problem.c_out // problem.groups
    if order == AS_GIVEN:
        return math.prod(problem.kernel) > 1
    innermost = c_out if order == OUT_INNERMOST and c_out > 1 else c_in  # with one c_out, c_in lies innermost
    return innermost * problem.dtype.itemsize % LEAST_ASYNC != 0


def _through_l1(
    problem: Problem, pass_name: str, programs: int, steps: int, m: int, a_tile: float, w_tile: float
) -> float:
    """Bytes from L2 of a kernel without a pipeline, or with narrow loads: L1 keeps what a tap loads for the next.

    The voxels of a tile and of its halo once per program, where L1 keeps them from tap to tap; the weight once per
    program, or, where it stays in L1, once per multiprocessor.
    """
    forward = pass_name == "forward"
    channels = (problem.c_in if forward else problem.c_out * math.prod(problem.stride)) // problem.groups
    halo = HALO if math.prod(problem.kernel) > 1 else 1.0
    voxels, each = m * channels * halo * problem.dtype.itemsize, steps / max(1, programs)
    if L1_SHARERS * voxels > L1_BYTES:
        voxels = each * a_tile
    weights = min(programs, MULTIPROCESSORS) if each * w_tile <= L1_BYTES else programs
    return programs * voxels + weights * each * w_tile


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
    """A kernel of FMAs without a dot: each product loads one value, most from L1; a thread keeps ``values`` sums."""
    memory = problem.bytes(pass_name) + moved
    if config.get("WEIGHT"):
        launches += 1
    return Work(
        flops=float(problem.flops),
        memory_bytes=memory,
        cache_bytes=memory,
        sram_bytes=problem.flops / 2 * problem.dtype.itemsize,
        programs=programs,
        registers=BASE_REGISTERS + 2 * values,
        warps=config["num_warps"],
        launches=launches,
        matrix=False,
    )
