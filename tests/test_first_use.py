"""Tuning in the first calls of a kind, as ``torch.backends.cudnn.benchmark`` asks for it. The CPU plays the GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from named_gpu import count_gpus

import tritonconv
from tritonconv import Problem, dispatch
from tritonconv.autotune import choose, pins, store
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.tuning import first_use, session
from tritonconv.autotune.tuning.api import tune
from tritonconv.epilogue import Epilogue
from tritonconv.kernels import triton_background
from tritonconv.lab.bench import gpu
from tritonconv.problem import PASSES

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TASKS: list = []
UP = Problem(1, 8, 4, (6, 6, 6), (2, 2, 2), (2, 2, 2), (0, 0, 0), (12, 12, 12))
LARGER = Problem(1, 8, 4, (6, 6, 7), (2, 2, 2), (2, 2, 2), (0, 0, 0), (12, 12, 14))
OTHER = Problem(1, 8, 4, (6, 6, 6), (3, 3, 3), (2, 2, 2), (1, 1, 1), (11, 11, 11))


@pytest.fixture(autouse=True)
def tuner(tmp_path, monkeypatch):
    """The switch is set, memory is free, nothing is captured, and the background's tasks run behind each call."""
    monkeypatch.setenv("TRITONCONV_CACHE", str(tmp_path))
    with torch.backends.__allow_nonbracketed_mutation():  # which torch's own tests forbid for the rest of a process
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(triton_background, "submit", TASKS.append)
    monkeypatch.setattr(first_use, "_kinds", {})
    monkeypatch.setattr(first_use, "SECONDS", 60.0)  # other programs may run beside the tests
    monkeypatch.setattr(first_use, "TIMING", 0.3 / 60)
    dispatch.forget()
    with torch.backends.__allow_nonbracketed_mutation():
        yield
        monkeypatch.undo()
    dispatch.forget()


def call(problem: Problem) -> dispatch.Plan:
    """The step of a call on a GPU before it runs."""
    first_use.offer(problem, CPU)
    made = dispatch.plan(problem, CPU)
    while TASKS:
        TASKS.pop()()
    return made


def stored() -> set[str]:
    return set(store.own(device_name(CPU)).entries)


def keys(problem: Problem) -> set[str]:
    return {str(Key.of(problem, name)) for name in PASSES}


def test_the_second_call_of_a_kind_tunes_it_and_no_later_one(caplog, monkeypatch):
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first = call(UP)
    assert not stored()
    with caplog.at_level(logging.INFO, "tritonconv"):
        second = call(UP)
    assert stored() == keys(UP)
    assert len(caplog.records) == 1 and "tritonconv tuned n1 8->4" in caplog.records[0].message
    assert second is not first  # its plan was dropped when the candidates were there
    assert all("tuned on this size" in second.choice(name).reason for name in PASSES)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == threads
    assert torch.backends.cudnn.benchmark is True
    monkeypatch.setattr(first_use, "_tune", None)
    for problem in (UP, LARGER, UP):  # a size of the same kind shares its choices
        assert "tuned on this size" in call(problem).choice("forward").reason


def test_a_kind_with_an_epilogue_is_tuned_by_itself():
    with_relu = dataclasses.replace(UP, epilogue=Epilogue("relu"))
    plain, _ = dispatch.plan(UP, CPU), call(with_relu)
    assert dispatch.plan(UP, CPU) is not plain  # which keeps the forward that was chosen before
    assert "then relu" in call(with_relu).choice("forward").reason
    assert stored() == {str(Key.of(with_relu, "forward"))}


def test_the_callers_modes_are_off_while_it_tunes():
    call(UP)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        call(UP)
        assert torch.is_inference_mode_enabled()
    assert stored() == keys(UP)


def test_a_plan_that_was_made_while_nothing_was_measured_is_made_anew():
    call(UP)
    dispatch.plan(UP, CPU).choice("forward")  # as a compiled graph asks for it
    generation = dispatch.generation
    assert "tuned on this size" in call(UP).choice("forward").reason
    assert dispatch.generation > generation  # a compiled graph asks again


@pytest.mark.parametrize("why", ["off", "never", "deterministic", "ours", "capture", "no voxels", "pinned"])
def test_nothing_is_measured_where_it_is_not_wanted(monkeypatch, tmp_path, why):
    monkeypatch.setattr(first_use, "_tune", None)
    monkeypatch.setattr(first_use.Kind, "compile", None)
    problem = UP
    if why == "off":
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    elif why == "never":
        monkeypatch.setenv("TRITONCONV_TUNE", "never")
    elif why == "capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif why == "no voxels":
        problem = Problem(0, 8, 4, (6, 6, 6), (2, 2, 2), (2, 2, 2), (0, 0, 0), (12, 12, 12))
    elif why == "pinned":
        choices = {name: (f"{name}_torch_phases", {}) for name in PASSES}
        pins.write({pins.text(problem, CPU): choices}, tmp_path / "choices.json")
        monkeypatch.setenv("TRITONCONV_CHOICES", str(tmp_path / "choices.json"))
    elif why == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    elif why == "ours":
        with gpu.cudnn_benchmark(torch.device("cuda")):
            assert torch.backends.cudnn.benchmark and gpu.switch_is_ours()
            call(problem)
        assert not gpu.switch_is_ours()
        return
    for _ in range(3):
        call(problem)
    assert not first_use._kinds


def test_in_a_backward_pass_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(first_use.Kind, "compile", None)
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(call(UP)))
    y.sum().backward()
    assert seen and not first_use._kinds


def test_candidates_are_those_of_the_gpu_that_is_tuned(monkeypatch):
    now, asked = count_gpus(monkeypatch), []
    monkeypatch.setattr(choose, "ceilings_of", lambda device: asked.append(now.index))
    monkeypatch.setattr(first_use, "candidates", lambda *more: asked.append(now.index) or [])
    monkeypatch.setattr(first_use, "_fits", lambda problem, device: True)
    monkeypatch.setattr(first_use, "_winners", lambda kind, deadline: asked.append(now.index) or [])
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    kind = first_use.Kind(UP, torch.device("cuda", 1))
    kind.compile()
    first_use._tune(kind)
    assert asked == [1] * 5 and kind.compiled and now.index == 0


def no_thread(task):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("what", ["memory", "an error", "time", "a thread"])
def test_it_gives_up_without_a_word(monkeypatch, what, recwarn):
    if what == "memory":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * UP.bytes(), 1 << 30))
    elif what == "time":
        monkeypatch.setattr(first_use, "SECONDS", 0.0)
    elif what == "a thread":
        monkeypatch.setattr(triton_background, "submit", no_thread)
    else:
        monkeypatch.setattr(first_use.ProblemTuner, "forward", lambda self: 1 / 0)
    want = call(UP).choice("forward")
    for _ in range(2):
        assert call(UP).choice("forward") == want
    assert not stored() and not recwarn.list


def test_what_is_measured_already_is_not_measured_again(monkeypatch):
    call(UP)
    call(UP)
    monkeypatch.setattr(first_use, "_kinds", {})  # another process
    monkeypatch.setattr(first_use.Kind, "compile", None)
    call(LARGER)
    assert all(kind.done for kind in first_use._kinds.values())


def test_a_store_that_cannot_be_written_serves_this_process(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(choose, "_adopted", {})
    call(UP)
    monkeypatch.setenv("TRITONCONV_CACHE", str(tmp_path / "file" / "store"))
    assert "tuned on this size" in call(UP).choice("forward").reason


def test_of_a_group_rank_0_tunes_and_the_others_read_what_it_stored(monkeypatch):
    monkeypatch.setattr(first_use, "_rank", lambda: 1)
    monkeypatch.setattr(first_use.Kind, "compile", None)
    reason = call(UP).choice("forward").reason
    monkeypatch.setattr(session, "PROBLEM_SECONDS", 0.2)
    tune(UP)  # as rank 0 would, in another process: this one knows nothing of it
    dispatch.drop(lambda plan: True)
    assert "tuned" not in reason
    call(OTHER)  # the next new kind
    dispatch.drop(lambda plan: True)
    assert "tuned on this size" in call(UP).choice("forward").reason


def test_a_call_reaches_the_tuner_by_its_door_alone(monkeypatch):
    offered = []
    monkeypatch.setattr(dispatch, "_tuner", lambda problem, device: offered.append((problem, device)))
    x, weight = torch.ones(UP.x_shape), torch.ones(UP.weight_shape)
    tritonconv.conv_transpose3d(x, weight, stride=2)
    assert not offered  # on a CPU the switch says nothing
    program = """
import sys, torch, tritonconv
from tritonconv import Problem, dispatch
assert dispatch._tuner is None and "tritonconv.autotune.tuning" not in sys.modules
problem = Problem(1, 8, 4, (6, 6, 6), (2, 2, 2), (2, 2, 2), (0, 0, 0), (12, 12, 12))
dispatch._offer_to_tuner(problem, torch.device("cpu"))
from tritonconv.autotune.tuning import first_use, session
assert dispatch._tuner is first_use.offer and not first_use._kinds
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
