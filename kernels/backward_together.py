"""Where taps overlap: both gradients in one grid, for layers of which neither alone fills the GPU.

The first programs of the grid are those of ``backward_data_gemm``, the others those of ``backward_weight_splitk``. None
waits for another, so the multiprocessors that one gradient leaves idle work on the other, and the two cost one launch.
A tile is smaller than where a gradient has the GPU for itself, and a program has the registers and the shared memory of
the larger half.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl

from tritonconv.kernels import backward_data_gemm as data_half
from tritonconv.kernels import backward_weight_splitk as weight_half
from tritonconv.kernels import triton_taps
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.backward_data_gemm import store_data_tile
from tritonconv.kernels.backward_weight_splitk import store_weight_tile
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_arrival import ARRIVE, with_arrivals
from tritonconv.kernels.triton_buffers import Buffer, KernelLaunch
from tritonconv.kernels.triton_device import aligned, voxel_tiles
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, refusal
from tritonconv.kernels.triton_launch import launch as run
from tritonconv.kernels.triton_split_gemm import through_partials
from tritonconv.kernels.variant import SPREADS_VOXELS, SPREADS_WEIGHT, Config, Variant
from tritonconv.kernels.work import Work
from tritonconv.problem import Problem

# Programs of both gradients per multiprocessor, without splits, of which each is a part: more of them fill it.
WAVES = 4
LARGEST_TILE = 128 * 64  # sums: half of what backward_data_gemm and backward_weight_splitk begin with
# Keys that both halves have are those of backward_weight; with this prefix they are those of backward_data.
PREFIX = "D_"
OF_BOTH = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_W", "SPLITS")
OF_DATA = ("GROUP_M", "PACK", "WEIGHT", "SKIP")
COMMON = ("num_warps", "num_stages")


@triton.jit(launch_metadata=accounting, do_not_specialize=(*RUN_TIME, "data_programs", "data_splits", "splits"))
def backward_together_kernel(
    x_ptr,  # (n, c_in, d, h, w)
    grad_y_ptr,  # (n, c_out, od, oh, ow)
    w_ptr,  # (c_in, c_out, taps)
    grad_x_ptr,  # (data_splits, n, c_in, d, h, w)
    partial_ptr,  # (splits, c_in, c_out, taps): the sums of chunks, or grad_weight itself
    bias_partial_ptr,  # (splits, c_out): those of grad_bias, or None
    arrivals_ptr, total_ptr, total_bias_ptr,  # as those of backward_weight_splitk_kernel
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    data_programs, data_splits, data_split_stride, splits,
    strides,  # of x, of grad_y, of the weight, of grad_x, of the partials
    LAYER: tl.constexpr, DATA_CONFIG: tl.constexpr, WEIGHT_CONFIG: tl.constexpr,  # CONFIG of either kernel
    UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first ``data_programs`` programs own tiles of grad_x, as in
    :func:`backward_data_gemm_kernel`; the others own those of grad_weight and grad_bias, as in
    :func:`backward_weight_splitk_kernel`.

    Rows, columns and depth are as there: voxels of x, input channels, (tap, output channel); and (tap, output channel),
    input channels, voxels of x.
    """
    x_strides, grad_y_strides, w_strides, grad_x_strides, partial_strides = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    pid = tl.program_id(0)
    if pid < data_programs:
        store_data_tile(
            pid, voxel_tiles(n, size, DATA_CONFIG.BLOCK_M, DATA_CONFIG.BLOCK_W, WIDE), grad_y_ptr, w_ptr, grad_x_ptr,
            n=n, size=size, out_size=out_size, crop=crop, splits=data_splits, split_stride=data_split_stride,
            strides=(grad_y_strides, w_strides, grad_x_strides),
            LAYER=LAYER, CONFIG=DATA_CONFIG, WIDE=WIDE, PRECISION=PRECISION,
        )  # fmt: skip
        return

    store_weight_tile(
        pid - data_programs, x_ptr=x_ptr, grad_y_ptr=grad_y_ptr, partial_ptr=partial_ptr,
        bias_partial_ptr=bias_partial_ptr, arrivals_ptr=arrivals_ptr, total_ptr=total_ptr,
        total_bias_ptr=total_bias_ptr, n=n, size=size, out_size=out_size, crop=crop, splits=splits,
        strides=(x_strides, grad_y_strides, partial_strides), LAYER=LAYER, CONFIG=WEIGHT_CONFIG, WIDE=WIDE,
        PRECISION=PRECISION,
    )  # fmt: skip


def of_data(config: Config) -> dict[str, int]:
    """The config of ``backward_data_gemm``."""
    return {key: config[PREFIX + key] for key in OF_BOTH} | {key: config[key] for key in (*OF_DATA, *COMMON)}


def of_weight(config: Config) -> dict[str, int]:
    """The config of ``backward_weight_splitk``."""
    return {key: value for key, value in config.items() if not key.startswith(PREFIX) and key not in OF_DATA}


def launch_data(problem, config, grad_y, weight):
    return data_half.launches(problem, of_data(config), grad_y, weight)


def launch_weight(problem, config, x, grad_y, need_bias):
    return weight_half.launches(problem, of_weight(config), x, grad_y, need_bias)


def backward(problem, config, x, weight, grad_y, need_bias):
    """(grad_x, grad_weight, grad_bias or None): the launches of both halves, of which the main ones become one."""
    grad_x = launch_data(problem, config, grad_y, weight)
    grad_weight, grad_bias = launch_weight(problem, config, x, grad_y, need_bias)
    if grad_x.writer is not None:  # else there is nothing to sum
        data = _main(grad_x, data_half.backward_data_gemm_kernel)
        own = _main(grad_weight, weight_half.backward_weight_splitk_kernel)
        _join(data, own)
    return grad_x, grad_weight, grad_bias


def _main(result: Buffer, kernel) -> KernelLaunch:
    """The launch of the kernel behind a result, which a sum of partials may follow."""
    launch = result.writer
    while launch is not None and launch.function is not kernel:
        launch = launch.read()[0].base.writer
    assert launch is not None  # each half launches its kernel
    return launch


def _join(data: KernelLaunch, own: KernelLaunch) -> None:
    """Has one launch write what the two would."""
    arguments = {name: value for name, value in data.arguments.items() if name not in ("splits", "split_stride")}
    arguments |= own.arguments
    _, w_strides, grad_x_strides = data.arguments["strides"]
    x_strides, grad_y_strides, partial_strides = own.arguments["strides"]
    arguments |= {
        "data_programs": data.grid[0],
        "data_splits": data.arguments["splits"],
        "data_split_stride": data.arguments["split_stride"],
        "strides": (x_strides, grad_y_strides, w_strides, grad_x_strides, partial_strides),
        "DATA_CONFIG": data.arguments["CONFIG"],
        "WEIGHT_CONFIG": arguments.pop("CONFIG"),
    }
    arguments["WIDE"] = max(data.arguments["WIDE"], own.arguments["WIDE"])
    run(backward_together_kernel, data.grid[0] + own.grid[0], {}, (*data.written, *own.written), **arguments)


def supports(problem: Problem, device: torch.device) -> str | None:
    why_not = refusal(problem, device) or triton_taps.refusal(problem.kernel)
    if why_not is None and problem.depthwise:
        why_not = "a depthwise layer has no product of matrices"
    if why_not is None and all(axis.kernel <= axis.stride for axis in problem.axes):
        why_not = (
            "where no taps overlap (kernel <= stride) backward_data_fused and backward_weight_fused read grad_y once"
        )
    if why_not is not None:
        return why_not
    programs, most = _programs(problem, default(problem, device)), WAVES * MULTIPROCESSORS
    if programs > most:
        return f"both gradients have {programs} programs without splits, and more than {most} fill a GPU one by one"
    return None


def _programs(problem: Problem, config: Config) -> int:
    """How many programs both gradients have, without splits."""
    own = weight_half.gemm(problem).programs(of_weight(config), problem.bias)
    return data_half.programs(problem, of_data(config)) + own


def default(problem: Problem, device: torch.device) -> Config:
    data, own = dict(data_half.default(problem, device)), weight_half.gemm(problem).default()
    while data["BLOCK_M"] * data["BLOCK_N"] > LARGEST_TILE:
        data["BLOCK_M"] //= 2
    while own["BLOCK_M"] * own["BLOCK_N"] > LARGEST_TILE:
        own["BLOCK_N"] //= 2
    # Narrow loads come through registers: of large tiles in more threads, as in each half alone.
    narrow = problem.dtype.itemsize == 2 and (problem.layout == "ncdhw" or problem.weight_shape[1] % 8 != 0)
    large = max(each["BLOCK_M"] * each["BLOCK_N"] for each in (data, own)) == LARGEST_TILE
    config = {**{PREFIX + key: data[key] for key in OF_BOTH}, **{key: data[key] for key in OF_DATA}, **own}
    return _counted(problem, {**config, "num_warps": 8 if narrow and large else 4})


def _counted(problem: Problem, config: Config) -> Config:
    """The config with rows that fit its tiles, and with their splits: of grad_weight as many as give each
    multiprocessor a program, of grad_x none, whose sum would cost the launch that is saved."""
    config = {
        **config,
        "D_BLOCK_W": min(config["D_BLOCK_W"], config["D_BLOCK_M"]),
        "BLOCK_W": min(config["BLOCK_W"], config["BLOCK_K"]),
        "D_SPLITS": 1,
    }
    return {**config, "SPLITS": weight_half.gemm(problem).splits(config, waves=1)}


def space(problem: Problem, device: torch.device) -> tuple[Config, ...]:
    """The neighbours of the default alone: a config compiles for as long as two of other kernels."""
    base = default(problem, device)
    configs = [base]
    for key in ("D_BLOCK_M", "D_BLOCK_N", "BLOCK_M", "BLOCK_N"):
        configs += [_counted(problem, {**base, key: value}) for value in (base[key] // 2, base[key] * 2)]
    others = {
        "SPLITS": (max(1, base["SPLITS"] // 2), base["SPLITS"] * 2),
        "D_SPLITS": (data_half.splits_of(problem, of_data(base)),),
        "WEIGHT": (0, 1, 2),
        "SKIP": (0, 1),
        "num_warps": (4, 8),
        "num_stages": (2,),
    }
    configs += [{**base, key: value} for key, values in others.items() for value in values]
    configs = [config for i, config in enumerate(configs) if config not in configs[:i]]
    return tuple(config for config in configs if config == base or _sensible(problem, config))


def _sensible(problem: Problem, config: Config) -> bool:
    return all(tiles.sensible(half, problem.dtype.itemsize) for half in (of_data(config), of_weight(config)))


def space_weight(problem: Problem, device: torch.device) -> tuple[Config, ...]:
    """Also of both gradients at once."""
    configs = space(problem, device)
    return tuple(
        each for config in configs for each in with_arrivals(config, 4 * config["BLOCK_M"] * config["BLOCK_N"])
    )


def work_data(problem: Problem, config: Config) -> Work:
    return data_half.work(problem, of_data(config))


def work_weight(problem: Problem, config: Config) -> Work:
    return weight_half.gemm(problem).work(of_weight(config), weight_half.LOAD_INSTRUCTIONS)


def workspace_weight(problem: Problem) -> int:
    """Of the partials, at the most chunks of the space, in bytes."""
    splits = max(config["SPLITS"] for config in space(problem, torch.device("cuda")))
    elements = math.prod(problem.weight_shape) + problem.c_out
    return 4 * splits * elements if through_partials(problem, splits) else 0


_variant = partial(
    Variant, idea="kernel > stride, few voxels: both gradients in one grid", backend="triton", supports=supports,
    default=default, joint=backward,
)  # fmt: skip
VARIANTS = [  # each is one half: both together are one launch
    _variant(
        "backward_data_together", "backward_data", launches=launch_data, space=space, work=work_data,
        workspace_bytes=data_half.workspace_bytes, spreads_nonfinite=SPREADS_WEIGHT,
    ),
    _variant(
        "backward_weight_together", "backward_weight", launches=launch_weight, space=space_weight, work=work_weight,
        workspace_bytes=workspace_weight, spreads_nonfinite=SPREADS_VOXELS, options=(ARRIVE,),
    ),
]  # fmt: skip
