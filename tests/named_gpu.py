"""A GPU that is only named: what dispatch, explain and the stores make of it. Nothing of it is touched."""

from __future__ import annotations

from functools import cache

import torch

from tritonconv import dispatch
from tritonconv.autotune import choose, serving
from tritonconv.autotune.serving import Part

CUDA = torch.device("cuda")
H200 = Part("NVIDIA H200", (9, 0), 132)


def name_gpu(monkeypatch, gpu: Part = H200) -> None:
    """``torch.device("cuda")`` is such a GPU until the test ends. Its store is the tests' own."""
    real = choose.device_name

    @cache
    def part(device: torch.device) -> Part | None:
        return gpu if device.type == "cuda" else None

    monkeypatch.setattr(serving, "part", part)
    monkeypatch.setattr(choose, "device_name", lambda device: gpu.name if device.type == "cuda" else real(device))
    dispatch.forget()
