"""Kernel = stride: each output voxel has one tap, so all passes are one GEMM and a (un)shuffle of phases.

A problem counts as such where nothing is cropped or appended (:attr:`tritonconv.problem.Problem.tiles_exactly`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from tritonconv.kernels.torch_layout import bias_gradient, matrix_refusal, voxel_rows
from tritonconv.kernels.torch_phase_copies import interleave, unshuffle
from tritonconv.kernels.torch_products import product, products, sum_of_products, writes
from tritonconv.kernels.variant import Variant
from tritonconv.kernels.work import by_torch, size_of
from tritonconv.problem import Problem

# Elements of an image of y from which on it has a product of its own, and from which on it has several: some of the
# channels each in NCDHW, which lie side by side in y and read x as it lies, some of the planes in channels_last_3d.
# More and smaller products take longer: y into a slice and the skip beside it take, with one product for all, one for
# an image, two for an image, 3.7, 3.8, 4.3 ms (4 x 128->64, 8^3), 2.0, 1.8, 2.0 (2 x 64->32, 12^3), 1.0, 1.4, 2.2
# (8 x 32->16, 8^3), 2.6, 2.6, 2.7 (1 x 32->16, 24^3), and 6.7, 6.7, 6.6 and in four 8.4 (1 x 32->16, 32^3; float32,
# 2 cores of an AMD EPYC with 1 MiB L2 each, torch 2.13, memory that was written before). In a room each image of a
# batch has a product of its own too, 0.07 ms for all and 0.10 for each (2 x 32->32, 8^3; 2 cores of an Intel Xeon), so
# the products of smaller images are not made there.
IMAGE_ELEMENTS, PART_ELEMENTS = 1 << 17, 1 << 20
MOST_PARTS = {"ncdhw": 2, "ndhwc": 4}
_ALL = slice(None)
_WHOLE = _ALL, _ALL, _ALL


def supports(problem: Problem, device: torch.device) -> str | None:
    if not problem.tiles_exactly:
        return (
            f"needs kernel = stride with nothing cropped or appended, the problem has kernel {problem.kernel}, "
            f"stride {problem.stride}, crop {problem.crop}, output {problem.out_size}"
        )
    return matrix_refusal(problem)


def taps_last(weight: torch.Tensor) -> torch.Tensor:
    """(c_in, c_out, kd, kh, kw) -> (c_in, taps*c_out), the channels_last_3d column order."""
    return weight.permute(0, 2, 3, 4, 1).reshape(weight.shape[0], weight[0].numel())


def taps_first(weight: torch.Tensor) -> torch.Tensor:
    """(c_in, c_out, kd, kh, kw) -> (c_in, c_out*taps), the NCDHW column order; a view of a contiguous weight."""
    return weight.flatten(1)


def forward(problem, config, x, weight, bias, out=None, room=None):
    """One GEMM over all phases, x read once, then the phases are interleaved.

    With ``out`` on a CPU it is one of some channels or planes at a time, so that no tensor of the size of y is made;
    where there is ``room`` for them, they are computed there.
    """
    y = out
    if y is None:
        y = torch.empty(problem.y_shape, dtype=x.dtype, device=x.device, memory_format=problem.memory_format)
    if out is None or x.device.type != "cpu":
        interleave(y, _products(problem, x, weight, bias))
        return y
    if room is not None and writes(x) and _dense(problem, room):
        interleave(y, _products(problem, x, weight, bias, room))
        return y
    if problem.layout == "ndhwc":  # each part reads the whole weight in the order of its columns: one copy for all
        weight = weight.contiguous(memory_format=problem.memory_format)
    for part in _parts(problem):
        if part is _WHOLE:
            interleave(y, _products(problem, x, weight, bias))
            continue
        images, channels, planes = part
        offsets = None if bias is None else bias[channels]
        places = y if planes is _ALL else y[:, :, planes.start * problem.kernel[0] : planes.stop * problem.kernel[0]]
        # Nobody holds a part while the next one is made.
        interleave(
            places[images, channels],
            _products(problem, x[images, :, planes], weight[:, channels], offsets),
        )
    return y


def _products(
    problem: Problem,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    room: torch.Tensor | None = None,
) -> torch.Tensor:
    """Some images and planes of x times some channels of the weight, as a view (n, c_out, kd, kh, kw, d, h, w); in
    NCDHW they lie in the first channels of each image of ``room``, where there is one."""
    (n, _, d, h, w), (_, c_out, kd, kh, kw) = x.shape, weight.shape
    if problem.layout == "ndhwc":
        offsets = None if bias is None else bias.repeat(kd * kh * kw)
        z = product(voxel_rows(x).flatten(0, 1), taps_last(weight), offsets)
        return z.view(n, d, h, w, kd, kh, kw, c_out).permute(0, 7, 4, 5, 6, 1, 2, 3)
    rows, voxels = c_out * kd * kh * kw, d * h * w
    place = None if room is None else room.as_strided((n, rows, voxels), (room.stride(0), voxels, 1))
    z = products(taps_first(weight).t(), x.flatten(2).contiguous(), place).view(n, c_out, kd, kh, kw, d, h, w)
    if bias is not None:
        z.add_(bias.view(c_out, 1, 1, 1, 1, 1, 1))
    return z


def takes_room(problem: Problem, channels: int) -> bool:
    """The products of an NCDHW call lie in ``channels`` channels of a room, if its images are dense: they fit, and no
    image is so small that this costs more."""
    enough = problem.n == 1 or _outputs(problem) >= IMAGE_ELEMENTS
    return problem.layout == "ncdhw" and channels >= problem.c_out and enough


def _dense(problem: Problem, room: torch.Tensor) -> bool:
    """The room takes all products, each image's as dense rows."""
    od, oh, ow = problem.out_size
    return takes_room(problem, room.shape[1]) and room.stride()[1:] == (od * oh * ow, oh * ow, ow, 1)


def _outputs(problem: Problem) -> int:
    """Elements of an image of y."""
    return math.prod(problem.y_shape[1:])


def _parts(problem: Problem) -> Iterator[tuple[slice, slice, slice]]:
    """(images, channels of y, planes of x) of one product each."""
    image = _outputs(problem)
    fewest = 2 if problem.layout == "ndhwc" and problem.n == 1 else 1  # it holds its copy of the weight beside a part
    parts = min(MOST_PARTS[problem.layout], max(fewest, math.ceil(image / PART_ELEMENTS)))
    if image < IMAGE_ELEMENTS or parts == problem.n == 1:
        yield _WHOLE
        return
    for each in range(problem.n):
        for part in _slices(problem.c_out if problem.layout == "ncdhw" else problem.size[0], parts):
            channels, planes = (part, _ALL) if problem.layout == "ncdhw" else (_ALL, part)
            yield slice(each, each + 1), channels, planes


def _slices(length: int, parts: int) -> Iterator[slice]:
    step = math.ceil(length / parts)
    for first in range(0, length, step):
        yield slice(first, min(first + step, length))


def backward_data(problem, config, grad_y, weight, prepared=None):
    """grad_y unshuffled, then one GEMM with K = taps*c_out."""
    rows = unshuffle(problem, grad_y) if prepared is None else prepared
    if problem.layout == "ndhwc":
        grad_x = product(rows, taps_last(weight).t())  # (n*voxels, c_in)
        return grad_x.view(problem.n, *problem.size, problem.c_in).permute(0, 4, 1, 2, 3)
    return products(taps_first(weight), rows).view(problem.x_shape)


def backward_weight(problem, config, x, grad_y, need_bias, prepared=None):
    """grad_y unshuffled, then one GEMM with N = taps*c_out."""
    rows = unshuffle(problem, grad_y) if prepared is None else prepared
    c_in, c_out = problem.c_in, problem.c_out
    if problem.layout == "ndhwc":
        sums = product(voxel_rows(x).flatten(0, 1).t(), rows)  # (c_in, taps*c_out)
        grad_weight = sums.view(c_in, *problem.kernel, c_out).permute(0, 4, 1, 2, 3)
    else:
        grad_weight = sum_of_products(x.flatten(2), rows).view(problem.weight_shape)  # (c_in, c_out*taps)
    return grad_weight, bias_gradient(grad_y) if need_bias else None


_variant = partial(Variant, backend="torch", supports=supports, strided=True)
_gradient = partial(_variant, idea="kernel = stride: unshuffle of phases, then one GEMM", prepare=unshuffle)
VARIANTS = [
    _variant(
        "forward_torch_shuffle", "forward", "kernel = stride: one GEMM, then a shuffle of phases", launch=forward,
        takes_room=takes_room,
        workspace_bytes=lambda problem: problem.bytes(),
        work=lambda problem, config: by_torch(problem, "forward", 2 * size_of(problem, "y"), 2),
    ),
    _gradient(
        "backward_data_torch_shuffle", "backward_data", launch=backward_data,
        workspace_bytes=lambda problem: problem.bytes("backward_data"),
        work=lambda problem, config: by_torch(problem, "backward_data", 2 * size_of(problem, "y"), 2),
    ),
    _gradient(
        "backward_weight_torch_shuffle", "backward_weight", launch=backward_weight,
        workspace_bytes=lambda problem: problem.bytes("backward_weight"),
        work=lambda problem, config: by_torch(problem, "backward_weight", 2 * size_of(problem, "y"), 3),
    ),
]  # fmt: skip
