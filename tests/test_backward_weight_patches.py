"""Backward-weight by patches of grad_y: chunks of several tiles, the bias beside them, and the count of bytes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_backward_data_patches import CASES
from variant_cases import DEVICE, Case, complaints

from tritonconv.kernels.registry import variant
from tritonconv.problem import LAYOUTS

pytestmark = pytest.mark.usefixtures("poisoned")
patches = pytest.importorskip("tritonconv.kernels.triton_patches")
from tritonconv.kernels.triton_target import assume_capability  # noqa: E402

RECORD = variant("backward_weight_patches")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("label", CASES)
def test_chunks_of_several_tiles(label, layout, monkeypatch):
    """One chunk of all tiles, chunks of one and two, and more of them than tiles."""

    def configs(problem):
        base = {**RECORD.default(problem, DEVICE), "BIAS_V": 64, "BIAS_W": 0}
        return [{**base, "BLOCK_N": 16, "SPLITS": 3}, {**base, "SPLITS": 1}, {**base, "SPLITS": 9}]

    monkeypatch.setattr(patches, "compute_capability", lambda: 90 if layout == "ncdhw" else 80)  # either order
    dtype, bias = torch.float32 if label == "5 channels" else torch.float16, label != "70 channels"
    assert complaints(RECORD, CASES[label], dtype, layout, bias, DEVICE, configs) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_offsets(layout, monkeypatch):
    monkeypatch.setattr("tritonconv.kernels.backward_weight_patches.wide", lambda *buffers, of=None: True)
    configs = lambda problem: [{**RECORD.default(problem, DEVICE), "SPLITS": 2}]  # noqa: E731
    for label in ("k4 s2", "dilation", "160 places", "320 places"):
        assert complaints(RECORD, CASES[label], torch.float16, layout, True, DEVICE, configs) == []


def test_x_is_read_once():
    """From L2 too; the partials are written and read, grad_y comes a few times."""
    problem = Case(n=32, channels=(64, 1), size=32, kernel=4, stride=2, front=1, back=1).problem(
        torch.bfloat16, "ndhwc", bias=False
    )
    config = RECORD.default(problem, torch.device("cuda"))
    counts = RECORD.work(problem, config)
    partials = 8 * config["SPLITS"] * math.prod(problem.weight_shape)
    assert counts.memory_bytes == problem.bytes("backward_weight") + partials
    x, y = (2 * math.prod(shape) for shape in (problem.x_shape, problem.y_shape))
    assert x + y < counts.cache_bytes - partials < x + 4 * y
    splitk = variant("backward_weight_splitk")
    theirs = splitk.work(problem, splitk.default(problem, torch.device("cuda")))
    assert counts.cache_bytes < theirs.cache_bytes and counts.instructions < theirs.instructions


def test_the_default_has_fewer_columns_where_as_many_spill(monkeypatch):
    """On sm_80: in float32, and where a thread has few sums beside a patch of several channels. On any: where it would
    have more than 128 of them."""
    layers = {name: Case(n=32, channels=channels, size=32, kernel=taps, stride=2) for name, channels, taps in (
        ("one channel", (32, 1), 4), ("two", (32, 2), 3), ("two, more sums", (64, 2), 3), ("in parts", (240, 3), 4),
        ("in five parts", (256, 5), 4),
    )}  # fmt: skip
    monkeypatch.setattr(patches, "shared_bytes", lambda: 160 * 1024)
    elsewhere = 32, 32, 64, 128, 64
    for capability, float32, columns in ((80, 16, (32, 16, 64, 128, 32)), (90, 32, elsewhere), (100, 32, elsewhere)):
        monkeypatch.setattr(
            "tritonconv.kernels.backward_weight_patches.compute_capability", lambda found=capability: found
        )
        halves = (case.problem(torch.bfloat16, "ndhwc") for case in layers.values())
        assert tuple(RECORD.default(each, torch.device("cuda"))["BLOCK_N"] for each in halves) == columns
        problem = layers["one channel"].problem(torch.float32, "ndhwc")
        assert RECORD.default(problem, torch.device("cuda"))["BLOCK_N"] == float32


def test_long_patches_have_four_warps_where_eight_spill():
    """Compiled for sm_80 and sm_120, whose products are HMMA: 8 warps spill up to 10 KiB with 32 or 64 columns."""
    hopper = {16: (8, 16), 32: (8, 32), 64: (8, 64), 240: (8, 128)}
    older = {16: (8, 16), 32: (4, 32), 64: (4, 32), 240: (8, 128)}
    for capability, shapes in ((80, older), (86, older), (120, older), (90, hopper), (100, hopper)):
        with assume_capability(capability):
            for c_in, c_out in itertools.product(shapes, (3, 4, 5)):
                problem = Case(n=1, channels=(c_in, c_out), size=64, kernel=4, stride=2).problem(torch.bfloat16)
                config = RECORD.default(problem, torch.device("cuda"))
                expected = shapes[64 if (c_in, c_out) == (240, 5) else c_in]  # 128 columns are 160 sums of a thread
                assert (config["num_warps"], config["BLOCK_N"]) == expected
                assert config["BLOCK_K"] == 16 * config["num_warps"]
                assert config in RECORD.space(problem, torch.device("cuda"))
