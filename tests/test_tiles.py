"""The default tiles: rows along w, and what fits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tritonconv.autotune.model import around, pruned_space
from tritonconv.kernels import registry
from tritonconv.lab.bench.workloads import workload, workloads
from tritonconv.problem import LAYOUTS, Problem

pytestmark = pytest.mark.skipif(not registry.have_triton(), reason="needs Triton")

HALF, FLOAT = torch.bfloat16, torch.float32


def problem(dtype, layout="ncdhw") -> Problem:
    return dataclasses.replace(workload("psmnet_train_64_32").problem(), dtype=dtype, layout=layout)


@pytest.mark.parametrize(
    ("dtype", "width", "block"),
    [
        (HALF, 8, 8),
        (HALF, 16, 16),
        (HALF, 64, 64),
        (HALF, 33, 16),  # 48 instead of 64 voxels
        (HALF, 65, 16),
        (HALF, 17, 32),  # rows of 8 would cover 24 voxels, and of each sector they touch half is another row's
        (FLOAT, 17, 8),  # of float32 a row of 8 fills a sector
        (HALF, 78, 16),
        (HALF, 85, 32),
        (HALF, 128, 64),
        (HALF, 7, 0),
    ],
)
def test_rows_cover_the_width_with_few_sectors(dtype, width, block):
    from tritonconv.kernels import triton_tiles

    assert triton_tiles.block_w(problem(dtype), (4, 4, width), 128) == block


def test_channels_last_has_no_rows_and_a_row_is_no_longer_than_its_tile():
    from tritonconv.kernels import triton_tiles

    assert triton_tiles.block_w(problem(HALF, "ndhwc"), (4, 4, 64), 128) == 0
    assert triton_tiles.block_w(problem(HALF), (4, 4, 64), 32) == 32


def test_what_divides_the_strides_is_told():
    from tritonconv.kernels.triton_launch import units

    def strides(channels, *size):
        x = torch.empty(2, channels, *size, device="meta")
        return x.to(memory_format=torch.channels_last_3d).stride(), x.stride()

    for channels, unit in ((64, 1), (48, 1), (24, 8), (28, 4), (6, 2), (5, 1)):
        last, first = strides(channels, 3, 5, 8)
        assert units(last) == (unit, 0, unit, unit, unit)
        assert units(first) == (8, 8, 8, 8, 0)
    for width, unit in ((16, 1), (40, 8), (20, 1), (7, 1)):  # of NCDHW 8 alone: each further one would compile again
        assert units(strides(4, 3, 4, width)[1]) == (unit, unit, unit, unit, 0)
    assert units((27 * 24, 27, 1)) == (1, 1, 0) and units((24, 1, 24 * 56)) == (8, 0, 8)
    assert units((0, 1, 0, 24, 24)) == (8, 0, 8, 8, 8)  # expanded


@pytest.mark.parametrize(
    ("depth", "block"),
    [(3, 16), (24, 32), (48, 16), (56, 64), (80, 16), (96, 32), (112, 16), (160, 32), (168, 16), (240, 16), (320, 64)],
)
def test_the_depth_of_a_step_that_pads_the_channels_least(depth, block):
    from tritonconv.kernels import triton_tiles

    assert triton_tiles.depths(depth) == (block,)


@pytest.mark.parametrize(("name", "columns", "depth"), [
    ("forward_phases", "c_out", "c_in"), ("backward_data_gemm", "c_in", "c_out"), ("forward_gather", "c_out", "c_in"),
])  # fmt: skip
def test_compute_bound_layers_have_candidates_of_all_columns_and_of_an_unpadded_depth(name, columns, depth):
    """After pruning, in the form whose loads are asynchronous: of an NCDHW layer the one that copies."""
    from tritonconv.kernels import triton_tiles
    from tritonconv.kernels.triton_target import assume_capability

    record, device, lacking, served = registry.variant(name), torch.device("cuda"), [], 0
    with assume_capability(90):
        for layer in workloads():
            for layout in LAYOUTS:
                case = dataclasses.replace(layer.problem(), dtype=HALF, layout=layout)
                n, k = (getattr(case, side) // case.groups for side in (columns, depth))
                copies = record.starts(case, device)[-1].get("COPY", 0)
                if case.intensity() < triton_tiles.RIDGE or not 16 < n <= 256 or (layout == "ncdhw") != bool(copies):
                    continue
                served += 1
                block_n, block_k = triton_tiles.power_of_two(n, 16, 256), triton_tiles.depths(k)[0]
                if not any(
                    (config["BLOCK_N"], config["BLOCK_K"], config.get("COPY", 0)) == (block_n, block_k, copies)
                    for config in pruned_space(record, case, device)
                ):
                    lacking.append(f"{layer.name} {layout}: {block_n} columns, a depth of {block_k}")
    assert lacking == [] and served > 5


@pytest.mark.parametrize("name", ["forward_phases", "backward_data_gemm", "forward_gather"])
def test_other_orders_of_the_tiles_are_few_and_where_there_are_several_columns(name):
    """The default's neighbours alone: with one tile of columns every order is the same."""
    record, device = registry.variant(name), torch.device("cuda")
    for channels, found in ((512, {1, 2, 4, 8}), (32, {8})):
        case = dataclasses.replace(problem(HALF, "ndhwc"), c_in=channels, c_out=channels)
        configs = record.space(case, device)
        assert {config["GROUP_M"] for config in configs} == found
        others = [config for config in configs if config["GROUP_M"] != 8 and not config.get("SPLITS", 0) > 1]
        assert len(others) == len(found) - 1
        assert all({**config, "GROUP_M": 8} == record.default(case, device) for config in others)


@pytest.mark.parametrize("pass_name", ["forward", "backward_data"])
def test_no_choice_without_a_measurement_takes_steps_of_a_quarter_of_the_depth(pass_name):
    """The model expects most of a depth of 16 here, and no layer was timed with it."""
    from tritonconv.autotune.ceilings import of_capability
    from tritonconv.autotune.first import first
    from tritonconv.kernels.triton_target import assume_capability

    case, device = workload("foundationstereo_168_112").problem(HALF, "ncdhw"), torch.device("cuda")
    with assume_capability(90):
        record, config, _ = first(case, device, pass_name, of_capability((9, 0)))
        _, copies = record.starts(case, device)
        assert any(each["BLOCK_K"] == 16 for each in around(record, case, device, copies))
    assert config["COPY"] == 1 and config["BLOCK_K"] == copies["BLOCK_K"] == 64
