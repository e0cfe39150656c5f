"""Shared by the backward-weight GEMMs: a sum over all voxels in chunks, and the bias gradient in the same launch.

Each chunk leaves a float32 partial, and the partials are added in a fixed order. More programs per chunk sum grad_y
over the chunk's share of the output voxels while the others read them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_arrival import ahead, arrives, last_to_arrive, sum_in_order, with_arrivals
from tritonconv.kernels.triton_device import chunk, dividers, offset, voxel_tiles, voxels, widened
from tritonconv.kernels.triton_launch import precision, wide
from tritonconv.kernels.triton_partials import WeightGradients
from tritonconv.kernels.triton_target import compute_capability, zeros_behind_loops
from tritonconv.kernels.variant import Config
from tritonconv.kernels.work import Work, parts, tap_gemm
from tritonconv.problem import Problem, Triple

WAVES = 2  # of programs in one launch, all chunks together
BIAS_BYTES = 16 * 1024  # of grad_y that a program of the bias gradient has in flight; half where loads are narrow
LEAST_STEPS = 8  # of BLOCK_K that a chunk is worth
# Elements of grad_weight, whose taps are neighbours, that tiles along its channels write themselves, each into a sector
# of its own: 8 MiB of sectors, which take about as long as a launch at the 4 TB/s of an H200's memory.
LARGEST_SCATTER = 1 << 18


@triton.jit
def store_channel_sums(
    grad_y_ptr, bias_partial_ptr, arrivals_ptr, total_bias_ptr, n, out_size, grad_y_strides, tile, split, splits,
    CHANNELS: tl.constexpr, VOXELS_INNER: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes the sums of grad_y over the chunk's output voxels of BLOCK_C channels; with arrivals, those of all too."""
    channel = widened(tile * BLOCK_C + tl.arange(0, BLOCK_C), WIDE)
    mask = channel < CHANNELS
    first, last = chunk(split, splits, voxel_tiles(n, out_size, BLOCK_V, BLOCK_W, WIDE))
    acc = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    by = None
    if WIDE < 2 and not VOXELS_INNER:
        by = dividers(out_size, BLOCK_W)
    for tile_v in range(first, last):
        image, d, h, w, mask_v = voxels(tile_v, n, out_size, BLOCK_V, BLOCK_W, WIDE, by=by)
        rows = grad_y_ptr + offset(grad_y_strides, image, 0, d, h, w)[:, None]
        wanted = mask_v[:, None] & mask[None, :]
        acc += tl.load(rows + (channel * grad_y_strides[1])[None, :], mask=wanted, other=0.0).to(tl.float32)
    sums = tl.sum(acc, 0).to(bias_partial_ptr.dtype.element_ty)
    tl.store(bias_partial_ptr + split * CHANNELS + channel, sums, mask=mask)
    if arrivals_ptr is not None:  # noqa: SIM102
        if last_to_arrive(arrivals_ptr, tile, splits):
            sums = sum_in_order(bias_partial_ptr, CHANNELS, splits, channel, mask, ahead(BLOCK_C))
            tl.store(total_bias_ptr + channel, sums.to(total_bias_ptr.dtype.element_ty), mask=mask)


@triton.jit
def strided(strides, STRIDE: tl.constexpr, WIDE: tl.constexpr):
    """The strides of grad_y from the outputs of one input voxel to those of the next."""
    along_d, along_h = widened(strides[2], WIDE) * STRIDE[0], widened(strides[3], WIDE) * STRIDE[1]
    return strides[0], strides[1], along_d, along_h, widened(strides[4], WIDE) * STRIDE[2]


@triton.jit
def store_weights(
    acc, partial_ptr, arrivals_ptr, total_ptr, partial_strides, tile, split, splits, co, tap_m, ci, tap_n, mask,
    C_OUT: tl.constexpr, TAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes a chunk's sum of one tile of grad_weight; with arrivals, that of all chunks too.

    Rows are output channels ``co`` and columns input channels ``ci``, both with a part of the tap, ``tap_m + tap_n``;
    ``tile`` is the place of the tile's counter.
    """
    rows = widened(split, WIDE) * partial_strides[0] + co * partial_strides[2] + tap_m * partial_strides[3]
    columns = ci * partial_strides[1] + tap_n * partial_strides[3]
    tl.store(partial_ptr + rows[:, None] + columns[None, :], acc.to(partial_ptr.dtype.element_ty), mask=mask)
    if arrivals_ptr is not None:  # noqa: SIM102
        if last_to_arrive(arrivals_ptr, tile, splits):
            offsets = (co * partial_strides[2] + tap_m * partial_strides[3])[:, None] + columns[None, :]
            step = widened(partial_strides[0], WIDE)
            sums = sum_in_order(partial_ptr, step, splits, offsets, mask, ahead(acc.shape[0] * acc.shape[1]))
            rows, columns = co * TAPS + tap_m, ci * (C_OUT * TAPS) + tap_n
            total_ptrs = total_ptr + rows[:, None] + columns[None, :]
            tl.store(total_ptrs, sums.to(total_ptr.dtype.element_ty), mask=mask)


class SplitGemm(NamedTuple):
    """``rows`` x ``columns`` of each group, summed over the n voxels or cells of ``size``."""

    problem: Problem
    rows: int
    columns: int
    size: Triple

    def programs(self, config: Config, need_bias: bool) -> int:
        """How many programs one chunk has."""
        count = parts(self.rows, config["BLOCK_M"]) * parts(self.columns, config["BLOCK_N"])
        count *= self.problem.groups
        return count + (parts(self.problem.c_out, config["BIAS_C"]) if need_bias else 0)

    def steps(self, config: Config) -> int:
        """Of BLOCK_K, over all chunks."""
        return tiles.tiles_of(self.problem.n, self.size, {**config, "BLOCK_M": config["BLOCK_K"]})

    def splits(self, config: Config, waves: int = WAVES) -> int:
        """SPLITS: as many chunks as fill the waves, each worth its start."""
        most = waves * MULTIPROCESSORS // max(1, self.programs(config, self.problem.bias))
        return max(1, min(most, self.steps(config) // LEAST_STEPS))

    def default(self) -> dict[str, int]:
        problem, half = self.problem, self.problem.dtype.itemsize == 2
        block_m = tiles.power_of_two(self.rows, 16, 128 if half else 64)
        block_n = tiles.power_of_two(self.columns, 16, 128 if half else 64)
        # A tile of 2-byte loads comes through registers: less deep and in more threads, so that none needs too many.
        through_registers = half and (problem.layout == "ncdhw" or problem.weight_shape[1] % 8 != 0)
        if through_registers and compute_capability() >= 100:  # a wider one spills there
            block_n = min(block_n, 64)
        block_k = 64 if half and not through_registers else 32
        more_warps = block_m * block_n >= 128 * 128 or (through_registers and block_m == 128)
        config = {
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "BLOCK_W": block_w(problem, self.size, block_k),
            **_bias_tile(problem, block_m + block_n),
            "num_warps": 8 if more_warps else 4,
            "num_stages": 3,
        }
        return {**config, "SPLITS": self.splits(config)}

    def space(self, base: Config) -> tuple[Config, ...]:
        """The configs around ``base``, each with the chunks of so many waves."""
        configs = {}
        for changed in tiles.around(base, self.problem, "BLOCK_K", num_warps=(4, 8), BLOCK_W=(0, base["BLOCK_K"])):
            for waves in (WAVES, 1, 2 * WAVES, 4 * WAVES):  # other tiles are other programs
                counted = {**changed, "SPLITS": self.splits(changed, waves)}
                for config in with_arrivals(counted, 4 * counted["BLOCK_M"] * counted["BLOCK_N"]):
                    configs[tuple(config.items())] = config
        return tuple(configs.values())

    def workspace_bytes(self) -> int:
        """Of the float32 partials, at the most chunks of the space."""
        splits = max(config["SPLITS"] for config in self.space(self.default()))
        elements = math.prod(self.problem.weight_shape) + self.problem.c_out
        return 4 * splits * elements if through_partials(self.problem, splits) else 0

    def work(self, config: Config, per_load: int) -> Work:
        """``per_load``: instructions of a load in the kernel's loop."""
        problem, splits = self.problem, config["SPLITS"]
        partials = through_partials(problem, splits)
        each = 4 if splits > 1 else problem.dtype.itemsize
        return tap_gemm(
            problem,
            "backward_weight",
            config,
            splits * self.programs(config, problem.bias),
            self.programs(config, False) * max(self.steps(config), splits),
            moved=2.0 * each * splits * math.prod(problem.weight_shape) if partials else 0.0,
            launches=2 if partials and not arrives(config) else 1,
            apart=(problem.stride[2], 1),
            per_load=per_load,
        )

    def launches(self, kernel, config: Config, x, grad_y, need_bias: bool):
        """(grad_weight, grad_bias or None) by ``kernel`` over all chunks, and the sum of their partials."""
        problem, sums = self.problem, WeightGradients(self.problem, config, x, grad_y, need_bias)
        if sums.nothing:
            return sums.results()
        sums.partial = sums.weight.view(lambda tensor: tensor.flatten(2).permute(2, 1, 0)[None, None])
        if through_partials(problem, sums.splits):  # (splits, groups, taps, c_out, c_in), as the tiles lie
            sums.split_weight(*sums.partial.shape[1:], dtype=torch.float32 if sums.splits > 1 else x.dtype)
        if sums.splits > 1:
            sums.split_bias(sums.splits)
        step = sums.partial.stride()
        sums.launch(
            kernel,
            self.programs(config, need_bias),
            partial_strides=(step[0], step[4], step[3], step[2]),
            Y_VOXELS_INNER=grad_y.stride(1) != 1,
            X_VOXELS_INNER=x.stride(1) != 1 and config["BLOCK_W"] == 0,
            ENTER=zeros_behind_loops(),
            WIDE=wide(x, grad_y, sums.partial, of=problem),
            PRECISION=precision(problem.dtype),
        )
        return sums.results()


def through_partials(problem: Problem, splits: int) -> bool:
    """Whether a second launch writes grad_weight: it adds several chunks, or it puts a large one in order."""
    return splits > 1 or math.prod(problem.weight_shape) > LARGEST_SCATTER


def _bias_tile(problem: Problem, width: int) -> dict[str, int]:
    """BIAS_V, BIAS_C, BIAS_W: the tile of the sums of grad_y.

    Few enough channels that a program reads about half of what its neighbours do, ``width`` elements per input voxel,
    but whole sectors of 32 bytes where the channels are contiguous.
    """
    outputs_per_input = math.prod(problem.out_size) / math.prod(problem.size)
    least = 1 if problem.layout == "ncdhw" else 32 // problem.dtype.itemsize
    channels = tiles.power_of_two(int(width / outputs_per_input / 2), least, 64)
    channels = min(channels, tiles.power_of_two(problem.c_out, 1, 64))
    narrow = problem.layout == "ncdhw" or channels % 8 != 0
    rows = BIAS_BYTES // problem.dtype.itemsize // channels // (2 if narrow else 1)
    return {"BIAS_V": rows, "BIAS_C": channels, "BIAS_W": block_w(problem, problem.out_size, rows)}


def block_w(problem: Problem, size: Triple, rows: int) -> int:
    """BLOCK_W: tiles along w also in NDHWC, where w nearly fills them: a tile then spans few rows to un-ravel."""
    if problem.layout == "ncdhw":
        return tiles.block_w(problem, size, rows)
    return tiles.filling(size[2], rows)
