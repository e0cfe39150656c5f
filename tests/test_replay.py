"""Launches that a plan keeps: the same answers as a launch made afresh, and nothing kept that a call owns."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")

from tritonconv import Problem
from tritonconv.kernels import triton_launch
from tritonconv.kernels.registry import variant, variants
from tritonconv.kernels.triton_replay import Replay

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UP = Problem(1, 4, 3, (2, 3, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), (4, 6, 8), bias=True)
GATHER, GEMM = variant("forward_gather"), variant("backward_data_gemm")


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, device=DEVICE).float()


def config_of(record, **changes) -> dict[str, int]:
    return {**record.default(UP, torch.device(DEVICE)), **changes}


@pytest.fixture
def made(monkeypatch):
    """How many launches were worked out, and how many were enqueued."""
    counts = {"worked out": 0, "enqueued": 0}
    real = triton_launch.geometry
    for module in ("forward_gather", "backward_data_gemm"):

        def geometry(problem):
            counts["worked out"] += 1
            return real(problem)

        monkeypatch.setattr(f"tritonconv.kernels.{module}.geometry", geometry)
    enqueue = triton_launch.enqueue

    def counted(*args):
        counts["enqueued"] += 1
        enqueue(*args)

    monkeypatch.setattr(triton_launch, "enqueue", counted)
    monkeypatch.setattr("tritonconv.kernels.triton_replay.enqueue", counted)
    return counts


def test_the_second_call_only_enqueues_and_is_right_for_its_own_operands(made):
    replay = Replay(GATHER.launch, UP, config_of(GATHER, WEIGHT=0))
    for call in range(3):
        x, weight, bias = integers(*UP.x_shape), integers(*UP.weight_shape), integers(3)
        y = replay(x, weight, bias)
        assert torch.equal(y, torch.conv_transpose3d(x, weight, bias, 2))
        assert made == {"worked out": 1, "enqueued": call + 1}


def test_other_strides_and_no_bias_are_worked_out_by_themselves(made):
    replay = Replay(GATHER.launch, UP, config_of(GATHER, WEIGHT=0))
    x, weight, bias = integers(*UP.x_shape), integers(*UP.weight_shape), integers(3)
    last = x.to(memory_format=torch.channels_last_3d)
    sliced = integers(1, 4, 2, 3, 8)[..., ::2]
    for operands in ((x, weight, bias), (last, weight, bias), (sliced, weight, bias), (x, weight, None)) * 2:
        assert torch.equal(replay(*operands), torch.conv_transpose3d(*operands, 2))
    assert made == {"worked out": 4, "enqueued": 8}


def test_a_packed_weight_is_made_anew_each_time(made):
    replay = Replay(GEMM.launch, UP, config_of(GEMM, WEIGHT=1))
    weight = integers(*UP.weight_shape)
    for call in range(2):
        grad_y = integers(*UP.y_shape)
        want = torch.nn.functional.conv3d(grad_y, weight, stride=2)
        assert torch.equal(replay(grad_y, weight), want)
        weight.data.mul_(2)  # which no version counter sees
        assert made["worked out"] == call + 1


def test_nothing_of_a_call_is_kept_alive():
    replay = Replay(GATHER.launch, UP, config_of(GATHER, WEIGHT=0))
    x, weight = integers(*UP.x_shape), integers(*UP.weight_shape)
    seen = [weakref.ref(each) for each in (x, weight, replay(x, weight, None))]
    assert any(known is not None for known in replay.kept.values())
    del x, weight
    gc.collect()
    assert [each() for each in seen] == [None, None, None]


def test_the_switch_of_the_products_is_asked_at_each_call(made, monkeypatch):
    replay = Replay(GATHER.launch, UP, config_of(GATHER, WEIGHT=0))
    operands = integers(*UP.x_shape), integers(*UP.weight_shape), integers(3)
    for said in ("ieee", "tf32", "ieee"):
        monkeypatch.setattr("tritonconv.kernels.triton_replay.precision", lambda dtype, said=said: said)
        replay(*operands)
    assert made["worked out"] == 2


WIDE = Problem(1, 16, 16, (2, 3, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), (4, 6, 8), layout="ndhwc")
HALO = Problem(1, 3, 5, (2, 3, 4), (3, 3, 3), (2, 2, 2), (1, 1, 1), (4, 6, 8), bias=True)
DEPTHWISE = Problem(1, 4, 4, (2, 3, 4), (3, 3, 3), (2, 2, 2), (1, 1, 1), (4, 6, 8), groups=4)
SERVED = [
    (record.name, problem)
    for record in variants()
    for problem in (UP, WIDE, HALO, DEPTHWISE)
    if record.backend == "triton" and record.pass_name != "backward_weight"
    and record.supports(problem, torch.device(DEVICE)) is None
]  # fmt: skip


@pytest.mark.parametrize(("name", "problem"), SERVED, ids=[f"{name} {problem}" for name, problem in SERVED])
def test_every_variants_second_call_is_right(name, problem, poisoned):
    record = variant(name)
    replay = Replay(record.launch, problem, record.default(problem, torch.device(DEVICE)))
    crop = problem.torch_crop
    for _ in range(2):
        weight = integers(*problem.weight_shape)
        if record.pass_name == "forward":
            x, bias = integers(*problem.x_shape), integers(problem.c_out) if problem.bias else None
            x = x.contiguous(memory_format=problem.memory_format)
            want = torch.conv_transpose3d(x, weight, bias, 2, crop.padding, crop.output_padding, problem.groups)
            assert torch.equal(replay(x, weight, bias), want)
        else:
            grad_y = integers(*problem.y_shape).contiguous(memory_format=problem.memory_format)
            want = torch.nn.functional.conv3d(grad_y, weight, None, 2, crop.padding, 1, problem.groups)
            assert torch.equal(replay(grad_y, weight), want)
