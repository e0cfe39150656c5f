"""``ConvTranspose3d`` on a slab of the volume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from tritonconv.distributed.call import checked_axis, conv_transpose3d
from tritonconv.errors import ArgumentError
from tritonconv.layer import ConvTranspose3d


class ShardedConvTranspose3d(ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` of a volume that the ranks of a group hold in slabs.

    Args:
        as ``torch.nn.ConvTranspose3d`` has them, and by keyword
        group, axis: as :func:`tritonconv.distributed.conv_transpose3d` has them.

    Its state_dict is that of ``torch.nn.ConvTranspose3d``. The parameters must be equal on all ranks: seed alike, or
    broadcast or load them. Their gradients are those of the sum of all ranks' losses, summed in the backward. A copy
    and a pickle of the layer have the default group, for a group belongs to a process.

    Raises ArgumentError or ArgumentTypeError for an axis that is none of 2, 3 and 4, and what torch's layer raises.
    """

    def __init__(self, *args: Any, group: dist.ProcessGroup | None = None, axis: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group, self.axis = group, checked_axis(axis)

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, output_size: None = None, *, sizes: Sequence[int] | None = None
    ) -> torch.Tensor:
        """This rank's slab of the output; ``sizes`` as :func:`tritonconv.distributed.conv_transpose3d` has it.

        Raises ArgumentError for an ``output_size``, which a slab does not know, and as that function does.
        """
        if self.padding_mode != "zeros":
            raise ArgumentError(f"ConvTranspose3d: supports only padding_mode='zeros', got {self.padding_mode!r}")
        if output_size is not None:
            raise ArgumentError("ConvTranspose3d: a slab takes no output_size; give the layer its output_padding")
        return conv_transpose3d(
            input, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation,
            group=self.group, axis=self.axis, sizes=sizes,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """As torch's layer writes itself, with the axis."""
        return f"{super().extra_repr()}, axis={self.axis}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}
