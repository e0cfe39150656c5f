"""Kernels for very few channels, for one, and for kernel = stride: every channel count, and offsets of 64 bits."""

from __future__ import annotations

import pytest
import torch
from variant_cases import DEVICE, Case, complaints

pytest.importorskip("triton")

from tritonconv.kernels.registry import variant
from tritonconv.problem import LAYOUTS

COUNTS = (1, 2, 3, 4, 5, 16, 24, 28, 48, 112)
OVERLAPPING = {"size": (2, 3, 2), "stride": 2, "front": 1, "back": 1, "extra": 1}
# By variant: the calls of a channel count, all of which it serves.
CALLS = {
    **dict.fromkeys(
        ("forward_overlap_planes", "backward_data_patches", "backward_weight_patches"),
        lambda count: [Case(n=1, channels=(count, 1 + count % 4), **OVERLAPPING)],
    ),
    **dict.fromkeys(
        [f"{name}_depthwise_cells" for name in ("forward", "backward_data", "backward_weight")],
        lambda count: [Case(n=1, channels=(each, each), groups=each, **OVERLAPPING) for each in (max(count, 2),)],
    ),
    **dict.fromkeys(
        ("backward_data_together", "backward_weight_together"),
        lambda count: [Case(n=1, channels=pair, **OVERLAPPING) for pair in ((count, 3), (2, count))],
    ),
    "backward_weight_shuffle": lambda count: [
        Case(n=1, channels=pair, size=(2, 1, 4), kernel=2, stride=2) for pair in ((count, 3), (2, count))
    ],
}


def faults(name: str, count: int) -> list[str]:
    """Of the default config's results in both layouts; float32 of a few places more is refused, float16 never."""
    record, found = variant(name), []
    configs = lambda problem: [record.default(problem, DEVICE)]  # noqa: E731
    for place, case in enumerate(CALLS[name](count)):
        for layout in LAYOUTS:
            found += complaints(record, case, torch.float16, layout, place == 0, DEVICE, configs) or []
        assert record.supports(case.problem(torch.float16, layout), DEVICE) is None
        found += complaints(record, case, torch.float32, "ndhwc", True, DEVICE, configs) or []
    return found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", CALLS)
def test_exact(name, count):
    assert faults(name, count) == []


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("count", [5, 24])
@pytest.mark.parametrize("name", CALLS)
def test_offsets_of_64_bits(name, count, monkeypatch):
    monkeypatch.setattr("tritonconv.kernels.triton_launch.WIDE_FROM", 1)
    assert faults(name, count) == []
