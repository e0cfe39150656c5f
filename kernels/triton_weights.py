"""The weight as the kernels read it: strides instead of copies, and a packed copy where that pays."""

from __future__ import annotations

import math

import torch

from tritonconv.kernels.triton_buffers import Buffer, copied
from tritonconv.kernels.triton_transpose import taps_first
from tritonconv.kernels.weight_orders import AS_GIVEN, CACHED_BYTES, IN_INNERMOST, OUT_INNERMOST, SMALL_PROBLEM
from tritonconv.problem import Problem

_INNERMOST = {OUT_INNERMOST: 1, IN_INNERMOST: 0}  # axes of the weight


def packed(weight: Buffer, order: int) -> Buffer:
    """``weight`` (c_in, c_out/groups, kd, kh, kw), with the same shape, its memory in the wanted order of axes.

    The packed orders are (tap, c_in, c_out) and (tap, c_out, c_in); a weight whose last wanted axis is contiguous
    already (channels_last_3d) stays as it is.
    """
    innermost = _INNERMOST.get(order)
    if innermost is None or (weight.stride()[innermost] == 1 and weight.shape[innermost] > 1):
        return copied(weight, lambda tensor: tensor if _one_tap_stride(tensor) else tensor.contiguous())
    if weight.is_contiguous():
        return weight.copy(order, lambda: taps_first(weight, innermost))
    axes = (2, 3, 4, 0, 1) if order == OUT_INNERMOST else (2, 3, 4, 1, 0)
    back = [axes.index(axis) for axis in range(5)]
    return copied(weight, lambda tensor: tensor.permute(axes).contiguous().permute(back))


def keep_packed(weight: Buffer, order: int, kept: Buffer) -> None:
    """``kept`` is the copy that :func:`packed` gives of the weight in this order: one of an earlier pass."""
    weight.copies[order] = kept


def _one_tap_stride(weight: torch.Tensor) -> bool:
    (_, _, kd, kh, kw), (_, _, sd, sh, sw) = weight.shape, weight.stride()
    return (kd == 1 or kh * kw == 1 or sd == kh * kw * sw) and (kh == 1 or kw == 1 or sh == kw * sw)


def strides(weight: Buffer) -> tuple[int, int, int]:
    """(c_in, c_out, tap) strides of a weight that :func:`packed` returned."""
    step = weight.stride()
    kd, kh, kw = weight.shape[2:]
    tap = step[4] if kw > 1 else step[3] if kh > 1 else step[2] if kd > 1 else math.prod(weight.shape)
    return step[0], step[1], tap


def oriented(weight: Buffer, pass_name: str) -> tuple[int, int, int]:
    """The strides as (k, n, tap) of the GEMM: the forward sums over c_in, the backward-data over c_out."""
    c_in, c_out, tap = strides(weight)
    return (c_in, c_out, tap) if pass_name == "forward" else (c_out, c_in, tap)


def preferred(problem: Problem, pass_name: str = "forward") -> int:
    """The default order: torch's where there is one tap, or the weight fits a cache in a small problem; else packed.

    16-bit dots take either operand order from shared memory, so forward and backward-data read the same copy: with the
    channels innermost that load wider, c_out where both do alike. TF32 on Hopper needs the summed axis innermost: c_in
    in the forward, c_out in the backward-data.
    """
    nbytes = math.prod(problem.weight_shape) * problem.dtype.itemsize
    if max(problem.kernel) == 1 or (nbytes <= CACHED_BYTES and problem.bytes(pass_name) <= SMALL_PROBLEM):
        return AS_GIVEN
    if problem.dtype.itemsize == 4:
        return IN_INNERMOST if pass_name == "forward" else OUT_INNERMOST
    c_in, c_out = problem.c_in // problem.groups, problem.c_out // problem.groups  # of one the two orders are the same
    return IN_INNERMOST if c_out > 1 and math.gcd(8, c_in) > math.gcd(8, c_out) else OUT_INNERMOST
