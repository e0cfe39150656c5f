"""Which shipped table serves a GPU, and which GPUs run what the cost model expects where nothing was measured.

The table measured on one part of compute capability 9.0 serves the others that are as wide: the H100 SXM, H200 and
GH200 are one chip with different memories. A narrower part of 9.0 takes the model with its own properties. A slice
of a GPU (MIG) has a smaller memory and cache than any measured GPU: torch's own runs there.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

HOPPER = (9, 0)
MEASURED = "NVIDIA H200"  # whose shipped table serves the others
LEAST_MULTIPROCESSORS = 114


class Part(NamedTuple):
    """A GPU as torch names it. ``bandwidth`` of its memory in bytes/s, None where torch does not say; ``shared_bytes``
    and ``registers`` of a multiprocessor, 0 where it does not."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    bandwidth: float | None = None
    shared_bytes: int = 0
    registers: int = 0

    @property
    def sliced(self) -> bool:
        return " MIG " in f" {self.name} "


@cache
def part(device: torch.device) -> Part | None:
    """None for anything but a CUDA device that is there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    try:
        facts = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError):  # an index that is not there
        return None
    clock, bus = getattr(facts, "memory_clock_rate", 0), getattr(facts, "memory_bus_width", 0)  # kHz, bits
    return Part(
        facts.name,
        (facts.major, facts.minor),
        facts.multi_processor_count,
        2e3 * clock * bus / 8 if clock and bus else None,  # twice in each clock
        getattr(facts, "shared_memory_per_multiprocessor", 0),
        getattr(facts, "regs_per_multiprocessor", 0),
    )


def table_for(gpu: Part) -> str | None:
    """The device whose shipped table serves the GPU, besides one of its own."""
    wide = gpu.capability == HOPPER and gpu.multiprocessors >= LEAST_MULTIPROCESSORS
    return MEASURED if wide and not gpu.sliced else None


def has_model(gpu: Part) -> bool:
    """Whether the cost model decides where nothing was tuned: its factors were measured on such parts."""
    return gpu.capability == HOPPER and not gpu.sliced
