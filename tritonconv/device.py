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
    return _of_linux("model name") or platform.processor() or platform.machine()


@cache
def cpu_vendor() -> str:
    """``"AuthenticAMD"``, ``"GenuineIntel"``, another name that Linux shows; "" where nobody says."""
    known = ("AuthenticAMD", "GenuineIntel")
    return _of_linux("vendor_id") or next((name for name in known if name in platform.processor()), "")


def _of_linux(field: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(field):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return ""
