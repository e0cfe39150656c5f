"""Copies between y and the order of the products of kernel = stride, where each phase lies by itself.

In y the voxels of two phases alternate along w, so torch copies with inner loops as short as a row of x. In NCDHW the
order of a channel is the same for all channels: where the rows are short, an index of it is cheaper than the loops.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from tritonconv.problem import Problem, Triple

MOST_ORDERS = 32
MOST_INDEXED = 1 << 17  # outputs of a channel; the index takes four bytes for each
# Times by copies over those by the index: about 24 / w into y and 16 / w from it, where x has w voxels in a row and
# both run in one thread (c_out 8 to 320, w 3 to 32; 162 and 25 us into y (1, 128, 8, 8, 8), 890 and 450 us into
# (1, 32, 32, 32, 32); float32, an Intel Xeon, torch 2.13). torch's copies take a thread for GRAIN elements, its index
# has one.
INDEXED_ROWS = {"into y": 24, "from y": 16}
GRAIN = 1 << 15


def interleave(y: torch.Tensor, values: torch.Tensor) -> None:
    """Fills ``y`` (n, c_out, od, oh, ow), of any strides, with ``values`` (n, c_out, kd, kh, kw, d, h, w)."""
    n, c_out, kd, kh, kw, d, h, w = values.shape
    orders = _by_index("into y", y, (d, h, w), (kd, kh, kw))
    if orders is not None and values.stride()[2:] == orders.by_phase:
        _select(values.flatten(2), orders.into_y, y.flatten(2))
        return
    step_n, step_c, step_d, step_h, step_w = y.stride()
    phases = y.as_strided(
        (n, c_out, d, kd, h, kh, w, kw),
        (step_n, step_c, kd * step_d, step_d, kh * step_h, step_h, kw * step_w, step_w),
    )
    fill(phases, values.permute(0, 1, 5, 2, 6, 3, 7, 4))


def fill(phases: torch.Tensor, values: torch.Tensor) -> None:
    """Fills ``phases``, a view (n, c_out, d, kd, h, kh, w, kw) of y, with ``values`` of that shape.

    Neighbours along w in y come from two places, and torch copies with an inner loop over those two. As the halves of
    complex numbers they are written together: 1.34 -> 0.64 ms for y (1, 16, 48, 48, 48), 6.2 -> 4.3 ms for (1, 32, 64,
    64, 64) (float32, 2 cores of an Intel Xeon, torch 2.13). Four taps take two calls and 0.88 -> 0.52 ms for y (1, 8,
    32, 32, 96), six or eight gain nothing: 0.35 -> 0.40 ms for (1, 8, 16, 16, 192) (one core).
    """
    kw = phases.shape[7]
    if not _has_pairs(phases, kw):
        phases.copy_(values)
    elif kw == 2:
        torch.complex(*values.unbind(7), out=torch.view_as_complex(phases))
    else:
        for first in range(0, kw, 2):
            pair = torch.view_as_complex(phases.narrow(7, first, 2))
            torch.complex(values.select(7, first), values.select(7, first + 1), out=pair)


def unshuffle(problem: Problem, grad_y: torch.Tensor) -> torch.Tensor:
    """grad_y with its phases beside the channels, as the GEMM's operand.

    NCDHW: (n, c_out*taps, voxels), rows as in a weight (c_in, c_out, kd, kh, kw).
    channels_last_3d: (n*voxels, taps*c_out).
    """
    (d, h, w), (kd, kh, kw) = problem.size, problem.kernel
    n, c_out = problem.n, problem.c_out
    if problem.layout == "ndhwc":
        split = grad_y.permute(0, 2, 3, 4, 1).reshape(n, d, kd, h, kh, w, kw, c_out)
        return split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(n * d * h * w, kd * kh * kw * c_out)
    rows, voxels = c_out * kd * kh * kw, d * h * w
    orders = _by_index("from y", grad_y, problem.size, problem.kernel)
    if orders is not None:
        found = torch.empty((n, c_out, len(orders.from_y)), dtype=grad_y.dtype, device=grad_y.device)
        _select(grad_y.flatten(2), orders.from_y, found)
        return found.view(n, rows, voxels)
    split = grad_y.reshape(n, c_out, d, kd, h, kh, w, kw)
    return split.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(n, rows, voxels)


class Orders(NamedTuple):
    """Indices (outputs of a channel,) in int32, and the strides of phases with nothing between their values."""

    into_y: torch.Tensor  # of each voxel of y, its place among the voxels of all phases
    from_y: torch.Tensor  # the inverse
    by_phase: tuple[int, ...]  # of (kd, kh, kw, d, h, w)


def _by_index(way: str, y: torch.Tensor, size: Triple, kernel: Triple) -> Orders | None:
    """The orders where an index of voxels copies y, or from it, faster than torch's copies do; else None."""
    if y.dtype is not torch.float32 or not y.is_cpu or kernel[2] == 1:
        return None
    threads = min(torch.get_num_threads(), -(-y.numel() // GRAIN))
    if size[2] * threads > INDEXED_ROWS[way]:
        return None
    _, _, _, oh, ow = y.shape
    return _orders(size, kernel) if y.stride()[2:] == (oh * ow, ow, 1) else None


def _select(source: torch.Tensor, order: torch.Tensor, target: torch.Tensor) -> None:
    """``target`` (n, c, voxels) from ``source``: torch is fast along the second of two dense axes alone."""
    if source.is_contiguous() and target.is_contiguous():
        torch.index_select(source.view(-1, source.shape[2]), 1, order, out=target.view(-1, source.shape[2]))
        return
    for one, place in zip(source, target, strict=True):
        torch.index_select(one, 1, order, out=place)


@lru_cache(MOST_ORDERS)
def _orders(size: Triple, kernel: Triple) -> Orders | None:
    """None for a channel of too many outputs, or of none."""
    (d, h, w), (kd, kh, kw) = size, kernel
    outputs = math.prod(size) * math.prod(kernel)
    if not 0 < outputs <= MOST_INDEXED:
        return None
    with torch.inference_mode(False):  # they serve later calls too
        places = torch.arange(outputs, dtype=torch.int32, device="cpu")
        phases, voxels = places.view(kd, kh, kw, d, h, w), places.view(d * kd, h * kh, w * kw)
        into_y = phases.permute(3, 0, 4, 1, 5, 2).flatten()
        from_y = voxels.view(d, kd, h, kh, w, kw).permute(1, 3, 5, 0, 2, 4).flatten()
    return Orders(into_y, from_y, phases.stride())


def _has_pairs(phases: torch.Tensor, kw: int) -> bool:
    """It is made of pairs of neighbours that torch takes for complex numbers."""
    if kw not in (2, 4) or phases.device.type != "cpu" or phases.dtype not in (torch.float32, torch.float64):
        return False
    n, c_out, d, kd, h, kh, w, last = phases.stride()
    return last == 1 and not (n | c_out | d | kd | h | kh | w | int(phases.storage_offset())) % 2
