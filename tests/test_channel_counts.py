"""Every Triton variant at channel counts of all kinds: in its default config, on copies, with offsets of 64 bits."""

from __future__ import annotations

import pytest
import torch
from variant_cases import DEVICE, Case, complaints

pytest.importorskip("triton")

from tritonconv.kernels.registry import variant, variants
from tritonconv.problem import LAYOUTS

COUNTS = (1, 2, 3, 4, 5, 16, 24, 28, 48, 112)
OVERLAPPING = {"size": (2, 3, 2), "stride": 2, "front": 1, "back": 1, "extra": 1}
EXACT_TILES = {"size": (2, 1, 4), "kernel": 2, "stride": 2}


def pairs(sizes):
    return lambda count: [Case(n=1, channels=pair, **sizes) for pair in ((count, 3), (2, count))]


# By variant: the calls of a channel count.
CALLS = {
    **dict.fromkeys(
        ("forward_gather", "forward_phases", "forward_phases_packed", "backward_data_gemm", "backward_data_together",
         "backward_weight_cells", "backward_weight_splitk", "backward_weight_together"),
        pairs(OVERLAPPING),
    ),
    **dict.fromkeys(
        ("forward_shuffle", "forward_shuffle_given", "forward_shuffle_resident", "backward_data_fused",
         "backward_data_shuffle", "backward_data_shuffle_given", "backward_data_shuffle_resident",
         "backward_weight_fused", "backward_weight_shuffle"),
        pairs(EXACT_TILES),
    ),
    "forward_shuffle_parts": lambda count: [
        Case(n=1, channels=pair, **EXACT_TILES) for pair in ((count, 5), (2, count))
    ],
    **dict.fromkeys(
        ("forward_overlap", "forward_overlap_planes", "backward_data_packed", "backward_data_patches",
         "backward_weight_patches"),
        lambda count: [Case(n=1, channels=(count, 1 + count % 4), **OVERLAPPING)],
    ),
    **dict.fromkeys(
        [f"{name}_depthwise{kind}" for name in ("forward", "backward_data", "backward_weight")
         for kind in ("", "_cells")],
        lambda count: [Case(n=1, channels=(each, each), groups=each, **OVERLAPPING) for each in (max(count, 2),)],
    ),
    **dict.fromkeys(
        ("forward_boxes", "backward_data_boxes"),
        lambda count: [Case(n=1, channels=pair, **OVERLAPPING) for pair in ((count, 16), (16, count))],
    ),
}  # fmt: skip
REFUSED = {
    **dict.fromkeys(("forward_boxes", "backward_data_boxes"), (1, 2, 3, 4, 5, 28)),  # strides of 16 bytes
    **dict.fromkeys(("forward_shuffle_given", "backward_data_shuffle_given"), (1, 3, 5)),  # tiles too narrow
}
# Keys that the default leaves out, by the count.
MORE = {
    "forward_phases": lambda count: {"SPLITS": count % 3},
    "forward_phases_packed": lambda count: {"APART": count % 3},
    "backward_data_gemm": lambda count: {"SPLITS": 1 + count % 2, "SKIP": count % 2},
}


def faults(name: str, count: int) -> tuple[list[str], bool]:
    """Of the results in both layouts, of the default config and on copies; whether one of the calls is served in
    float16."""
    record, found, served = variant(name), [], False
    more = MORE.get(name, lambda count: {})(count)
    configs = lambda problem: [{**start, **more} for start in record.starts(problem, DEVICE)]  # noqa: E731
    for place, case in enumerate(CALLS[name](count)):
        for layout in LAYOUTS:
            answer = complaints(record, case, torch.float16, layout, place == 0, DEVICE, configs)
            served |= answer is not None
            found += answer or []
        found += complaints(record, case, torch.float32, "ndhwc", True, DEVICE, configs) or []
    return found, served


def test_every_triton_variant_is_here():
    assert CALLS.keys() == {record.name for record in variants() if record.backend == "triton"}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", CALLS)
def test_exact(name, count):
    assert faults(name, count) == ([], count not in REFUSED.get(name, ()))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("count", "limit"), [(5, "WIDE_FROM"), (24, "WIDE_FROM"), (5, "COUNTED_FROM")])
@pytest.mark.parametrize("name", CALLS)
def test_offsets_and_numbers_of_voxels_of_64_bits(name, count, limit, monkeypatch):
    monkeypatch.setattr(f"tritonconv.kernels.triton_launch.{limit}", 1)
    assert faults(name, count) == ([], count not in REFUSED.get(name, ()))
