"""tritonconv: 3-D transposed convolution for PyTorch, and the laboratory that measures it."""

from typing import TYPE_CHECKING, Any

from tritonconv.convert import ConversionReport, convert, restore
from tritonconv.dispatch import pin_choices, save_choices, wait_until_compiled
from tritonconv.errors import (
    ArgumentError,
    ArgumentTypeError,
    KernelWarning,
    ResultsError,
    StoreError,
    StoreWarning,
    VariantNotApplicable,
)
from tritonconv.explain import explain
from tritonconv.forced import use
from tritonconv.functional import conv_transpose3d
from tritonconv.graphed import graphed
from tritonconv.kernels.registry import variants
from tritonconv.kernels.variant import Variant
from tritonconv.layer import ConvTranspose3d, LazyConvTranspose3d
from tritonconv.matlab.factors import param_groups
from tritonconv.matlab.layer import TransposedConv3dLayer
from tritonconv.problem import Problem
from tritonconv.switches import for_graphs

if TYPE_CHECKING:
    from tritonconv.autotune.tuning.api import tune
    from tritonconv.concatenation import up_concat

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ConvTranspose3d",
    "ConversionReport",
    "KernelWarning",
    "LazyConvTranspose3d",
    "Problem",
    "ResultsError",
    "StoreError",
    "StoreWarning",
    "TransposedConv3dLayer",
    "Variant",
    "VariantNotApplicable",
    "conv_transpose3d",
    "convert",
    "explain",
    "for_graphs",
    "graphed",
    "param_groups",
    "pin_choices",
    "restore",
    "save_choices",
    "tune",
    "up_concat",
    "use",
    "variants",
    "wait_until_compiled",
]


def __getattr__(name: str) -> Any:
    """Loads the tuner when it is first used: the import of tritonconv loads nothing that measures. Likewise
    ``up_concat``."""
    if name == "tune":
        from tritonconv.autotune.tuning.api import tune

        return tune
    if name == "up_concat":
        from tritonconv.concatenation import up_concat

        globals()[name] = up_concat
        return up_concat
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
