"""Initial values of a :class:`tritonconv.TransposedConv3dLayer`: MATLAB's rules, and arrays in MATLAB's layout.

Sizes are MATLAB's, ``(h, w, d, num_filters, num_channels)`` for the weights and ``(1, 1, 1, num_filters)`` for the
bias. The results have torch's layout, ``(num_channels, num_filters, h, w, d)`` and ``(num_filters,)``: the axes are
permuted, not flipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tritonconv.errors import ArgumentError, ArgumentTypeError
from tritonconv.matlab.arguments import OP
from tritonconv.problem import Triple

WEIGHTS_RULES = ("glorot", "he", "narrow-normal", "zeros", "ones")
BIAS_RULES = ("zeros", "narrow-normal", "ones")
NARROW_STD = 0.01

Rule = str | Callable[[tuple[int, ...]], Any]


def check_rule(name: str, rule: Any, known: tuple[str, ...]) -> Rule:
    """``rule`` if it is one of ``known`` or a function of the size; else ArgumentError or ArgumentTypeError."""
    if callable(rule):
        return rule
    if not isinstance(rule, str):
        raise ArgumentTypeError(f"{OP}: {name} expects a name or a function of the size, got {rule!r}")
    if rule not in known:
        raise ArgumentError(f"{OP}: {name} expects a function or one of {', '.join(known)}; got {rule!r}")
    return rule


@torch.no_grad()
def initial_weights(
    rule: Rule, filter_size: Triple, num_filters: int, num_channels: int, like: torch.Tensor
) -> torch.Tensor:
    """New weights ``(num_channels, num_filters, h, w, d)`` by ``rule``, of the dtype and on the device of ``like``.

    With ``numIn = h*w*d*num_channels`` and ``numOut = h*w*d*num_filters``: ``"glorot"`` draws from the uniform
    distribution on +-sqrt(6/(numIn + numOut)) (Glorot & Bengio, 2010), ``"he"`` from the normal one with variance
    2/numIn (He et al., 2015), ``"narrow-normal"`` from the normal one with standard deviation 0.01. torch calls the
    ``numIn`` of a transposed weight its *fan_out*. A function gets ``(h, w, d, num_filters, num_channels)``.
    """
    if callable(rule):
        values = rule((*filter_size, num_filters, num_channels))
        return weights_from_matlab(
            "the result of weights_initializer", values, filter_size, num_filters, num_channels, like
        )
    taps = math.prod(filter_size)
    weights = torch.empty((num_channels, num_filters, *filter_size), dtype=like.dtype, device=like.device)
    if rule == "glorot":
        bound = math.sqrt(6 / (taps * (num_channels + num_filters)))
        return weights.uniform_(-bound, bound)
    if rule == "he":
        return weights.normal_(0, math.sqrt(2 / (taps * num_channels)))
    return _fill(weights, rule)


@torch.no_grad()
def initial_bias(rule: Rule, num_filters: int, like: torch.Tensor) -> torch.Tensor:
    """A new bias ``(num_filters,)`` by ``rule``; a function gets ``(1, 1, 1, num_filters)``."""
    if callable(rule):
        return bias_from_matlab("the result of bias_initializer", rule((1, 1, 1, num_filters)), num_filters, like)
    return _fill(torch.empty(num_filters, dtype=like.dtype, device=like.device), rule)


def _fill(values: torch.Tensor, rule: str) -> torch.Tensor:
    return values.normal_(0, NARROW_STD) if rule == "narrow-normal" else values.fill_(rule == "ones")


def weights_from_matlab(
    name: str,
    values: Any,
    filter_size: Triple,
    num_filters: int,
    num_channels: int | None,
    like: torch.Tensor,
) -> torch.Tensor:
    """A copy, in torch's layout, of an array of size ``(h, w, d, num_filters, num_channels)``.

    ``num_channels=None`` takes any number of channels. Trailing axes of length one may be missing, as MATLAB drops
    them. Raises ArgumentError for another size, ArgumentTypeError for something that is no array of real numbers.
    """
    array = _real(name, values, like.dtype)
    size = (*array.shape, *(1,) * (5 - array.dim()))
    channels = max(1, size[-1]) if num_channels is None else num_channels
    if size != (*filter_size, num_filters, channels):
        want = _by((*filter_size, num_filters, "num_channels" if num_channels is None else num_channels))
        raise ArgumentError(
            f"{OP}: {name} expects size {want} (filter_size, num_filters, num_channels), got {_by(array.shape)}"
        )
    return _copy(array.reshape(size).permute(4, 3, 0, 1, 2), like)


def bias_from_matlab(name: str, values: Any, num_filters: int, like: torch.Tensor) -> torch.Tensor:
    """A copy, in torch's layout, of a bias ``(1, 1, 1, num_filters)`` or ``(num_filters,)``; raises as above."""
    array = _real(name, values, like.dtype)
    size = tuple(array.shape)
    if size != (num_filters,) and (*size, *(1,) * (4 - len(size))) != (1, 1, 1, num_filters):
        raise ArgumentError(f"{OP}: {name} expects size 1x1x1x{num_filters} (num_filters last), got {_by(size)}")
    return _copy(array.reshape(num_filters), like)


def _real(name: str, values: Any, dtype: torch.dtype) -> torch.Tensor:
    try:
        # The copy gives torch what it demands of a NumPy array: positive strides and writable memory.
        array = values.detach() if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError) as error:
        kind = type(values).__name__
        raise ArgumentTypeError(f"{OP}: {name} expects an array of numbers, got {kind} ({error})") from None
    if array.dtype == torch.bool or (array.is_complex() and not dtype.is_complex):
        raise ArgumentTypeError(f"{OP}: {name} expects real numbers, got {array.dtype}")
    return array


def _copy(array: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(array.shape, dtype=like.dtype, device=like.device).copy_(array)


def _by(size: Any) -> str:
    return "x".join(map(str, size)) or "a scalar"
