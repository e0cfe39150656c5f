"""The phases of a problem as small stride-1 convolutions, with only the taps that hit.

Inside a phase, output ``j`` of an axis reads ``x[j + offset]`` for each tap (:class:`tritonconv.problem.AxisPhase`).
The taps step by ``s/g`` and the offsets by ``-r/g`` with ``g = gcd(r, s)``, so the phase is a dense correlation of
dilation ``r/g`` with the reversed taps. Outputs that no tap reaches get the bias alone, and are never read in the
gradients: at kernel 1, stride 2 that leaves an eighth of grad_y.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from tritonconv.kernels.torch_layout import bias_gradient, sum_dtype, window
from tritonconv.kernels.torch_one_channel import conv3d
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of
from tritonconv.problem import Phase, Problem


def outputs(problem: Problem, phase: Phase, y: torch.Tensor) -> torch.Tensor:
    """The view of y (n, c_out, od, oh, ow) that the phase owns."""
    return y[
        (slice(None), slice(None), *(slice(a.first, None, s) for a, s in zip(phase.axes, problem.stride, strict=True)))
    ]


def tap_slices(problem: Problem, phase: Phase) -> tuple[slice, ...]:
    """The phase's taps on the three kernel axes, ascending."""
    return tuple(slice(a.taps[0], a.taps[-1] + 1, a.taps[1] - a.taps[0] if len(a.taps) > 1 else 1) for a in phase.axes)


def taps_of(problem: Problem, phase: Phase, weight: torch.Tensor) -> torch.Tensor:
    """weight (c_in, c_out/groups, ...) of the phase's taps only, a view."""
    return weight[(slice(None), slice(None), *tap_slices(problem, phase))]


def dilation(phase: Phase) -> list[int]:
    """Dilation of the phase's stride-1 correlation, per axis."""
    return [a.offsets[0] - a.offsets[1] if len(a.offsets) > 1 else 1 for a in phase.axes]


def as_conv_weight(problem: Problem, weight: torch.Tensor) -> torch.Tensor:
    """A transposed-convolution weight as that of the ordinary convolution with the taps reversed.

    (c_in, c_out/groups, kd, kh, kw) -> (c_out, c_in/groups, kd, kh, kw)
    """
    groups = problem.groups
    flipped = weight.flip(2, 3, 4) if max(weight.shape[2:]) > 1 else weight
    if groups == 1:
        return flipped.transpose(0, 1)
    grouped = flipped.unflatten(0, (groups, -1)).transpose(1, 2)  # (groups, c_out/groups, c_in/groups, ...)
    return grouped.flatten(0, 1)


def correlate(tensor, weight, bias, starts, counts, rates, groups):
    """out[j] = bias + sum_m tensor[start + rate*m + j] weight[m] for j < count, zero outside the tensor.

    ``weight`` is an ordinary convolution's (c_out, c/groups, k...).
    """
    found, box = correlate_inside(tensor, weight, bias, starts, counts, rates, groups)
    if found is not None and found.shape[2:] == tuple(counts):
        return found
    shape = (tensor.shape[0], weight.shape[0], *counts)
    whole = tensor.new_zeros(shape) if bias is None else bias.view(1, -1, 1, 1, 1).expand(shape).clone()
    if found is not None:
        whole[box] = found
    return whole


def correlate_inside(tensor, weight, bias, starts, counts, rates, groups):
    """(out, box): the outputs of :func:`correlate` that some tap finds inside the tensor on each axis, and where.

    The others are the bias alone; padded for, they would be NaN where the weight is infinite. ``out`` is None where
    there is no such output. The front overhang becomes the convolution's own padding where it can, so nothing is
    copied for it.
    """
    padding, windows, keep, box = [], [], [slice(None)] * 2, [slice(None)] * 2
    for axis in range(3):
        size, span = tensor.shape[2 + axis], rates[axis] * (weight.shape[2 + axis] - 1)
        low = max(0, -starts[axis] - span)
        start, count = starts[axis] + low, min(counts[axis], size - starts[axis]) - low
        if count <= 0:
            return None, ()
        stop = start + span + count  # one past the last element read
        pad = max(0, -start, stop - size)
        first, last = (0, size) if pad else (start, stop)
        if pad:  # planes that no output reads are dropped where the overhang is on the other side
            first, last = max(0, start), min(size, stop)
        padding.append(pad)
        windows.append((first, last - first))
        keep.append(slice(start - first + pad, start - first + pad + count))
        box.append(slice(low, low + count))
    found = _conv3d(window(tensor, windows), weight, bias, padding, rates, groups)
    return found[tuple(keep)], tuple(box)


def _conv3d(tensor, weight, bias, padding, rates, groups):
    """``F.conv3d`` at stride 1, on a CPU always by oneDNN, which skips the padding.

    torch sends one small image past it, to a product that multiplies the weight by the zeros of the padding.
    """
    onednn = tensor.device.type == "cpu" and tensor.dtype is torch.float32 and len(tensor) == 1 and any(padding)
    by = _by_onednn if onednn and torch.backends.mkldnn.is_available() else F.conv3d
    return conv3d(tensor, weight, bias, (1, 1, 1), padding, rates, groups, by)


def _by_onednn(tensor, weight, bias, stride, padding, rates, groups):
    # The operation behind torch.compile's CPU backend, which reads a bias as if it were dense; the last three arguments
    # name no fused activation.
    dense = bias if bias is None else bias.contiguous()
    return torch.ops.mkldnn._convolution_pointwise(
        tensor, weight, dense, padding, stride, rates, groups, "none", [], ""
    )


def supports(problem, device):
    return "stride 1 has a single phase, which is torch_conv" if problem.stride == (1, 1, 1) else None


def forward(problem, config, x, weight, bias, out=None):
    """One ``conv3d`` per phase, each copied to its place.

    A phase without taps (kernel < stride, or a dilation that shares a factor with the stride) is filled with the bias.
    """
    y = out
    if y is None:
        y = torch.empty(problem.y_shape, dtype=x.dtype, device=x.device, memory_format=problem.memory_format)
    turned = not x.is_contiguous(memory_format=problem.memory_format)
    for phase in problem.phases:
        target = outputs(problem, phase, y)
        part, box = None, ()
        if phase.taps:
            taps = as_conv_weight(problem, taps_of(problem, phase, weight))
            starts = [axis.offsets[-1] for axis in phase.axes]
            counts = [axis.count for axis in phase.axes]
            part, box = correlate_inside(x, taps, bias, starts, counts, dilation(phase), problem.groups)
        if part is None or part.shape != target.shape:
            target.copy_(bias.view(1, -1, 1, 1, 1).expand_as(target)) if bias is not None else target.zero_()
        if part is not None:
            if turned:  # while a phase is small enough for the caches
                part = part.contiguous(memory_format=problem.memory_format)
            target[box].copy_(part)
    return y


def backward_data(problem, config, grad_y, weight):
    """A ``conv3d`` of grad_y of one phase at a time, summed."""
    grad_x = None
    for phase in problem.phases:
        if not phase.taps:
            continue
        taps = taps_of(problem, phase, weight)
        # x[i] fed output j = i - offset of tap t; the offsets fall while the taps rise
        starts = [-axis.offsets[0] for axis in phase.axes]
        part = correlate(
            outputs(problem, phase, grad_y), taps, None, starts, problem.size, dilation(phase), problem.groups
        ).to(sum_dtype(problem.dtype))
        grad_x = part if grad_x is None else grad_x.add_(part)
    if grad_x is None:  # no tap reaches any output
        return grad_y.new_zeros(problem.x_shape)
    return grad_x.to(problem.dtype)


def backward_weight(problem, config, x, grad_y, need_bias):
    """The taps of one phase at a time, from x and that phase's grad_y."""
    grad_weight = x.new_zeros(problem.weight_shape)
    for phase in problem.phases:
        if not phase.taps:
            continue
        target = taps_of(problem, phase, grad_weight)
        rates = dilation(phase)
        # tap t of x[i] meets output i - offset(t): the window starts where i = 0 meets the first tap
        boxes = [
            (-axis.offsets[0], size + rate * (len(axis.taps) - 1))
            for axis, size, rate in zip(phase.axes, problem.size, rates, strict=True)
        ]
        box = window(outputs(problem, phase, grad_y), boxes)
        like_weight = x.new_empty(target.shape)
        gradient = torch.ops.aten.convolution_backward(
            x, box, like_weight, None, [1, 1, 1], [0, 0, 0], rates,
            False, [0, 0, 0], problem.groups, (False, True, False),
        )[1]  # fmt: skip
        target.copy_(gradient)
    return grad_weight, bias_gradient(grad_y) if need_bias else None


def _work(pass_name: str, *copied: str):
    return lambda problem, config: by_torch(problem, pass_name, 2 * size_of(problem, *copied), 3 * len(problem.phases))


_variant = partial(Variant, backend="torch", supports=supports, spreads_nonfinite=SPREADS_PADDING, strided=True)
VARIANTS = [
    _variant(
        "forward_torch_phases", "forward", "one stride-1 conv3d per phase, only the taps that hit", launch=forward,
        workspace_bytes=lambda problem: problem.bytes(), work=_work("forward", "weight", "y"),
    ),
    _variant(
        "backward_data_torch_phases", "backward_data", "sum over phases of a stride-1 conv3d of that phase's grad_y",
        launch=backward_data, workspace_bytes=lambda problem: 2 * problem.bytes("backward_data"),
        work=_work("backward_data", "weight", "y", "x"),
    ),
    _variant(
        "backward_weight_torch_phases", "backward_weight", "weight gradient of a stride-1 conv3d per phase",
        launch=backward_weight, workspace_bytes=lambda problem: 2 * problem.bytes("backward_weight"),
        work=_work("backward_weight", "weight", "y"),
    ),
]  # fmt: skip
