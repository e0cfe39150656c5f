"""KernelBench's level 2: a transposed 3-D convolution and the operations behind it, as its problems define them.

``data/kernelbench_level2.json`` holds the operations; the layer is that of ``layers.json`` of the same name. A problem
is

- ``inputs``: shapes of the tensors of the forward; ``x`` is the layer's own where it is not given;
- ``parameters``: a number, or the shape of a normally distributed tensor, or ``{"ones": shape}``;
- ``modules``: by name a class of ``torch.nn`` and its arguments;
- ``steps``: each takes the value of the one before. ``[name]`` is a module, ``["keep"]`` a copy of the value under the
  name ``kept``, ``[name, arguments]`` one of :data:`FUNCTIONS`, ``[name, operand]`` one of :data:`BINARY`. An operand
  is a number, a name, a parameter's view, or steps that begin at the same value.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tritonconv.lab.bench.layer_sizes import CPU_BATCH, Workload
from tritonconv.lab.bench.workloads import workload
from tritonconv.lab.models.factories import Network, Shape

LAYER = "conv_transpose"
SCALE_RULE = f"of a problem of KernelBench's level 2 the batch at most {CPU_BATCH}, nothing else shrunk"
BINARY: dict[str, Callable] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
}  # fmt: skip
FUNCTIONS: dict[str, Callable] = {
    "clamp": torch.clamp, "flatten": torch.flatten, "gelu": F.gelu, "hardswish": F.hardswish,
    "largest": lambda x, dim: torch.max(x, dim=dim)[0], "logsumexp": torch.logsumexp, "mean": torch.mean,
    "sigmoid": torch.sigmoid, "softmax": torch.softmax, "sum": torch.sum, "tanh": torch.tanh,
    "unflatten": lambda x, dim, sizes: x.unflatten(dim, sizes),
}  # fmt: skip


@cache
def definitions() -> dict[str, Any]:
    """The problems by name under ``problems``, with their ``source`` and ``licence``."""
    with (files("tritonconv") / "data" / "kernelbench_level2.json").open(encoding="utf-8") as file:
        return json.load(file)


def problem(name: str, scale: str = "full") -> Network:
    """The problem of this name; at scale ``cpu`` its batch is shrunk (:data:`SCALE_RULE`), and nothing else.

    Raises KeyError for a name that is none.
    """
    definition, layer = definitions()["problems"][name], workload(name)
    shapes: dict[str, Shape] = {"x": layer.problem().x_shape, **definition.get("inputs", {})}
    batch = layer.n if scale == "full" else min(layer.n, CPU_BATCH)
    kind = ChainedOfTwo if len(shapes) > 1 else Chained
    return Network(name, lambda: kind(layer, definition), tuple((batch, *shape[1:]) for shape in shapes.values()))


def defined_batch(name: str) -> int:
    """The batch that KernelBench defines. Raises KeyError for a name that is none."""
    return workload(name).n


class Chained(nn.Module):
    """The model of a problem; its layer is :data:`LAYER`."""

    def __init__(self, layer: Workload, definition: Mapping[str, Any]) -> None:
        super().__init__()
        self.conv_transpose = nn.ConvTranspose3d(
            layer.c_in, layer.c_out, layer.kernel, layer.stride, layer.padding, layer.output_padding, layer.groups,
            layer.bias, layer.dilation,
        )  # fmt: skip
        for name, value in definition.get("parameters", {}).items():
            self.register_parameter(name, nn.Parameter(_drawn(value)))
        for name, (kind, arguments) in definition.get("modules", {}).items():
            self.add_module(name, getattr(nn, kind)(**arguments))
        self.steps: Sequence[Sequence[Any]] = definition["steps"]
        self.beside = tuple(name for name in definition.get("inputs", {}) if name != "x")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._follow(self.steps, x, {})

    def _follow(self, steps: Sequence[Sequence[Any]], x: torch.Tensor, named: dict[str, torch.Tensor]) -> torch.Tensor:
        for name, *more in steps:
            if name == "keep":
                named["kept"] = x.clone().detach()
            elif name in self._modules:
                x = getattr(self, name)(x)
            elif name in BINARY:
                x = BINARY[name](x, self._operand(more[0], x, named))
            else:
                x = FUNCTIONS[name](x, **(more[0] if more else {}))
        return x

    def _operand(self, operand: Any, x: torch.Tensor, named: dict[str, torch.Tensor]) -> Any:
        if isinstance(operand, list):
            return self._follow(operand, x, named)
        if isinstance(operand, dict):
            return getattr(self, operand["parameter"]).view(operand["view"])
        if isinstance(operand, str):
            return named[operand] if operand in named else getattr(self, operand)
        return operand


class ChainedOfTwo(Chained):
    """With a second tensor for the forward."""

    def forward(self, x: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self._follow(self.steps, x, {self.beside[0]: beside})


def _drawn(value: float | list[int] | dict[str, list[int]]) -> torch.Tensor:
    if isinstance(value, list):
        return torch.randn(value)
    return torch.ones(value["ones"]) if isinstance(value, dict) else torch.tensor(value)
