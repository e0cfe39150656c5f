"""Formulas for torch's count of FLOPs (``torch.utils.flop_counter``), which must agree with its count of torch's layer.

That module loads Triton. Few programs count FLOPs, so the formulas are registered when somebody else imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"


def register(forward: Any, backward: Any) -> None:
    """Registers the formulas of the two operators now, or as soon as torch's counter is imported."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER], forward, backward)
    else:
        sys.meta_path.insert(0, _WhenImported(forward, backward))


def _register(counter: ModuleType, forward: Any, backward: Any) -> None:
    count = counter.conv_flop_count  # counts the cropped taps of a transposed convolution too

    @counter.register_flop_formula(forward)
    def of_forward(x_shape, weight_shape, bias_shape, *args, out_shape=None, **kwargs) -> int:
        return count(x_shape, weight_shape, out_shape, transposed=True)

    @counter.register_flop_formula(backward)
    def of_backward(grad_y_shape, x_shape, weight_shape, size, *args, out_shape=None, **kwargs) -> int:
        c_in = weight_shape[0] if x_shape is None else x_shape[1]
        kernel, groups, wanted = args[1], args[5], args[-1]
        x_shape, weight_shape = (grad_y_shape[0], c_in, *size), (c_in, grad_y_shape[1] // groups, *kernel)
        return sum(wanted[:2]) * count(x_shape, weight_shape, grad_y_shape, transposed=True)


class _WhenImported(MetaPathFinder):
    """Finds the counter as any finder does, once, and registers the formulas behind its import."""

    def __init__(self, forward: Any, backward: Any) -> None:
        self._operators = forward, backward

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _register(module, *self._operators)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
