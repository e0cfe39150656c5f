"""tritonconv in the tables in which other tools look an operator or a layer up.

* torch's count of FLOPs (``torch.utils.flop_counter``), which must agree with its count of torch's layer
* thop and ptflops, which count a layer by its exact class
* torch's eager-mode quantization and ``fuse_modules``, which replace a layer by its exact class

Some of these modules are slow to load, or are not there. So a table is filled when somebody else imports its module.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"
# module: the dicts in it whose keys are a layer's class, or a tuple of classes. A table that another version of the
# tool does not have is left out: the layer is then unknown to that tool, as the documentation says of other tools.
TABLES = {
    "thop.profile": ("register_hooks",),
    "ptflops.pytorch_ops": ("MODULES_MAPPING",),
    "torch.ao.quantization.fuser_method_mappings": ("_DEFAULT_OP_LIST_TO_FUSER_METHOD",),
}
QUANTIZED = "torch.ao.quantization.quantization_mappings"
QUANTIZED_TABLES = ("DEFAULT_STATIC_QUANT_MODULE_MAPPINGS", "DEFAULT_REFERENCE_STATIC_QUANT_MODULE_MAPPINGS")


def register_operators(forward: Any, backward: Any) -> None:
    """Registers the formulas of the two operators with torch's counter of FLOPs."""

    def formulas(counter: ModuleType) -> None:
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

    _when_imported(COUNTER, formulas)


def register_layers(torchs: type, ours: type) -> None:
    """Gives the class ``ours`` the entries of ``torchs`` in the tables of the tools."""

    def same_entries(module: ModuleType) -> None:
        for name in TABLES[module.__name__]:
            table = getattr(module, name, {})
            for key, value in list(table.items()):
                if isinstance(key, tuple) and torchs in key:
                    table.setdefault(tuple(ours if cls is torchs else cls for cls in key), value)
                elif key is torchs:
                    table.setdefault(ours, value)

    def quantized_entries(module: ModuleType) -> None:
        for name in QUANTIZED_TABLES:
            table = getattr(module, name, {})
            if torchs in table:
                table.setdefault(ours, _from_ours(table[torchs], torchs))

    for name in TABLES:
        _when_imported(name, same_entries)
    _when_imported(QUANTIZED, quantized_entries)


def _from_ours(quantized: Any, torchs: type) -> type:
    """torch's quantized class, which takes layers of exactly torch's class, with a ``from_float`` that takes ours."""

    @wraps(quantized.from_float.__func__)  # torch reads the names of its arguments
    def from_float(cls, layer, *args, **kwargs):
        twin: Any = object.__new__(torchs)
        twin.__dict__ = dict(layer.__dict__)
        return quantized.from_float(twin, *args, **kwargs)

    namespace = {"__module__": quantized.__module__, "from_float": classmethod(from_float)}
    return type(quantized.__name__, (quantized,), namespace)


def _when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls ``action`` with the module now, or as soon as somebody has imported it."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _WhenImported(name, action))


class _WhenImported(MetaPathFinder):
    """Finds a module as any finder does, once, and acts behind its import."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self._name, self._action = name, action

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                self._action(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
