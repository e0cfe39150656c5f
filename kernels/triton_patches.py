"""The patches of grad_y, for the gradients of layers with very few output channels: device code, tiles and counts.

A patch holds the values of grad_y that one voxel of x meets (im2col): its *places* count (tap, output channel),
channels innermost. A thread loads whole patches, element by element, and joins them in registers. Every place is a
constant of the code, so its address is the voxel's and a constant, and one comparison says whether it is inside.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.triton_device import constant, divided, inside, multiple, offset, product, voxels, widened
from tritonconv.kernels.triton_launch import refusal
from tritonconv.kernels.triton_target import BARRIERS, compute_capability, pipeline_buffers, shared_bytes, step_of
from tritonconv.kernels.variant import Config
from tritonconv.kernels.work import BASE_REGISTERS, HALO, LINE, VECTOR, WARP, Work, parts, size_of
from tritonconv.problem import Problem

MOST_CHANNELS = 5  # output channels; more are wide enough to be loaded side by side
DEEPEST = {2: 128, 4: 64}  # places of a patch, by the bytes of an element: each has a register of a thread
# Of a longer patch: threads, each of which loads the places of a part of the taps along d, in parts of so many places.
PARTED_SIDES, PART = 2, 64
MOST_PLACES = 320  # of a patch in parts: of kernel 4 and the most channels
WIDEST, LONG = 64, 64  # columns of a program; places of a patch above which half as many fit the registers
MOST_RESIDENT = 4  # programs per multiprocessor, where its registers allow
REGISTERS = 1 << 16  # of a multiprocessor
# Instructions of a thread in a step, for each place of its patch and each column, seen in the compiled loops (Triton
# 3.6.0, sm_90): 490 for 64 places and 64 columns, 263 for 27 and 16.
PER_STEP, PER_PLACE, PER_COLUMN = 120, 4.7, 1.2


class Patch(NamedTuple):
    """The argument PATCH of a kernel."""

    PLACES: int  # of a part, a power of two: BLOCK_M or BLOCK_K of the tiles
    FLIPPED: bool  # the patches are the right operand, which is always in shared memory


@triton.constexpr_function
def levels(BLOCK):
    """How often BLOCK is halved."""
    return int(BLOCK).bit_length() - 1


@triton.constexpr_function
def patch_sides(PATCH_PLACES, PLACES):
    """Threads that load a voxel's patch of PATCH_PLACES places, in parts of PLACES: one where it has a part alone."""
    return PARTED_SIDES if int(PATCH_PLACES) > int(PLACES) else 1


@triton.constexpr_function
def part_count(PATCH_PLACES, PLACES):
    """Parts of a patch."""
    return -(-int(PATCH_PLACES) // int(PLACES))


@triton.constexpr_function
def part_filled(PATCH_PLACES, PLACES, PART):
    """Places that a part has of each side of a patch."""
    sides = PARTED_SIDES if int(PATCH_PLACES) > int(PLACES) else 1
    run = int(PLACES) // sides
    return min(run, int(PATCH_PLACES) // sides - int(PART) * run)


@triton.jit
def below(index, limit):
    """Whether 0 <= index < limit, in one comparison; ``limit`` is unsigned."""
    return index.to(limit.dtype) < limit


@triton.jit
def patch_place(pointers, oh, limits_h, hits_w, strides, PLACE: tl.constexpr, LAYER: tl.constexpr):
    """One place of the patches, (voxels,)."""
    CHANNELS: tl.constexpr = LAYER.C_OUT
    KERNEL: tl.constexpr = LAYER.KERNEL
    DILATION: tl.constexpr = LAYER.DILATION
    TAP: tl.constexpr = PLACE // CHANNELS
    TD: tl.constexpr = TAP // (KERNEL[1] * KERNEL[2])
    TH: tl.constexpr = TAP // KERNEL[2] % KERNEL[1]
    TW: tl.constexpr = TAP % KERNEL[2]
    pointers += TD * DILATION[0] * strides[2] + TH * DILATION[1] * strides[3]
    pointers += TW * DILATION[2] * strides[4] + PLACE % CHANNELS * strides[1]
    hit = below(oh + TH * DILATION[1], limits_h[TD]) & hits_w[TW]
    return tl.load(pointers, mask=hit, other=0.0)


@triton.jit
def halved(parts, HALF: tl.constexpr):
    """Each of the first HALF tensors beside its partner in the second half, along a new last axis."""
    joined = ()
    for k in tl.static_range(HALF):
        joined = joined + (tl.join(parts[k], parts[k + HALF]),)  # type: ignore[assignment]  # noqa: RUF005
    return joined


@triton.jit
def sided_voxels(tile, n, size, BLOCK: tl.constexpr, SIDES: tl.constexpr, WIDE: tl.constexpr, by):
    """:func:`voxels` of SIDES x BLOCK lanes: each side has the voxels of the tile; and its number, (SIDES x BLOCK,)."""
    lane = tl.arange(0, SIDES * BLOCK)
    by_d, by_h, by_w = None, None, None
    if by is not None:
        by_d, by_h, by_w = by
    row, w = divided(widened(tile, WIDE > 1) * BLOCK + lane % BLOCK, size[2], WIDE, by_w)
    plane, h = divided(row, size[1], WIDE, by_h)
    image, d = divided(plane, size[0], WIDE, by_d)
    mask = image < n
    return widened(image, WIDE), widened(d, WIDE), widened(h, WIDE), widened(w, WIDE), mask, lane // BLOCK


@triton.jit
def patches(
    grad_y_ptr, strides, tile, n, size, out_size, crop, by,
    LAYER: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr, WIDE: tl.constexpr, PART: tl.constexpr = 0,
):  # fmt: skip
    """A part of the patches of a tile of BLOCK voxels, (BLOCK, PLACES); zeros beyond the last place, and of voxels not
    there. The columns are the places of :func:`part_places`.

    ``by``: the dividers of ``size``, or None where WIDE is 2. Where a patch has several parts two threads load a
    voxel's places, each those of half the taps along d.
    """
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    DILATION: tl.constexpr = LAYER.DILATION
    PATCH_PLACES: tl.constexpr = product(KERNEL) * LAYER.C_OUT
    SIDES: tl.constexpr = patch_sides(PATCH_PLACES, PLACES)
    TAPS_D: tl.constexpr = KERNEL[0] // SIDES
    FIRST: tl.constexpr = PART * (PLACES // SIDES)
    FILLED: tl.constexpr = part_filled(PATCH_PLACES, PLACES, PART)
    if SIDES > 1:
        image, d, h, w, mask, side = sided_voxels(tile, n, size, BLOCK=BLOCK, SIDES=SIDES, WIDE=WIDE, by=by)
    else:
        image, d, h, w, mask = voxels(tile, n, size, BLOCK, 0, WIDE, by=by)
    od, oh, ow = d * STRIDE[0] - crop[0], h * STRIDE[1] - crop[1], w * STRIDE[2] - crop[2]
    if SIDES > 1:
        od += side * (TAPS_D * DILATION[0])
    pointers = grad_y_ptr + offset(strides, image, 0, od, oh, ow)
    # Of a voxel whose tap along d is outside no row is below the limit: few predicates live through all loads.
    UNSIGNED: tl.constexpr = tl.uint64 if WIDE else tl.uint32
    limit_h, limit_w = tl.full((), 0, UNSIGNED) + out_size[1], tl.full((), 0, UNSIGNED) + out_size[2]
    limits_h, hits_w = (), ()
    for tap in tl.static_range(constant(TAPS_D)):
        hit = inside(od + tap * DILATION[0], out_size[0]) & mask
        limits_h = limits_h + (tl.where(hit, limit_h, 0).to(UNSIGNED),)  # type: ignore[assignment]  # noqa: RUF005
    for tap in tl.static_range(constant(KERNEL[2])):
        hits_w = hits_w + (below(ow + tap * DILATION[2], limit_w),)  # type: ignore[assignment]  # noqa: RUF005
    parts = ()
    for place in tl.static_range(FILLED):
        part = patch_place(pointers, oh, limits_h, hits_w, strides, PLACE=FIRST + place, LAYER=LAYER)
        parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
    for _ in tl.static_range(PLACES // SIDES - FILLED):
        zeros = tl.zeros((SIDES * BLOCK,), grad_y_ptr.dtype.element_ty)
        parts = parts + (zeros,)  # type: ignore[assignment]  # noqa: RUF005
    for level in tl.static_range(levels(PLACES // SIDES)):
        parts = halved(parts, PLACES // SIDES >> (level + 1))
    if SIDES > 1:  # noqa: SIM108
        tiled = tl.reshape(parts[0], (SIDES, BLOCK, PLACES // SIDES)).permute(1, 0, 2)  # type: ignore[misc]
    else:
        tiled = parts[0]  # type: ignore[misc]
    return tl.reshape(tiled, (BLOCK, PLACES))


@triton.jit
def part_places(LAYER: tl.constexpr, PLACES: tl.constexpr, PART: tl.constexpr):
    """The places in a part of a patch, (PLACES,), and which of them there are: a run of each side's."""
    place = tl.arange(0, PLACES)
    PATCH_PLACES: tl.constexpr = product(LAYER.KERNEL) * LAYER.C_OUT
    SIDES: tl.constexpr = patch_sides(PATCH_PLACES, PLACES)
    if SIDES > 1:
        RUN: tl.constexpr = PLACES // SIDES
        within = PART * RUN + place % RUN
        found, there = place // RUN * (PATCH_PLACES // SIDES) + within, within < PATCH_PLACES // SIDES
    else:
        found, there = place, place < PATCH_PLACES
    return found, there


@triton.jit
def multiplied(left, right, acc, FLIPPED: tl.constexpr, PRECISION: tl.constexpr):
    """``acc`` (None: zeros) plus left times right; with FLIPPED all of them and the result are the other way round."""
    if FLIPPED:
        acc = tl.dot(tl.trans(right), tl.trans(left), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def voxel_count(size, X_STEP: tl.constexpr, WIDE: tl.constexpr):
    """The voxels of an image; X_STEP, where it is not 0, divides them."""
    count = widened(size[0], WIDE > 1) * size[1] * size[2]
    if X_STEP > 0:
        count = multiple(count, X_STEP)
    return count


@triton.jit
def tile_voxels(tile, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The voxels of a tile, counted over all images, (BLOCK,)."""
    return widened(tile, WIDE > 1) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def dense_places(voxel, channel, count, CHANNELS: tl.constexpr, X_STEP: tl.constexpr, WIDE: tl.constexpr):
    """Element offsets of :func:`tile_voxels`, of images of ``count``, and those of channels, in dense x or grad_x.

    The channels are innermost where X_STEP is 0, else the voxels.
    """
    if X_STEP > 0:
        image, place = widened(voxel // count, WIDE), voxel % count
        return image * (CHANNELS * widened(count, WIDE)) + place, channel * count
    return widened(voxel, WIDE) * CHANNELS, channel


def voxel_step(problem: Problem) -> int:
    """X_STEP."""
    return step_of(math.prod(problem.size)) if problem.layout == "ncdhw" else 0


def places(problem: Problem) -> int:
    """Of a patch: (tap, output channel)."""
    return math.prod(problem.kernel) * problem.c_out


def refused(problem: Problem, device: torch.device) -> str | None:
    """Why no kernel with patches serves the problem on the device; None where one does."""
    why_not = refusal(problem, device)
    if why_not is not None:
        return why_not
    if problem.groups > 1 or problem.c_out > MOST_CHANNELS:
        return (
            f"{problem.groups} groups, {problem.c_out} output channels: one group of at most {MOST_CHANNELS} is served"
        )
    most = MOST_PLACES if divisible(problem) else DEEPEST[problem.dtype.itemsize]
    if places(problem) > most:
        return f"{places(problem)} taps and output channels: a patch of at most {most} fits the registers"
    return None


def too_large(problem: Problem, config: Config, least: int, pass_name: str) -> str | None:
    """Why the config asks for more shared memory than the target has; None where it does not."""
    asked, most = shared_of(problem, config, least, pass_name), shared_bytes()
    patch = f"{places(problem)} taps and output channels with {config['BLOCK_N']} input channels"
    return f"{patch} take {asked} bytes of shared memory, of which there are {most}" if asked > most else None


def divisible(problem: Problem) -> bool:
    """Whether a patch too long for one thread can be loaded by PARTED_SIDES of them, each half of the taps along d."""
    return problem.dtype.itemsize == 2 and problem.kernel[0] % PARTED_SIDES == 0


def sides(problem: Problem) -> int:
    """Threads that load a voxel's patch."""
    return PARTED_SIDES if places(problem) > DEEPEST[problem.dtype.itemsize] else 1


def patch_parts(problem: Problem) -> int:
    """Of a patch."""
    return parts(places(problem), PART) if sides(problem) > 1 else 1


def padded(problem: Problem, least: int) -> int:
    """The places of a part, a power of two."""
    if sides(problem) > 1:
        return PART
    return tiles.power_of_two(places(problem), least, max(DEEPEST.values()))


def form(problem: Problem, least: int) -> Patch:
    """PATCH. On Hopper a part that is put together in its own turn would be a left operand in registers."""
    return Patch(padded(problem, least), patch_parts(problem) > 1 and 90 <= compute_capability() < 100)


def voxels_of(problem: Problem, warps: int) -> int:
    """Of a tile: each has a thread, or SIDES of them."""
    return warps * WARP // sides(problem)


def columns(problem: Problem) -> int:
    """The default BLOCK_N."""
    if sides(problem) > 1:
        return tiles.power_of_two(problem.c_in, 16, 2 * WIDEST)
    return tiles.power_of_two(problem.c_in, 16, WIDEST if places(problem) <= LONG else WIDEST // 2)


def registers_of(problem: Problem, least: int, sums: int) -> int:
    """Of a thread that has one voxel's patch and so many sums, as compiled: 200 for 64 places and 64 sums."""
    return BASE_REGISTERS + padded(problem, least) + max(48, sums * 3 // 2)


def resident(problem: Problem, config: Config, least: int, sums: int, pass_name: str) -> int:
    """The programs that share a multiprocessor, by their registers and their shared memory."""
    threads = config["num_warps"] * WARP
    by_registers = REGISTERS // (registers_of(problem, least, sums) * threads)
    return max(1, min(MOST_RESIDENT, by_registers, shared_bytes() // shared_of(problem, config, least, pass_name)))


def shared_of(problem: Problem, config: Config, least: int, pass_name: str) -> int:
    """Bytes of shared memory: a part of the patches and, in backward-data, the whole weight, which stays; in
    backward-weight the tiles of x on their way. On sm_100 (not sm_120) the parts of backward-weight take no turns."""
    part, turns, barriers = padded(problem, least), patch_parts(problem), BARRIERS
    voxels, wide = voxels_of(problem, config["num_warps"]), config["BLOCK_N"]
    if pass_name == "backward_data":
        elements = part * voxels + turns * part * wide
        if form(problem, least).FLIPPED and config["num_warps"] > 4 and wide == 64:  # the first sums change threads
            barriers += config["num_warps"] * WARP * VECTOR
    else:
        places = part * (turns if 100 <= compute_capability() < 120 else 1)
        elements = voxels * (places + wide * pipeline_buffers(config["num_stages"]))
    return elements * problem.dtype.itemsize + barriers


def patch_work(
    problem: Problem, pass_name: str, config: Config, steps: int, programs: int, least: int, sums: int,
    moved: float, launches: int,
) -> Work:  # fmt: skip
    """Of ``steps`` tiles in all programs by BLOCK_N columns.

    ``sums``: of a thread. ``moved`` and ``launches``: bytes and launches besides.
    """
    item, wide, turns, beside = problem.dtype.itemsize, config["BLOCK_N"], patch_parts(problem), sides(problem)
    depth, voxels = padded(problem, least) * turns, voxels_of(problem, config["num_warps"])
    tile, patch = voxels * wide * item, voxels * depth * item
    memory = problem.bytes(pass_name) + moved
    # From L2 each tile has the rows of grad_y that its voxels meet along d, and a halo along h.
    around = HALO * max(1.0, problem.kernel[0] / problem.stride[0])
    across = parts(problem.c_in, wide)
    cached = size_of(problem, "x") + around * across * size_of(problem, "y") + programs * wide * depth * item + moved
    loaded = voxels * places(problem) * item * min(problem.stride[2], LINE // (WARP * item))
    each = PER_STEP * turns + (PER_PLACE * places(problem) + PER_COLUMN * wide) / beside
    return Work(
        flops=2.0 * voxels * wide * depth * steps,
        memory_bytes=memory,
        cache_bytes=max(memory, cached),
        programs=programs,
        shared_bytes=shared_of(problem, config, least, pass_name),
        registers=registers_of(problem, least, sums),
        warps=config["num_warps"],
        launches=launches,
        depth=float(turns) * steps / max(1, programs),
        ahead=1,
        sram_bytes=float(steps) * (loaded + 2 * patch + 2 * tile),
        instructions=float(steps) * config["num_warps"] * each,
    )
