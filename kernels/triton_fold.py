"""Taps along w counted as channels, of channels-last layers whose kernel is their stride.

There the outputs of a voxel along w lie side by side with their channels: kernel (kd, kh, kw) to C channels is kernel
(kd, kh, 1) to kw*C channels, of the same memory. Few channels, 5 of 2 bytes, are no multiple of what one load may take;
20 of them are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from tritonconv.kernels.triton_buffers import Buffer, copied
from tritonconv.kernels.triton_weights import packed
from tritonconv.kernels.weight_orders import IN_INNERMOST
from tritonconv.problem import Problem

WIDEST_LOAD = 16  # bytes


def pays(problem: Problem) -> bool:
    """Whether the folded channels load wider than one tap's."""
    exact = problem.tiles_exactly and problem.layout == "ndhwc" and problem.groups == 1
    return exact and problem.kernel[2] > 1 and problem.c_out * problem.dtype.itemsize % WIDEST_LOAD != 0


@lru_cache(4096)  # a count calls it for each config, and the problem caches the sums over its phases
def folded(problem: Problem) -> Problem:
    """The same layer with the taps along w among its output channels."""
    (kd, kh, kw), (od, oh, _) = problem.kernel, problem.out_size
    return replace(
        problem,
        c_out=kw * problem.c_out,
        kernel=(kd, kh, 1),
        stride=(kd, kh, 1),
        out_size=(od, oh, problem.size[2]),
    )


def folded_outputs(grad_y: Buffer, taps: int) -> Buffer:
    """grad_y (n, c, od, oh, w*taps) as (n, taps*c, od, oh, w); a copy where it is not dense in channels_last_3d."""
    n, channels, depth, height, width = grad_y.shape
    dense = copied(grad_y, lambda tensor: tensor.contiguous(memory_format=torch.channels_last_3d))
    shape = (n, depth, height, width // taps, taps * channels)
    return dense.view(lambda tensor: tensor.permute(0, 2, 3, 4, 1).view(shape).permute(0, 4, 1, 2, 3))


def folded_weight(weight: Buffer) -> Buffer:
    """weight (c_in, c, kd, kh, kw) as (c_in, kw*c, kd, kh, 1), out of its packed copy with c_in innermost."""
    c_in, channels, kd, kh, kw = weight.shape
    shape = (kd, kh, 1, kw * channels, c_in)
    order = packed(weight, IN_INNERMOST)
    if not order.view(lambda tensor: tensor.permute(2, 3, 4, 1, 0)).is_contiguous():
        order = copied(order, lambda tensor: tensor.permute(2, 3, 4, 1, 0).contiguous().permute(4, 3, 0, 1, 2))
    return order.view(lambda tensor: tensor.permute(2, 3, 4, 1, 0).view(shape).permute(4, 3, 0, 1, 2))
