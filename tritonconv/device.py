"""The machine that a call runs on: the current GPU, and the CPU's name."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch


@contextlib.contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Inside the block a GPU that is named by its index is the current one.

    Triton and the configs read the limits of the current GPU, and events are recorded on its streams.
    """
    if device.type != "cuda" or device.index is None or not torch.cuda.is_available():
        yield
        return
    with torch.cuda.device(device):
        yield


@cache
def cpu_name() -> str:
    """The CPU's model name as Linux shows it, else what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
