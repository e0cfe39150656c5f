"""MATLAB's ``transposedConv3dLayer`` as a torch module.

Axes keep MATLAB's order on torch's spatial axes: ``filter_size[i]``, ``stride[i]`` and ``cropping[i]`` belong to
input axis ``2 + i`` of ``(n, c, h, w, d)``. So "top/bottom" is the first spatial axis, "left/right" the second and
"front/back" the third. An array of MATLAB's, ``X(h, w, d, c, n)``, is the tensor ``X.transpose(4, 3, 0, 1, 2)``.

Weights ``(h, w, d, num_filters, num_channels)`` become torch's ``(c_in, c_out, k1, k2, k3)`` by the same transpose.
Nothing is flipped: MATLAB's page speaks of sliding filters over a padded input, which describes the equivalent
correlation; the stored filter is the one that each input voxel stamps on the output, in MATLAB and in torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.nn.utils.parametrize import is_parametrized

from tritonconv import symbolic
from tritonconv.errors import ArgumentError, ArgumentTypeError
from tritonconv.functional import conv_transpose3d
from tritonconv.matlab.arguments import LEARNABLES, OP, cropping_of, integer, plain, property_list, row
from tritonconv.matlab.factors import Factors
from tritonconv.matlab.initializers import (
    BIAS_RULES,
    WEIGHTS_RULES,
    bias_from_matlab,
    check_rule,
    initial_bias,
    initial_weights,
    weights_from_matlab,
)
from tritonconv.problem import Triple


class TransposedConv3dLayer(LazyModuleMixin, Factors):
    """Transposed 3-D convolution with the arguments, defaults and properties of MATLAB's ``transposedConv3dLayer``.

    ``filter_size[i]``, ``stride[i]`` and ``cropping[i]`` belong to axis ``2 + i`` of the input, so the axes read
    ``(n, c, h, w, d)`` and front/back is the *third* spatial axis. Input ``(n, c, h, w, d)``, or without ``n``;
    output ``(n, num_filters, *out)`` with, per axis, ``out = stride*(in - 1) + filter - begin - end``.

    Where MATLAB takes numbers, Python and NumPy numbers, sequences, arrays and tensors are taken. The parameters
    ``weight`` ``(num_channels, num_filters, h, w, d)`` and ``bias`` ``(num_filters,)`` are torch's, made in torch's
    default dtype on its default device. ``Weights`` and ``Bias`` are the same numbers in MATLAB's layout.

    Args:
        filter_size: a positive integer, or three ``[h w d]``.
        num_filters: output channels.
        stride: a positive integer, or three.
        cropping: a non-negative integer, three ``[a b c]``, a 2x3 matrix ``[t l f; b r bk]``, or ``"same"``:
            ``out = stride*in``, cutting ``filter - stride`` planes, the odd one at the end (bottom, right, back);
            where the filter is shorter than the stride, ``stride - filter`` planes of bias are appended instead.
        num_channels: input channels, or ``"auto"`` for those of the first input. Until then ``weight`` and ``bias``
            are ``UninitializedParameter``; a first call that is refused leaves them so.
        weights_initializer: ``"glorot"``, ``"he"``, ``"narrow-normal"``, ``"zeros"``, ``"ones"``, or a function that
            takes the size ``(h, w, d, num_filters, num_channels)`` and returns an array of it.
        bias_initializer: ``"zeros"``, ``"narrow-normal"``, ``"ones"``, or a function of ``(1, 1, 1, num_filters)``.
        weights: an array ``(h, w, d, num_filters, num_channels)``; wins over the initializer.
        bias: an array ``(1, 1, 1, num_filters)`` or ``(num_filters,)``; wins over the initializer.
        weight_learn_rate_factor, bias_learn_rate_factor: learning rate of the parameter = factor * global rate.
        weight_l2_factor, bias_l2_factor: L2 penalty of the parameter = factor * global one. All four factors act
            through :func:`tritonconv.param_groups`.
        name: a label.

    Raises:
        ArgumentError (a ValueError): a value or a size that does not fit, an input whose channels are not
            ``num_channels``, or an output that would be empty.
        ArgumentTypeError (a TypeError): booleans, text and other things that are no numbers.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        filter_size: Any,
        num_filters: Any,
        *,
        stride: Any = 1,
        cropping: Any = 0,
        num_channels: Any = "auto",
        weights_initializer: Any = "glorot",
        bias_initializer: Any = "zeros",
        weights: Any = None,
        bias: Any = None,
        weight_learn_rate_factor: Any = 1,
        bias_learn_rate_factor: Any = 1,
        weight_l2_factor: Any = 1,
        bias_l2_factor: Any = 0,
        name: str = "",
    ) -> None:
        if isinstance(num_channels, str) and num_channels != "auto":
            raise ArgumentError(f"{OP}: num_channels expects a positive integer or 'auto', got {num_channels!r}")
        if not isinstance(name, str):
            raise ArgumentTypeError(f"{OP}: name expects text, got {name!r}")
        channels = None if isinstance(num_channels, str) else integer("num_channels", plain(num_channels), 1)
        # The mixin's hooks fill the parameters in at the first call; a layer that has them needs no hooks.
        if channels is None and weights is None:
            super().__init__()  # pyright: ignore[reportAttributeAccessIssue]
        else:
            nn.Module.__init__(self)
        self._name = name
        self._filter_size = row("filter_size", filter_size, 1)
        self._num_filters = integer("num_filters", plain(num_filters), 1)
        self._stride = row("stride", stride, 1)
        self._cropping = cropping_of(cropping, self._filter_size, self._stride)
        self._geometry: tuple[Any, ...] = (self._stride, self._cropping.padding, self._cropping.append)
        self._smallest = self._cropping.smallest_input(self._filter_size, self._stride)
        self._weights_initializer = check_rule("weights_initializer", weights_initializer, WEIGHTS_RULES)
        self._bias_initializer = check_rule("bias_initializer", bias_initializer, BIAS_RULES)
        self.weight_learn_rate_factor = weight_learn_rate_factor
        self.bias_learn_rate_factor = bias_learn_rate_factor
        self.weight_l2_factor = weight_l2_factor
        self.bias_l2_factor = bias_l2_factor

        self.register_parameter("weight", cast(nn.Parameter, UninitializedParameter()))
        self.register_parameter("bias", cast(nn.Parameter, UninitializedParameter()))
        if weights is not None:
            self._assign("weight", self._weights_from(weights, channels))
            channels = self.weight.shape[0]
        if bias is not None:
            self._assign("bias", self._bias_from(bias))
        if channels is not None:
            self._initialize(channels, self._missing())

    @property
    def filter_size(self) -> Triple:
        return self._filter_size

    @property
    def num_filters(self) -> int:
        return self._num_filters

    @property
    def num_channels(self) -> int | str:
        """Input channels, or ``"auto"`` while they are not known."""
        return "auto" if is_lazy(self.weight) else self.weight.shape[0]

    @property
    def stride(self) -> Triple:
        return self._stride

    @property
    def cropping_mode(self) -> str:
        """``"same"`` or ``"manual"``."""
        return self._cropping.mode

    @property
    def cropping_size(self) -> tuple[Triple, Triple]:
        """The 2x3 matrix ``((top, left, front), (bottom, right, back))``, in planes."""
        return self._cropping.begin, self._cropping.end

    @property
    def name(self) -> str:
        return self._name

    @property
    def Weights(self) -> torch.Tensor | None:
        """``weight`` as ``(h, w, d, num_filters, num_channels)``: a detached view of the parameter's own memory, or
        None while there are no values. An assigned array is checked and copied into the parameter."""
        return None if is_lazy(self.weight) else self.weight.detach().permute(2, 3, 4, 1, 0)

    @Weights.setter
    def Weights(self, values: Any) -> None:
        self._assign("weight", self._weights_from(values, None if is_lazy(self.weight) else self.weight.shape[0]))

    @property
    def Bias(self) -> torch.Tensor | None:
        """``bias`` as ``(1, 1, 1, num_filters)``; otherwise like ``Weights``."""
        return None if is_lazy(self.bias) else self.bias.detach().reshape(1, 1, 1, -1)

    @Bias.setter
    def Bias(self, values: Any) -> None:
        self._assign("bias", self._bias_from(values))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(n, c, h, w, d)`` or ``(c, h, w, d)`` in, ``num_filters`` channels out."""
        if type(input) is not torch.Tensor and isinstance(input, Proxy):
            node = symbolic.node_of(self, input)
            if node is not None:
                return node
        # The operation refuses the same inputs; asking again in MATLAB's words costs nothing where all is well.
        try:
            return conv_transpose3d(input, self.weight, self.bias, *self._geometry)
        except ArgumentError:
            self._check(input, self.weight.shape[0])
            raise

    def __prepare_scriptable__(self) -> nn.Module:
        raise ArgumentTypeError(f"{OP}: torch.jit.script cannot compile it; torch.jit.trace and torch.export record it")

    def initialize_parameters(self, input: torch.Tensor) -> None:
        """Makes the parameters that have no values yet, for the channels of ``input``; none if the call must fail."""
        if isinstance(input, Proxy):
            raise ArgumentTypeError(f"{OP}: torch.fx gives no channels; run one forward first, or give num_channels")
        missing = self._missing()
        if not missing:
            return
        self._check(input, None if is_lazy(self.weight) else self.weight.shape[0])
        dtype, device = self.weight.dtype, self.weight.device
        if input.device != device:
            raise ArgumentError(f"{OP}: the layer is on {device} but the input is on {input.device}")
        if input.dtype != dtype and not torch.is_autocast_enabled(device.type):
            raise ArgumentTypeError(f"{OP}: the layer is {dtype} but the input is {input.dtype}")
        self._initialize(input.shape[-4], missing)

    def reset_parameters(self) -> None:
        """Draws new weights and a new bias by the initializers; values given at construction are not kept."""
        if not self._missing():
            self._initialize(self.weight.shape[0], LEARNABLES.values())

    def _check(self, x: torch.Tensor, channels: int | None) -> None:
        shape = tuple(x.shape)
        if len(shape) not in (4, 5):
            raise ArgumentError(f"{OP}: input expects (n, c, h, w, d), or (c, h, w, d), got {shape}")
        if shape[-4] == 0:
            raise ArgumentError(f"{OP}: the input needs at least one channel, got {shape}")
        if channels is not None and shape[-4] != channels:
            raise ArgumentError(f"{OP}: NumChannels is {channels} but the input has {shape[-4]} channels: {shape}")
        if any(extent < least for extent, least in zip(shape[-3:], self._smallest, strict=True)):
            raise ArgumentError(
                f"{OP}: the output would be empty: filter {self._filter_size}, stride {self._stride} and cropping "
                f"{self.cropping_size} need an input of at least {self._smallest}, got {shape[-3:]}; input {shape}"
            )

    def _missing(self) -> list[str]:
        return [name for name in LEARNABLES.values() if is_lazy(getattr(self, name))]

    def _initialize(self, channels: int, names: Iterable[str]) -> None:
        filters, like = self._num_filters, self.weight
        make = {
            "weight": lambda: initial_weights(self._weights_initializer, self._filter_size, filters, channels, like),
            "bias": lambda: initial_bias(self._bias_initializer, filters, like),
        }
        # All values first: a function that fails then leaves the layer as it was.
        for name, values in [(name, make[name]()) for name in names]:
            self._assign(name, values)

    def _weights_from(self, values: Any, channels: int | None) -> torch.Tensor:
        return weights_from_matlab("weights", values, self._filter_size, self._num_filters, channels, self.weight)

    def _bias_from(self, values: Any) -> torch.Tensor:
        return bias_from_matlab("bias", values, self._num_filters, self.bias)

    def _assign(self, name: str, values: torch.Tensor) -> None:
        """Puts values in torch's layout into a parameter, which stays the same object (optimizers refer to it)."""
        if is_parametrized(self, name):
            setattr(self, name, values)
            return
        parameter = getattr(self, name)
        # In the mode that the layer was built in: values made under inference_mode could never be trained.
        with torch.inference_mode(parameter.data.is_inference()), torch.no_grad():
            if is_lazy(parameter):
                parameter.materialize(values.shape)
            parameter.copy_(values)

    def _lazy_load_hook(self, state_dict, prefix, *args) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        # torch's hook makes a missing parameter in whatever shape the state dict has.
        for name in self._missing():
            values = state_dict.get(prefix + name)
            if isinstance(values, torch.Tensor) and not is_lazy(values):
                shape = tuple(values.shape)
                bias_shape = (self._num_filters,)
                want = bias_shape if name == "bias" else (*shape[:1], *bias_shape, *self._filter_size)
                if shape != want:
                    raise ArgumentError(f"{OP}: {prefix + name} in the state dict expects {want}, got {shape}")
        super()._lazy_load_hook(state_dict, prefix, *args)  # pyright: ignore[reportAttributeAccessIssue]

    def _replicate_for_data_parallel(self) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        # The mixin's always refuses, for torch's lazy modules change their class once they have values.
        if self._missing():
            raise ArgumentError(f"{OP}: DataParallel needs the channels; run one forward first, or give num_channels")
        return nn.Module._replicate_for_data_parallel(self)

    def __repr__(self) -> str:
        return property_list(
            self._get_name(),
            {
                "": {"Name": self._name},
                "Hyperparameters": {
                    "FilterSize": self._filter_size,
                    "NumChannels": self.num_channels,
                    "NumFilters": self._num_filters,
                    "Stride": self._stride,
                    "CroppingMode": self.cropping_mode,
                    "CroppingSize": self.cropping_size,
                },
                "Learnable Parameters": {"Weights": self.Weights, "Bias": self.Bias},
            },
        )
