"""Choices that are written out and pinned: the same variants run again, whatever was tuned meanwhile. CPU only."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from named_gpu import CUDA, name_gpu

import tritonconv
from tritonconv import Problem, StoreError, VariantNotApplicable, dispatch
from tritonconv.autotune import choose, pins, store
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.store import Entry, Table
from tritonconv.kernels.registry import variant
from tritonconv.problem import PASSES

CPU = torch.device("cpu")
X, WEIGHT = torch.randn(1, 64, 8, 8, 8), torch.randn(64, 32, 2, 2, 2)
PROBLEM = Problem(1, 64, 32, (8, 8, 8), (2, 2, 2), (2, 2, 2), (0, 0, 0), (16, 16, 16))
ON_CPU = pins.text(PROBLEM, CPU)


@pytest.fixture(autouse=True)
def _unpinned(own_store):
    yield
    tritonconv.pin_choices(None)


def ran() -> str:
    return dispatch.plan(PROBLEM, CPU).choice("forward").variant.name


def tune_by_hand(name: str) -> None:
    entry = Entry(name, {}, 1.0, 2.0, "", str(PROBLEM), "forward", "2026-01-01T00:00")
    store.merge(Table(device_name(CPU), {str(Key.of(PROBLEM, "forward")): entry}))
    dispatch.forget()


def test_pinned_choices_stand_before_what_is_tuned(tmp_path):
    path = tmp_path / "choices.json"
    y = tritonconv.conv_transpose3d(X, WEIGHT, stride=2)
    first = ran()
    with tritonconv.use("forward_torch_phases"):
        tritonconv.conv_transpose3d(X, WEIGHT, stride=2)
    assert tritonconv.save_choices(path) == 1
    assert json.loads(path.read_text())["choices"] == {ON_CPU: {"forward": {"variant": first, "config": {}}}}
    tune_by_hand("forward_torch_onednn")
    assert ran() == "forward_torch_onednn" != first
    tritonconv.pin_choices(path)
    assert ran() == first
    assert torch.equal(tritonconv.conv_transpose3d(X, WEIGHT, stride=2), y)
    assert dispatch.plan(PROBLEM, CPU).choice("forward").reason == "pinned"
    assert dispatch.plan(PROBLEM, CPU).choice("backward_data").reason != "pinned"  # it was not needed
    tritonconv.pin_choices(None)
    assert ran() == "forward_torch_onednn"


def test_one_problem_on_a_cpu_and_on_gpus_is_pinned_apart(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    name_gpu(monkeypatch)
    problem = replace(PROBLEM, dtype=torch.bfloat16)
    both = [(device, name) for device in (CUDA, CPU) for name in PASSES[:2]]
    first = [dispatch.plan(problem, device).choice(name).variant for device, name in both]
    assert {record.backend for record in first} == {"triton", "torch"}
    dispatch.plan(problem, torch.device("cuda", 1)).choice("forward")  # the other pass is still that of the first GPU
    assert tritonconv.save_choices(tmp_path / "choices.json") == 2
    tritonconv.pin_choices(tmp_path / "choices.json")
    again = [dispatch.plan(problem, device).choice(name) for device, name in both]
    assert [each.variant for each in again] == first and {each.reason for each in again} == {"pinned"}


def test_the_environment_names_a_file_for_the_whole_program(tmp_path, monkeypatch):
    path = tmp_path / "choices.json"
    pins.write({ON_CPU: {"forward": ("forward_torch_phases", {})}}, path)
    monkeypatch.setenv("TRITONCONV_CHOICES", str(path))
    dispatch.forget()
    assert ran() == "forward_torch_phases"
    monkeypatch.setenv("TRITONCONV_CHOICES", "~nobody of this name/choices.json")
    dispatch.forget()
    with pytest.raises(StoreError, match="nobody of this name"):
        tritonconv.conv_transpose3d(X, WEIGHT, stride=2)


def test_a_pinned_kernel_waits_for_the_compiler(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    name_gpu(monkeypatch)
    record = variant("forward_phases")
    pins.write(
        {pins.text(PROBLEM, CUDA): {"forward": (record.name, record.default(PROBLEM, CUDA))}}, tmp_path / "choices.json"
    )
    tritonconv.pin_choices(tmp_path / "choices.json")
    made = dispatch.plan(PROBLEM, CUDA)
    assert made.choice("forward").variant.name == record.name and made.forward.standby is None


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("forward_gone", {}, "unknown variant"), ("forward_torch_depthwise", {}, "does not serve"),
        ("forward_torch_phases", {"BLOCK_M": 3}, "BLOCK_M"),
    ],
)  # fmt: skip
def test_what_cannot_be_repeated_is_an_error_and_no_other_kernel(tmp_path, name, config, words):
    path = tmp_path / "choices.json"
    pins.write({ON_CPU: {"forward": (name, config)}}, path)
    tritonconv.pin_choices(path)
    with pytest.raises(VariantNotApplicable, match=words):
        tritonconv.conv_transpose3d(X, WEIGHT, stride=2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"format": 2}',
        '{"format": 1, "choices": {"p": {"sideways": {"variant": "v", "config": {}}}}}',
    ],
)
def test_a_file_of_something_else_is_refused_and_nothing_changes(tmp_path, text):
    path, good = tmp_path / "choices.json", tmp_path / "good.json"
    path.write_text(text)
    pins.write({ON_CPU: {"forward": ("forward_torch_phases", {})}}, good)
    tritonconv.pin_choices(good)
    with pytest.raises(StoreError, match=r"choices\.json"):
        tritonconv.pin_choices(path)
    assert ran() == "forward_torch_phases"
    with pytest.raises(StoreError, match="missing"):
        tritonconv.pin_choices(tmp_path / "missing.json")
    with pytest.raises(StoreError, match="cannot write"):
        tritonconv.save_choices(tmp_path / "no folder" / "choices.json")


def test_nothing_is_pinned_by_default():
    assert pins.find(PROBLEM, CPU, "forward") is None and choose.choose(PROBLEM, CPU, "forward").reason != "pinned"
