"""Tiles of rows along w in channels-last: where they are tried, that they are exact, untimed ones not chosen."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_triton_kernels import small
from variant_cases import DEVICE, TINY, Case, complaints, form

pytest.importorskip("triton")

from tritonconv.autotune import first, model
from tritonconv.autotune.ceilings import of_capability
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.kernels.registry import variants
from tritonconv.lab.bench.workloads import workload

CUDA = torch.device("cuda")
TRYING = (
    "backward_data_fused", "backward_data_gemm", "backward_weight_fused", "forward_phases", "forward_phases_packed",
    "forward_shuffle", "forward_shuffle_given", "forward_shuffle_parts", "forward_shuffle_resident",
)  # fmt: skip
WIDE = {
    "wide": Case(n=2, channels=(16, 16), size=(2, 1, 33), kernel=2, stride=2),
    "wide to 5": Case(n=2, channels=(16, 5), size=(2, 1, 33), kernel=2, stride=2),
}


def rows_of(record, problem) -> set[int]:
    """The BLOCK_W of its space, but the default's."""
    default = record.default(problem, CUDA)
    return {config["BLOCK_W"] for config in record.space(problem, CUDA)} - {default["BLOCK_W"]}


@pytest.mark.parametrize(
    ("width", "most", "row"),
    [(64, 256, 64), (64, 32, 32), (128, 256, 64), (96, 256, 32), (57, 256, 64), (56, 256, 0), (65, 256, 0),
     (360, 128, 64), (29, 128, 32), (28, 128, 0), (72, 256, 0), (16, 256, 0), (1, 256, 0)],
)  # fmt: skip
def test_a_row_is_nearly_filled(width, most, row):
    assert tiles.filling(width, most, tiles.LEAST_ROW) == row


@pytest.mark.parametrize("name", TRYING)
def test_where_rows_fill_the_width_they_are_tried(name):
    layer = "psmnet_train_64_32" if name in ("forward_phases", "backward_data_gemm") else "nnunet_dynunet_128_up4"
    layer = "pangu_patch_recovery3d" if name == "forward_shuffle_parts" else layer
    record, problem = form(name), workload(layer).problem(torch.bfloat16, "ndhwc")
    assert record.default(problem, CUDA)["BLOCK_W"] == 0
    assert 64 in rows_of(record, problem) <= {32, 64}
    tried = [config for config, _ in model.candidates(record, problem, CUDA, of_capability((9, 0)), most=6)]
    assert any(config["BLOCK_W"] for config in tried) and not all(config["BLOCK_W"] for config in tried)
    short = dataclasses.replace(
        problem, size=(*problem.size[:2], 40), out_size=(*problem.out_size[:2], 40 * problem.stride[2])
    )
    assert rows_of(record, short) == set()


def test_no_other_variant_tries_them():
    problem = workload("nnunet_dynunet_128_up4").problem(torch.bfloat16, "ndhwc")
    trying = set()
    for record in variants():
        if record.backend == "triton" and record.supports(problem, CUDA) is None:
            default = record.default(problem, CUDA)
            trying |= {record.name} if default.get("BLOCK_W") == 0 and rows_of(record, problem) else set()
    assert trying == set(TRYING) - {"forward_shuffle_parts"}


@pytest.mark.parametrize("name", TRYING)
def test_the_choice_without_a_measurement_takes_none(name):
    layer = "pangu_patch_recovery3d" if name == "forward_shuffle_parts" else "toothseg_256_last"
    record, problem = form(name), workload(layer).problem(torch.bfloat16, "ndhwc")
    default = record.default(problem, CUDA)
    assert first._was_timed(record, default, default)
    assert not first._was_timed(record, {**default, "BLOCK_W": 64}, default)
    assert first._was_timed(record, {**default, "BLOCK_W": 64}, {**default, "BLOCK_W": 32})  # as in NCDHW


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "label", ["k2 s2 24", "k2 s2 cropped", "k1x2x2 to 12", "k2x2x1 s2", "k1 s2", "k3 s2 24", "k4 s2 p1", *WIDE]
)
@pytest.mark.parametrize("name", TRYING)
def test_they_are_exact(name, label):
    """Rows that end at the border, beyond it, and of several images; of float16 and float32."""
    record, case, served = form(name), WIDE.get(label) or TINY[label], 0
    for dtype in (torch.float16, torch.float32):

        def configs(problem):
            return [{**small(record.default(problem, DEVICE), 32), "BLOCK_W": row} for row in (8, 32)]

        found = complaints(record, case, dtype, "ndhwc", True, DEVICE, configs)
        assert found in (None, [])
        served += found is not None
    assert served or label != ("wide to 5" if name == "forward_shuffle_parts" else "wide")
