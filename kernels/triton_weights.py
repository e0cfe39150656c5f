"""The weight as the kernels read it: strides instead of copies, and a packed copy where that pays."""

from __future__ import annotations

import torch

from tritonconv.problem import Problem

AS_GIVEN, OUT_INNERMOST, IN_INNERMOST = 0, 1, 2  # the values of the config key WEIGHT
# torch's order has the taps innermost: neighbours of a tile then lie taps*itemsize bytes apart. A weight this small
# stays in a multiprocessor's L1 cache beside the tiles, so that a launch for its packing would buy nothing.
CACHED_BYTES = 32 * 1024
_ORDERS = {OUT_INNERMOST: (2, 3, 4, 0, 1), IN_INNERMOST: (2, 3, 4, 1, 0)}


def packed(weight: torch.Tensor, order: int) -> torch.Tensor:
    """``weight`` (c_in, c_out/groups, kd, kh, kw), with the same shape, its memory in the wanted order of axes.

    The packed orders are (tap, c_in, c_out) and (tap, c_out, c_in). A copy is made for one launch and never kept, so
    no edit of the weight, through an optimizer, under no_grad or through ``.data``, can leave a stale one behind.
    """
    if order != AS_GIVEN:
        axes = _ORDERS[order]
        return weight.permute(axes).contiguous().permute([axes.index(axis) for axis in range(5)])
    (_, _, kd, kh, kw), (_, _, sd, sh, sw) = weight.shape, weight.stride()
    one_stride = (kd == 1 or kh * kw == 1 or sd == kh * kw * sw) and (kh == 1 or kw == 1 or sh == kw * sw)
    return weight if one_stride else weight.contiguous()


def strides(weight: torch.Tensor) -> tuple[int, int, int]:
    """(c_in, c_out, tap) strides of a weight that :func:`packed` returned."""
    step = weight.stride()
    kd, kh, kw = weight.shape[2:]
    tap = step[4] if kw > 1 else step[3] if kh > 1 else step[2] if kd > 1 else 0
    return step[0], step[1], tap


def oriented(weight: torch.Tensor, pass_name: str) -> tuple[int, int, int]:
    """The strides as (k, n, tap) of the GEMM: the forward sums over c_in, the backward-data over c_out."""
    c_in, c_out, tap = strides(weight)
    return (c_in, c_out, tap) if pass_name == "forward" else (c_out, c_in, tap)


def preferred(problem: Problem, pass_name: str = "forward") -> int:
    """The default order: as given where there is one tap or the weight fits a cache, else the last axis of a tile.

    16-bit dots take either operand order from shared memory, so the tile's columns come innermost. TF32 on Hopper needs
    the summed axis innermost: c_in in the forward, c_out in the backward-data.
    """
    elements = 1
    for size in problem.weight_shape:
        elements *= size
    if max(problem.kernel) == 1 or elements * problem.dtype.itemsize <= CACHED_BYTES:
        return AS_GIVEN
    columns_innermost = problem.dtype.itemsize == 2
    return OUT_INNERMOST if columns_innermost == (pass_name == "forward") else IN_INNERMOST
