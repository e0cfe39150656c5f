"""Forward where kernel = stride, the weight read in torch's order: one launch, for small layers.

In torch's order (c_in, c_out, taps) a row of the weight is (channel, tap). A tile of BLOCK_N columns is whole channels
with all their taps, one stretch of each row, so the loads are as wide as from a packed copy. Only the
accumulator is out of order: once per program its columns become the (phase, channel) of
:mod:`~tritonconv.kernels.forward_shuffle`, in the exchange between lanes that its store needs anyway. That variant
packs the weight with a launch that reads and writes it: in a layer of a few microseconds a large part of the time. The
price is that a tile holds few channels of each phase: in channels_last_3d y is written in shorter stretches.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tritonconv.kernels import forward_shuffle
from tritonconv.kernels import triton_phases as phases
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_device import aligned, load_voxels, product, widened
from tritonconv.kernels.triton_epilogue import computes, with_bias
from tritonconv.kernels.triton_launch import accounting, refusal
from tritonconv.kernels.triton_phases import cells_of, phases_first
from tritonconv.kernels.triton_shuffle import cell_rows, own_tile, row_dividers, zero_sums
from tritonconv.kernels.triton_store import store_phases
from tritonconv.kernels.variant import Config, Variant
from tritonconv.kernels.work import Work, size_of
from tritonconv.problem import Problem

LARGEST = {2: 256, 4: 128}  # columns of a tile, by the bytes of an element
FEWEST = 16  # columns, for the dot
STRETCH = 16  # bytes of y side by side in channels_last_3d, one access of a lane; half where the weight outweighs y


@triton.jit(launch_metadata=accounting, do_not_specialize=phases.RUN_TIME)
def forward_shuffle_given_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    w_ptr,  # (c_in, c_out, taps), dense
    bias_ptr,  # (c_out,) or None
    y_ptr,  # (n, c_out, od, oh, ow)
    residual_ptr, slopes,  # see triton_epilogue
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    by_d, by_h, by_w, shift_d, shift_h, shift_w,
    strides,  # of x, of y
    LAYER: tl.constexpr, CONFIG: tl.constexpr, FACTS: tl.constexpr,
    UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows (cells) x BLOCK_N columns (output channel, tap), as the weight has them; the depth is
    the input channels of the group.
    """
    EPILOGUE: tl.constexpr = CONFIG.EPILOGUE  # Triton 3.6.0 hands no tuple with a name on as an attribute
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    x_strides, y_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    TAPS: tl.constexpr = product(KERNEL)
    CHANNELS: tl.constexpr = BLOCK_N // TAPS  # of a tile
    TILES_N: tl.constexpr = C_OUT // CHANNELS
    cells, first = cells_of(crop, out_size, STRIDE)
    tile_m, tile_n = own_tile(n, cells, TILES_N, LAYER, CONFIG, WIDE)
    group = widened(tile_n // TILES_N, WIDE)
    channel = widened(tile_n * CHANNELS, WIDE)  # the first one of the tile, in all of y
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = widened(tl.arange(0, BLOCK_K), WIDE)
    by = row_dividers(by_d, by_h, by_w, shift_d, shift_h, shift_w, CONFIG=CONFIG, WIDE=WIDE)
    rows, mask_m = cell_rows(tile_m, n, cells, first, size=size, strides=x_strides, CONFIG=CONFIG, WIDE=WIDE, by=by)
    x_rows = x_ptr + group * C_IN * x_strides[1] + rows
    w_columns = w_ptr + (group * C_IN * C_OUT + channel % C_OUT) * TAPS + offs_n

    acc = zero_sums(CONFIG)
    for step in range(tl.cdiv(C_IN, BLOCK_K)):
        k = step * BLOCK_K + offs_k
        mask_k = (k < C_IN) | (C_IN % BLOCK_K == 0)
        x_mask = mask_m[:, None] & mask_k[None, :]
        x_ptrs = x_rows[:, None] + (k * x_strides[1])[None, :]  # (BLOCK_M, BLOCK_K)
        x_tile = load_voxels(x_ptrs, x_mask, CONFIG.X_VOXELS_INNER)
        w_tile = tl.load(w_columns[None, :] + (k * (C_OUT * TAPS))[:, None], mask=mask_k[:, None], other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc = with_bias(acc, tl.load(bias_ptr + channel + offs_n // TAPS), y_ptr, EPILOGUE)
    origin = (first[0] * STRIDE[0] - crop[0], first[1] * STRIDE[1] - crop[1], first[2] * STRIDE[2] - crop[2])
    if EPILOGUE is None:  # half the bytes to exchange
        acc = acc.to(y_ptr.dtype.element_ty)
    store_phases(
        phases_first(acc, KERNEL, CONFIG.ROWS), y_ptr, first_channel=channel, strides=y_strides, tile=tile_m, n=n,
        cells=cells, origin=origin, out_size=out_size, tile_n=0, CHANNELS=CHANNELS, PHASES=STRIDE, STRIDE=STRIDE,
        FACTS=FACTS, CONFIG=CONFIG, WIDE=WIDE, by=by, residual_ptr=residual_ptr, slopes=slopes,
    )  # fmt: skip


def launches(problem, config, x, weight, bias, out=None, **epilogue):
    if not weight.is_contiguous():  # channels_last_3d, or a slice: that kernel takes any strides, in the same tiles
        config = {**forward_shuffle.default(problem, x.device), **config}
        return forward_shuffle.launches(problem, config, x, weight, bias, out, **epilogue)
    config = {**config, "BLOCK_N": columns_of(problem, config["BLOCK_N"])}
    return phases.forward(
        forward_shuffle_given_kernel, problem, config, x, weight, bias, out,
        grid=_programs(problem, config), channels=config["BLOCK_N"] // math.prod(problem.kernel), **epilogue,
    )  # fmt: skip


def _programs(problem: Problem, config: Config) -> int:
    across = math.prod(problem.kernel) * problem.c_out // config["BLOCK_N"]
    return tiles.tiles_of(problem.n, phases.cells(problem), config) * across


def columns_of(problem: Problem, columns: int) -> int:
    """The columns of a tile that is to have ``columns``: all taps of as many channels, a divisor of a group's."""
    taps = math.prod(problem.kernel)
    return taps * math.gcd(max(1, columns // taps), problem.c_out // problem.groups)


def supports(problem: Problem, device: torch.device) -> str | None:
    return refusal(problem, device) or unfit(problem, LARGEST[problem.dtype.itemsize])


def unfit(problem: Problem, largest: int) -> str | None:
    """Why tiles of at most ``largest`` columns (channel, tap) do not serve the problem; None where they do."""
    taps, channels = math.prod(problem.kernel), problem.c_out // problem.groups
    if problem.kernel != problem.stride:
        return f"kernel {problem.kernel} is not stride {problem.stride}"
    if taps == 1:
        return "kernel (1, 1, 1): a weight of one tap needs no packing"
    if taps & (taps - 1) or taps > largest:
        return f"kernel {problem.kernel} has {taps} taps: a power of two up to {largest} fills a tile"
    columns = columns_of(problem, largest)
    if not fits(problem, columns):
        return f"{channels} output channels per group: tiles of {columns // taps} with all {taps} taps are too narrow"
    return phases.dilation_refusal(problem)


def fits(problem: Problem, columns: int) -> bool:
    """Whether a tile may have ``columns``: enough for the dot, of whole channels, with stretches of y worth an access.

    In channels_last_3d a stretch is the tile's channels of one output; where those are all, of a row of phases.
    """
    channels = columns // math.prod(problem.kernel)
    stretch = channels * problem.dtype.itemsize * (problem.kernel[2] if channels == problem.c_out else 1)
    return columns == columns_of(problem, columns) and columns >= FEWEST and stretch >= _shortest(problem)


def _shortest(problem: Problem) -> int:
    """The shortest stretch of y, in bytes; 0 where w is its contiguous axis."""
    if problem.layout == "ncdhw" or phases.whole_rows(problem):
        return 0
    return STRETCH if size_of(problem, "y") >= size_of(problem, "weight") else STRETCH // 2


def default(problem: Problem, device: torch.device):
    rows, itemsize = phases.whole_rows(problem), problem.dtype.itemsize
    base = phases.tile(problem, phases.cells(problem), phases.columns(problem, rows), problem.c_in // problem.groups)
    least = math.prod(problem.kernel) * _shortest(problem) // itemsize
    config = {**base, "BLOCK_N": columns_of(problem, max(base["BLOCK_N"], least)), "GROUP_M": 1, "ROWS": rows}
    taller = {**config, "BLOCK_M": 128}  # where a divisor of the channels is small, so is BLOCK_N
    area = taller["BLOCK_M"] * taller["BLOCK_N"]
    spare = itemsize == 2 and area <= phases.LARGEST_ACCUMULATOR and _programs(problem, taller) >= MULTIPROCESSORS
    return taller if spare else config


def space(problem: Problem, device: torch.device):
    rows = (0, 1) if phases.whole_rows(problem) else ()
    width = phases.cells(problem)[2]
    configs = tiles.around(default(problem, device), problem, width=width, GROUP_M=(8,), ROWS=rows)
    return tuple(each for each in configs if fits(problem, each["BLOCK_N"]))


def work(problem: Problem, config: Config) -> Work:
    return phases.work(problem, config, phases.cells(problem), [problem.c_in // problem.groups])


VARIANT = Variant(
    "forward_shuffle_given", "forward",
    "kernel = stride, the weight as given: the sums are put in order, nothing is packed", "triton",
    launches=launches, supports=supports, space=space, default=default, work=work,
    epilogue=computes,
)  # fmt: skip
