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
    from tritonconv.folding import unfuse
    from tritonconv.fused_layer import FusedConvTranspose3d
    from tritonconv.fusion import FusionReport, fuse

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ConvTranspose3d",
    "ConversionReport",
    "FusedConvTranspose3d",
    "FusionReport",
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
    "fuse",
    "graphed",
    "param_groups",
    "pin_choices",
    "restore",
    "save_choices",
    "tune",
    "unfuse",
    "up_concat",
    "use",
    "variants",
    "wait_until_compiled",
]


def __getattr__(name: str) -> Any:
    """Loads what few programs use where it is first used: the tuner, the fusion of models, the decoder's concatenation,
    slabs on several ranks. The import of tritonconv loads nothing that measures."""
    if name == "tune":
        from tritonconv.autotune.tuning.api import tune

        return tune
    if name == "FusedConvTranspose3d":
        from tritonconv.fused_layer import FusedConvTranspose3d

        return FusedConvTranspose3d
    if name in ("FusionReport", "fuse"):
        from tritonconv import fusion

        return getattr(fusion, name)
    if name == "unfuse":
        from tritonconv.folding import unfuse

        return unfuse
    if name == "up_concat":
        from tritonconv.concatenation import up_concat

        globals()[name] = up_concat
        return up_concat
    if name == "distributed":
        import tritonconv.distributed

        return tritonconv.distributed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
