"""Backward-data for the compute-bound layers: each stride phase of grad_y is a dense volume read in boxes.

Input i under tap t reads grad_y[i*stride - crop + dilation*t], which lies in the phase of the residue of dilation*t: a
strided view of grad_y with a descriptor of its own. Inside a phase the taps are shifts of one box.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from tritonconv.kernels import triton_boxes
from tritonconv.kernels.forward_boxes import box_config, box_space
from tritonconv.kernels.triton_boxes import box_corner, box_gemm, box_voxels, box_zeros, boxes, store_box
from tritonconv.kernels.triton_device import (
    aligned,
    ceil_div,
    grouped_order,
    product,
)
from tritonconv.kernels.triton_launch import RUN_TIME, accounting, empty, geometry, precision, wide
from tritonconv.kernels.triton_launch import launch as run
from tritonconv.kernels.triton_taps import tap_steps, volume_phase, voxel_steps
from tritonconv.kernels.triton_target import compute_capability
from tritonconv.kernels.variant import SPREADS_WEIGHT, Variant
from tritonconv.kernels.weight_orders import OUT_INNERMOST
from tritonconv.kernels.work import Work

MOST_PHASES = 8  # descriptors of one launch: stride 2 on each axis


@triton.jit
def phase_gemm(
    acc, volume, weight, PHASE: tl.constexpr, image, d, h, w, out_size, crop, column, LAYER: tl.constexpr,
    CONFIG: tl.constexpr, VOXELS_LAST: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """acc plus what the taps of one phase add to the box of inputs at d, h, w; a phase without outputs: nothing."""
    KERNEL: tl.constexpr = LAYER.KERNEL
    STRIDE: tl.constexpr = LAYER.STRIDE
    DILATION: tl.constexpr = LAYER.DILATION
    _, outs, tap, taps, start = volume_phase(PHASE, crop, out_size, KERNEL, STRIDE, DILATION)
    return box_gemm(
        acc, volume, weight, image=image, d=d - start[0], h=h - start[1], w=w - start[2],
        tap=tap, taps=(tl.where(outs[0] * outs[1] * outs[2] == 0, 0, taps[0]), taps[1], taps[2]), column=column,
        TAP_STEP=tap_steps(STRIDE, DILATION), VOXEL_STEP=voxel_steps(STRIDE, DILATION),
        KERNEL=KERNEL, K=LAYER.C_OUT, K_INNERMOST=True, CONFIG=CONFIG,
        VOXELS_LAST=VOXELS_LAST, PRECISION=PRECISION, WAIT=WAIT,
    )  # fmt: skip


@triton.jit(launch_metadata=accounting, do_not_specialize=RUN_TIME)
def backward_data_boxes_kernel(
    phase0, phase1, phase2, phase3, phase4, phase5, phase6, phase7,  # grad_y by phase, (n, d, h, w, c_out) each
    w_desc,  # (tap, c_in, c_out)
    grad_x_ptr,  # (n, c_in, d, h, w)
    n, d_in, h_in, w_in, d_out, h_out, w_out, d_crop, h_crop, w_crop,
    strides,  # of grad_x
    LAYER: tl.constexpr, CONFIG: tl.constexpr,
    VOXELS_LAST: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """A program owns every ``num_programs``-th tile. Rows: a box of BLOCK_D x BLOCK_H x BLOCK_W voxels of grad_x;
    columns: BLOCK_N input channels; depth: (tap, output channel), by the phases of grad_y.
    """
    C_IN: tl.constexpr = LAYER.C_IN
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    (x_strides,) = aligned(strides, UNITS)
    size, out_size, crop = (d_in, h_in, w_in), (d_out, h_out, w_out), (d_crop, h_crop, w_crop)
    TILES_N: tl.constexpr = ceil_div(C_IN, BLOCK_N)
    tiles_m = n * boxes(size, CONFIG)
    for tile in range(tl.program_id(0), tiles_m * TILES_N, tl.num_programs(0)):
        tile_m, tile_n = grouped_order(tile, tiles_m, TILES_N, CONFIG.GROUP_M)
        image, d, h, w = box_corner(tile_m, size, CONFIG)
        acc = box_zeros(CONFIG, VOXELS_LAST)
        for PHASE in tl.static_range(product(LAYER.STRIDE)):
            grad_y = phase0
            if PHASE == 1:
                grad_y = phase1
            if PHASE == 2:
                grad_y = phase2
            if PHASE == 3:
                grad_y = phase3
            if PHASE == 4:
                grad_y = phase4
            if PHASE == 5:
                grad_y = phase5
            if PHASE == 6:
                grad_y = phase6
            if PHASE == 7:
                grad_y = phase7
            acc = phase_gemm(
                acc, grad_y, w_desc, PHASE=PHASE, image=image, d=d, h=h, w=w, out_size=out_size, crop=crop,
                column=tile_n * BLOCK_N, LAYER=LAYER, CONFIG=CONFIG,
                VOXELS_LAST=VOXELS_LAST, PRECISION=PRECISION, WAIT=WAIT,
            )  # fmt: skip
        if VOXELS_LAST:
            acc = tl.trans(acc)
        d, h, w, mask_m = box_voxels(d, h, w, size, CONFIG, WIDE)
        store_box(
            grad_x_ptr, x_strides, acc, image=image, d=d, h=h, w=w, mask_m=mask_m, column=tile_n * BLOCK_N,
            CHANNELS=C_IN, CONFIG=CONFIG, WIDE=WIDE,
        )  # fmt: skip


def supports(problem, device):
    why_not = triton_boxes.box_refusal(problem, device)
    if why_not is None and math.prod(problem.stride) > MOST_PHASES:
        return f"stride {problem.stride} has more than {MOST_PHASES} phases, one descriptor each"
    return why_not


def phase_views(problem, grad_y):
    """grad_y's phases, as strided views, in the order of the phases (w fastest); one without outputs stays whole."""
    views = []
    for phase in range(math.prod(problem.stride)):
        _, sh, sw = problem.stride
        residues = (phase // (sw * sh), phase // sw % sh, phase % sw)
        firsts = [(phi - p) % s for phi, p, s in zip(residues, problem.crop, problem.stride, strict=True)]
        every = (..., *[slice(first, None, s) for first, s in zip(firsts, problem.stride, strict=True)])
        view = grad_y.view(lambda tensor, every=every: tensor[every])
        views.append(view if view.numel() else grad_y)
    return views


def launches(problem, config, grad_y, weight):
    grad_x = empty(problem, problem.x_shape, grad_y)
    if grad_x.numel() == 0:
        return grad_x
    box, block = triton_boxes.box_shape(config), (config["BLOCK_N"], config["BLOCK_K"])
    views = phase_views(problem, triton_boxes.describable(grad_y))
    views = [triton_boxes.volume(view, box, config["BLOCK_K"]) for view in views]
    views += views[:1] * (MOST_PHASES - len(views))
    run(
        backward_data_boxes_kernel,
        triton_boxes.programs(grad_y.device, triton_boxes.box_tiles(problem, problem.size, problem.c_in, config)),
        {**config, **triton_boxes.register_limit()},
        (grad_x,),
        **{f"phase{index}": view for index, view in enumerate(views)},
        w_desc=triton_boxes.taps_first(weight, OUT_INNERMOST, block),
        grad_x_ptr=grad_x,
        **geometry(problem, backward_data_boxes_kernel),
        strides=(grad_x.stride(),),
        WIDE=wide(grad_x, of=problem),
        VOXELS_LAST=triton_boxes.voxels_last(config),
        PRECISION=precision(problem.dtype),
    )
    return grad_x


def default(problem, device):
    config = box_config(problem, problem.size, problem.c_in, problem.c_out) | {"num_warps": 8}
    if compute_capability() >= 100:  # the pipelines of eight phases: 128 columns spill there, and 4 warps
        config["BLOCK_N"] = min(config["BLOCK_N"], 64)
    return config


def work(problem, config) -> Work:
    depth = math.prod(problem.kernel) * problem.c_out
    return triton_boxes.boxes_work(problem, "backward_data", config, problem.size, problem.c_in, depth)


VARIANT = Variant(
    "backward_data_boxes", "backward_data",
    "strided convolution of grad_y on tensor-descriptor boxes, persistent grid", "triton",
    launches=launches, supports=supports, default=default,
    space=lambda problem, device: box_space(default(problem, device), problem.size),
    spreads_nonfinite=SPREADS_WEIGHT, work=work,
)  # fmt: skip
