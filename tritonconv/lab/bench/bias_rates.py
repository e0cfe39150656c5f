"""How fast ATen adds a bias, and sums its gradient: passes over the output that a fused kernel does not make.

Where cuDNN computes a convolution with a bias, ATen adds it afterwards, in place (``y.add_``), and the bias's gradient
is ``grad_y.sum((0, 2, 3, 4))``. The rows are those of roofs, in bytes/s, to be held against the copy in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

from tritonconv.lab.bench import roofs
from tritonconv.lab.bench.clock import stopwatch_for
from tritonconv.lab.bench.timing import Call
from tritonconv.problem import LAYOUTS

ADD, GRADIENT = "bias_add", "bias_gradient"
# The output of nnU-Net's last up-convolution, and a slice of it that a CPU sums in milliseconds.
SHAPES = {"cuda": (2, 32, 128, 128, 128), "cpu": (1, 32, 64, 64, 64)}


def measure(device: torch.device, dtypes: Iterable[torch.dtype], seconds: float) -> Iterator[dict[str, Any]]:
    """A row for the addition and one for the gradient in each dtype and layout, each in about ``seconds``."""
    watch, shape = stopwatch_for(device), SHAPES[device.type]
    for dtype in dtypes:
        bias = torch.zeros(shape[1], dtype=dtype, device=device)
        for layout, memory_format in LAYOUTS.items():
            y = torch.ones(shape, dtype=dtype, device=device).contiguous(memory_format=memory_format)
            across = bias.view(1, -1, 1, 1, 1)
            size = y.numel() * y.element_size()
            calls: dict[str, tuple[str, int, Call]] = {
                ADD: ("bias add", 2 * size, partial(y.add_, across)),
                GRADIENT: ("bias gradient", size, partial(y.sum, (0, 2, 3, 4))),
            }
            for name, (said, moved, call) in calls.items():
                text = f"ATen's {said}, {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} {layout}"
                times = roofs.times_of(call, watch, seconds)
                yield roofs.row_of(name, text, str(dtype).removeprefix("torch."), moved, "byte/s", times)
            del y, calls  # and the memory, before the next
