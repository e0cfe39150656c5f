"""Checks the arguments of a call and turns them into plain integers: torch's refusals, with errors that say more.

torch's own meta kernel accepts wrong channel counts (measured, torch 2.13), so every route, eager, compiled or
fake, is checked here and nowhere else. The functions only compare sizes, so symbolic sizes pass through.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from tritonconv.errors import ArgumentError, ArgumentTypeError, EmptyOutputError
from tritonconv.private import convolution
from tritonconv.problem import Problem, Triple, output_size

OP = "conv_transpose3d"
LARGEST = 2**63 - 1  # torch holds sizes in 64 bits


class Geometry(NamedTuple):
    """A call's hyper-parameters as plain integers; ``crop`` holds the front, ``back`` the back of each axis."""

    stride: Triple
    crop: Triple
    back: Triple
    output_padding: Triple
    groups: int
    dilation: Triple


def triple(name: str, value, low: int) -> Triple:
    """An integer, or one or three of them, as three; each at least ``low``.

    Raises ArgumentTypeError for something that is no integer, ArgumentError for a wrong count or a value below ``low``.
    """
    entries = tuple(value) if isinstance(value, (Sequence, torch.Size)) and not isinstance(value, str) else (value,)
    if len(entries) == 1:
        entries = entries * 3  # dynamo of torch 2.11 has no `*=` of a tuple
    if len(entries) != 3:
        raise ArgumentError(f"{OP}: {name} expects one integer or three, got {len(entries)}: {value!r}")
    numbers = tuple(_integer(name, entry, value) for entry in entries)
    if min(numbers) < low:
        raise ArgumentError(f"{OP}: {name} must be at least {low}, got {value!r}")
    return numbers  # type: ignore[return-value]


def _integer(name: str, entry, value) -> int:
    number = entry
    if not isinstance(entry, torch.SymInt) and type(entry) is not int:  # index() would fix a symbolic size for good
        try:
            number = operator.index(entry)
        except TypeError:
            number = None
        if number is None or isinstance(entry, bool):
            raise ArgumentTypeError(f"{OP}: {name} expects integers, got {value!r}")
    if number > LARGEST:
        raise ArgumentError(f"{OP}: {name} must be at most {LARGEST}, got {value!r}")
    return number


def crops(padding) -> tuple[Triple, Triple]:
    """``padding`` as (front, back): an integer, one or three integers, or three ``(begin, end)`` pairs."""
    if isinstance(padding, str):
        raise ArgumentTypeError(
            f"{OP}: padding expects integers or three (begin, end) pairs, got {padding!r}; "
            "'same' is an argument of tritonconv.TransposedConv3dLayer"
        )
    if isinstance(padding, Sequence) and any(isinstance(entry, Sequence) for entry in padding):
        shape_ok = len(padding) == 3 and all(isinstance(entry, Sequence) and len(entry) == 2 for entry in padding)
        if not shape_ok:
            raise ArgumentError(f"{OP}: padding expects three (begin, end) pairs, got {padding!r}")
        front = triple("padding (begin)", [entry[0] for entry in padding], 0)
        return front, triple("padding (end)", [entry[1] for entry in padding], 0)
    same = triple("padding", padding, 0)
    return same, same


def plain(arguments: tuple) -> tuple:
    """(stride, padding, output_padding, groups, dilation) in ``int`` and tuples alone, in which equal calls are equal.

    Raises as :func:`geometry` does, but looks at types alone: what stands in tuples of integers passes as it is.
    """
    for value in arguments:  # each call comes by here: a function for each value would take longer
        if type(value) is not int:
            if type(value) is not tuple:
                break
            for entry in value:
                if type(entry) is not int and not (type(entry) is tuple and _integers(entry)):
                    break
            else:
                continue
            break
    else:
        return arguments
    try:
        return _as_plain(arguments)
    except TypeError:
        geo = geometry(*arguments)
    return geo.stride, tuple(zip(geo.crop, geo.back, strict=True)), geo.output_padding, geo.groups, geo.dilation


def _integers(values: tuple) -> bool:
    return all(type(value) is int for value in values)


def _as_plain(value):
    kind = type(value)
    if kind is int:
        return value
    if kind in (tuple, list, torch.Size):
        return tuple([_as_plain(entry) for entry in value])
    if kind is bool:  # 1 == True == 1.0, and they hash alike
        raise TypeError
    return operator.index(value)


def geometry(stride=1, padding=0, output_padding=0, groups=1, dilation=1) -> Geometry:
    """The hyper-parameters of a call, checked as far as that is possible without the tensors."""
    steps, rates = triple("stride", stride, 1), triple("dilation", dilation, 1)
    front, back = crops(padding)
    extra = triple("output_padding", output_padding, 0)
    for q, s, r in zip(extra, steps, rates, strict=True):
        if q >= max(s, r):
            raise ArgumentError(
                f"{OP}: output_padding must be smaller than either stride or dilation on each axis, "
                f"got output_padding {extra}, stride {steps}, dilation {rates}"
            )
    groups = _integer("groups", groups, groups)
    if groups < 1:
        raise ArgumentError(f"{OP}: groups must be at least 1, got {groups}")
    return Geometry(steps, front, back, extra, groups, rates)


def check_shapes(x, weight, bias, geo: Geometry):
    """Compares the shapes of a batched call with each other; returns the output size ``(od, oh, ow)``."""
    shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    if x.dim() != 5:
        raise ArgumentError(f"{OP}: input expects 5 axes (n, c, d, h, w), or 4 without the batch; got {shapes}")
    if weight.dim() != 5:
        raise ArgumentError(f"{OP}: weight expects 5 axes (c_in, c_out/groups, kd, kh, kw), got {shapes}")
    c_in, c_out = weight.shape[0], weight.shape[1] * geo.groups
    if x.shape[1] != c_in:
        raise ArgumentError(
            f"{OP}: weight expects {c_in} input channels (weight.shape[0]) but x has {x.shape[1]} (x.shape[1]); "
            f"{shapes}"
        )
    if c_in == 0:
        raise ArgumentError(f"{OP}: input needs at least one channel; {shapes}")
    if c_in % geo.groups:
        raise ArgumentError(f"{OP}: groups={geo.groups} must divide the {c_in} input channels; {shapes}")
    for name, size in (("input", x.shape[2:]), ("weight", weight.shape[2:])):
        for extent in size:
            if extent == 0:
                raise ArgumentError(f"{OP}: {name} has an empty spatial axis; {shapes}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != c_out):
        raise ArgumentError(
            f"{OP}: bias expects shape ({c_out},), one value per output channel, got {tuple(bias.shape)}; {shapes}"
        )
    out = output_size(x.shape[2:], weight.shape[2:], geo.stride, geo.crop, geo.back, geo.output_padding, geo.dilation)
    for extent in out:
        if extent < 1:
            kind = EmptyOutputError if min(out) == 0 and geo.crop == geo.back else ArgumentError
            raise kind(
                f"{OP}: the output would be empty, size {tuple(out)}: padding (begin {geo.crop}, end {geo.back}) "
                f"crops all of it; {shapes}, stride {geo.stride}, dilation {geo.dilation}"
            )
    return out


def check_types(x, weight, bias) -> None:
    """Dtypes and devices agree, as torch demands; mixed dtypes are refused, never promoted."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            hint = "; quantize after tritonconv.restore(model)" if x.is_quantized else ""
            raise ArgumentTypeError(
                f"{OP}: {name} is {tensor.dtype} but input is {x.dtype}; they must be the same{hint}"
            )
        if tensor.device != x.device:
            raise ArgumentError(f"{OP}: {name} is on {tensor.device} but input is on {x.device}; they must be the same")


def layout_of(x, weight) -> str:
    """``"ndhwc"`` where x or weight is in channels_last_3d, and so is the answer of torch's convolutions but one."""
    return "ndhwc" if _channels_last(x) or _channels_last(weight) else "ncdhw"


def _channels_last(tensor) -> bool:
    # torch's rule (is_strides_like_channels_last_3d): strides grow in the order c, w, h, d, n.
    shape, strides = tensor.shape, tensor.stride()
    least = 0
    if strides[1] == 0:
        return False
    for axis in (1, 4, 3, 2, 0):
        if shape[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(1, shape[axis])
    return True


def problem_of(x, weight, bias, geo: Geometry, device: torch.device | None = None) -> Problem:
    """Checks a batched call of tensors and records it; ``layout`` is that of torch's answer on the device, which is
    x's where none is given.
    """
    out = check_shapes(x, weight, bias, geo)
    check_types(x, weight, bias)
    problem = Problem(
        n=x.shape[0], c_in=x.shape[1], c_out=weight.shape[1] * geo.groups, size=tuple(x.shape[2:]),
        kernel=tuple(weight.shape[2:]), stride=geo.stride, crop=geo.crop, out_size=tuple(out), dilation=geo.dilation,
        groups=geo.groups, dtype=x.dtype, layout=layout_of(x, weight), bias=bias is not None,
    )  # fmt: skip
    slow = problem.layout == "ndhwc" and (device or x.device).type == "cpu" and _past_onednn(problem)
    return replace(problem, layout="ncdhw") if slow else problem


def _past_onednn(problem: Problem) -> bool:
    """On a CPU torch does not call oneDNN: it answers in NCDHW then, whatever the layout of its operands."""
    if problem.n == 0:
        return True
    if problem.c_out == 0:
        return False
    x, weight = (
        torch.empty((1,) * 5, dtype=problem.dtype, device="cpu").expand(shape)  # only their shapes are read
        for shape in (problem.x_shape, problem.weight_shape)
    )
    crop, transposed = problem.torch_crop, True
    chosen = convolution(
        x, weight, None, problem.stride, crop.padding, problem.dilation, transposed, crop.output_padding, problem.groups
    )
    return getattr(chosen, "name", "") == "SlowTranspose3d"
