"""A fused chain as a function, and the forward of a module whose chains are fused.

The layers themselves stay as they are. A chain reads their parameters at each call, and folds the batch norm into
weight and bias anew where one of them has changed: after ``load_state_dict``, ``to`` or a step of training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tritonconv.autocast import lowered_dtype
from tritonconv.epilogue import activated, parsed
from tritonconv.errors import ArgumentError, ArgumentTypeError
from tritonconv.functional import conv_transpose3d
from tritonconv.private import any_autocast, dispatch_modes, tracing, transforms


class FusedChain:
    """``activation(norm(layer(input)) + residual)`` as one call; ``norm`` and ``activation`` may be None.

    ``activation`` is as :func:`tritonconv.conv_transpose3d` has it, or a PReLU; ``in_place``: the sum has the dtype of
    the layer's output. Where a gradient of what is folded is
    needed, and where the residual broadcasts or has another dtype, the modules themselves run.
    """

    def __init__(self, name: str, layer: nn.ConvTranspose3d, norm: Any, activation: Any, in_place: bool) -> None:
        self.__name__ = name  # by which the code of torch.fx knows it
        self.layer, self.norm, self._activation, self.in_place = layer, norm, activation, in_place
        self._folded: tuple[tuple, Any, Any, Any] = ((), None, None, None)

    @property
    def activation(self) -> Any:
        """With the slopes of now."""
        return ("prelu", self._activation.weight) if isinstance(self._activation, nn.PReLU) else self._activation

    def __call__(self, input: torch.Tensor, residual: Any = None, output_size: Any = None) -> torch.Tensor:
        """Shapes as the layer's; the residual's is that of the output."""
        layer = self.layer
        learning = torch.is_grad_enabled() and self.norm is not None and self._learns()
        if learning or (residual is not None and not _alike(input, residual)):
            return self._by_modules(input, residual, output_size)
        weight, bias = (layer.weight, layer.bias) if self.norm is None else self._parameters()
        padding: Any = layer.output_padding
        if output_size is not None:
            padding = layer._output_padding(
                input, output_size, layer.stride, layer.padding, layer.kernel_size, 3, layer.dilation  # type: ignore[arg-type]
            )  # fmt: skip
        try:
            return conv_transpose3d(
                input, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation,
                activation=self.activation, residual=residual,
            )  # fmt: skip
        except (ArgumentError, ArgumentTypeError):  # it broadcasts, or the layer refuses the call too
            return self._by_modules(input, residual, output_size)

    def _by_modules(self, input, residual, output_size):
        y = self.layer(input, output_size)
        if self.norm is not None:
            y = self.norm(y)
        if residual is not None:
            y = y.add_(residual) if self.in_place else y + residual
        return activated(y, *parsed(self.activation, None, None))

    def _sources(self) -> list[Any]:
        norm = self.norm
        return [self.layer.weight, self.layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]

    def _learns(self) -> bool:
        return any(source is not None and source.requires_grad for source in self._sources())

    def _parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight, bias) with the norm in them, folded when one of the sources has changed."""
        sources = self._sources()
        state = (self.norm.eps, *map(_state, sources))
        if state != self._folded[0]:
            with torch.inference_mode(False), torch.no_grad():
                # The old memory is kept, so that no later parameter has its address.
                kept = [None if source is None else source.detach() for source in sources]
                self._folded = state, *folded(sources, self.norm.eps, self.layer.groups), kept
        return self._folded[1], self._folded[2]


def folded(sources: Sequence[Any], eps: float, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, bias) of the transposed convolution with a batch norm behind it, of fixed statistics.

    ``sources`` are its weight (c_in, c_out/groups, kd, kh, kw), its bias (c_out,), and of the norm weight, bias, mean
    and variance, all (c_out,); the biases and the norm's weight may be None. Computed in float64, rounded once to the
    dtype of the weight.
    """
    weight, bias, gamma, beta, mean, variance = sources
    scale = (variance.double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() if bias is None else bias.double() - mean.double()
    shift = shift * scale
    if beta is not None:
        shift = shift + beta.double()
    c_in, columns = weight.shape[:2]
    by_input = scale.view(groups, 1, columns).expand(groups, c_in // groups, columns).reshape(c_in, columns, 1, 1, 1)
    return torch.empty_like(weight).copy_(weight.double() * by_input), shift.to(weight.dtype)


def _state(source: torch.Tensor | None) -> Any:
    """Differs where the values may: the memory, its strides and the count of writes to it, which no inference tensor
    has."""
    if source is None:
        return None
    return source.data_ptr(), source.dtype, source.stride(), 0 if source.is_inference() else source._version


def _alike(input: torch.Tensor, residual: Any) -> bool:
    """The residual is a tensor of the output's dtype."""
    if type(residual) not in (torch.Tensor, nn.Parameter):
        return False
    wanted = lowered_dtype(input.dtype, input.device.type) if any_autocast() else input.dtype
    return residual.dtype is wanted


class FusedForward:
    """The forward of a module with fused chains: ``function`` of the module and ``count`` tensors.

    Every other call has the forward of the module's class, which nothing has changed: one with other arguments, under
    a compiler, a tracer or a transform, or while one of the ``recorded`` modules trains.
    """

    def __init__(self, module: nn.Module, function: Callable, count: int, recorded: Iterable[nn.Module]) -> None:
        self.module, self.function, self.count, self.recorded = module, function, count, tuple(recorded)

    def __call__(self, *operands: Any, **named: Any) -> Any:
        module = self.module
        if (
            torch.compiler.is_compiling()
            or named
            or len(operands) != self.count
            or any(type(operand) is not torch.Tensor for operand in operands)
            or any(each.training for each in self.recorded)
            or transforms() is not None
            or dispatch_modes() > 0
            or tracing() is not None
        ):
            return type(module).forward(module, *operands, **named)
        return self.function(module, *operands)

    def __getattr__(self, name: str) -> Any:
        """Tools ask a forward for its code and its signature: those of the class's."""
        if name in ("__code__", "__name__", "__signature__"):
            own = type(self.module).forward.__get__(self.module)
            return inspect.signature(own) if name == "__signature__" else getattr(own, name)
        raise AttributeError(name)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module has its class's forward: the chains belong to the layers of this one.
        return getattr, (self.module, "forward")


def unfuse(model: nn.Module) -> tuple[str, ...]:
    """Undoes :func:`tritonconv.fuse` alone: the forwards are those of the classes again, bit for bit, and tritonconv's
    layers stay so. Returns the modules' names.

    Raises ArgumentTypeError if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"fuse: model expects a torch.nn.Module, got {type(model).__name__}")
    names = []
    for name, module in model.named_modules():
        if isinstance(vars(module).get("forward"), FusedForward):
            del module.forward
            names.append(name)
    return tuple(names)
