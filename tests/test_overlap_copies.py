"""The forwards of very few output channels on a channels-last copy of x: exact, counted, and chosen once timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_triton_epilogue import computed, near
from test_triton_epilogue import given as with_residual
from variant_cases import DEVICE, Case, complaints

import tritonconv
from tritonconv.autotune import model, store
from tritonconv.autotune.ceilings import COPIES, of_capability
from tritonconv.autotune.choose import config_fault
from tritonconv.autotune.first import first
from tritonconv.autotune.key import Key
from tritonconv.epilogue import Epilogue
from tritonconv.kernels.registry import have_triton, variant
from tritonconv.kernels.work import size_of
from tritonconv.lab.bench.workloads import workload, workloads
from tritonconv.problem import LAYOUTS

pytestmark = pytest.mark.skipif(not have_triton(), reason="Triton is not installed")

NAMES = ("forward_overlap", "forward_overlap_planes")
HALF, GPU = torch.float16, torch.device("cuda")
CASES = {
    "16 to 1": Case(n=2, channels=(16, 1), size=(3, 4, 5), kernel=4, stride=2, front=1, back=1),
    "17 to 2": Case(n=1, channels=(17, 2), size=(2, 5, 3), stride=2, front=(1, 0, 1), back=(0, 1, 0), extra=(0, 1, 0)),
    "33 to 3": Case(n=2, channels=(33, 3), size=(2, 3, 4), kernel=(4, 3, 2), stride=2, front=(0, 2, 1)),
    "24 to 4": Case(n=1, channels=(24, 4), size=(3, 3, 6), kernel=2, stride=1, front=(0, 1, 0)),
    "40 to 5": Case(n=1, channels=(40, 5), size=(3, 4, 2), kernel=(2, 2, 3), stride=2, back=(0, 0, 1)),
}


def on_copies(name, boxes):
    """(problem) -> the default of copies and, in turn, one of two small boxes."""

    def configs(problem):
        config = {**variant(name).default(problem, DEVICE), "COPY": 1}
        small = ({"BLOCK_H": 4, "BLOCK_W": 4}, {"BLOCK_H": 4, "BLOCK_W": 8})[boxes % 2]
        small |= {"BLOCK_D": 4, "BLOCK_K": 16} if "BLOCK_D" in config else {"PLANES": 1 + boxes % 2}
        return [config, {**config, **small}]

    return configs


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_exact_on_a_copy(name, label):
    """In NDHWC, where a pinned config may ask for it too, x is its own copy."""
    turn = list(CASES).index(label)
    for layout, dtype in (("ncdhw", HALF if turn % 2 else torch.float32), ("ndhwc", HALF)):
        assert complaints(variant(name), CASES[label], dtype, layout, True, DEVICE, on_copies(name, turn)) == []


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", NAMES)
def test_offsets_of_64_bits(name, monkeypatch):
    monkeypatch.setattr("tritonconv.kernels.triton_launch.WIDE_FROM", 1)
    assert complaints(variant(name), CASES["17 to 2"], HALF, "ncdhw", True, DEVICE, on_copies(name, 0)) == []


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the helpers' operands are the CPU's")
@pytest.mark.parametrize("name", NAMES)
def test_the_epilogue_is_that_of_the_element(name):
    for label in ("16 to 1", "33 to 3"):
        problem, config, x, weight, bias, residual, slopes = with_residual(name, HALF, "ncdhw", CASES[label])
        epilogue = Epilogue("prelu", residual=True)
        y = computed(name, problem, {**config, "COPY": 1}, x, weight, bias, epilogue, residual, slopes)
        z = CASES[label].reference(x.double(), weight.double(), bias.double()) + residual
        assert y.is_contiguous() and near(y, z, epilogue, slopes), label


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_gets_the_copy_and_writes_y_in_its_own_order(name):
    problem = CASES["33 to 3"].problem(HALF)
    for copies in (0, 1):
        config = {**variant(name).starts(problem, DEVICE)[-1], "WEIGHT": 0, "COPY": copies}
        *before, kernel = variant(name).program(problem, config).kernels
        assert [each.name for each in before] == ["transpose_kernel"] * copies and kernel.name == f"{name}_kernel"
        x, y = kernel.arguments["x_ptr"], kernel.arguments["y_ptr"]
        assert (x.shape, x.stride()[1]) == (problem.x_shape, 1 if copies else 24) and y.is_contiguous()


@pytest.mark.parametrize("name", NAMES)
def test_of_one_output_channel_the_launch_on_a_copy_is_that_of_the_ndhwc_layer(name):
    """But for its memory: the strides of y are no constants of the code, except the one along w, which is 1 in both."""
    problem, record = CASES["16 to 1"].problem(HALF), variant(name)
    launched = []
    for each in (problem, replace(problem, layout="ndhwc")):
        arguments = record.program(each, record.starts(each, DEVICE)[-1]).kernels[-1].arguments
        launched.append({key: value for key, value in arguments.items() if not key.endswith("_ptr") and key != "y_c"})
    assert launched[0] == launched[1] and launched[0]["y_w"] == 1


def test_planes_serves_many_channels_of_ncdhw_on_copies_alone():
    record, case = variant("forward_overlap_planes"), CASES["33 to 3"]
    problem = case.problem(HALF)
    assert [config["COPY"] for config in record.starts(problem, DEVICE)] == [1]
    assert {config["COPY"] for config in record.space(problem, DEVICE)} == {1}
    few = replace(problem, c_in=32)
    assert [config["COPY"] for config in record.starts(few, DEVICE)] == [0, 1]
    many = record.supports(replace(problem, c_in=257), DEVICE)
    assert many is not None and "at most 32 channels" in many and "of a copy in ndhwc: c_in=257: at most 256" in many
    x, weight = torch.ones(problem.x_shape, device=DEVICE), torch.ones(problem.weight_shape, device=DEVICE)
    with tritonconv.use("forward_overlap_planes"):
        y = case.call(x, weight, None)
    assert torch.equal(y, case.reference(x, weight, None))


@pytest.mark.parametrize("name", NAMES)
def test_the_count_has_the_copy_and_its_launch(name):
    problem = workload("vqvae3d_256_1").problem(torch.bfloat16, "ncdhw")
    twin, record = replace(problem, layout="ndhwc"), variant(name)
    config = record.starts(problem, GPU)[-1]
    own, copied = record.work(twin, {**config, "COPY": 0}), record.work(problem, config)
    moved = 2 * size_of(problem, "x")
    assert config["COPY"] == 1 and record.workspace_bytes(problem) >= size_of(problem, "x")
    assert (copied.memory_bytes, copied.launches) == (own.memory_bytes + moved, own.launches + 1)
    assert copied.cache_bytes == own.cache_bytes + moved and copied.instructions == own.instructions


def test_the_tuner_tries_both_and_the_choice_without_a_measurement_takes_no_copy():
    from tritonconv.kernels.triton_target import assume_capability

    tried = set()
    with assume_capability(90):
        for layer in workloads():
            problem = layer.problem(torch.bfloat16, "ncdhw")
            served = [name for name in NAMES if variant(name).supports(problem, GPU) is None]
            for name in served:
                found = model.candidates(variant(name), problem, GPU, of_capability((9, 0)))
                tried |= {model.form(variant(name), config) for config, _ in found}
            if served:
                record, config, _ = first(problem, GPU, "forward", of_capability((9, 0)))
                assert record.name not in NAMES or config["COPY"] == 0, layer.name
    assert tried == {name + form for name in NAMES for form in ("", COPIES)}


def test_measured_choices_from_before_the_key_are_served_without_a_copy():
    table, found = store.shipped_table("NVIDIA H200"), 0
    for layer in workloads():
        for layout in LAYOUTS:
            problem = layer.problem(torch.bfloat16, layout)
            entry = table.find(Key.of(problem, "forward"))
            for each in entry.choices(True) if entry is not None else ():
                if each.variant in NAMES:
                    assert each.config["COPY"] == 0
                    assert config_fault(variant(each.variant), each.config, problem, GPU) is None
                    found += 1
    assert found >= 3
