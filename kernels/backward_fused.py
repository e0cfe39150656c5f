"""Where kernel = stride: grad_x, grad_weight and grad_bias from one read of grad_y and of x.

Each element of grad_y belongs to one voxel of x, so a tile of BLOCK_M voxels x all the columns (tap, output channel) is
at once the operand of ``grad_x = grad_y . weight^T`` and of ``grad_weight += grad_y^T . x``, and its column sums are
grad_bias. A program keeps the weight and its part of grad_weight on the chip while it walks over its tiles; the parts
are added up in a fixed order. Called apart, the three gradients would read grad_y three times and x once more.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl

from tritonconv.kernels import triton_phases as phases
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_arrival import ARRIVE, ahead, arrives, last_to_arrive, sum_in_order, with_arrivals
from tritonconv.kernels.triton_buffers import Buffer
from tritonconv.kernels.triton_device import aligned, dividers, inside, multiple, product, voxel_tiles, voxels, widened
from tritonconv.kernels.triton_launch import accounting, empty, geometry, precision, refusal, wide
from tritonconv.kernels.triton_launch import launch as run
from tritonconv.kernels.triton_partials import POINTERS, WeightGradients
from tritonconv.kernels.triton_phases import fine_dividers, load_phases, phases_first
from tritonconv.kernels.triton_shuffle import taps
from tritonconv.kernels.triton_target import BARRIERS, compute_capability, pipeline_buffers, shared_bytes
from tritonconv.kernels.triton_weights import oriented, packed
from tritonconv.kernels.variant import Config, Variant
from tritonconv.kernels.weight_orders import AS_GIVEN
from tritonconv.kernels.work import Work, tap_gemm
from tritonconv.problem import Problem

# By the bytes of an element: the most elements of grad_weight per group, padded, and the fewest voxels of a tile.
# Compiled for sm_90 with 8 warps, all three gradients then take up to 254 registers; at twice as many elements, or
# half as many voxels, whose dots keep the whole weight in registers, they spill.
LARGEST = {2: 128 * 128, 4: 128 * 64}
FEWEST = {2: 64, 4: 32}


@triton.jit
def _voxel_tile(
    tile, n, size, strides, offs_c, C: tl.constexpr, X_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, WIDE: tl.constexpr, by,
):  # fmt: skip
    """Element offsets and mask (BLOCK_M, BLOCK_C) of a tile of x."""
    image, d, h, w, _ = voxels(tile, n, size, BLOCK_M, BLOCK_W, WIDE, by=by)
    mask = ((image < n) & inside(w, multiple(size[2], X_STEP)))[:, None] & (offs_c < C)[None, :]
    rows = image * strides[0] + d * strides[2] + h * strides[3] + w * strides[4]
    return rows[:, None] + (offs_c * strides[1])[None, :], mask


@triton.jit(launch_metadata=accounting, do_not_specialize=phases.RUN_TIME)
def fused_backward_kernel(
    x_ptr,  # (n, c_in, d, h, w), or None without grad_weight
    w_ptr,  # (c_in, c_out, taps), or None where grad_x is not
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    grad_x_ptr,  # (n, c_in, d, h, w) or None
    partial_ptr,  # (splits, groups, taps, c_out, c_in), dense float32, or None
    bias_partial_ptr,  # (splits, groups*c_out), dense float32, or None
    arrivals_ptr,  # (groups,) int32, zeros: the last program of a group adds up its partials; or None
    total_ptr,  # (groups, c_in, c_out, taps), dense, or None without arrivals
    total_bias_ptr,  # (groups*c_out,), or None
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    strides,  # of x, of the weight, of grad_y, of grad_x
    LAYER: tl.constexpr, CONFIG: tl.constexpr, GIVEN: tl.constexpr, X_STEP: tl.constexpr, FACTS: tl.constexpr,
    PLAIN: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns every SPLITS-th tile of BLOCK_M voxels of a group of x: the grad_x of each, and the sum of all for
    grad_weight and grad_bias.

    A tile of grad_y has voxels as rows and (tap, output channel) as columns, all BLOCK_N of them. They are the depth of
    grad_x; the voxels are that of grad_weight, whose columns are the BLOCK_C input channels.
    """
    C_IN: tl.constexpr = LAYER.C_IN
    C_OUT: tl.constexpr = LAYER.C_OUT
    GROUPS: tl.constexpr = LAYER.GROUPS
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    ROWS: tl.constexpr = CONFIG.ROWS
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    BLOCK_W: tl.constexpr = CONFIG.BLOCK_W
    SPLITS: tl.constexpr = CONFIG.SPLITS
    x_strides, w_strides, grad_y_strides, grad_x_strides = aligned(strides, UNITS)
    size, out_size = (d_in, h_in, w_in), (d_out, h_out, w_out)
    split = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    if WIDE:
        split = split.to(tl.int64)
        group = group.to(tl.int64)
        offs_c = offs_c.to(tl.int64)
    tap, channel, mask_n = taps(offs_n, LAYER, CONFIG)
    mask_w = mask_n[:, None] & (offs_c < C_IN)[None, :]
    if grad_x_ptr is not None:
        if GIVEN:  # a row (channel, tap) of the weight lies side by side
            w_rows = w_ptr + (group * C_IN + offs_c) * (KERNEL[0] * KERNEL[1] * KERNEL[2] * C_OUT)
            w_rows = tl.load(w_rows[:, None] + offs_n[None, :], mask=(offs_c < C_IN)[:, None], other=0.0)
            w_tile = tl.trans(phases_first(w_rows, KERNEL, ROWS))  # (BLOCK_N, BLOCK_C)
        else:
            w_rows = channel * w_strides[0] + tap * w_strides[2]
            w_columns = (group * C_IN + offs_c) * w_strides[1]
            w_tile = tl.load(w_ptr + w_rows[:, None] + w_columns[None, :], mask=mask_w, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)

    by, fine = None, None
    if not PLAIN:
        by, fine = dividers(size, BLOCK_W), fine_dividers(size, KERNEL, ROWS, BLOCK_W)
    for tile in range(split, voxel_tiles(n, size, BLOCK_M, BLOCK_W, WIDE), SPLITS):
        grad_y_tile = load_phases(
            grad_y_ptr + group * C_OUT * grad_y_strides[1], grad_y_strides, tile, n, cells=size, origin=(0, 0, 0),
            out_size=out_size, tile_n=0, CHANNELS=C_OUT, PHASES=KERNEL, STRIDE=STRIDE, ROWS=ROWS, FACTS=FACTS,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_W=BLOCK_W, WIDE=WIDE, by=fine,
        )  # fmt: skip
        if partial_ptr is not None:
            offsets, mask = _voxel_tile(
                tile, n, size, x_strides, offs_c, C=C_IN, X_STEP=X_STEP, BLOCK_M=BLOCK_M, BLOCK_W=BLOCK_W, WIDE=WIDE,
                by=by,
            )  # fmt: skip
            x_tile = tl.load(x_ptr + group * C_IN * x_strides[1] + offsets, mask=mask, other=0.0)
            acc = tl.dot(tl.trans(grad_y_tile), x_tile, acc, input_precision=PRECISION)
        if bias_partial_ptr is not None:
            sums += tl.sum(grad_y_tile.to(tl.float32), axis=0)
        if grad_x_ptr is not None:
            grad_x = tl.dot(grad_y_tile, w_tile, input_precision=PRECISION)  # (BLOCK_M, BLOCK_C)
            offsets, mask = _voxel_tile(
                tile, n, size, grad_x_strides, offs_c, C=C_IN, X_STEP=X_STEP, BLOCK_M=BLOCK_M, BLOCK_W=BLOCK_W,
                WIDE=WIDE, by=by,
            )  # fmt: skip
            grad_x_group = grad_x_ptr + group * C_IN * grad_x_strides[1]
            tl.store(grad_x_group + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)

    part = split * GROUPS + group
    if partial_ptr is not None:
        rows = ((part * KERNEL[0] * KERNEL[1] * KERNEL[2] + tap) * C_OUT + channel) * C_IN
        tl.store(partial_ptr + rows[:, None] + offs_c[None, :], acc, mask=mask_w)
    if bias_partial_ptr is not None:
        BLOCK_O: tl.constexpr = triton.next_power_of_2(C_OUT)
        offs_o = tl.arange(0, BLOCK_O)
        of_channel = (channel[:, None] == offs_o[None, :]) & mask_n[:, None]
        folded = tl.sum(tl.where(of_channel, sums[:, None], 0.0), axis=0)  # over the taps
        tl.store(bias_partial_ptr + part * C_OUT + offs_o, folded, mask=offs_o < C_OUT)
    if arrivals_ptr is not None:  # noqa: SIM102
        if last_to_arrive(arrivals_ptr, group, SPLITS):
            TAPS: tl.constexpr = product(KERNEL)
            step = widened(GROUPS * TAPS * C_OUT * C_IN, WIDE)
            offsets = (((group * TAPS + tap) * C_OUT + channel) * C_IN)[:, None] + offs_c[None, :]
            weights = sum_in_order(partial_ptr, step, SPLITS, offsets, mask_w, ahead(BLOCK_N * BLOCK_C))
            rows, columns = channel * TAPS + tap, (group * C_IN + offs_c) * (C_OUT * TAPS)
            total_ptrs = total_ptr + rows[:, None] + columns[None, :]
            tl.store(total_ptrs, weights.to(total_ptr.dtype.element_ty), mask=mask_w)
            if bias_partial_ptr is not None:
                offs_b, mask_o = group * C_OUT + offs_o, offs_o < C_OUT
                biases = sum_in_order(bias_partial_ptr, GROUPS * C_OUT, SPLITS, offs_b, mask_o, ahead(BLOCK_O))
                tl.store(total_bias_ptr + offs_b, biases.to(total_bias_ptr.dtype.element_ty), mask=mask_o)


def backward(problem, config, x, weight, grad_y, need_bias):
    """(grad_x, grad_weight, grad_bias): grad_x needs ``weight``, the other two need ``x``; without it they are None."""
    c_in, c_out = problem.c_in // problem.groups, problem.c_out // problem.groups
    sums = grad_x = None
    if weight is not None:
        grad_x = empty(problem, problem.x_shape, grad_y, zero=not grad_y.numel())
        weight = packed(weight, config["WEIGHT"])
    if x is not None:
        sums = WeightGradients(problem, config, x, grad_y, need_bias)
        sums.split_weight(problem.groups, math.prod(problem.kernel), c_out, c_in)
        sums.split_bias(sums.splits)
    if grad_y.numel():
        wide_offsets = wide(x, weight, grad_y, grad_x, None if sums is None else sums.partial, of=problem)
        run(
            fused_backward_kernel,
            config["SPLITS"] * problem.groups,
            {key: value for key, value in config.items() if key not in ("WEIGHT", ARRIVE)},
            (grad_x, *(() if sums is None else sums.written)),
            x_ptr=x,
            w_ptr=weight,
            grad_y_ptr=grad_y,
            grad_x_ptr=grad_x,
            **(dict.fromkeys(POINTERS) if sums is None else sums.pointers(problem.groups)),
            **geometry(problem, fused_backward_kernel),
            strides=(
                () if x is None else x.stride(),
                () if weight is None else oriented(weight, "backward_data"),
                grad_y.stride(),
                () if grad_x is None else grad_x.stride(),
            ),
            GIVEN=weight is not None and _whole_rows(problem, weight, config["ROWS"]),
            X_STEP=phases.width_step(problem.size[2], config),
            FACTS=phases.facts(problem, config, grad_y),
            BLOCK_N=_block_n(problem, config["ROWS"]),
            BLOCK_C=_block_c(problem),
            PLAIN=wide_offsets > 1 or config["BLOCK_W"] > 0 or 0 < compute_capability() < 90,  # dividers spill on sm_80
            WIDE=wide_offsets,
            PRECISION=precision(problem.dtype),
        )
    return grad_x, *((None, None) if sums is None else sums.results())


def _whole_rows(problem: Problem, weight: Buffer, rows: int) -> bool:
    """A row of the weight, as torch has it, fills the columns of a tile."""
    columns = math.prod(problem.kernel) * problem.c_out // problem.groups
    return weight.is_contiguous() and columns == _block_n(problem, rows)


def _rows(problem: Problem) -> int:
    # Triton 3.9.0 aborts for sm_100 on a float32 tile that is loaded by rows, unshuffled and transposed for a dot.
    return phases.whole_rows(problem) if problem.dtype.itemsize == 2 else 0


def _block_n(problem: Problem, rows: int) -> int:
    return max(16, triton.next_power_of_2(phases.columns(problem, rows)))


def _block_c(problem: Problem) -> int:
    return max(16, triton.next_power_of_2(problem.c_in // problem.groups))


def supports(problem: Problem, device: torch.device) -> str | None:
    why_not = refusal(problem, device)
    if why_not is None and not problem.tiles_exactly:
        why_not = "one tile of grad_y gives all three gradients only where kernel = stride and nothing is cropped"
    if why_not is None and problem.dtype is torch.float32 and precision(problem.dtype) == "ieee":
        why_not = "with TF32 off float32 has no matrix instruction, and tiles of this size would spill registers"
    if why_not is not None:
        return why_not
    rows, least = _rows(problem), FEWEST[problem.dtype.itemsize]
    elements, most = _block_n(problem, rows) * _block_c(problem), LARGEST[problem.dtype.itemsize]
    if elements > most:
        return f"grad_weight stays in registers: at most {most} elements per group, padded, not {elements}"
    shared = _held_bytes(problem, rows, least)
    if shared > tiles.SHARED_BYTES:
        # Not the limit of the target: 512 columns fit an H100, and in NCDHW spill hundreds of bytes (sm_80 to sm_100).
        return (
            f"weight and tiles would take {shared} bytes of shared memory, and at most {tiles.SHARED_BYTES} are taken"
        )
    return None


def _held_bytes(problem: Problem, rows: int, block_m: int) -> int:
    """The weight, and a tile of grad_y and of x with what is exchanged of them, in bytes: it says what is served."""
    itemsize, block_n, block_c = problem.dtype.itemsize, _block_n(problem, rows), _block_c(problem)
    copies_y, copies_x = (1.5, 2.2) if itemsize == 2 else (2, 2)
    return int((block_n * block_c + block_m * (copies_y * block_n + copies_x * block_c)) * itemsize)


def _shared_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a program that makes all three gradients, in bytes, at most: the weight, the pipeline's copies
    of a tile of grad_y and of x, in the half types what is exchanged to store grad_x, in NCDHW twice, and barriers. For
    sm_90 Triton 3.6.0 and 3.9.0 take just that in channels_last_3d with 64 voxels a tile, but for the barriers."""
    block_m, stages, half = config["BLOCK_M"], config["num_stages"], problem.dtype.itemsize == 2
    block_n, block_c = _block_n(problem, config["ROWS"]), _block_c(problem)
    in_rows = half and problem.layout == "ncdhw"
    copies = max(1, stages - 1) if in_rows else pipeline_buffers(stages)
    elements = block_n * block_c + copies * block_m * (block_n + block_c) + (half + in_rows) * block_m * block_c
    return max(_held_bytes(problem, config["ROWS"], block_m), elements * problem.dtype.itemsize + BARRIERS)


def default(problem: Problem, device: torch.device) -> Config:
    rows, half = _rows(problem), problem.dtype.itemsize == 2
    block_m = 64 if half or _held_bytes(problem, rows, 64) <= tiles.SHARED_BYTES else 32
    block_n = _block_n(problem, rows)
    largest = max(block_n * _block_c(problem), block_m * block_n // (2 if half else 1))
    width = tiles.block_w(problem, problem.size, block_m)
    most = tiles.tiles_of(problem.n, problem.size, {"BLOCK_M": block_m, "BLOCK_W": width})
    return {
        "BLOCK_M": block_m,
        "BLOCK_W": width,
        "ROWS": rows,
        "SPLITS": max(1, min(most, MULTIPROCESSORS // problem.groups)),
        "WEIGHT": AS_GIVEN,  # each program reads the weight once
        "num_warps": 8 if largest >= 128 * 64 else 4,
        "num_stages": 1 if compute_capability() >= 100 else 2,  # on sm_100 grad_weight alone spills in two
    }


def space(problem: Problem, device: torch.device) -> tuple[Config, ...]:
    base = default(problem, device)
    changes = {
        "BLOCK_M": (base["BLOCK_M"] // 2, base["BLOCK_M"] * 2),
        "SPLITS": (base["SPLITS"] // 2, base["SPLITS"] * 2, base["SPLITS"] * 4),
        "num_warps": (4, 8),
        "num_stages": (1, 3),
        "ROWS": (0, 1) if base["ROWS"] else (),
    }
    configs = [base]
    for changed in ({**base, key: value} for key, values in changes.items() for value in values):
        if changed not in configs and changed["SPLITS"] and changed["BLOCK_M"] >= max(16, changed["BLOCK_W"]):
            configs.append(changed)
    row = tiles.row_in_channels_last(problem, problem.size[2], base["BLOCK_M"])
    if row and base["BLOCK_W"] == 0:
        configs += [{**base, "BLOCK_W": row, "num_stages": stages} for stages in (base["num_stages"], 3)]
    return tuple(config for config in configs if _shared_bytes(problem, config) <= shared_bytes())


def space_weight(problem: Problem, device: torch.device) -> tuple[Config, ...]:
    """Also of both gradients at once."""
    configs = space(problem, device)
    tile_bytes = 4 * _block_n(problem, configs[0]["ROWS"]) * _block_c(problem)
    return tuple(each for config in configs for each in with_arrivals(config, tile_bytes))


def workspace_bytes(problem: Problem) -> int:
    """The partial sums of the largest number of splits in :func:`space`, in bytes."""
    elements = math.prod(problem.weight_shape) + problem.c_out
    return 4 * elements * 4 * max(1, MULTIPROCESSORS // problem.groups)


def work(problem: Problem, config: Config, pass_name: str) -> Work:
    """Of one of the two gradients alone."""
    splits = config["SPLITS"]
    tile = {**config, "BLOCK_N": _block_c(problem), "BLOCK_K": _block_n(problem, config["ROWS"])}
    del tile["WEIGHT"]  # the loop loads none
    steps = tiles.tiles_of(problem.n, problem.size, config) * problem.groups
    partial = 8.0 * splits * math.prod(problem.weight_shape) if pass_name == "backward_weight" else 0.0
    launches = 2 if pass_name == "backward_weight" and not arrives(config) else 1
    counts = tap_gemm(problem, pass_name, tile, splits * problem.groups, steps, partial, launches)
    return replace(counts, shared_bytes=_shared_bytes(problem, config))


def launch_data(problem, config, grad_y, weight):
    return backward(problem, config, None, weight, grad_y, False)[0]


def launch_weight(problem, config, x, grad_y, need_bias):
    return backward(problem, config, x, None, grad_y, need_bias)[1:]


_variant = partial(
    Variant, idea="kernel = stride: all three gradients from one read of grad_y", backend="triton", supports=supports,
    default=default, joint=backward,
)  # fmt: skip
VARIANTS = [  # each is one half: both together are one launch
    _variant(
        "backward_data_fused", "backward_data", launches=launch_data, space=space,
        work=lambda problem, config: work(problem, config, "backward_data"),
    ),
    _variant(
        "backward_weight_fused", "backward_weight", launches=launch_weight, space=space_weight, options=(ARRIVE,),
        workspace_bytes=workspace_bytes,
        work=lambda problem, config: work(problem, config, "backward_weight"),
    ),
]  # fmt: skip
