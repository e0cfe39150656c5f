"""The epilogue of a forward: ``y = activation(conv(x) + bias + residual)``, as a record and as torch's operations.

``conv_transpose3d(..., activation=, residual=, rounding=)`` makes an :class:`Epilogue` of its arguments. The tensors
among them are operands beside it: ``residual`` (n, c_out, od, oh, ow), any strides, in the dtype of y; ``slopes`` (1,)
or (c_out,), the weight of prelu.

**The contract of a variant.** A forward variant may compute the epilogue where it stores y, and y is then written once
and never read again. It says so by ``Variant.epilogue``, a function (problem, config, epilogue) -> bool. Where that
answers True, :meth:`tritonconv.plan.Plan.forward_with` calls its ``launches`` (or ``launch``) with three operands more:

    launches(problem, config, x, weight, bias, out, epilogue=epilogue, residual=residual, slopes=slopes) -> y

``residual`` and ``slopes`` are buffers (tensors for ``launch``), or None where the record does not name them; the bias
may be None in a problem that has one. ``out`` is None, or a buffer of any strides for y, and then the residual has the
same strides, or y is dense in the problem's layout. (``launch`` gets ``out`` by keyword, and only where there is one.)
The values, for an accumulator ``acc`` in float32 (or wider):

* ``rounding=None``: ``y = dtype(activation(acc + bias + residual))``, all of it in the accumulator's dtype, rounded
  once.
* ``rounding="torch"``: rounded to the dtype of y after each step, as torch's separate operations do: the accumulator;
  plus the bias; plus the residual; the activation of that, computed in float32. A variant must answer False for an
  activation that it cannot compute with torch's bits.

``activation`` is None or one of :data:`ACTIVATIONS`, ``slope`` the number of leaky_relu. z stands for what it is
applied to; a NaN stays a NaN in each:

    relu        z > 0 ? z : 0               sigmoid     1 / (1 + exp(-z))
    leaky_relu  z > 0 ? z : slope * z       tanh        tanh(z)
    prelu       z > 0 ? z : slopes[c] * z   silu        z / (1 + exp(-z))
    gelu        z / 2 * (1 + erf(z / sqrt(2)))
    gelu_tanh   z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 * z**3)))

Everywhere else the plain forward runs, and :func:`finish` does the rest in place. A forward whose gradient needs z is
asked for an epilogue without the activation, and torch's autograd records that (:attr:`Epilogue.from_output`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from tritonconv.errors import ArgumentError, ArgumentTypeError

OP = "conv_transpose3d"
ACTIVATIONS = ("relu", "leaky_relu", "prelu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh")
NAMES = ACTIVATIONS[:-1]  # as the argument has them: ("gelu", "tanh") is the last one's
ROUNDINGS = (None, "torch")
LEAKY_SLOPE = 0.01  # torch's default


@dataclass(frozen=True)
class Epilogue:
    """The steps behind the accumulator, without the tensors: see this module's docstring."""

    activation: str | None = None
    slope: float = 0.0  # of leaky_relu
    residual: bool = False
    rounding: str | None = None
    in_kernels: ClassVar[bool] = True  # a kernel may compute it by the contract

    @property
    def from_output(self) -> bool:
        """The derivative of the activation follows from y alone, so z need not be kept."""
        return self.activation in (None, "relu", "sigmoid", "tanh") or (
            self.activation == "leaky_relu" and self.slope >= 0
        )

    @property
    def linear(self) -> Epilogue:
        """The same without the activation: its y is z."""
        return replace(self, activation=None, slope=0.0)

    @property
    def kind(self) -> Epilogue:
        """The same with torch's slope of leaky_relu: all of a kind share their choice of a variant."""
        return replace(self, slope=LEAKY_SLOPE) if self.activation == "leaky_relu" else self

    @property
    def beside(self) -> int:
        """How many tensors as large as y it moves besides y: the residual is read."""
        return int(self.residual)

    @property
    def apart(self) -> int:
        """The same of torch's separate operations, each of which reads y and writes it again."""
        return 3 * self.residual + 2 * (self.activation is not None)

    @property
    def flags(self) -> list[str]:
        """The flags of a command, as of ``tritonconv tune``, that stand for it."""
        names = {"leaky_relu": f"leaky_relu:{self.slope:g}", "gelu_tanh": "gelu:tanh"}
        activation = names.get(self.activation or "", self.activation)
        flags = [f"--activation {activation}"] * (activation is not None) + ["--residual"] * self.residual
        return flags + [f"--rounding {self.rounding}"] * (self.rounding is not None)

    def __str__(self) -> str:
        detail = f"({self.slope:g})" if self.activation == "leaky_relu" else ""
        steps = ["residual"] * self.residual + [f"{self.activation}{detail}"] * (self.activation is not None)
        return " + ".join(steps or ["no epilogue"]) + (f", rounded as {self.rounding}" if self.rounding else "")


def parsed(activation, residual, rounding) -> tuple[Epilogue, torch.Tensor | None]:
    """(the record, the slopes of prelu or None) of the arguments; the shapes of tensors are not looked at.

    Raises ArgumentTypeError or ArgumentError for an activation, a residual or a rounding that is none.
    """
    if residual is not None and not torch.overrides.is_tensor_like(residual):
        raise ArgumentTypeError(
            f"{OP}: residual expects a tensor or None, got {residual!r} ({type(residual).__name__})"
        )
    if rounding not in ROUNDINGS:
        raise ArgumentError(f"{OP}: rounding expects None or 'torch', got {rounding!r}")
    paired = isinstance(activation, Sequence) and not isinstance(activation, str) and len(activation) > 0
    name, *rest = activation if paired else (activation,)
    if name is not None and not isinstance(name, str):
        raise ArgumentTypeError(
            f"{OP}: activation expects a name ({', '.join(NAMES)}), a (name, parameter) or None, got {activation!r}"
        )
    if name is not None and name not in NAMES:
        raise ArgumentError(f"{OP}: activation expects one of {', '.join(NAMES)}, got {name!r}")
    if len(rest) > 1 or (rest and name not in ("leaky_relu", "prelu", "gelu")):
        raise ArgumentError(f"{OP}: activation {name!r} takes no such parameter: {activation!r}")
    record = Epilogue(name, residual=residual is not None, rounding=rounding)
    if name == "leaky_relu":
        return replace(record, slope=_slope(rest[0]) if rest else LEAKY_SLOPE), None
    if name == "prelu":
        return record, _slopes(rest)
    if name == "gelu" and rest and rest[0] != "none":
        if rest[0] != "tanh":
            raise ArgumentError(f"{OP}: gelu expects the approximation 'none' or 'tanh', got {rest[0]!r}")
        return replace(record, activation="gelu_tanh"), None
    return record, None


def _slope(value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{OP}: leaky_relu expects a number as its slope, got {value!r}")
    return float(value)


def _slopes(rest) -> torch.Tensor:
    if not rest or not torch.overrides.is_tensor_like(rest[0]):
        given = f"{rest[0]!r} ({type(rest[0]).__name__})" if rest else "none"
        raise ArgumentTypeError(
            f"{OP}: prelu expects ('prelu', slopes) with a tensor of 1 or c_out values, got {given}"
        )
    return rest[0]


def check_operands(y_shape, like: torch.Tensor, residual, slopes) -> None:
    """Raises ArgumentError or ArgumentTypeError for a residual that is not as y, of shape ``y_shape`` and otherwise
    like ``like``, or for slopes that do not belong to its channels."""
    if residual is not None and tuple(residual.shape) != tuple(y_shape):
        raise ArgumentError(f"{OP}: residual expects the shape of y {tuple(y_shape)}, got {tuple(residual.shape)}")
    # Two comparisons: torch.compile does not find a size that is symbolic ``in`` a tuple.
    if slopes is not None and (slopes.dim() != 1 or (slopes.shape[0] != 1 and slopes.shape[0] != y_shape[-4])):
        raise ArgumentError(
            f"{OP}: prelu expects slopes of shape (1,) or ({y_shape[-4]},), one per output channel, "
            f"got {tuple(slopes.shape)}"
        )
    for name, tensor in (("residual", residual), ("prelu: slopes", slopes)):
        if tensor is not None and tensor.dtype != like.dtype:
            raise ArgumentTypeError(f"{OP}: {name} is {tensor.dtype} but y is {like.dtype}; they must be the same")
        if tensor is not None and tensor.device != like.device:
            raise ArgumentError(f"{OP}: {name} is on {tensor.device} but y is on {like.device}; they must be the same")


def activated(z: torch.Tensor, epilogue: Epilogue, slopes: torch.Tensor | None) -> torch.Tensor:
    """The activation of ``z`` as torch's own operation, in new memory."""
    name = epilogue.activation
    if name == "leaky_relu":
        return F.leaky_relu(z, epilogue.slope)
    if name == "prelu":
        if isinstance(z, torch.Tensor) and z.dim() == 4:  # without a batch torch would take the axis d for channels
            return F.prelu(z.unsqueeze(0), slopes).squeeze(0)  # type: ignore[arg-type]
        return F.prelu(z, slopes)  # type: ignore[arg-type]
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(z, approximate="tanh" if name == "gelu_tanh" else "none")
    if name == "silu":
        return F.silu(z)
    return z if name is None else getattr(torch, name)(z)


def activated_(z: torch.Tensor, epilogue: Epilogue, slopes: torch.Tensor | None) -> torch.Tensor:
    """As :func:`activated`, in the memory of ``z``: where autograd records it, for activations ``from_output``."""
    name = epilogue.activation
    if name == "leaky_relu":
        return F.leaky_relu_(z, epilogue.slope)
    if name == "prelu":  # torch has it in new memory alone
        return activated(z, epilogue, slopes)
    if name in ("gelu", "gelu_tanh"):
        return torch.ops.aten.gelu_(z, approximate="tanh" if name == "gelu_tanh" else "none")
    if name == "silu":
        return F.silu(z, inplace=True)
    return z if name is None else getattr(torch, f"{name}_")(z)


def before_activation(grad_y: torch.Tensor, y: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """The gradient of z from that of y, for an activation ``from_output``; differentiable itself."""
    if epilogue.activation == "relu":
        return torch.ops.aten.threshold_backward(grad_y, y, 0)
    if epilogue.activation == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward(grad_y, y, epilogue.slope, True)
    if epilogue.activation == "sigmoid":
        return torch.ops.aten.sigmoid_backward(grad_y, y)
    return torch.ops.aten.tanh_backward(grad_y, y)


def finish(y: torch.Tensor, epilogue: Epilogue, bias, residual, slopes, recorded: bool = False) -> torch.Tensor:
    """The epilogue of ``y``, which nobody else holds: in its own memory, by torch's operations.

    ``bias`` is None where y has it already. ``recorded``: autograd records the operations.
    """
    if bias is not None:
        y.add_(bias.view(1, -1, 1, 1, 1))
    if residual is not None:
        y.add_(residual)
    in_place = not recorded or epilogue.from_output
    return (activated_ if in_place else activated)(y, epilogue, slopes)
