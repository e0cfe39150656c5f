"""Shared by the depthwise kernels over cells: a lane walks along d and keeps its taps and its window in registers.

A *cell* is the stride_d x stride_h x stride_w neighbouring outputs at ``j*stride``, with the window of x that their
taps reach: 8 outputs and 2 x 2 x 2 voxels for 27 taps at stride 2. The voxels of a window are its *slots*, the outputs
of a cell its *places*; ``triton_depthwise.phase_window`` says which tap joins the two. From one cell to the next along
d the window moves by a plane. Only that plane is loaded, and one step before it is needed: the loads of a step are on
their way while the products of the one before are worked out.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from tritonconv.kernels import triton_depthwise as depthwise
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_depthwise import distance, within
from tritonconv.kernels.triton_device import constant, inside, load_along
from tritonconv.kernels.variant import Config
from tritonconv.kernels.work import BASE_REGISTERS, WARP, Work
from tritonconv.problem import Problem

MOST_TAPS = 32  # float32 weights, or sums, that a thread keeps for each of its channels
MOST_PLACES = 32  # outputs of a cell
MOST_PLANES = 32  # of a program: so many steps along d hide its start
START = 3  # steps that the start of a program takes, by its instructions
MOST_PER_THREAD = 255  # registers that a thread can have
PROGRAMS = 4  # of 128 threads with THREAD values each, that the registers of a multiprocessor hold at a time
THREAD = 2  # values of a tile in each thread: of more, taps and window take all registers
# By the count of :func:`registers`: of more the compiler spills. In NCDHW each value has an address.
MOST_REGISTERS = {"ndhwc": 264, "ncdhw": 255}
ACCESS_INSTRUCTIONS = 8  # of a load or store with its address and mask, as compiled


@triton.constexpr_function
def tap_of(slot, place, slots, kernel, places, along_d, along_h, along_w):
    """The tap that joins a slot of a window to an output of its cell, counted w fastest; -1 where there is none."""
    along = ((along_w, slots[2], places[2]), (along_h, slots[1], places[1]), (along_d, slots[0], places[0]))
    taps = []
    for joins, of_slots, of_places in along:
        taps.append(int(joins[slot % int(of_slots) * int(of_places) + place % int(of_places)]))
        slot, place = slot // int(of_slots), place // int(of_places)
    return -1 if min(taps) < 0 else (taps[2] * int(kernel[1]) + taps[1]) * int(kernel[2]) + taps[0]


@triton.jit
def load_taps(w_ptr, mask_c, tap_stride, TAPS: tl.constexpr):
    """All taps of the tile's channels, float32: a tuple of (1, BLOCK_C)."""
    taps = ()
    for tap in tl.static_range(TAPS):
        taps = taps + (tl.load(w_ptr + tap * tap_stride, mask=mask_c, other=0.0).to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return taps


@triton.jit
def slot_masks(row, column, mask_c, size, SLOTS: tl.constexpr):
    """Whether each slot of a plane is inside along h and w: a tuple of SLOTS[0] * SLOTS[1] masks (BLOCK_M, BLOCK_C)."""
    masks = ()
    for slot in tl.static_range(constant(SLOTS[0] * SLOTS[1])):
        along_h = inside(row + slot // SLOTS[1], size[1])
        along_w = within(column + slot % SLOTS[1], size[2], SLOTS[1] > 1)
        masks = masks + (along_h & along_w & mask_c,)  # type: ignore[assignment]  # noqa: RUF005
    return masks


@triton.jit
def gated(mask, scalar):
    """``mask & scalar``, of which the interpreter makes no mask."""
    return tl.where(scalar, mask, False)


@triton.jit
def load_slots(pointers, masks, plane, there, strides, SLOTS: tl.constexpr, SCATTERED: tl.constexpr = False):
    """The slots of a plane as they are in memory: a tuple of tiles (BLOCK_M, BLOCK_C), zeros where it is not ``there``.

    ``pointers``: to slot (0, 0) of plane 0. SCATTERED: neighbouring lanes have no neighbouring voxels.
    """
    pointers += plane * strides[2]
    tiles = ()
    for slot in tl.static_range(constant(SLOTS[0] * SLOTS[1])):
        at = pointers + (distance(slot // SLOTS[1], strides[3]) + distance(slot % SLOTS[1], strides[4]))
        mask = gated(masks[slot], there)
        if SCATTERED and pointers.shape[1] < 4:  # noqa: SIM108
            tile = load_along(at, mask, 1)
        else:
            tile = tl.load(at, mask=mask, other=0.0)
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def floats(tiles):
    """The tiles in float32."""
    values = ()
    for place in tl.static_range(len(tiles)):
        values = values + (tiles[place].to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return values


def refused(problem: Problem) -> str | None:
    """Why the problem is not one for the kernels over cells."""
    if not problem.depthwise:
        return "one input and one output channel per group are needed"
    if problem.dilation != (1, 1, 1):
        return f"the taps are {problem.dilation} apart, and those of a window in registers have to be neighbours"
    taps, places = math.prod(problem.kernel), math.prod(problem.stride)
    if taps > MOST_TAPS or places > MOST_PLACES:
        return f"{taps} taps and {places} outputs of a cell do not fit the registers ({MOST_TAPS} and {MOST_PLACES} do)"
    return None


def windows(problem: Problem) -> dict[str, tuple]:
    """The arguments of the cells' windows along d, h and w, as :func:`triton_depthwise.phase_windows` of h and w."""
    along = [depthwise.phase_window(a.kernel, a.stride, a.dilation, a.crop) for a in problem.axes]
    return {
        "FIRST": tuple(first for first, _ in along),
        **{f"TAPS_{n}": a[1] for n, a in zip("DHW", along, strict=True)},
    }


def slots(problem: Problem) -> tuple[int, int, int]:
    """Slots of a window along d, h and w."""
    found = windows(problem)
    d, h, w = (len(found[f"TAPS_{name}"]) // stride for name, stride in zip("DHW", problem.stride, strict=True))
    return d, h, w


def counts(problem: Problem) -> tuple[int, int, int]:
    """How many cells cover y along d, h and w."""
    d, h, w = (-(-o // s) for o, s in zip(problem.out_size, problem.stride, strict=True))
    return d, h, w


def tile_sizes(layout: str, channels: int, counts: tuple[int, int, int], n: int, each: int = THREAD) -> dict[str, int]:
    """A tile of ``each`` values in each of 128 threads, and PLANES: that with which the last program ends first."""
    config = depthwise.tile_sizes(layout, channels, counts[1:], 128 * each)

    def steps(planes: int) -> int:
        programs = depthwise.programs(n, channels, counts, (1, 1), {**config, "PLANES": planes})
        return math.ceil(programs * each / (PROGRAMS * THREAD * MULTIPROCESSORS)) * (planes + START)

    return {**config, "PLANES": min((1 << bits for bits in range(MOST_PLANES.bit_length())), key=steps)}


def registers(config: Config, kept: float) -> int:
    """Of a thread that keeps so many for each value of its tiles."""
    return BASE_REGISTERS + math.ceil(_values(config) * kept)


def fits(layout: str, config: Config, kept: float) -> bool:
    """Whether the registers of a thread hold what it keeps."""
    return registers(config, kept) <= MOST_REGISTERS[layout]


def _values(config: Config) -> int:
    """Of a tile in each thread."""
    return max(1, config["BLOCK_H"] * config["BLOCK_W"] * config["BLOCK_C"] // (config["num_warps"] * WARP))


def space(layout: str, base: dict[str, int], kept: float, **more: tuple[int, ...]) -> tuple[Config, ...]:
    """``base`` and those around it, with ``more`` values of other keys, whose registers hold what a thread keeps."""
    around = depthwise.around(base, **more)
    return tuple(config for config in around if config == base or fits(layout, config, kept))


def work(
    problem: Problem, pass_name: str, config: Config, columns: int, programs: int, loads: int, stores: int,
    products: float, kept: float, moved: float = 0.0, launches: int = 1,
) -> Work:  # fmt: skip
    """Of a kernel over ``columns`` of PLANES cells, whose lanes load, store and multiply so many values at each cell.

    ``kept``: registers of a thread for each value of its tiles: taps, window, sums and the loads on their way.
    """
    lanes = config["BLOCK_H"] * config["BLOCK_W"] * config["BLOCK_C"]
    item, steps = problem.dtype.itemsize, float(columns) * config["PLANES"]
    memory = problem.bytes(pass_name) + moved
    each = _values(config)
    # Neighbouring channels come in one load; in NCDHW each value comes by itself.
    wide = min(each, 16 // item) if problem.layout == "ndhwc" else 1
    accesses = (ACCESS_INSTRUCTIONS * (loads + stores)) / wide
    return Work(
        flops=2.0 * steps * lanes * products,
        memory_bytes=memory,
        cache_bytes=max(memory, steps * lanes * item * stores),
        sram_bytes=steps * lanes * item * (loads + stores),
        programs=programs,
        registers=min(MOST_PER_THREAD, registers(config, kept)),
        warps=config["num_warps"],
        launches=launches + (1 if config.get("WEIGHT") else 0),
        matrix=False,
        instructions=steps * each * config["num_warps"] * (products + loads + stores / 2 + accesses),
    )
