"""A GPU that is only named: what dispatch, explain and the stores make of it. Nothing of it is touched."""

from __future__ import annotations

import contextlib
from functools import cache
from types import SimpleNamespace

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


def count_gpus(monkeypatch) -> SimpleNamespace:
    """``torch.cuda`` says that there are GPUs, until the test ends; ``index`` of what is returned is the current one's,
    in the thread that asks for another."""
    now = SimpleNamespace(index=0)

    @contextlib.contextmanager
    def device(wanted):
        before, now.index = now.index, torch.device(wanted).index
        yield
        now.index = before

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    return now
