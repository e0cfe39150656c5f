"""Operands of NCDHW layers in channels_last_3d: one copy, so that a tile's loads are 16 bytes wide.

In NCDHW the neighbours of a tap start at any address, and every load of a tile is 2 bytes (4 of float32) wide. Where
taps overlap, each element is loaded several times, and one copy in the other order can cost less than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import triton
import triton.language as tl

from tritonconv.kernels.registry import Config, Variant
from tritonconv.kernels.triton_device import widened
from tritonconv.kernels.triton_launch import launch, wide
from tritonconv.kernels.triton_tape import derived, fresh
from tritonconv.kernels.triton_tiles import power_of_two
from tritonconv.kernels.work import Work, size_of
from tritonconv.problem import Problem

LEAST_CHANNELS = 16  # of a group: fewer fill no 32-byte sector
BLOCK_V = 128  # voxels of a tile


@triton.jit(do_not_specialize=("n",))
def channels_last_kernel(
    x_ptr,  # (n, CHANNELS, voxels), dense
    out_ptr,  # (n, voxels, CHANNELS), dense
    n, voxels,  # specialised on whether 16 divides it: wide loads
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tiles_v, tiles_c = tl.cdiv(voxels, BLOCK_V), tl.cdiv(CHANNELS, BLOCK_C)
    pid = tl.program_id(0)
    image = widened(pid // (tiles_v * tiles_c), WIDE)
    offs_c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_v = widened(pid // tiles_c % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V), WIDE)
    mask = (offs_c < CHANNELS)[:, None] & (offs_v < voxels)[None, :]
    rows = widened(offs_c, WIDE) * voxels
    x_tile = tl.load(x_ptr + image * CHANNELS * voxels + rows[:, None] + offs_v[None, :], mask=mask)
    out_ptrs = out_ptr + (image * voxels + offs_v)[:, None] * CHANNELS + offs_c[None, :]
    tl.store(out_ptrs, tl.trans(x_tile), mask=tl.trans(mask))


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``x`` (n, c, d, h, w) dense in channels_last_3d: itself where it is already."""
    if x.is_contiguous(memory_format=torch.channels_last_3d) or not x.is_contiguous():
        return derived(x, lambda tensor: tensor.contiguous(memory_format=torch.channels_last_3d))
    n, channels, *size = x.shape
    out = fresh(x.shape, x, memory_format=torch.channels_last_3d)
    voxels = size[0] * size[1] * size[2]
    block_c = power_of_two(channels, 8, 64)
    launch(
        channels_last_kernel,
        n * triton.cdiv(voxels, BLOCK_V) * triton.cdiv(channels, block_c),
        {"BLOCK_C": block_c, "BLOCK_V": BLOCK_V, "num_warps": 4},
        x.device,
        x_ptr=x,
        out_ptr=out,
        n=n,
        voxels=voxels,
        CHANNELS=channels,
        WIDE=wide(x),
    )
    return out


def grad_y_last(problem: Problem, grad_y: torch.Tensor) -> torch.Tensor:
    """``Variant.prepare`` of the two gradients: one copy of grad_y serves both."""
    return channels_last(grad_y)


def of(base: Variant, launch: Callable, idea: str, copied: tuple[str, ...], gathered: str) -> Variant:
    """The record of ``base`` on channels-last copies of the operands ``copied``, with the tiles of an NDHWC layer.

    ``gathered`` (``c_in`` or ``c_out``) are the channels of the operand that the taps gather.
    """

    def supports(problem: Problem, device: torch.device) -> str | None:
        if problem.layout != "ncdhw":
            return "the operands are channels_last_3d already"
        if all(axis.kernel <= axis.stride for axis in problem.axes):
            return f"kernel {problem.kernel}, stride {problem.stride}: no element is read twice, a copy saves nothing"
        channels = getattr(problem, gathered) // problem.groups
        if channels < LEAST_CHANNELS:
            return f"{gathered}={channels} per group: fewer than {LEAST_CHANNELS} contiguous channels gain nothing"
        return base.supports(_last(problem), device)

    def work(problem: Problem, config: Config) -> Work:
        assert base.work is not None
        found, moved = base.work(_last(problem), config), 2 * size_of(problem, *copied)
        return replace(
            found,
            memory_bytes=found.memory_bytes + moved,
            cache_bytes=found.cache_bytes + moved,
            launches=found.launches + len(copied),
        )

    return replace(
        base,
        name=f"{base.name}_last",
        idea=idea,
        launch=launch,
        supports=supports,
        space=lambda problem, device: base.space(_last(problem), device),
        default=lambda problem, device: base.default(_last(problem), device),
        prepare=None if base.pass_name == "forward" else grad_y_last,
        workspace_bytes=lambda problem: base.workspace_bytes(_last(problem)) + int(size_of(problem, *copied)),
        work=work,
    )


def _last(problem: Problem) -> Problem:
    return replace(problem, layout="ndhwc")
