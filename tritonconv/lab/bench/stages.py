"""A layer with what stands behind it in a model: an epilogue, or the concatenation with a skip connection.

The value is ``Problem.epilogue``: an :class:`~tritonconv.epilogue.Epilogue`, or :data:`CONCAT`. Key, case, row and
label take from it. The forward and the training step are measured so (``operations.py``): a gradient by itself is that
of the plain layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from tritonconv.epilogue import Epilogue, parsed
from tritonconv.errors import ArgumentError
from tritonconv.kernels.work import bytes_spared
from tritonconv.lab.bench.calls import FORWARD_BACKWARD
from tritonconv.lab.bench.layer_sizes import Workload
from tritonconv.problem import Problem

SUITE = "stages"
SUITE_TEXT = "layers with the activation, residual or concatenation behind them; not in 'all'"
PASSES = ("forward", FORWARD_BACKWARD)


@dataclass(frozen=True)
class Concatenation(Epilogue):
    """``cat((y, skip), 1)`` with a skip of y's shape, as of a U-Net: it is no epilogue of a kernel, which writes y into
    a slice. The skip is read and written; torch reads y and writes it again, besides."""

    in_kernels: ClassVar[bool] = False

    @property
    def beside(self) -> int:
        return 2

    @property
    def apart(self) -> int:
        return 4

    def __str__(self) -> str:
        return "concat"


CONCAT = Concatenation()
# In their models.
NAMED = {
    "nnunet_resenc_160x192_up4": CONCAT,
    "3dgan_64_1": Epilogue("sigmoid"),
    "psmnet_train_64_32": Epilogue("relu", residual=True),
}


def of_words(activation: str | None, residual: bool, rounding: str | None, concat: bool = False) -> Epilogue | None:
    """The value for words such as ``"leaky_relu:0.2"`` or ``"gelu:tanh"``; None without any.

    Raises ArgumentError as :func:`tritonconv.conv_transpose3d` does.
    """
    if concat:
        return CONCAT
    if activation is None and not residual and rounding is None:
        return None
    name, _, detail = (activation or "").partition(":")
    given: Any = name or None
    if name == "prelu":
        given = name, torch.empty(1, device="meta")
    elif detail:
        given = name, detail if name == "gelu" else _number(detail)
    return parsed(given, torch.empty(0, device="meta") if residual else None, rounding)[0]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def with_epilogue(layers: tuple[Workload, ...], epilogue: Epilogue | None) -> tuple[Workload, ...]:
    """The layers with an epilogue, and with its words in their names: ``psmnet_train_64_32+residual+relu``.

    None leaves them as they are. Raises ArgumentError where one has an epilogue already.
    """
    if epilogue is None:
        return layers
    for layer in layers:
        if layer.epilogue is not None:
            raise ArgumentError(f"{layer.name} has an epilogue of its own: {layer.epilogue}")
    slug = str(epilogue).replace(" + ", "+").replace(", rounded as ", "+").replace("no epilogue", "rounded")
    return tuple(
        replace(
            layer,
            name=f"{layer.name}+{slug}",
            epilogue=epilogue,
            family=f"{layer.family}+{slug}" if layer.family else "",
        )
        for layer in layers
    )


def without_concat(layer: Workload) -> Workload:
    """The plain layer of one before a concatenation, whose choice that takes."""
    return replace(layer, name=layer.name.partition("+")[0], epilogue=None) if layer.epilogue == CONCAT else layer


def stages(layers: tuple[Workload, ...]) -> tuple[Workload, ...]:
    """The suite: the named layers among these, each with what stands behind it."""
    named = tuple(replace(each, suite=SUITE) for each in layers if each.name in NAMED)
    return tuple(with_epilogue((each,), NAMED[each.name])[0] for each in named)


def fields(problem: Problem) -> dict[str, object]:
    """The columns of a row about a problem with an epilogue; none of a plain one.

    ``epilogue`` is its text; ``spared_bytes`` are what torch's separate operations move more than one pass, in the
    forward: the backward runs the derivative as torch does.
    """
    epilogue = problem.epilogue
    if epilogue is None:
        return {}
    own = {name: getattr(epilogue, name) for name in ("activation", "residual", "rounding")}
    return {"epilogue": str(epilogue), **own, "spared_bytes": bytes_spared(problem)}
