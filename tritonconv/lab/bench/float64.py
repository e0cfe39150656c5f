"""The outputs of a problem in float64, straight from the definition: whole, or at full size piece by piece."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import NamedTuple

import torch

from tritonconv.lab.bench.behind import EVERYTHING, Reference, behind, gradients
from tritonconv.lab.bench.calls import Tensors
from tritonconv.lab.bench.operations import exact
from tritonconv.lab.bench.stages import CONCAT
from tritonconv.problem import Axis, Problem

TF32_BITS = 13  # of a float32's mantissa that the matrix units do not read (PTX ISA, "Matrix fragments", .tf32)
# Voxels times channels of a piece, of one image, on its larger side: 512 MiB in float64.
PIECE_ELEMENTS = 1 << 26
LITTLE_WORK = 1e9  # FLOPs of a tap from which its product is worth more than one thread


def reference(problem: Problem, x, weight, bias, grad_y, outputs: Iterable[str]) -> dict[str, torch.Tensor]:
    """The outputs in float64, tap by tap from y[i*s + r*t - p] += x[i] weight[t]; inputs of any dtype on any device."""
    wanted = set(outputs)
    n, groups = problem.n, problem.groups
    c_in, c_out = problem.c_in // groups, problem.c_out // groups
    product = _depthwise_product if c_in == c_out == 1 else torch.einsum
    of_x, of_y = (n, groups, c_in, *problem.size), (n, groups, c_out, *problem.out_size)
    new = partial(torch.zeros, dtype=torch.float64, device=x.device)
    answers: dict[str, torch.Tensor] = {}
    with _one_thread(problem):
        # Voxels last but for the channels of a group: (n, d, h, w, groups, c), so that a tap is a batched GEMM.
        # Nothing is made that no output needs: at full size a tensor in float64 is large.
        if wanted & {"y", "grad_weight"}:
            x = _voxels_last(x, of_x)
        if wanted & {"grad_x", "grad_weight"}:
            grad = _voxels_last(grad_y, of_y)
        taps = weight.detach().to(torch.float64).reshape(groups, c_in, c_out, *problem.kernel)
        taps = taps.permute(3, 4, 5, 0, 1, 2).contiguous()
        y = new((n, *problem.out_size, groups, c_out) if "y" in wanted else 0)
        grad_x = new((n, *problem.size, groups, c_in) if "grad_x" in wanted else 0)
        grad_weight = torch.zeros_like(taps)
        for tap in itertools.product(*(range(k) for k in problem.kernel)):
            pairs = [_overlap(axis, t) for axis, t in zip(problem.axes, tap, strict=True)]
            inputs, targets = ((slice(None), *(pair[side] for pair in pairs)) for side in (0, 1))
            if "y" in wanted:
                y[targets] += product("ndhwgi,gio->ndhwgo", x[inputs], taps[tap])
            if "grad_x" in wanted:
                grad_x[inputs] += product("ndhwgo,gio->ndhwgi", grad[targets], taps[tap])
            if "grad_weight" in wanted:
                grad_weight[tap] = product("ndhwgi,ndhwgo->gio", x[inputs], grad[targets])
        if "y" in wanted:
            if bias is not None:
                y += bias.detach().to(torch.float64).view(groups, c_out)
            answers["y"] = y.permute(0, 4, 5, 1, 2, 3).reshape(problem.y_shape)
        if "grad_x" in wanted:
            answers["grad_x"] = grad_x.permute(0, 4, 5, 1, 2, 3).reshape(problem.x_shape)
        if "grad_weight" in wanted:
            answers["grad_weight"] = grad_weight.permute(3, 4, 5, 0, 1, 2).reshape(problem.weight_shape)
        if "grad_bias" in wanted and bias is not None:
            answers["grad_bias"] = grad_y.detach().sum((0, 2, 3, 4), dtype=torch.float64)
    return answers


def reference_in_tf32(problem: Problem, x, weight, bias, grad_y, outputs: Iterable[str]) -> dict[str, torch.Tensor]:
    """The products of :func:`reference`, in float64, of float32 operands as the matrix units read them in TF32."""
    whole = (t.detach().to(torch.float32).view(torch.int32) for t in (x, weight, grad_y))
    x, weight, grad_y = ((bits >> TF32_BITS << TF32_BITS).view(torch.float32) for bits in whole)
    return reference(problem, x, weight, bias, grad_y, set(outputs) - {"grad_bias"})


def distances(
    problem: Problem, tensors: Tensors, output: str, answers: Sequence[torch.Tensor]
) -> tuple[float, list[float]]:
    """The largest value of an output in float64, and the largest error of each answer: NaN where one is not finite.

    Piece by piece on the tensors' device: no float64 tensor has more than ``PIECE_ELEMENTS``, or than one channel of
    one image where that is more.
    """
    largest, errors = [], []
    for place, piece in _pieces(problem, tensors, output):
        largest.append(piece.abs().max().item())
        errors.append([(each[place].detach().to(torch.float64) - piece).abs().max().item() for each in answers])
    return max(largest), torch.tensor(errors, dtype=torch.float64).amax(0).tolist()  # amax keeps a NaN


def outputs_of(
    problem: Problem, t: Tensors, outputs: Iterable[str], by: Reference = reference
) -> dict[str, torch.Tensor]:
    """The outputs of a problem with its epilogue: of its tensors by :func:`reference` or :func:`reference_in_tf32`."""
    wanted = set(outputs)
    if problem.epilogue is None:
        return by(problem, t.x, t.weight, t.bias, t.grad_y, wanted)
    y = by(problem, t.x, t.weight, t.bias, t.grad_y[:, : problem.c_out], {"y"})["y"]
    found = {"y": _finished(problem, t, y)} if "y" in wanted else {}
    return found | (gradients(problem, t, y, by, wanted) if wanted - {"y"} else {})


def _finished(problem: Problem, t: Tensors, y: torch.Tensor) -> torch.Tensor:
    if problem.epilogue == CONCAT:
        return torch.cat((y, _skip(t, EVERYTHING, EVERYTHING)), 1)
    return exact(problem, t, y, EVERYTHING, EVERYTHING)


def _skip(t: Tensors, image: slice, channels: slice) -> torch.Tensor:
    assert t.beside is not None  # as a concatenation has it
    return t.beside[image, channels].to(torch.float64)


class _Block(NamedTuple):
    """Channels of x, channels of y, and what of the weight's second axis joins them; ``groups`` of them."""

    inside: slice
    outside: slice
    columns: slice
    groups: int


def _pieces(problem: Problem, t: Tensors, output: str) -> Iterator[tuple[tuple, torch.Tensor]]:
    """Where a piece of the output lies, and the piece in float64."""
    if output == "y":
        for image, channels, y in _before_epilogue(problem, t):
            yield (image, channels), exact(problem, t, y, image, channels)
            if problem.epilogue == CONCAT:
                skips = slice(channels.start + problem.c_out, channels.stop + problem.c_out)
                yield (image, skips), _skip(t, image, channels)
        return
    if problem.epilogue == CONCAT:
        problem, t = problem.plain, replace(t, grad_y=t.grad_y[:, : problem.c_out])
    if problem.epilogue is not None:
        yield from _pieces_behind(problem, t, output)
        return
    if output == "grad_bias":
        yield (), t.grad_y.sum((0, 2, 3, 4), dtype=torch.float64)
        return
    for rows in _blocks(problem):
        if output == "grad_x":
            for row, image in itertools.product(rows, _images(problem)):
                yield (image, row[0].inside), _sum(_piece(problem, t, output, image, block) for block in row)
        else:
            for block in itertools.chain(*rows):
                pieces = (_piece(problem, t, output, image, block) for image in _images(problem))
                yield (block.inside, block.columns), _sum(pieces)


def _images(problem: Problem) -> list[slice]:
    return [slice(image, image + 1) for image in range(problem.n)]


def _before_epilogue(problem: Problem, t: Tensors) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(image, channels, the convolution with its bias there), of all images and channels of y."""
    for rows in _blocks(problem):
        for column, image in itertools.product(zip(*rows, strict=True), _images(problem)):
            channels = column[0].outside
            y = _sum(_piece(problem, t, "y", image, block) for block in column)
            if t.bias is not None:
                y = y + t.bias[channels].to(torch.float64).view(-1, 1, 1, 1)
            yield image, channels, y


def _pieces_behind(problem: Problem, t: Tensors, output: str) -> Iterator[tuple[tuple, torch.Tensor]]:
    """The same of a gradient, with an epilogue. The gradient of z, as large as y, is kept in float32 at least."""
    kept = torch.float64 if problem.dtype is torch.float64 else torch.float32
    grad_z = torch.empty(problem.y_shape, dtype=kept, device=t.x.device)
    slopes = torch.zeros(problem.c_out, dtype=torch.float64, device=t.x.device)
    for image, channels, y in _before_epilogue(problem, t):
        found = behind(problem, t, y, image, channels)
        grad_z[image, channels] = found.z.to(kept)
        if found.slopes is not None:
            slopes[channels] += found.slopes
    if output == "grad_slopes":
        yield (), slopes
    elif output == "grad_beside":
        yield from (((image,), grad_z[image].to(torch.float64)) for image in _images(problem))
    else:
        yield from _pieces(problem.plain, replace(t, grad_y=grad_z), output)


def _blocks(problem: Problem) -> Iterator[list[list[_Block]]]:
    """By groups, or of one large group by channels: a row of blocks has the same channels of x, a column of y."""
    c_in, c_out = problem.c_in // problem.groups, problem.c_out // problem.groups
    inputs, outputs = math.prod(problem.size), math.prod(problem.out_size)
    for group in _cut(problem.groups, max(c_in * inputs, c_out * outputs)):

        def channels(part: slice, each: int, group: slice = group) -> slice:
            return slice(group.start * each + part.start, (group.stop - 1) * each + part.stop)

        yield [
            [_Block(channels(i, c_in), channels(o, c_out), o, group.stop - group.start) for o in _cut(c_out, outputs)]
            for i in _cut(c_in, inputs)
        ]


def _cut(count: int, elements: int) -> list[slice]:
    """``count`` things of so many elements in runs of at most ``PIECE_ELEMENTS``, but at least one thing each."""
    step = max(1, PIECE_ELEMENTS // elements)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _piece(problem: Problem, t: Tensors, output: str, image: slice, block: _Block) -> torch.Tensor:
    inside, outside, columns, groups = block
    c_in, c_out = inside.stop - inside.start, outside.stop - outside.start
    small = replace(problem.plain, n=1, c_in=c_in, c_out=c_out, groups=groups, bias=False)
    operands = t.x[image, inside], t.weight[inside, columns], None, t.grad_y[image, outside]
    return reference(small, *operands, (output,))[output]


def _sum(pieces: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum, with one piece in memory at a time."""
    return reduce(torch.Tensor.add_, pieces)


def _voxels_last(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(n, c, d, h, w) of any dtype -> (n, d, h, w, groups, c of a group) in float64."""
    return tensor.detach().to(torch.float64).reshape(shape).permute(0, 3, 4, 5, 1, 2).contiguous()


def _depthwise_product(formula: str, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The einsum of one channel per group without a tiny GEMM for each: (n, d, h, w, g, 1) with (g, 1, 1) or alike."""
    if right.dim() == 3:
        return left * right[:, 0]
    return (left * right).sum((0, 1, 2, 3)).unsqueeze(-1)


@contextlib.contextmanager
def _one_thread(problem: Problem) -> Iterator[None]:
    # Thousands of tiny operations: starting threads for each costs more than they save.
    threads = torch.get_num_threads()
    little = problem.flops < LITTLE_WORK * math.prod(problem.kernel)
    torch.set_num_threads(1 if little else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _overlap(axis: Axis, tap: int) -> tuple[slice, slice]:
    """The inputs that a tap sends inside the output, and where they go."""
    shift = axis.dilation * tap - axis.crop
    low = max(0, -(shift // axis.stride))
    high = max(low, min(axis.size, (axis.out - 1 - shift) // axis.stride + 1))
    first = low * axis.stride + shift
    if high == low:
        return slice(0, 0), slice(0, 0)
    return slice(low, high), slice(first, first + (high - low - 1) * axis.stride + 1, axis.stride)
