"""The class of a layer: what decides which kind of kernel can be fast on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FEW_CHANNELS = 16  # fewer leave most of a matrix instruction empty
CLASSES = ("depthwise", "grouped", "few channels", "k < s", "k = s", "stride 1", "k > s")


def layer_class(problem: Mapping[str, Any]) -> str:
    """One of :data:`CLASSES`, the first that holds, from the sizes of a row (``problem``)."""
    groups, c_in, c_out = problem["groups"], problem["c_in"], problem["c_out"]
    kernel, stride = tuple(problem["kernel"]), tuple(problem["stride"])
    if groups > 1:
        return "depthwise" if groups == c_in == c_out else "grouped"
    if min(c_in, c_out) < FEW_CHANNELS:
        return "few channels"
    pairs = list(zip(kernel, stride, strict=True))
    if any(k < s for k, s in pairs):
        return "k < s"
    if kernel == stride:
        return "k = s"
    return "stride 1" if set(stride) == {1} else "k > s"
