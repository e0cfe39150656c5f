"""The outputs of a cell as channels: one stride-1 convolution makes them all, x read once, then they are interleaved.

Each phase of an axis (outputs first, first + stride, ...) reads the same window of ceil(kernel/stride) neighbours of x
with taps of its own, so all phases are channels of one ordinary convolution (Shi et al., "Is the deconvolution layer
the same as a convolutional layer?", 2016, arXiv:1609.07009). oneDNN fills its vectors with channels: few output
channels, which torch's own leaves nearly empty, are stride**3 times as many here. Where the stride does not divide the
kernel some of the taps are zeros: 64 instead of 27 for a kernel of 3 and stride 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tritonconv.kernels.torch_phase_copies import fill
from tritonconv.kernels.torch_phases import correlate
from tritonconv.kernels.variant import SPREADS_PADDING, SPREADS_VOXELS, Variant
from tritonconv.kernels.work import by_torch
from tritonconv.problem import Axis, Problem

# Elements of the convolution's result that are computed at a time: some images, and in NCDHW some channels. With 2^18,
# 2^20, 2^21, 2^22, and all at once: 26, 21, 17, 23, 51 ms (3 x 1->28, 24^3, k3 s2), 16, 11, 9, 16, 28 ms (1 x 3->56,
# 18x18x36, k4 s2; float32, NCDHW, one core of an Intel Xeon, torch 2.13).
PART_ELEMENTS = 1 << 21
_ONES = 1, 1, 1


class Packing(NamedTuple):
    """One axis. Output j of phase p is value ``bases[p] + j - low`` of the convolution, which has ``values`` of them.
    It reads ``x[bases[p] + j - m]`` with the tap ``taps[p] + stride*m`` for each slot m < ``slots`` of the window.
    """

    taps: tuple[int, ...]
    bases: tuple[int, ...]
    low: int
    values: int
    slots: int

    @classmethod
    def of(cls, axis: Axis) -> Packing:
        bases = tuple(phase.offsets[0] for phase in axis.phases)
        high = max(base + phase.count for base, phase in zip(bases, axis.phases, strict=True))
        taps = tuple(phase.taps[0] for phase in axis.phases)
        return cls(taps, bases, min(bases), high - min(bases), -(-axis.kernel // axis.stride))


def supports(problem: Problem, device: torch.device) -> str | None:
    if problem.stride == _ONES:
        return "stride 1 has a single phase, which is torch_conv"
    if problem.dilation != _ONES:
        return f"needs dilation 1, the problem has {problem.dilation}"
    if any(k < s for k, s in zip(problem.kernel, problem.stride, strict=True)):
        return f"needs a tap in each phase, the problem has kernel {problem.kernel} and stride {problem.stride}"
    if not problem.dtype.is_floating_point:
        return f"needs a floating-point dtype, the problem has {problem.dtype}"
    return None


def _packings(problem: Problem) -> list[Packing]:
    return [Packing.of(axis) for axis in problem.axes]


def _channels_inner(problem: Problem) -> bool:
    """The channels of y are the innermost ones of a cell's, as they are in y itself."""
    return problem.layout == "ndhwc" and problem.groups == 1


@lru_cache(512)
def _taps(axes: tuple[Axis, ...]) -> list[int]:
    """The tap, by its number in the kernel, of each (phase, slot) of the packed weight, whose slots are reversed; where
    there is none, the number behind the last one."""
    packings = [Packing.of(axis) for axis in axes]
    _, height, width = (axis.kernel for axis in axes)
    numbers = []
    for firsts in itertools.product(*(packing.taps for packing in packings)):
        for slots in itertools.product(*(reversed(range(packing.slots)) for packing in packings)):
            d, h, w = (first + axis.stride * slot for first, axis, slot in zip(firsts, axes, slots, strict=True))
            inside = all(tap < axis.kernel for tap, axis in zip((d, h, w), axes, strict=True))
            numbers.append((d * height + h) * width + w if inside else math.prod(axis.kernel for axis in axes))
    return numbers


def packed_weight(problem: Problem, weight: torch.Tensor) -> torch.Tensor:
    """(c_in, c_out/groups, kd, kh, kw) -> (c_out*cell, c_in/groups, slots...), the taps of all phases, reversed."""
    numbers = _taps(problem.axes)
    taps = weight.flatten(2)
    if max(numbers) == taps.shape[2]:
        taps = F.pad(taps, (0, 1))
    slots = [packing.slots for packing in _packings(problem)]
    groups, (c_in, c_out) = problem.groups, taps.shape[:2]
    cells = taps[:, :, torch.tensor(numbers, device=weight.device)].view(groups, c_in // groups, c_out, -1, *slots)
    order = (0, 3, 2, 1, 4, 5, 6) if _channels_inner(problem) else (0, 2, 3, 1, 4, 5, 6)
    return cells.permute(order).reshape(-1, c_in // groups, *slots)


def _blocks(packing: Packing, axis: Axis) -> Iterator[tuple[int, int, int, int]]:
    """(first phase, phases, outputs of each, by how far the base rises from one to the next) of those phases of an axis
    that are one view of y and of the values: all of them, or each alone."""
    rises = {after - before for before, after in itertools.pairwise(packing.bases)}
    phases = len(packing.bases)
    if axis.out % phases == 0 and len(rises) <= 1:
        yield 0, phases, axis.out // phases, next(iter(rises), 0)
        return
    for first, phase in enumerate(axis.phases):
        yield first, 1, phase.count, 0


def views(problem: Problem, values: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(view of y, view of the values) of the same shape (n, channels, d, kd, h, kh, w, kw), which together cover y.

    ``values`` (n, channels*cell, counts...) are the convolution's, ``y`` (n, channels, od, oh, ow) may be some images
    and channels.
    """
    packings, channels = _packings(problem), y.shape[1]
    cell = [len(packing.taps) for packing in packings]
    if _channels_inner(problem):
        apart = values.unflatten(1, (*cell, channels)).permute(0, 4, 1, 2, 3, 5, 6, 7)
    else:
        apart = values.unflatten(1, (channels, *cell))
    (image, channel, *steps), (y_image, y_channel, *y_steps) = apart.stride(), y.stride()
    between_phases, between_values = steps[:3], steps[3:]
    axes = zip(packings, problem.axes, strict=True)
    for blocks in itertools.product(*(tuple(_blocks(packing, axis)) for packing, axis in axes)):
        shape, y_strides, strides = [len(y), channels], [y_image, y_channel], [image, channel]
        y_begin, begin = int(y.storage_offset()), int(apart.storage_offset())
        for axis, (first, phases, count, rise) in enumerate(blocks):
            packing = packings[axis]
            shape += count, phases
            y_strides += problem.stride[axis] * y_steps[axis], y_steps[axis]
            strides += between_values[axis], between_phases[axis] + rise * between_values[axis]
            y_begin += first * y_steps[axis]
            begin += first * between_phases[axis] + (packing.bases[first] - packing.low) * between_values[axis]
        yield y.as_strided(shape, y_strides, y_begin), apart.as_strided(shape, strides, begin)


def forward(problem, config, x, weight, bias, out=None):
    """One ``conv3d``, in parts of some images and channels, each interleaved while it is in the caches."""
    y = out
    if y is None:
        y = torch.empty(problem.y_shape, dtype=x.dtype, device=x.device, memory_format=problem.memory_format)
    if not y.numel():
        return y
    packings = _packings(problem)
    packed = packed_weight(problem, weight)
    cell = packed.shape[0] // problem.c_out
    starts = [packing.low - packing.slots + 1 for packing in packings]
    counts = [packing.values for packing in packings]
    for images, channels in _parts(problem, cell * math.prod(counts)):
        offsets = None
        if bias is not None:
            own = bias[channels]
            offsets = own.repeat(cell) if _channels_inner(problem) else own.repeat_interleave(cell)
        rows = packed[channels.start * cell : channels.stop * cell]
        values = correlate(x[images], rows, offsets, starts, counts, _ONES, problem.groups)
        for target, source in views(problem, values, y[images, channels]):
            fill(target, source)
    return y


def _parts(problem: Problem, per_channel: int) -> Iterator[tuple[slice, slice]]:
    """(images, channels of y) of one convolution each, which makes ``per_channel`` values of an image and channel."""
    step = problem.c_out
    if problem.layout == "ncdhw" and problem.groups == 1:
        step = max(1, min(step, PART_ELEMENTS // per_channel))
    together = max(1, PART_ELEMENTS // (step * per_channel))
    for image in range(0, problem.n, together):
        for first in range(0, problem.c_out, step):
            yield slice(image, image + together), slice(first, min(first + step, problem.c_out))


def _values(problem: Problem) -> int:
    return problem.n * problem.c_out * math.prod(p.values * len(p.taps) for p in _packings(problem))


def _workspace_bytes(problem: Problem) -> int:
    """The values of a part, and those that it is cut from where the window overhangs x by more planes on one side."""
    return problem.bytes() + 2 * _values(problem) * problem.dtype.itemsize


def _work(problem, config):
    packings = _packings(problem)
    places = math.prod(packing.slots * len(packing.taps) * packing.values for packing in packings)
    flops = 2 * problem.n * problem.c_in * problem.c_out // problem.groups * places
    return by_torch(problem, "forward", 2 * _values(problem) * problem.dtype.itemsize, 3, flops)


VARIANT = Variant(
    name="forward_torch_packed",
    pass_name="forward",
    idea="one stride-1 conv3d whose channels are the outputs of a cell",
    backend="torch",
    launch=forward,
    strided=True,
    supports=supports,
    spreads_nonfinite=f"{SPREADS_VOXELS}; {SPREADS_PADDING}",
    workspace_bytes=_workspace_bytes,
    work=_work,
)
