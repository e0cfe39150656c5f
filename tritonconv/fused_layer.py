"""``ConvTranspose3d`` with an activation behind it, and a residual beside its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Proxy

from tritonconv import registries, symbolic
from tritonconv.epilogue import parsed
from tritonconv.errors import ArgumentError, ArgumentTypeError
from tritonconv.functional import conv_transpose3d
from tritonconv.layer import ConvTranspose3d

PRELU_SLOPE = 0.25  # torch's


class FusedConvTranspose3d(ConvTranspose3d):
    """``activation(conv(input) + bias + residual)`` in one pass over the output.

    Args:
        as ``torch.nn.ConvTranspose3d`` has them, and by keyword
        activation: as :func:`tritonconv.conv_transpose3d` has it; "prelu" has one slope, ("prelu", count) has 1 or
            ``out_channels`` of them, which the layer learns: ``slopes``, 0.25 at first.
        rounding: as :func:`tritonconv.conv_transpose3d` has it.

    The keys of its state_dict are those of ``torch.nn.ConvTranspose3d``, and "slopes" with prelu.

    Raises ArgumentError or ArgumentTypeError for an activation, a count or a rounding that is none.
    """

    slopes: nn.Parameter | None

    def __init__(self, *args: Any, activation: Any = None, rounding: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        name, count = _prelu(activation)
        if name == "prelu" and count not in (1, self.out_channels):
            raise ArgumentError(
                f"FusedConvTranspose3d: prelu expects 1 slope or out_channels={self.out_channels}, got {count!r}"
            )
        self.activation, self.rounding = activation, rounding
        if name == "prelu":
            self.slopes = nn.Parameter(self.weight.new_full((count,), PRELU_SLOPE))
        else:
            self.register_parameter("slopes", None)
        parsed(self._activation(), None, rounding)

    def reset_parameters(self) -> None:
        """Draws weight and bias as torch's layer does; the slopes of prelu are 0.25 again."""
        super().reset_parameters()
        slopes = getattr(self, "slopes", None)  # torch's constructor asks before there are any
        if slopes is not None:
            nn.init.constant_(slopes, PRELU_SLOPE)

    def _activation(self) -> Any:
        return self.activation if self.slopes is None else ("prelu", self.slopes)

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, residual: torch.Tensor | None = None, output_size: list[int] | None = None
    ) -> torch.Tensor:
        """Output (n, c_out, od, oh, ow); ``residual`` has its shape and dtype, ``output_size`` is torch's.

        Raises as :func:`tritonconv.conv_transpose3d` and torch's layer do.
        """
        if type(input) is not torch.Tensor and isinstance(input, Proxy):
            node = symbolic.node_of(self, input, residual, output_size)
            if node is not None:
                return node
        output_padding: Any = self.output_padding
        if output_size is not None:
            output_padding = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, 3, self.dilation  # type: ignore[arg-type]
            )  # fmt: skip
        return conv_transpose3d(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation,
            activation=self._activation(), residual=residual, rounding=self.rounding,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """As torch's layer writes itself, with the activation and the rounding."""
        more = {"activation": self.activation, "rounding": self.rounding}
        return super().extra_repr() + "".join(f", {name}={value!r}" for name, value in more.items() if value)

    def __prepare_scriptable__(self) -> nn.Module:
        raise ArgumentTypeError(
            "FusedConvTranspose3d: torch.jit.script cannot compile it; torch.jit.trace and torch.export record it"
        )


def _prelu(activation: Any) -> tuple[Any, Any]:
    """("prelu", the number of slopes) where the activation is prelu, else (None, None)."""
    if isinstance(activation, str):
        return (activation, 1) if activation == "prelu" else (None, None)
    if isinstance(activation, (tuple, list)) and activation and activation[0] == "prelu":
        return activation if len(activation) == 2 else ("prelu", None)  # type: ignore[return-value]
    return None, None


registries.register_layers(nn.ConvTranspose3d, FusedConvTranspose3d)
