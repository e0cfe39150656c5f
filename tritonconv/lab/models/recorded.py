"""The transposed convolutions that a model calls: the names of its layers and the problems they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from tritonconv.arguments import geometry, problem_of
from tritonconv.autocast import cast_arguments
from tritonconv.problem import Problem


class LayerCall(NamedTuple):
    """One call of a layer: its qualified name, and the problem, in the dtype and the memory format of the call."""

    layer: str
    problem: Problem


def transposed(model: nn.Module) -> dict[str, nn.ConvTranspose3d]:
    """The layers by qualified name, subclasses included."""
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.ConvTranspose3d)}


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[LayerCall]]:
    """Inside the block each call of a layer adds to the list."""
    calls: list[LayerCall] = []
    handles = []
    for name, layer in transposed(model).items():

        def hook(module, args, kwargs, name=name) -> None:
            calls.append(LayerCall(name, _problem(module, *args, **kwargs)))

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _problem(layer: nn.ConvTranspose3d, input: torch.Tensor, output_size=None) -> Problem:
    """The arguments are those of the layer's forward."""
    padded: Any = layer._output_padding
    extra = padded(input, output_size, layer.stride, layer.padding, layer.kernel_size, 3, layer.dilation)
    x, weight, bias = cast_arguments(input, layer.weight, layer.bias)
    batched = x.unsqueeze(0) if x.dim() == 4 else x
    geo = geometry(layer.stride, layer.padding, extra, layer.groups, layer.dilation)
    return problem_of(batched, weight, bias, geo)
