"""torch's autocast for a call of ours: the operands in the dtype of the region, no parameter cast twice in a block.

torch keeps the casts of parameters until the outermost autocast block ends, in a cache without a public interface. Our
casts hang on an entry of that cache, so torch frees them exactly when it frees its own: where a block ends, where
``torch.clear_autocast_cache`` is called, and at once where a block was opened with ``cache_enabled=False``.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from tritonconv.fallback import DEVICES


def cast_arguments(*operands):
    """The operands as torch's autocast hands them to a convolution: all real floats but float64 in its dtype."""
    return _lowered(operands, torch.Tensor.to)


def cast_arguments_once(*operands):
    """As :func:`cast_arguments`, for plain tensors outside every tracer; parameters are cast once per block."""
    return _lowered(operands, _cast_once)


def cast_beside(y, *operands):
    """As :func:`cast_arguments`, of operands that are added to an answer ``y``; each may be None."""
    return _lowered((y, *operands), torch.Tensor.to)[1:]


def lowered_dtype(dtype: torch.dtype, kind: str) -> torch.dtype:
    """The dtype that autocast gives a tensor of ``dtype`` on devices of this kind."""
    if (
        not dtype.is_floating_point
        or dtype is torch.float64
        or kind not in DEVICES
        or not torch.is_autocast_enabled(kind)
    ):
        return dtype
    return torch.get_autocast_dtype(kind)


def _lowered(operands, cast):
    kind, lowered = operands[0].device.type, []
    for tensor in operands:
        dtype = None if tensor is None else lowered_dtype(tensor.dtype, kind)
        lowered.append(tensor if tensor is None or tensor.dtype is dtype else cast(tensor, dtype))
    return lowered


def _cast_once(tensor, dtype):
    # torch caches the casts of parameters only: a block meets them again.
    if not (tensor.requires_grad and tensor.is_leaf and tensor.dtype is torch.float32) or tensor._is_view():
        return tensor.to(dtype)
    if not torch.is_autocast_cache_enabled():
        return tensor.to(dtype)
    casts = _casts_of_this_block(tensor.device)
    key, version = (id(tensor), dtype), tensor._version
    entry = casts.get(key)
    if entry is None or entry[1] != version:
        # A cast that a call without gradients made first must lead back to the parameter in a later call too.
        with torch.inference_mode(False), torch.enable_grad():
            entry = tensor.to(dtype), version, tensor  # the parameter, so that its id stays its own
        casts[key] = entry
    return entry[0]


class _Casts(dict):
    """(id of a parameter, dtype) -> (its cast, the parameter's version then, the parameter)."""

    __slots__ = ("__weakref__",)


_probes: dict[torch.device, torch.Tensor] = {}
_casts: dict[torch.device, weakref.ref[_Casts]] = {}


def _casts_of_this_block(device: torch.device) -> _Casts:
    """The casts made since torch last emptied its cache."""
    reference = _casts.get(device)
    casts = None if reference is None else reference()
    if casts is None:
        casts = _Casts()
        _casts[device] = weakref.ref(casts)
        with torch.inference_mode(False), torch.enable_grad():
            probe = _probes.get(device)
            if probe is None:
                probe = _probes[device] = torch.zeros(0, 0, device=device, requires_grad=True)
            # torch casts the probe for this product and keeps the cast; the node that made the cast, and what hangs on
            # the node, live as long.
            product = torch.mm(probe, probe)
        node: Any = product.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        node.metadata["tritonconv"] = casts
    return casts
