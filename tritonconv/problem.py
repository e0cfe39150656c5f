"""One frozen record of a transposed-convolution call, and the arithmetic on it.

Per spatial axis, with kernel ``k``, stride ``s``, crop ``p`` at the front and ``p'`` at the back, output padding
``q`` and dilation ``r`` (Dumoulin & Visin, "A guide to convolution arithmetic", 2016, chapter 4; torch's rule):

    out  = (in - 1)*s - p - p' + r*(k - 1) + q + 1
    y[o] = bias + sum over taps t with o + p - r*t = s*i and 0 <= i < in of x[i] * weight[t]

Only the front crop appears in the second line: the back crop is carried by the output size, so an asymmetric
crop costs nothing. Outputs with the same residue ``(o + p) mod s`` form a *phase*: they use the same taps.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from tritonconv.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from tritonconv.epilogue import Epilogue

Triple = tuple[int, int, int]

PASSES = ("forward", "backward_data", "backward_weight")
LAYOUTS = {"ncdhw": torch.contiguous_format, "ndhwc": torch.channels_last_3d}
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class AxisPhase:
    """The outputs ``first, first + stride, ...`` of one axis (``count`` of them) and the taps they use.

    Output ``first + stride*j`` reads ``x[j + offset] * weight[tap]`` for each (tap, offset) pair whose input index
    lies inside the axis. A phase without taps is exactly the bias.
    """

    first: int
    count: int
    taps: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Phase:
    """One residue class of the output volume: an :class:`AxisPhase` per axis."""

    axes: tuple[AxisPhase, ...]

    @property
    def taps(self) -> int:
        """Taps per output voxel, before the border removes any."""
        return math.prod(len(axis.taps) for axis in self.axes)

    @property
    def voxels(self) -> int:
        """Output voxels of the phase, per image."""
        return math.prod(axis.count for axis in self.axes)


class TorchCrop(NamedTuple):
    """A front and a back crop in torch's terms: one padding for both ends, and an output padding at the back.

    torch cuts ``padding`` planes at the front and ``padding - output_padding`` at the back. ``front`` and ``back`` hold
    the planes that those two cannot express; they are cut off the result.
    """

    padding: Triple
    output_padding: Triple
    front: Triple  # planes left over at the front
    back: Triple  # planes left over at the back

    @property
    def exact(self) -> bool:
        """Nothing is left over."""
        return not any(self.front) and not any(self.back)

    @classmethod
    def of(cls, front: Triple, back: Triple, stride: Triple, dilation: Triple) -> TorchCrop:
        """From the planes cut at the front and at the back (negative: appended) of each axis."""
        axes = [_torch_crop(*values) for values in zip(front, back, stride, dilation, strict=True)]
        return cls(*zip(*axes, strict=True))  # type: ignore[arg-type]


def _torch_crop(front: int, back: int, stride: int, dilation: int) -> tuple[int, int, int, int]:
    # torch's output padding stays below the larger of stride and dilation.
    padding = min(front, back + max(stride, dilation) - 1)
    return padding, max(0, padding - back), front - padding, max(0, back - padding)


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a problem."""

    size: int
    kernel: int
    stride: int
    crop: int
    dilation: int
    out: int

    @property
    def back_crop(self) -> int:
        """Planes cut at the back; negative where planes are appended (output padding)."""
        full = (self.size - 1) * self.stride + self.dilation * (self.kernel - 1) + 1
        return full - self.crop - self.out

    @cached_property
    def phases(self) -> tuple[AxisPhase, ...]:
        """The phases that have at least one output, by first output index."""
        phases = []
        for first in range(min(self.stride, self.out)):
            pairs = [divmod(first + self.crop - self.dilation * tap, self.stride) for tap in range(self.kernel)]
            taps = tuple(tap for tap, (_, rest) in enumerate(pairs) if rest == 0)
            offsets = tuple(pairs[tap][0] for tap in taps)
            phases.append(AxisPhase(first, len(range(first, self.out, self.stride)), taps, offsets))
        return tuple(phases)

    @cached_property
    def hits(self) -> int:
        """(input, tap) pairs that land inside the output: the useful multiply-adds of this axis."""
        total = 0
        for tap in range(self.kernel):
            shift = self.dilation * tap - self.crop  # input i writes output i*stride + shift
            low = max(0, -(shift // self.stride))
            high = min(self.size, (self.out - 1 - shift) // self.stride + 1)
            total += max(0, high - low)
        return total


@dataclass(frozen=True)
class Problem:
    """A call's sizes and hyper-parameters: the key of every choice the project makes.

    ``crop`` is the *front* crop; the back crop follows from ``out_size``. ``layout`` is ``"ncdhw"`` or ``"ndhwc"``
    (``torch.channels_last_3d``). The three passes of one call share one problem. ``epilogue``, None in a plain call, is
    what the forward does besides: for the choice of its variant. A kernel gets it as an argument.
    """

    n: int
    c_in: int
    c_out: int
    size: Triple
    kernel: Triple
    stride: Triple
    crop: Triple
    out_size: Triple
    dilation: Triple = (1, 1, 1)
    groups: int = 1
    dtype: torch.dtype = torch.float32
    layout: str = "ncdhw"
    bias: bool = False
    epilogue: Epilogue | None = None

    def __post_init__(self) -> None:
        for name in ("n", "c_in", "c_out", "groups"):
            _at_least(name, getattr(self, name), 1 if name in ("groups", "c_in") else 0)
        for name, low in (("size", 1), ("kernel", 1), ("stride", 1), ("crop", 0), ("out_size", 1), ("dilation", 1)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 3:
                raise ArgumentError(f"Problem: {name} expects three integers, got {value!r}")
            for entry in value:
                _at_least(name, entry, low)
        if self.c_in % self.groups or self.c_out % self.groups:
            raise ArgumentError(f"Problem: groups={self.groups} must divide c_in={self.c_in} and c_out={self.c_out}")
        for axis in self.axes:
            if -axis.back_crop >= max(axis.stride, axis.dilation):
                raise ArgumentError(
                    f"Problem: out_size {self.out_size} appends {-axis.back_crop} planes on one axis, and at most "
                    f"max(stride, dilation) - 1 = {max(axis.stride, axis.dilation) - 1} may be appended"
                )
        if self.layout not in LAYOUTS:
            raise ArgumentError(f"Problem: layout expects one of {', '.join(LAYOUTS)}, got {self.layout!r}")

    @cached_property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        fields = (self.size, self.kernel, self.stride, self.crop, self.dilation, self.out_size)
        return tuple(Axis(*values) for values in zip(*fields, strict=True))  # type: ignore[return-value]

    @cached_property
    def torch_crop(self) -> TorchCrop:
        """The crop as torch's operations take it."""
        back = tuple(axis.back_crop for axis in self.axes)
        return TorchCrop.of(self.crop, back, self.stride, self.dilation)  # type: ignore[arg-type]

    @cached_property
    def torch_arguments(self) -> tuple[Triple, Triple, Triple, int, Triple]:
        """(stride, padding, output_padding, groups, dilation) of ``torch.nn.functional.conv_transpose3d``.

        Raises ArgumentError where torch has no arguments for the crops: see ``torch_crop.exact``.
        """
        crop = self.torch_crop
        if not crop.exact:
            cut = ", ".join(f"{axis.crop} before and {axis.back_crop} behind" for axis in self.axes)
            raise ArgumentError(f"torch_arguments: torch has no padding that crops (by axis) {cut}: {self}")
        return self.stride, crop.padding, crop.output_padding, self.groups, self.dilation

    @cached_property
    def plain(self) -> Problem:
        """The problem without an epilogue."""
        return self if self.epilogue is None else replace(self, epilogue=None)

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes of which it has a choice of its own: with an epilogue the forward alone."""
        return PASSES if self.epilogue is None else PASSES[:1]

    @cached_property
    def shortest_arguments(self) -> tuple[Triple | int, ...]:
        """:attr:`torch_arguments` with one integer for three that are equal, and none at the end that torch assumes.

        torch takes 0.2 us to read three of them.
        """
        short = [each[0] if isinstance(each, tuple) and len(set(each)) == 1 else each for each in self.torch_arguments]
        while short and short[-1] == (1, 0, 0, 1, 1)[len(short) - 1]:
            short.pop()
        return tuple(short)

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.n, self.c_in, *self.size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.c_in, self.c_out // self.groups, *self.kernel)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (self.n, self.c_out, *self.out_size)

    @property
    def memory_format(self) -> torch.memory_format:
        return LAYOUTS[self.layout]

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """Every phase that has outputs, heaviest (most taps) first."""
        combos = (Phase(axes) for axes in itertools.product(*(axis.phases for axis in self.axes)))
        return tuple(sorted(combos, key=lambda phase: -phase.taps))

    @cached_property
    def phase_taps(self) -> int:
        """Taps of all phases together, each per output voxel."""
        return sum(phase.taps for phase in self.phases)

    @cached_property
    def flops(self) -> int:
        """Useful FLOPs, the same for all three passes: 2 x the multiply-adds that land inside the output.

        Taps that fall outside the output (cropped, or beyond the border) are not counted; the bias is not counted.
        """
        return 2 * self.n * self.c_in * (self.c_out // self.groups) * math.prod(axis.hits for axis in self.axes)

    def bytes(self, pass_name: str = "forward") -> int:
        """Compulsory traffic in bytes: x, weight and y (or their gradients) once each, and the bias where it is used.

        The forward reads bias and residual, ``backward_weight`` writes the bias's gradient, ``backward_data`` none.
        """
        if pass_name not in PASSES:
            raise ArgumentError(f"bytes: pass_name expects one of {', '.join(PASSES)}, got {pass_name!r}")
        elements = math.prod(self.x_shape) + math.prod(self.weight_shape) + math.prod(self.y_shape)
        if self.bias and pass_name != "backward_data":
            elements += self.c_out
        if self.epilogue is not None and pass_name == "forward":
            elements += self.epilogue.beside * math.prod(self.y_shape)
        return elements * self.dtype.itemsize

    def intensity(self, pass_name: str = "forward") -> float:
        """Arithmetic intensity in useful FLOP per compulsory byte."""
        return self.flops / max(1, self.bytes(pass_name))

    @property
    def index_bits(self) -> int:
        """32 or 64: the width that the largest element offset of dense x, weight and y needs."""
        largest = max(math.prod(shape) for shape in (self.x_shape, self.weight_shape, self.y_shape)) - 1
        return index_bits(largest)

    @cached_property
    def without_overlap(self) -> Problem:
        """An equivalent problem whose taps never overlap; the problem itself where there is none.

        Along an axis of one voxel the stride is irrelevant, so it is raised to the kernel. The first layer of a GAN
        (4 taps, one voxel, any stride) is such a problem: with its own stride a kernel would try every tap for every
        output.
        """
        stride = tuple(max(axis.stride, axis.kernel) if axis.size == 1 else axis.stride for axis in self.axes)
        apart = all(
            axis.kernel <= s and (axis.kernel == 1 or axis.dilation == 1)
            for axis, s in zip(self.axes, stride, strict=True)
        )
        return replace(self, stride=stride) if apart and stride != self.stride else self  # type: ignore[arg-type]

    @property
    def depthwise(self) -> bool:
        """One input and one output channel per group."""
        return self.groups == self.c_in == self.c_out and self.groups > 1

    @property
    def tiles_exactly(self) -> bool:
        """Kernel = stride, nothing cropped or appended: each output has exactly one tap (a GEMM and a shuffle)."""
        return all(
            axis.kernel == axis.stride and axis.crop == 0 and axis.out == axis.size * axis.stride and axis.dilation == 1
            for axis in self.axes
        )

    def __str__(self) -> str:
        def short(triple: tuple[int, ...]) -> str:
            return str(triple[0]) if len(set(triple)) == 1 else "x".join(map(str, triple))

        parts = [f"n{self.n} {self.c_in}->{self.c_out} {'x'.join(map(str, self.size))}"]
        parts.append(f"k{short(self.kernel)} s{short(self.stride)}")
        back = tuple(axis.back_crop for axis in self.axes)
        if any(self.crop) or any(back):
            parts.append(f"crop {short(self.crop)}/{short(back)}")
        if self.dilation != (1, 1, 1):
            parts.append(f"dil {short(self.dilation)}")
        if self.groups > 1:
            parts.append(f"g{self.groups}")
        parts.append(f"{str(self.dtype).removeprefix('torch.')} {self.layout}{' bias' if self.bias else ''}")
        if self.epilogue is not None:
            parts.append(f"then {self.epilogue}")
        return " ".join(parts)


def index_bits(largest_offset: int) -> int:
    """32 where every offset up to ``largest_offset`` fits a signed 32-bit integer, else 64."""
    return 32 if largest_offset <= INT32_MAX else 64


def largest_offset(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The largest element offset that indices inside ``shape`` reach with these ``strides``."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size > 1)


def output_size(size, kernel, stride, begin, end, output_padding, dilation):
    """Output size per axis (sequences of three in, tuple of three out; symbolic sizes work)."""
    axes = zip(size, kernel, stride, begin, end, output_padding, dilation, strict=True)
    return tuple((i - 1) * s - b - e + r * (k - 1) + q + 1 for i, k, s, b, e, q, r in axes)


def _at_least(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"Problem: {name} expects an integer, got {value!r} ({type(value).__name__})")
    if value < low:
        raise ArgumentError(f"Problem: {name} must be at least {low}, got {value}")
