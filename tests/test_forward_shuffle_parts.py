"""Lengths in parts that are powers of two, and forward_shuffle_parts, whose columns are taken so."""

from __future__ import annotations

import itertools

import pytest
import torch
from variant_cases import DEVICE, Case, complaints, form

pytest.importorskip("triton")

from tritonconv.epilogue import Epilogue
from tritonconv.kernels import triton_phases as phases
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.triton_parts import LEAST, part_sizes, part_start
from tritonconv.kernels.work import WARP, parts
from tritonconv.problem import LAYOUTS

PATCHES = Case(n=1, channels=(20, 5), size=(1, 3, 17), kernel=(2, 4, 4), stride=(2, 4, 4))  # 160 columns
HALF = torch.float16


@pytest.mark.parametrize("length", [*range(1, 300), 320, 384, 400, 448, 511])
def test_parts_are_powers_of_two_that_cover_the_length(length):
    sizes = part_sizes(length)
    assert all(size & (size - 1) == 0 and size >= LEAST for size in sizes)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert sum(sizes[:-1]) < length <= sum(sizes)
    assert 7 * sum(sizes) <= 8 * parts(length, LEAST) * LEAST  # padding
    starts = [part_start(sizes, part) for part in range(len(sizes))]
    assert starts[0] == 0 and all(start % size == 0 for start, size in zip(starts, sizes, strict=True))
    assert [b - a for a, b in itertools.pairwise(starts)] == list(sizes[:-1])


def test_the_parts_of_layers():
    assert part_sizes(160) == (128, 32) and part_sizes(384) == (256, 128) and part_sizes(40) == (32, 16)
    assert part_sizes(224) == (256,) and part_sizes(223) == (256,) and part_sizes(208) == (128, 64, 16)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        PATCHES,
        PATCHES._replace(channels=(40, 5), size=(2, 2, 9), front=(1, 2, 3), back=(0, 1, 2)),
        Case(n=3, channels=(17, 25), size=(2, 1, 9), kernel=2, stride=2),  # 200 columns in three parts
        Case(n=2, channels=(16, 5), size=(2, 3, 5), kernel=1, stride=2),  # 35 of 40 columns have no tap
        Case(
            n=1, channels=(3, 6), size=(2, 2, 9), kernel=(1, 1, 2), stride=(2, 1, 3), extra=(1, 0, 1), front=(0, 0, 2)
        ),
        Case(n=1, channels=(3, 12), size=(1, 2, 9), kernel=(1, 2, 3), stride=(1, 2, 3)),  # more columns with ROWS
    ],
    ids=str,
)
def test_every_tile_is_exact(case, layout):
    """Of the fewest rows, so that there are several tiles, in both orders of the columns."""
    served = 0
    for dtype in (HALF, torch.float32):
        problem = case.problem(dtype, layout)
        record = form("forward_shuffle_parts")
        if record.supports(problem, DEVICE) is not None:
            continue

        def configs(problem, record=record):
            space = record.space(problem, DEVICE)
            chosen = [next(each for each in space if each["ROWS"] == rows) for rows in {each["ROWS"] for each in space}]
            return [{**each, "BLOCK_M": 16, "BLOCK_K": 16, "BLOCK_W": min(each["BLOCK_W"], 16)} for each in chosen]

        assert complaints(record, case, dtype, layout, True, DEVICE, configs) == []
        assert complaints(record, case, dtype, layout, False, DEVICE) == []
        served += 1
    assert served


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (PATCHES._replace(channels=(20, 8)), "256 columns (phase, output channel) fill one part of 256"),
        (PATCHES._replace(channels=(20, 7)), "224 columns (phase, output channel) fill one part of 256"),
        (
            PATCHES._replace(channels=(20, 26)),
            "832 columns (phase, output channel): no tile of all parts (512, 256, 64) fits",
        ),
        (Case(n=1, channels=(20, 54), kernel=(1, 2, 4), stride=(1, 2, 4)), "4 parts (256, 128, 32, 16): at most 3"),
        (PATCHES._replace(channels=(20, 10), groups=2), "2 groups"),
        (PATCHES._replace(size=(2, 3, 17), kernel=(3, 4, 4)), "several taps"),
    ],
)
def test_refusals(case, words):
    assert words in form("forward_shuffle_parts").supports(case.problem(HALF), DEVICE)


def test_an_epilogue_is_declined_beside_the_sums_of_all_parts():
    """160 a thread leave no registers for a residual or a function, 80 do; the config has no BLOCK_N to say so."""
    record = form("forward_shuffle_parts")
    problem = PATCHES._replace(size=(7, 181, 360)).problem(HALF)
    declined = set()
    for config in record.space(problem, DEVICE):
        many = config["BLOCK_M"] * 160 // (WARP * config["num_warps"]) == 160
        declined.add(many)
        assert record.epilogue(problem, config, Epilogue("relu"))
        assert record.epilogue(problem, config, Epilogue("gelu")) is not many
        assert record.epilogue(problem, config, Epilogue("relu", residual=True)) is not many
    assert declined == {True, False} and record.epilogue(
        problem, record.default(problem, DEVICE), Epilogue("gelu", residual=True)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_count_has_the_columns_that_are_multiplied(layout):
    """FLOPs of 160 columns, not of 256; x once, the weight once for each tile of rows."""
    record = form("forward_shuffle_parts")
    problem = PATCHES._replace(channels=(384, 5), size=(7, 181, 360)).problem(HALF, layout)
    for config in record.space(problem, DEVICE):
        rows = tiles.tiles_of(problem.n, phases.cells(problem), config) * config["BLOCK_M"]
        depth = parts(problem.c_in, config["BLOCK_K"]) * config["BLOCK_K"]
        assert record.work(problem, config).flops == 2.0 * rows * depth * 160
    least, whole = (each.work(problem, each.default(problem, DEVICE)) for each in (record, form("forward_shuffle")))
    assert whole.flops >= 1.5 * least.flops and whole.cache_bytes > 1.2 * least.cache_bytes
