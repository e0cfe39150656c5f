"""Shared by the depthwise kernels: the window of a tile, its taps, the sum over them, and the tiles.

No dot: a channel meets only itself, so every product is a float32 FMA. A kernel owns *places*: along h and w each
lane j of a tile has PLACES neighbouring results ``j*PLACES + place``, and one load from the window serves all of them:

* forward: the places are the stride's phases; a tap t of phase p reads x at ``j + offset``;
* backward-data: a few neighbouring voxels of x; a tap t of voxel u reads grad_y at ``j*PLACES*stride + offset``.

Which taps a window position (*slot*) joins to which place is compiled in: TAPS_H and TAPS_W, one row of places per
slot, -1 where there is none. Along d a program walks over PLANES results, whose windows overlap in the L1 cache.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_device import ceil_div, constant, inside, load_along, widened
from tritonconv.kernels.triton_epilogue import finished, rounded
from tritonconv.kernels.variant import Config
from tritonconv.kernels.weight_orders import AS_GIVEN, OUT_INNERMOST
from tritonconv.kernels.work import WARP, Work, direct
from tritonconv.problem import Problem, Triple

BLOCKS = ("BLOCK_H", "BLOCK_W", "BLOCK_C", "PLANES")
MOST_PLACES = 16  # accumulators of a lane
PACKED_FROM_BYTES = 1 << 24  # of y: about 4 us of traffic, as long as the launch that packs the weight
Window = tuple[int, tuple[int, ...]]


def _window(joins: list[tuple[int, int, int]], places: int) -> Window:
    """(offset of the first slot, taps of all slots) from (tap, place, offset) triples."""
    first = min(offset for _, _, offset in joins)
    taps = [-1] * (max(offset for _, _, offset in joins) - first + 1) * places
    for tap, place, offset in joins:
        taps[(offset - first) * places + place] = tap
    return first, tuple(taps)


def phase_window(kernel: int, stride: int, dilation: int, crop: int) -> Window:
    """Outputs ``j*stride + place`` from inputs ``j + crop // stride + offset``; only crop mod stride matters."""
    joins = []
    for tap in range(kernel):
        back, place = divmod(dilation * tap - crop % stride, stride)
        joins.append((tap, place, -back))
    return _window(joins, stride)


def phase_windows(problem: Problem) -> dict[str, tuple]:
    """The kernel's arguments of :func:`phase_window` along h and w."""
    along_h, along_w = [phase_window(a.kernel, a.stride, a.dilation, a.crop) for a in problem.axes[1:]]
    return {"FIRST": (along_h[0], along_w[0]), "TAPS_H": along_h[1], "TAPS_W": along_w[1]}


def strided_window(kernel: int, stride: int, dilation: int, places: int) -> Window:
    """Inputs ``j*places + place`` from outputs ``j*places*stride - crop + offset``."""
    return _window([(t, u, stride * u + dilation * t) for u in range(places) for t in range(kernel)], places)


@triton.constexpr_function
def any_tap(taps, slot, places):
    return any(int(tap) >= 0 for tap in taps[slot * places : (slot + 1) * places])


@triton.jit
def looked_up(index, TABLE: tl.constexpr):
    """TABLE[index] at run time."""
    value = index * 0 - 1
    for place in tl.static_range(len(TABLE)):
        if TABLE[place] >= 0:
            value = tl.where(index == place, TABLE[place], value)
    return value


@triton.jit
def replaced(values, PLACE: tl.constexpr, value):
    """The tuple ``values`` with another value at PLACE."""
    return values[:PLACE] + (value,) + values[PLACE + 1 :]  # noqa: RUF005


@triton.jit
def filled(value, COUNT: tl.constexpr):
    """A tuple of COUNT times ``value``."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
    return values


@triton.jit
def tile_of(pid, n, count, planes, PLANES: tl.constexpr, CHANNELS: tl.constexpr,
            BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """image, first plane, first h and first w of a program's tile, and its channels (1, BLOCK_C).

    ``count`` is how many lanes there are along h and w. Channel blocks are innermost: neighbours in memory in NDHWC.
    """
    BLOCKS_C: tl.constexpr = ceil_div(CHANNELS, BLOCK_C)
    tiles_h, tiles_w = tl.cdiv(count[0], BLOCK_H), tl.cdiv(count[1], BLOCK_W)
    walks = tl.cdiv(planes, PLANES)
    channel = pid % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    pid = pid // BLOCKS_C
    w = pid % tiles_w * BLOCK_W
    pid = pid // tiles_w
    h = pid % tiles_h * BLOCK_H
    pid = pid // tiles_h
    image, plane = pid // walks, pid % walks * PLANES
    return widened(image, WIDE), widened(plane, WIDE), widened(h, WIDE), widened(w, WIDE), widened(channel, WIDE)


@triton.jit
def tile_at(index, planes, count, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, WIDE: tl.constexpr):
    """image, plane, h and w of the tile of this index, w fastest."""
    tiles_h, tiles_w = tl.cdiv(count[0], BLOCK_H), tl.cdiv(count[1], BLOCK_W)
    w = index % tiles_w * BLOCK_W
    index = index // tiles_w
    h = index % tiles_h * BLOCK_H
    index = index // tiles_h
    return widened(index // planes, WIDE), widened(index % planes, WIDE), widened(h, WIDE), widened(w, WIDE)


@triton.jit
def lanes(h, w, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """h and w (BLOCK_H * BLOCK_W, 1) of a tile that starts at (h, w)."""
    lane = tl.arange(0, BLOCK_H * BLOCK_W)[:, None]
    return h + lane // BLOCK_W, w + lane % BLOCK_W


@triton.jit
def distance(steps, stride):
    """steps * stride in 64 bits: a scalar, so the width costs nothing."""
    return tl.cast(steps, tl.int64) * stride


@triton.jit
def within(index, size, SHIFTED: tl.constexpr):
    """Whether 0 <= index < size. SHIFTED hides from the compiler that neighbours agree.

    Where w is contiguous it would read the one slot of a window that lies at 16 bytes in wide loads, and every other
    slot in the same layout: 2-byte loads with a gap of 16 bytes between threads.
    """
    if SHIFTED:
        return (index | (size - 1 - index)) >= 0
    return inside(index, size)


@triton.jit
def add_window(
    acc,  # tuple of PLACES[0] * PLACES[1] tiles (BLOCK_M, BLOCK_C)
    a_ptr,  # (BLOCK_M, BLOCK_C) pointers to slot (0, 0)
    row, column,  # (BLOCK_M, 1): of slot (0, 0)
    mask_c,  # (1, BLOCK_C)
    size, a_strides,
    w_ptr,  # (1, BLOCK_C) pointers to tap (tap_d, 0, 0)
    tap_stride,
    KERNEL: tl.constexpr, PLACES: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    SCATTERED: tl.constexpr = False,  # neighbouring rows have no neighbouring voxels: the store's layout suits no load
):  # fmt: skip
    """acc plus all taps of one plane: each slot of the window is loaded once.

    A run-time loop along h: unrolled, the compiler hoists the loads of all its taps and runs out of registers.
    """
    SLOTS_W: tl.constexpr = len(TAPS_W) // PLACES[1]
    for slot_h in range(len(TAPS_H) // PLACES[0]):
        mask_h = inside(row + slot_h, size[1]) & mask_c
        tiles = ()
        for slot_w in tl.static_range(SLOTS_W):
            tile = 0.0
            if any_tap(TAPS_W, slot_w, PLACES[1]):
                mask = mask_h & within(column + slot_w, size[2], SLOTS_W > 1)
                moved = distance(slot_h, a_strides[3]) + distance(slot_w, a_strides[4])
                if SCATTERED and a_ptr.shape[1] < 4:
                    tile = load_along(a_ptr + moved, mask, 1).to(tl.float32)
                else:
                    tile = tl.load(a_ptr + moved, mask=mask, other=0.0).to(tl.float32)
            tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005
        for place_h in tl.static_range(constant(PLACES[0])):
            tap_h = looked_up(slot_h * PLACES[0] + place_h, TAPS_H)
            if tap_h >= 0:
                for slot_w in tl.static_range(SLOTS_W):
                    for place_w in tl.static_range(constant(PLACES[1])):
                        if TAPS_W[slot_w * PLACES[1] + place_w] >= 0:
                            tap = (tap_h * KERNEL[2] + TAPS_W[slot_w * PLACES[1] + place_w]) * tap_stride
                            w_tile = tl.load(w_ptr + tap, mask=mask_c, other=0.0).to(tl.float32)  # (1, BLOCK_C)
                            value = acc[place_h * PLACES[1] + place_w] + tiles[slot_w] * w_tile
                            acc = replaced(acc, place_h * PLACES[1] + place_w, value)
    return acc


@triton.jit
def store_places(acc, out_ptr, h, w, channel, size, out_strides, mask_c,
                 PLACES: tl.constexpr, INTERLEAVE: tl.constexpr,
                 BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
                 bias=None, residual_ptr=None, slopes=None, EPILOGUE: tl.constexpr = None):  # fmt: skip
    """Stores every place of a plane, those of lane j at (j*PLACES + place); the tile's lanes start at (h, w).

    INTERLEAVE: two places along w, joined in registers, so that neighbouring threads write neighbours along w.
    ``residual_ptr``, ``slopes`` and EPILOGUE are those of :mod:`~tritonconv.kernels.triton_epilogue`, ``residual_ptr``
    of the plane; with EPILOGUE ``bias`` (1, BLOCK_C) in float32 is not in the sums yet.
    """
    WIDTH: tl.constexpr = 2 if INTERLEAVE else 1
    for place_h in tl.static_range(constant(PLACES[0])):
        for place_w in tl.static_range(constant(PLACES[1] // WIDTH)):
            tile = acc[place_h * PLACES[1] + place_w]
            if EPILOGUE is None:
                tile = tile.to(out_ptr.dtype.element_ty)
            if INTERLEAVE:
                odd = acc[place_h * PLACES[1] + 1]
                if EPILOGUE is None:
                    odd = odd.to(out_ptr.dtype.element_ty)
                tile = tl.join(tile, odd).permute(0, 2, 1).reshape(2 * tile.shape[0], tile.shape[1])
                lane_h, at_w = lanes(h, w * 2, BLOCK_H, 2 * BLOCK_W)
            else:
                lane_h, lane_w = lanes(h, w, BLOCK_H, BLOCK_W)
                at_w = lane_w * PLACES[1] + place_w
            at_h = lane_h * PLACES[0] + place_h
            if EPILOGUE is None:
                pointers = out_ptr + at_h * out_strides[3] + at_w * out_strides[4] + channel * out_strides[1]
                tl.store(pointers, tile, mask=(at_h < size[1]) & (at_w < size[2]) & mask_c)
            else:
                mask = (at_h < size[1]) & (at_w < size[2]) & mask_c
                offsets = at_h * out_strides[3] + at_w * out_strides[4] + channel * out_strides[1]
                if EPILOGUE.ROUNDED:
                    tile = rounded(tile, out_ptr)
                own_channel = tl.where(mask_c, channel, 0)
                tile = finished(
                    tile + bias, residual_ptr, offsets, mask, slopes=slopes, channel=own_channel, y_ptr=out_ptr,
                    EPILOGUE=EPILOGUE,
                )  # fmt: skip
                tl.store(out_ptr + offsets, tile, mask=mask)


@triton.jit
def begun(zero, bias_ptr, channel, mask_c, EPILOGUE: tl.constexpr):
    """The first value of an output's sums, like ``zero``, and the bias that :func:`store_places` adds."""
    start, bias = zero, 0.0
    if bias_ptr is not None:
        value = tl.load(bias_ptr + channel, mask=mask_c, other=0.0).to(tl.float32)
        if EPILOGUE is None:
            start += value
        else:
            bias = value
    return start, bias


def refused(problem: Problem) -> str | None:
    """Why the problem is not one for the depthwise kernels."""
    if problem.c_in != problem.groups:
        return f"one input channel per group is needed, and there are {problem.c_in // problem.groups}"
    return None


def lane_counts(size: Triple, places: tuple[int, int]) -> tuple[int, int]:
    """Lanes along h and w for results of ``size``."""
    return -(-size[1] // places[0]), -(-size[2] // places[1])


def programs(n: int, channels: int, size: Triple, places: tuple[int, int], config: Config) -> int:
    """How many programs cover the results ``size`` of n images: the host's side of :func:`tile_of`."""
    along_h, along_w = lane_counts(size, places)
    tiles = math.ceil(along_h / config["BLOCK_H"]) * math.ceil(along_w / config["BLOCK_W"])
    return n * math.ceil(size[0] / config["PLANES"]) * tiles * math.ceil(channels / config["BLOCK_C"])


def _block(count: int, most: int) -> int:
    """The power of two up to ``most`` that covers ``count`` best, a halo of 2 per block included; else the largest."""
    blocks = [1 << bits for bits in range(most.bit_length())]
    return min(blocks, key=lambda block: (math.ceil(count / block) * (block + 2), -block))


def tile_sizes(layout: str, channels: int, counts: tuple[int, int], elements: int) -> dict[str, int]:
    """A tile of about ``elements`` (lanes x channels) for ``counts`` lanes along h and w."""
    if layout == "ndhwc":
        block_c = min(elements, _block(channels, 64))
        block_w = _block(counts[1], max(1, min(8, elements // block_c)))  # near a square: the smallest halo
    else:
        block_c = 1
        block_w = _block(counts[1], min(64, elements))
    block_h = _block(counts[0], max(1, elements // (block_c * block_w)))
    if layout == "ncdhw":
        block_c = _block(channels, max(1, elements // (block_h * block_w)))
    return {"BLOCK_H": block_h, "BLOCK_W": block_w, "BLOCK_C": block_c, "num_warps": 4}


def planes(problem: Problem, channels: int, size: Triple, places: tuple[int, int], config: Config) -> int:
    """PLANES: as many as leave enough programs to fill a GPU several times."""
    count = 8
    while count > 1 and programs(problem.n, channels, size, places, {**config, "PLANES": count}) < 8 * MULTIPROCESSORS:
        count //= 2
    return count


def weight_order(problem: Problem) -> int:
    """Channels innermost where they are the vector of a tile, unless the launch of the packing would cost more."""
    large = math.prod(problem.y_shape) * problem.dtype.itemsize > PACKED_FROM_BYTES
    return OUT_INNERMOST if problem.layout == "ndhwc" and max(problem.kernel) > 1 and large else AS_GIVEN


def around(base: dict[str, int], **more: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    """``base``, its neighbours with half and double tiles, and ``more`` values of other keys."""
    configs = [base]
    changes = [{key: base[key] * 2 // part} for key in BLOCKS if key in base for part in (1, 4)]
    changes += [{"BLOCK_H": max(1, base["BLOCK_H"] // 2), "BLOCK_W": base["BLOCK_W"] * 2}, {"num_warps": 8}]
    changes += [{key: value} for key, values in more.items() for value in values]
    for change in changes:
        config = {**base, **change}
        if min(config[key] for key in BLOCKS if key in config) >= 1 and config not in configs:
            configs.append(config)
    return tuple(configs)


def work(
    problem: Problem, pass_name: str, config: Config, programs: int, places: int, moved: float = 0.0, launches: int = 1
) -> Work:
    """Of a kernel whose lanes keep ``places`` sums each."""
    lanes = config["BLOCK_H"] * config["BLOCK_W"] * config["BLOCK_C"]
    values = max(1, lanes // (config["num_warps"] * WARP)) * places
    return direct(problem, pass_name, config, programs, values, moved, launches)
