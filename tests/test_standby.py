"""Torch's own in the place of a kernel that is being compiled, or that cannot be: no call waits, and none fails.

The compiler's part is played by the tests, and the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from named_gpu import CUDA, name_gpu

import tritonconv
from tritonconv import KernelWarning, Problem, dispatch
from tritonconv.autotune.choose import Selection
from tritonconv.epilogue import Epilogue, finish
from tritonconv.kernels.registry import variant
from tritonconv.problem import PASSES

triton_replay = pytest.importorskip("tritonconv.kernels.triton_replay")
from tritonconv.kernels import triton_background  # noqa: E402
from tritonconv.kernels.triton_program import Program  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
UP = Problem(1, 8, 4, (2, 3, 2), (2, 2, 2), (2, 2, 2), (0, 0, 0), (4, 6, 4), bias=True)
KERNELS = ("forward_phases", "backward_data_gemm", "backward_weight_splitk")
FUSED = ("forward_phases", "backward_data_fused", "backward_weight_fused")


@pytest.fixture
def compiler(monkeypatch):
    """The tasks of the compiler's thread, which the test runs when it likes; the kernels need no compiler then."""
    tasks = []
    monkeypatch.setattr(triton_replay, "INTERPRETED", False)
    monkeypatch.setattr(triton_background, "submit", tasks.append)
    triton_replay._warn_once.cache_clear()
    return tasks


@pytest.fixture
def interpreted(compiler, monkeypatch):
    """``compile`` makes nothing: the interpreter needs no kernels."""
    monkeypatch.setattr(triton_replay.KeptProgram, "compile", lambda self: setattr(self, "ready", True))
    return compiler


def plan_of(names=KERNELS, forced=False) -> dispatch.Plan:
    chosen = {
        name: Selection(record, record.default(UP, CPU), "chosen", forced=forced) for name, record in _records(names)
    }
    return dispatch.Plan(UP, CPU, choose=None, chosen=chosen, standby=True)


def _records(names):
    return [(variant(name).pass_name, variant(name)) for name in names]


def operands():
    generator = torch.Generator().manual_seed(1)
    shapes = (UP.x_shape, UP.weight_shape, (UP.c_out,), UP.y_shape)
    return tuple(torch.randint(-3, 4, shape, generator=generator).float() for shape in shapes)


def outputs(plan: dispatch.Plan) -> list[torch.Tensor]:
    x, weight, bias, grad_y = operands()
    grads = plan.backward(x, weight, grad_y, True)
    return [plan.forward(x, weight, bias), *grads, plan.backward_data(grad_y, weight), plan.forward(x, weight, None)]


def want() -> list[torch.Tensor]:
    own = {name: Selection(variant(f"{name}_torch_native"), {}, "torch's own") for name in PASSES}
    return outputs(dispatch.Plan(UP, CPU, None, own))


def same(left, right) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("names", [KERNELS, FUSED], ids=["apart", "fused"])
def test_torchs_own_runs_until_the_kernels_are_compiled(interpreted, monkeypatch, names):
    ran = []
    real = Program.run
    monkeypatch.setattr(Program, "run", lambda *args: ran.append("kernels") or real(*args))
    plan, right = plan_of(names), want()
    assert same(outputs(plan), right) and not ran
    submitted = len(interpreted)
    assert submitted >= 3
    assert same(outputs(plan), right) and not ran and len(interpreted) == submitted  # each kind is asked for once
    for task in interpreted:
        task()
    assert same(outputs(plan), right) and ran
    anew = [replay.counts.anew for replay in plan.replays.values()]
    assert same(outputs(plan), right)
    assert [replay.counts.anew for replay in plan.replays.values()] == anew
    assert sum(replay.counts.stood_in for replay in plan.replays.values()) == 2 * submitted


def test_a_kernel_that_cannot_be_compiled_is_one_warning_and_torchs_own(compiler, monkeypatch):
    def no_compiler(program):
        raise RuntimeError("Failed to find C compiler.\nPlease set CC")

    plan, right = plan_of(), want()
    assert same(outputs(plan), right)
    monkeypatch.setattr(Program, "compile", no_compiler)
    for task in compiler:
        task()  # in the thread nothing is raised, and nothing is told
    count = len(compiler)
    with pytest.warns(KernelWarning, match="Failed to find C compiler") as told:
        assert same(outputs(plan), right)
    assert same(outputs(plan), right)  # and tells nothing any more
    assert len(told) == 1 and "Please set CC" not in str(told[0].message)
    assert len(compiler) == count  # it is not tried again


def test_a_launch_that_fails_is_one_warning_and_torchs_own(interpreted, monkeypatch):
    plan, right = plan_of(), want()
    outputs(plan)
    for task in interpreted:
        task()

    def refused(program, operands):
        raise RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448")

    monkeypatch.setattr(Program, "run", refused)
    with pytest.warns(KernelWarning, match="out of resource") as told:
        assert same(outputs(plan), right)
    assert same(outputs(plan), right)
    assert len(told) == 1


def test_a_failure_keeps_no_tensor(compiler, monkeypatch):
    plan = plan_of()
    x, weight, bias, _ = operands()
    plan.forward(x, weight, bias)
    (task,) = compiler
    task.__self__.ready = True

    def refused(program, operands):
        raise RuntimeError("out of resource")

    monkeypatch.setattr(Program, "run", refused)
    with pytest.warns(KernelWarning, match="out of resource"):
        plan.forward(x, weight, bias)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_a_thread_that_cannot_be_started_is_one_warning_and_torchs_own(monkeypatch):
    def no_thread(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(triton_replay, "INTERPRETED", False)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    triton_replay._warn_once.cache_clear()
    plan, right = plan_of(), want()
    with pytest.warns(KernelWarning, match="can't start new thread") as told:
        assert same(outputs(plan), right)
    assert same(outputs(plan), right) and len(told) == 1
    assert not triton_background._waiting and tritonconv.wait_until_compiled(0)


def test_a_lack_of_memory_is_raised_as_torch_raises_it(interpreted, monkeypatch):
    plan = plan_of()
    outputs(plan)
    for task in interpreted:
        task()

    def full(program, operands):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Program, "run", full)
    with pytest.raises(torch.OutOfMemoryError):
        outputs(plan)


def test_a_driver_that_is_not_there_is_one_warning_and_torchs_own(compiler, monkeypatch):
    def nothing(*operands):
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    monkeypatch.setattr(Program, "of", nothing)
    with pytest.warns(KernelWarning, match="active drivers") as told:
        assert same(outputs(plan_of()), want())
    assert len(told) == 1


def test_what_is_forced_or_deterministic_waits_for_the_compiler(compiler, monkeypatch):
    name_gpu(monkeypatch)
    with tritonconv.use(*KERNELS):
        forced = dispatch.plan(UP, CUDA)
        assert forced.forward.standby is None and forced.backward_weight.standby is None
    sizes = (2, 64, 32, (64,) * 3, (2,) * 3, (2,) * 3, (0,) * 3, (128,) * 3)
    problem = Problem(*sizes, dtype=torch.bfloat16, layout="ndhwc")  # of the shipped table
    assert dispatch.plan(problem, CUDA).forward.standby is not None
    torch.use_deterministic_algorithms(True)
    try:
        assert dispatch.plan(problem, CUDA).forward.standby is None
    finally:
        torch.use_deterministic_algorithms(False)
        monkeypatch.undo()
        dispatch.forget()


def test_of_endless_kinds_of_operands_the_latest_are_remembered(interpreted, monkeypatch):
    monkeypatch.setattr(triton_replay, "MOST_KEPT", 2)
    plan = plan_of()
    x, weight, bias, _ = operands()
    volumes = (x.new_zeros(1, 8, 2, 3, width) for width in range(2, 9))
    for volume in volumes:
        plan.forward(volume[..., :2], weight, bias)
    assert len(interpreted) == 7 and len(plan.forward.kept) == 2


def test_the_compiler_makes_what_the_launch_then_finds():
    """For a target that is not there, by the real compiler, in the thread."""
    program = """
import torch, tritonconv
from tritonconv import Problem, dispatch
from tritonconv.autotune.choose import Selection
from tritonconv.lab.inspection.compiling import compiling_for
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels import forward_phases
from tritonconv.kernels.registry import variant
problem = Problem(1, 8, 4, (2, 3, 2), (2, 2, 2), (2, 2, 2), (0, 0, 0), (4, 6, 4), dtype=torch.bfloat16)
record, cpu = variant("forward_phases"), torch.device("cpu")
with compiling_for(TARGETS["sm_90"]):
    config = record.default(problem, torch.device("cuda"))
    plan = dispatch.Plan(problem, cpu, None, {"forward": Selection(record, config, "chosen")}, standby=True)
    operands = [torch.ones(shape, dtype=torch.bfloat16) for shape in (problem.x_shape, problem.weight_shape)]
    plan.forward(*operands, None)
    assert tritonconv.wait_until_compiled(100)
    (made,) = plan.forward.kept.values()
assert made.error is None and made.ready, made.error
(kernels, *_), = forward_phases.forward_phases_kernel.device_caches.values()
assert len(kernels) == 1
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=300, env=environment)


def test_the_thread_works_in_order_and_ends():
    done, gate = [], threading.Event()
    triton_background.submit(lambda: (gate.wait(100), done.append("first")))
    triton_background.submit(lambda: done.append("second"))
    assert not tritonconv.wait_until_compiled(0.01)
    gate.set()
    assert tritonconv.wait_until_compiled(100) and done == ["first", "second"]
    triton_background.submit(lambda: done.append("third"))
    assert tritonconv.wait_until_compiled(100) and done[-1] == "third"
    assert not any(thread.name == "tritonconv-compiler" for thread in threading.enumerate())


def test_a_program_ends_without_compiling_what_was_not_begun():
    program = """
import threading
from tritonconv.kernels import triton_background
begun = threading.Event()
triton_background.submit(lambda: (print("begun", flush=True), begun.set(), threading.main_thread().join()))
for _ in range(100):
    triton_background.submit(lambda: print("late"))
begun.wait()
"""
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert ran.stdout == "begun\n" and not ran.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_waits_for_no_thread_of_its_parent():
    program = """
import os, threading, time
from tritonconv.kernels import triton_background
locked, gate, done = threading.Event(), threading.Event(), []
def hold():
    with triton_background._changed:
        locked.set()
        gate.wait(100)
threading.Thread(target=hold).start()
locked.wait()
child = os.fork()
if child == 0:
    triton_background.submit(lambda: done.append(1))
    os._exit(0 if triton_background.wait(60) and done else 1)
for _ in range(900):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
gate.set()
assert ended and status == 0, (ended, status)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=300)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("epilogue", [Epilogue("relu"), Epilogue("sigmoid", residual=True)], ids=str)
def test_a_forced_kernel_with_an_epilogue_waits_for_the_compiler(interpreted, epilogue, forced, pack):
    x, weight, bias = torch.randn(1, 8, 2, 3, 2), torch.randn(8, 4, 2, 2, 2), torch.randn(4)
    residual = torch.randn(UP.y_shape) if epilogue.residual else None
    found = plan_of(forced=forced).forward_with(epilogue, pack)(x, weight, bias, residual, None)
    y = F.conv_transpose3d(x, weight, bias, 2)
    want = finish(y, epilogue, None, residual, None)
    torch.testing.assert_close(found[0] if pack else found, want)
