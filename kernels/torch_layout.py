"""Layout helpers of the torch formulations: fast copies between NCDHW and channels_last_3d, matrices, the bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tritonconv.problem import LAYOUTS, Problem

CHANNELS_LAST = torch.channels_last_3d
CONTIGUOUS = torch.contiguous_format

# Elements of one copied block: its source and its destination stay in a core's L2 cache together. torch copies
# channels-last to NCDHW with a stride between consecutive reads; in blocks of 1 MiB the same copy is 1.7 to 2.7 times
# faster (2 x 64 x 31x31x63 float32, 31 MB: 23.5 -> 8.8 ms; 2 cores of a Xeon with 2 MiB L2 each, torch 2.13).
BLOCK_ELEMENTS = 1 << 18
# On a GPU torch copies a tensor with gaps element by element: the skip of a concatenation in bfloat16 took an H200 696
# us in NCDHW and 759 us in channels_last_3d (2x 32, 160x192x160, 1.26 GB), 1.7 to 1.8 TB/s of the 4.25 of a dense copy.
# By elements of 16 bytes it loads and stores as a dense one does.
WIDE = {16: torch.complex128, 8: torch.complex64, 4: torch.int32}
LEAST_WIDE = 4 << 20  # bytes: a smaller copy takes less than the host's time for the views


def to_layout(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """The 5-D ``tensor`` dense in ``memory_format``: itself if it is already, else a copy."""
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    if (memory_format is CONTIGUOUS and _in_blocks(tensor)) or _large_on_gpu(tensor):
        return filled(torch.empty_like(tensor, memory_format=memory_format), tensor)
    return tensor.contiguous(memory_format=memory_format)


def filled(out: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``out``, of the same shape and any strides, with the values of the 5-D ``tensor``."""
    wide = _wide_rows(out, tensor) if _large_on_gpu(tensor) else None
    if wide is not None:
        wide[0].copy_(wide[1])
        return out
    planes = out.flatten(2) if _in_blocks(tensor) and _rows_of_voxels(out) else None
    if planes is None:
        return out.copy_(tensor)
    step, rows = _block_of_voxels(tensor), voxel_rows(tensor)  # (n, voxels, channels)
    for image, values in zip(planes, rows, strict=True):
        for first in range(0, len(values), step):
            image[:, first : first + step].copy_(values[first : first + step].t())
    return out


def _large_on_gpu(tensor: torch.Tensor) -> bool:
    return not tensor.is_cpu and tensor.device.type == "cuda" and tensor.numel() * tensor.itemsize >= LEAST_WIDE


def _wide_rows(out: torch.Tensor, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(rows, length) of both as views in elements of 16, 8 or 4 bytes; None where there are no such views: the order of
    the axes differs, a row is too short or not aligned, a tensor is a negated or conjugate view, or autograd records
    the copy.
    """
    recorded = torch.is_grad_enabled() and (tensor.requires_grad or out.requires_grad)
    lazy = any(each.is_neg() or each.is_conj() for each in (out, tensor))
    if out.dtype != tensor.dtype or out.shape != tensor.shape or recorded or lazy:
        return None
    for order in (CHANNELS_LAST, CONTIGUOUS):
        pair = [rows for rows in (_rows(out, order), _rows(tensor, order)) if rows is not None]
        if len(pair) < 2:
            continue
        size = tensor.itemsize
        begins = [each.data_ptr() for each in pair]
        steps = [size * step for each in pair for step in (each.shape[1], each.stride(0), each.storage_offset())]
        width = next((each for each in WIDE if each > size and not any(step % each for step in begins + steps)), None)
        if width is not None:
            return pair[0].view(WIDE[width]), pair[1].view(WIDE[width])
    return None


def _rows(tensor: torch.Tensor, order: torch.memory_format) -> torch.Tensor | None:
    """(rows, length), a view with neighbours side by side: of channels where ``order`` is channels-last, else of the
    rest of an image; None where the strides are others."""
    try:
        if order is CHANNELS_LAST:
            rows = tensor.permute(0, 2, 3, 4, 1).view(-1, tensor.shape[1])
        else:
            rows = tensor.view(tensor.shape[0], -1)
    except RuntimeError:
        return None
    return rows if rows.stride(1) == 1 else None


def _in_blocks(tensor: torch.Tensor) -> bool:
    """A copy of it to NCDHW is faster in blocks: it is channels-last, on a CPU, and large."""
    if tensor.is_contiguous() or not tensor.is_cpu:  # the usual case costs a tenth of a microsecond
        return False
    large = math.prod(tensor.shape[2:]) >= 2 * _block_of_voxels(tensor)
    return large and tensor.is_contiguous(memory_format=CHANNELS_LAST)


def _block_of_voxels(tensor: torch.Tensor) -> int:
    return max(256, BLOCK_ELEMENTS // max(1, tensor.shape[1]))


def _rows_of_voxels(out: torch.Tensor) -> bool:
    """The voxels of a channel lie side by side, so that they are one axis of a view."""
    _, _, d, h, w = out.stride()
    return w == 1 and h == out.shape[4] and d == h * out.shape[3]


def other_layout(problem: Problem) -> torch.memory_format:
    """The memory format that the problem does not use."""
    return next(fmt for name, fmt in LAYOUTS.items() if name != problem.layout)


def voxel_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(n, c, d, h, w) -> (n, d*h*w, c); a view of a channels_last_3d tensor."""
    n, channels = tensor.shape[:2]
    return tensor.permute(0, 2, 3, 4, 1).reshape(n, math.prod(tensor.shape[2:]), channels)


def matrix_refusal(problem: Problem) -> str | None:
    """Why no one matrix product serves the problem: it has groups, or whole numbers; None where one may."""
    if problem.groups != 1:
        return f"needs groups=1, the problem has {problem.groups}"
    if not problem.dtype.is_floating_point:
        return f"needs a floating-point dtype, the problem has {problem.dtype}"
    return None


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial sums are kept: float32 for the half types, so that a result is rounded once."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def add_bias_(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Adds one value per channel in place; ``y`` (n, c, d, h, w), ``bias`` (c,) or None."""
    return y if bias is None else y.add_(bias.view(1, -1, 1, 1, 1))


def bias_gradient(grad_y: torch.Tensor) -> torch.Tensor:
    """db = sum of grad_y over batch and space; (n, c_out, d, h, w) -> (c_out,).

    Summed apart from the weight gradient: oneDNN's fused one costs up to twice the whole backward pass in
    channels_last_3d (2 x 64->32, 16x16x32, k2 s2: 13.2 ms fused, 5.9 ms apart; 2 cores, torch 2.13).
    """
    return grad_y.sum((0, 2, 3, 4))


def pad(tensor: torch.Tensor, front: Sequence[int], back: Sequence[int]) -> torch.Tensor:
    """Zeros around the three spatial axes, or planes cut off where a number is negative."""
    if not any(front) and not any(back):
        return tensor
    sizes = tensor.shape[2:]
    if any(size + min(f, 0) + min(b, 0) <= 0 for size, f, b in zip(sizes, front, back, strict=True)):
        # All of the tensor is cut away on one axis, which torch's pad refuses: what is left is the zeros around it.
        return tensor.new_zeros((*tensor.shape[:2], *(s + f + b for s, f, b in zip(sizes, front, back, strict=True))))
    return F.pad(tensor, [extra for axis in (2, 1, 0) for extra in (front[axis], back[axis])])


def window(tensor: torch.Tensor, boxes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The box that starts at ``start`` (may be negative) and has ``length`` planes on each spatial axis, zero outside.

    ``boxes`` holds (start, length) for axes 2, 3, 4; a view where the box lies inside the tensor.
    """
    front = [-start for start, _ in boxes]
    back = [start + length - size for (start, length), size in zip(boxes, tensor.shape[2:], strict=True)]
    return pad(tensor, front, back)
