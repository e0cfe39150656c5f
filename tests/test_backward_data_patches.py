"""Backward-data by patches of grad_y: several tiles of a program, of channels, and voxels that fill no tile."""

from __future__ import annotations

import itertools

import pytest
import torch
from variant_cases import DEVICE, Case, complaints

from tritonconv.kernels.registry import variant
from tritonconv.kernels.targets import NVIDIA
from tritonconv.problem import LAYOUTS

pytestmark = pytest.mark.usefixtures("poisoned")
patches = pytest.importorskip("tritonconv.kernels.triton_patches")
from tritonconv.kernels import backward_data_patches as kernel  # noqa: E402
from tritonconv.kernels.triton_target import assume_capability  # noqa: E402

RECORD = variant("backward_data_patches")
# More voxels than a tile of 128; their number is a multiple of 16 in the second, so rows are loaded and stored wide.
CASES = {
    "k4 s2": Case(n=2, channels=(20, 1), size=(5, 6, 7), kernel=4, stride=2, front=1, back=1),
    "k3 s2 p1 q1, 256 voxels": Case(n=2, channels=(5, 2), size=(4, 8, 8), stride=2, front=1, back=1, extra=1),
    "70 channels": Case(n=1, channels=(70, 1), size=(3, 7, 8), kernel=(2, 3, 4), stride=(2, 1, 3), front=(1, 0, 2)),
    "dilation": Case(n=1, channels=(3, 3), size=(5, 5, 6), kernel=(2, 3, 2), stride=2, dilation=(1, 2, 3), front=1),
    "5 channels": Case(n=1, channels=(24, 5), size=(3, 8, 6), kernel=(1, 2, 3), stride=(1, 2, 2), back=(0, 1, 0)),
    "kernel = stride": Case(n=3, channels=(8, 3), size=(4, 3, 12), kernel=2, stride=2),
    # Longer patches than a thread has room for: two load them, in parts; of the second and the fourth the last part is
    # half empty.
    "192 places": Case(n=1, channels=(20, 3), size=(3, 5, 6), kernel=4, stride=2, front=3, back=(3, 1, 3)),
    "160 places": Case(
        n=2, channels=(70, 5), size=(2, 4, 8), kernel=(2, 4, 4), stride=(1, 2, 3), dilation=(2, 1, 1), front=1
    ),
    "320 places": Case(n=2, channels=(24, 5), size=(3, 4, 5), kernel=4, stride=2, front=1, back=1),
    "288 places": Case(n=1, channels=(17, 3), size=(3, 3, 5), kernel=(6, 4, 4), stride=2, front=(2, 1, 1), extra=1),
    "one tap of a stride": Case(n=1, channels=(17, 4), size=(2, 9, 9), kernel=1, stride=2, extra=1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("label", CASES)
def test_programs_that_take_tiles_in_turn(label, layout, monkeypatch):
    """One program has all tiles of its channels, and two leave each other none."""

    def configs(problem):
        base = RECORD.default(problem, DEVICE)
        return [{**base, "BLOCK_N": 16, "RESIDENT": 1}, {**base, "WEIGHT": 1, "RESIDENT": 2}]

    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 2 if label == "k4 s2" else 1)
    monkeypatch.setattr(patches, "compute_capability", lambda: 90 if layout == "ncdhw" else 80)  # either order
    dtype = torch.float32 if label == "5 channels" else torch.float16
    assert complaints(RECORD, CASES[label], dtype, layout, True, DEVICE, configs) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_offsets(layout, monkeypatch):
    monkeypatch.setattr(kernel, "wide", lambda *buffers, of=None: True)
    base = [RECORD.default]
    for label in ("k4 s2", "dilation", "160 places", "320 places"):
        configs = lambda problem: [each(problem, DEVICE) for each in base]  # noqa: E731
        assert complaints(RECORD, CASES[label], torch.float16, layout, True, DEVICE, configs) == []


def test_the_refusals_name_the_limit():
    for case, words in (
        (Case(channels=(8, 6)), "6 output channels"),
        (Case(channels=(8, 4), groups=4), "4 groups"),
        (Case(channels=(8, 3), kernel=(3, 4, 4), stride=2), "144 taps and output channels: a patch of at most 128"),
        (Case(channels=(8, 2), kernel=6, stride=2), "432 taps and output channels: a patch of at most 320"),
        (Case(channels=(8, 5), kernel=(6, 4, 4), stride=2), "480 taps and output channels: a patch of at most 320"),
    ):
        assert words in str(RECORD.supports(case.problem(torch.float16), DEVICE))
        assert words in str(variant("backward_weight_patches").supports(case.problem(torch.float16), DEVICE))
    longest = Case(channels=(8, 5), kernel=4, stride=2)
    for record in (RECORD, variant("backward_weight_patches")):
        for case, float32 in ((Case(channels=(8, 4)), "108 taps"), (longest, "320 taps")):
            assert record.supports(case.problem(torch.float16), DEVICE) is None
            assert f"{float32} and output channels: a patch of at most 64" in str(
                record.supports(case.problem(torch.float32), DEVICE)
            )


def test_the_programs_fit_their_registers():
    """As many are resident as the compiled kernels of 200, 152 and 69 registers a thread allow, four at most."""
    found = []
    for channels, taps in (((64, 1), 4), ((32, 1), 4), ((16, 1), 3)):
        problem = Case(n=32, channels=channels, size=32, kernel=taps, stride=2).problem(torch.float16, "ndhwc")
        found.append(RECORD.default(problem, torch.device("cuda"))["RESIDENT"])
    assert found == [2, 3, 4]
    config = {"BLOCK_N": 64, "num_warps": 8}
    assert patches.resident(problem, config, 16, 64, "backward_data") == 1


def test_the_programs_fit_their_shared_memory():
    """Of 320 places by 128 columns a program has 90 KiB: one fits an A100 and an RTX 4090, two an H100 or a B200."""
    problem = Case(n=1, channels=(256, 5), size=64, kernel=4, stride=2).problem(torch.float16, "ndhwc")
    for capability, programs in ((80, 1), (89, 1), (90, 2), (100, 2)):
        with assume_capability(capability):
            config = RECORD.default(problem, torch.device("cuda"))
            assert config["BLOCK_N"] == 128 and config["RESIDENT"] == programs
            assert RECORD.work(problem, config).shared_bytes == 2 * 64 * (64 + 5 * 128) + 128


LONG = [(4, 5), (4, 4), ((2, 4, 4), 5), ((6, 4, 4), 3), ((2, 4, 6), 5), ((2, 8, 4), 5), ((1, 5, 5), 5), (2, 5), (5, 1)]


@pytest.mark.parametrize("name", ["backward_data_patches", "backward_weight_patches"])
def test_every_config_fits_every_gpu(name):
    """The longest patches that are served, beside any number of input channels."""
    record, found = variant(name), set()
    for target in NVIDIA.values():
        for (taps, c_out), c_in in itertools.product(LONG, (5, 64, 96, 512)):
            for dtype, layout in itertools.product((torch.float16, torch.float32), LAYOUTS):
                problem = Case(channels=(c_in, c_out), size=16, kernel=taps, stride=2).problem(dtype, layout)
                with assume_capability(target.arch):
                    if record.supports(problem, DEVICE) is not None:
                        continue
                    found.add((target.arch, patches.places(problem)))
                    for config in record.space(problem, DEVICE):
                        assert record.work(problem, config).shared_bytes <= target.shared_per_block
    assert found >= {(arch, most) for arch in NVIDIA for most in (320, 288, 256, 125, 40)}


@pytest.mark.parametrize("name", ["backward_data_patches", "backward_weight_patches"])
def test_less_shared_memory_takes_fewer_columns_and_none_is_refused(name, monkeypatch):
    record = variant(name)
    problem = Case(n=1, channels=(256, 5), size=16, kernel=4, stride=2).problem(torch.float16, "ndhwc")
    for kib, columns in ((99, {"backward_data_patches": 128}), (40, {})):
        monkeypatch.setattr(patches, "shared_bytes", lambda most=kib << 10: most)
        assert record.supports(problem, DEVICE) is None
        base, configs = record.default(problem, DEVICE), record.space(problem, DEVICE)
        assert base["BLOCK_N"] == columns.get(name, 32 if kib < 99 else 64) and base in configs
        assert max(record.work(problem, config).shared_bytes for config in configs) <= kib << 10
    monkeypatch.setattr(patches, "shared_bytes", lambda: 8 << 10)
    assert "320 taps and output channels with 16 input channels take" in str(record.supports(problem, DEVICE))
