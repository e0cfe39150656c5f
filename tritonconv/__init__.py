"""tritonconv: 3-D transposed convolution for PyTorch, and the laboratory that measures it."""

from tritonconv.convert import ConversionReport, convert, restore
from tritonconv.dispatch import use
from tritonconv.errors import ArgumentError, ArgumentTypeError, ResultsError, VariantNotApplicable
from tritonconv.explain import explain
from tritonconv.factors import param_groups
from tritonconv.functional import conv_transpose3d
from tritonconv.kernels.registry import variants
from tritonconv.layer import ConvTranspose3d, LazyConvTranspose3d
from tritonconv.matlab import TransposedConv3dLayer
from tritonconv.problem import Problem

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ConvTranspose3d",
    "ConversionReport",
    "LazyConvTranspose3d",
    "Problem",
    "ResultsError",
    "TransposedConv3dLayer",
    "VariantNotApplicable",
    "conv_transpose3d",
    "convert",
    "explain",
    "param_groups",
    "restore",
    "use",
    "variants",
]
