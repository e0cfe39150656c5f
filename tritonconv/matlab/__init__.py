"""MATLAB's ``transposedConv3dLayer`` as a layer of torch."""

from tritonconv.matlab.factors import param_groups
from tritonconv.matlab.layer import TransposedConv3dLayer

__all__ = ["TransposedConv3dLayer", "param_groups"]
