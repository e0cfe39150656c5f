"""The arguments of :class:`tritonconv.TransposedConv3dLayer`: MATLAB's forms read into plain numbers, and displayed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from tritonconv.errors import ArgumentError, ArgumentTypeError
from tritonconv.problem import Triple

OP = "TransposedConv3dLayer"
LEARNABLES = {"Weights": "weight", "Bias": "bias"}


class Cropping(NamedTuple):
    """The planes cut at both ends of each axis, and the planes of bias appended at its end."""

    mode: str
    begin: Triple
    end: Triple
    append: Triple

    @property
    def padding(self) -> Triple | tuple[tuple[int, int], ...]:
        """The crop as ``conv_transpose3d`` takes it: pairs only where the two ends differ."""
        return self.begin if self.begin == self.end else tuple(zip(self.begin, self.end, strict=True))

    def smallest_input(self, filter_size: Triple, stride: Triple) -> tuple[int, ...]:
        """The least input size of each axis that leaves at least one output plane."""
        axes = zip(filter_size, stride, self.begin, self.end, self.append, strict=True)
        return tuple(max(1, 1 - (f + a - b - e - 1) // s) for f, s, b, e, a in axes)


def plain(value: Any) -> Any:
    """Sequences, arrays and tensors as nested lists of Python numbers; an axis of length one is dropped."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    entries = [plain(entry) for entry in value]
    return entries[0] if len(entries) == 1 else entries


def integer(name: str, value: Any, low: int) -> int:
    """A whole number, at least ``low``: ``2`` or ``2.0``, but neither ``2.5`` nor ``True``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{OP}: {name} expects an integer, got {value!r}")
    if value != value or math.isinf(value) or value != int(value):
        raise ArgumentError(f"{OP}: {name} expects an integer, got {value!r}")
    if value < low:
        raise ArgumentError(f"{OP}: {name} must be at least {low}, got {value!r}")
    return int(value)


def row(name: str, value: Any, low: int, expected: str = "an integer or three") -> Triple:
    """One whole number or a row of three, as three; each at least ``low``."""
    entries = plain(value)
    if not isinstance(entries, list):
        entries = [entries] * 3
    if len(entries) != 3 or any(isinstance(entry, list) for entry in entries):
        raise ArgumentError(f"{OP}: {name} expects {expected}, got {value!r}")
    first, second, third = (integer(name, entry, low) for entry in entries)
    return first, second, third


def cropping_of(value: Any, filter_size: Triple, stride: Triple) -> Cropping:
    """Any form of MATLAB's ``Cropping``: text, a number, a row of three, a 2x3 matrix."""
    if isinstance(value, str):
        if value != "same":
            raise ArgumentError(f"{OP}: cropping expects numbers or 'same', got {value!r}")
        surplus = [f - s for f, s in zip(filter_size, stride, strict=True)]
        begin = row("cropping", [max(0, planes) // 2 for planes in surplus], 0)
        end = row("cropping", [(max(0, planes) + 1) // 2 for planes in surplus], 0)
        return Cropping("same", begin, end, row("cropping", [max(0, -planes) for planes in surplus], 0))
    rows = plain(value)
    if isinstance(rows, list) and len(rows) == 2 and all(isinstance(line, list) and len(line) == 3 for line in rows):
        return Cropping("manual", row("cropping", rows[0], 0), row("cropping", rows[1], 0), (0, 0, 0))
    both = row("cropping", value, 0, "'same', an integer, three, or a 2x3 matrix [t l f; b r bk]")
    return Cropping("manual", both, both, (0, 0, 0))


def non_negative(name: str, value: Any) -> float:
    """A finite real number that is not negative."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ArgumentTypeError(f"{name} expects a number, got {value!r}")
    if not 0 <= number < math.inf:
        raise ArgumentError(f"{name} expects a finite number that is not negative, got {value!r}")
    return number


def factor(name: str) -> property:
    """A settable property that holds a checked factor."""

    def read(layer: nn.Module) -> float:
        return layer.__dict__[f"_{name}"]

    def write(layer: nn.Module, value: Any) -> None:
        layer.__dict__[f"_{name}"] = non_negative(f"{OP}: {name}", value)

    return property(read, write, doc="See the class; a finite number that is not negative.")


def learnable(parameter_name: str) -> str:
    """The attribute of a parameter that MATLAB calls ``"Weights"`` or ``"Bias"``."""
    if parameter_name not in LEARNABLES:
        raise ArgumentError(f"{OP}: parameter_name expects 'Weights' or 'Bias', got {parameter_name!r}")
    return LEARNABLES[parameter_name]


def property_list(title: str, sections: dict[str, dict[str, Any]]) -> str:
    """MATLAB's display of an object: the sections' properties, names aligned at the colon."""
    lines = [f"{title} with properties:"]
    for section, properties in sections.items():
        lines += ["", *([f" {section}"] if section else [])]
        lines += [f"{name:>16}: {_written(value)}" for name, value in properties.items()]
    return "\n".join(lines)


def _written(value: Any) -> str:
    """A value as MATLAB writes it: ``[1 2 3]``, ``[0 0 0; 1 1 1]``, and an array by its size and type."""
    if value is None:
        return "[]"
    if isinstance(value, torch.Tensor):
        return f"[{'x'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}]"
    if isinstance(value, tuple):
        matrix = isinstance(value[0], tuple)
        return f"[{'; '.join(_written(line)[1:-1] for line in value) if matrix else ' '.join(map(str, value))}]"
    return repr(value)
