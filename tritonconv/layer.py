"""``torch.nn.ConvTranspose3d`` with another forward: same arguments, state_dict, RNG draws and repr."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tritonconv.errors import ArgumentError
from tritonconv.functional import conv_transpose3d


class ConvTranspose3d(nn.ConvTranspose3d):
    """Drop-in for ``torch.nn.ConvTranspose3d``; see there for the arguments.

    Shapes: input (n, c_in, d, h, w) or (c_in, d, h, w), weight (c_in, c_out/groups, kd, kh, kw), bias (c_out,).
    """

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """Output (n, c_out, od, oh, ow); ``output_size`` picks among the sizes that output_padding can reach.

        Raises ArgumentError or ValueError as torch's layer refuses.
        """
        if self.padding_mode != "zeros":
            raise ArgumentError(f"ConvTranspose3d: supports only padding_mode='zeros', got {self.padding_mode!r}")
        output_padding: Sequence[int] = self.output_padding
        if output_size is not None:
            # torch annotates lists where its own layer passes tuples
            output_padding = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, 3, self.dilation  # type: ignore[arg-type]
            )  # fmt: skip
        return conv_transpose3d(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class LazyConvTranspose3d(nn.LazyConvTranspose3d):
    """Drop-in for ``torch.nn.LazyConvTranspose3d``: the first input sets ``in_channels``; then a ConvTranspose3d."""

    cls_to_become = ConvTranspose3d
    forward = ConvTranspose3d.forward
