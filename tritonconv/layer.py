"""``torch.nn.ConvTranspose3d`` with another forward: same arguments, state_dict, RNG draws and repr."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Proxy

from tritonconv import registries, symbolic
from tritonconv.errors import ArgumentError, ArgumentTypeError
from tritonconv.functional import conv_transpose3d

_is_scripting = torch.jit.is_scripting


@torch.jit.unused  # TorchScript knows no f-string
def _refuse_padding_mode(mode: str) -> None:
    raise ArgumentError(f"ConvTranspose3d: supports only padding_mode='zeros', got {mode!r}")


class ConvTranspose3d(nn.ConvTranspose3d):
    """Drop-in for ``torch.nn.ConvTranspose3d``; see there for the arguments.

    Shapes: input (n, c_in, d, h, w) or (c_in, d, h, w), weight (c_in, c_out/groups, kd, kh, kw), bias (c_out,).
    """

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """Output (n, c_out, od, oh, ow); ``output_size`` picks among the sizes that output_padding can reach.

        Raises ArgumentError or ValueError as torch's layer refuses.
        """
        if self.padding_mode != "zeros":
            _refuse_padding_mode(self.padding_mode)
        if _is_scripting():  # torch.jit.script compiles this branch alone, and parses the other: no f-string in it
            scripted = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, 3, self.dilation  # type: ignore[arg-type]
            )  # fmt: skip
            y = nn.functional.conv_transpose3d(
                input, self.weight, self.bias, self.stride, self.padding, scripted, self.groups, self.dilation  # type: ignore[arg-type]
            )  # fmt: skip
        else:
            if type(input) is not torch.Tensor and isinstance(input, Proxy):
                node = symbolic.node_of(self, input, output_size)
                if node is not None:
                    return node
            output_padding: Sequence[int] = self.output_padding
            if output_size is not None:
                # torch annotates lists where its own layer passes tuples
                output_padding = self._output_padding(
                    input, output_size, self.stride, self.padding, self.kernel_size, 3, self.dilation  # type: ignore[arg-type]
                )  # fmt: skip
            own = self._parameters
            if "weight" in own and "bias" in own:  # torch takes ten times as long to find them
                weight: torch.Tensor | None = own["weight"]
                bias: torch.Tensor | None = own["bias"]
            else:  # a parametrization, or another tensor in the place of one
                weight, bias = self.weight, self.bias
            y = conv_transpose3d(
                input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
            )
        return y


class LazyConvTranspose3d(nn.LazyConvTranspose3d):
    """Drop-in for ``torch.nn.LazyConvTranspose3d``: the first input sets ``in_channels``; then a ConvTranspose3d."""

    cls_to_become = ConvTranspose3d
    forward = ConvTranspose3d.forward

    def initialize_parameters(self, input: torch.Tensor, *args: object, **kwargs: object) -> None:
        """Makes the parameters for the channels of ``input``. Raises ArgumentTypeError for a proxy of torch.fx."""
        if isinstance(input, Proxy):
            raise ArgumentTypeError("LazyConvTranspose3d: torch.fx gives no channels; run one forward first")
        super().initialize_parameters(input, *args, **kwargs)  # type: ignore[arg-type]


registries.register_layers(nn.ConvTranspose3d, ConvTranspose3d)
