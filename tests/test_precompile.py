"""Compiling ahead of the launch: the kernels are in Triton's cache on disk afterwards, whatever fails on the way."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tritonconv import Problem
from tritonconv.kernels.registry import have_triton
from tritonconv.lab.inspection import workers
from tritonconv.lab.inspection.precompile import Precompiler, target_of

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import pathlib, torch
from tritonconv import Problem
from tritonconv.lab.inspection import compiling
from tritonconv.lab.inspection.precompile import Precompiler
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.registry import variant

with pathlib.Path(__file__).with_name("runs").open("a") as runs:  # no guard: what a process imports would run here
    print("a run", file=runs)
record = variant("forward_shuffle")
for dtype, precision in ((torch.float16, "tf32"), (torch.float32, "ieee")):
    torch.backends.cudnn.conv.fp32_precision = precision
    up = Problem(1, 32, 16, (4, 4, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), (8, 8, 8), dtype=dtype, bias=True)
    config = record.default(up, compiling.GPU)
    with Precompiler("sm_90", processes=1) as compiler:
        jobs = [("forward_shuffle", up, config), ("forward_gone", up, {}), ("forward_shuffle", up, {})]
        started = compiler.start(jobs)
        compiler.finish(started)
        print([each.result().ok for each in started])
    with compiling.compiling_for(TARGETS["sm_90"]), compiling._seconds() as seconds:
        compiling.compile_launch(record, up, config)
    print(len(seconds))  # compiled here because the cache did not hold it
"""
MINE = """
import triton
import triton.language as tl
from tritonconv import Variant
from tritonconv.kernels.triton_launch import empty
from tritonconv.kernels.triton_launch import launch as run

@triton.jit
def mine_kernel(y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))

def launches(problem, config, x, weight, bias):
    y = empty(problem, problem.y_shape, x)
    run(mine_kernel, 1, config, (y,), y_ptr=y)
    return y

VARIANT = Variant("forward_mine", "forward", "zeros", "triton", launches=launches)
"""
OUTSIDE = """
import pathlib
from tritonconv import Problem
from tritonconv.lab.inspection import compiling
from tritonconv.lab.inspection.precompile import Precompiler
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels import registry

(record,) = registry.load(pathlib.Path("mine.py"))
up = Problem(1, 4, 3, (3, 4, 5), (2, 2, 2), (2, 2, 2), (0, 0, 0), (6, 8, 10))
configs = [{"BLOCK": block, "num_warps": 4} for block in (64, 128)]
with Precompiler("sm_90", processes=1) as compiler:
    started = compiler.start((record.name, up, config) for config in configs)
    compiler.finish(started)
    print([each.result().ok for each in started])
with compiling.compiling_for(TARGETS["sm_90"]), compiling._seconds() as seconds:
    print(*(name for config in configs for name, _ in compiling.compile_launch(record, up, config)))
print(len(seconds))
"""
UP = Problem(1, 4, 3, (3, 4, 5), (2, 2, 2), (2, 2, 2), (0, 0, 0), (6, 8, 10))


@pytest.mark.skipif(not have_triton(), reason="needs Triton's compiler")
def test_a_script_without_a_guard_compiles_ahead_and_failures_are_left_to_the_launch(tmp_path):
    assert lines_of(SCRIPT, tmp_path) == ["[True, False, False]", "0"] * 2
    assert (tmp_path / "runs").read_text() == "a run\n"


@pytest.mark.skipif(not have_triton(), reason="needs Triton's compiler")
def test_the_kernel_of_a_variant_file_is_compiled_ahead(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    assert lines_of(OUTSIDE, tmp_path) == ["[True, True]", "mine_kernel mine_kernel", "0"]


def lines_of(script: str, folder: Path) -> list[str]:
    """The output of a script that runs in the folder, with Triton's cache there."""
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, str(folder / "script.py")],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="reads the kernels' precisions")


@needs_triton
def test_the_end_of_the_block_ends_what_is_compiling(tmp_path, monkeypatch):
    started = tmp_path / "started"
    hangs = f"import subprocess, sys; open({str(started)!r}, 'w'); subprocess.run(['sleep', '600'])"
    monkeypatch.setattr(workers, "WORKER", hangs)
    with Precompiler("sm_90", processes=2) as compiler:
        found = compiler.start([("forward_shuffle", UP, {})] * 4)
        deadline = time.monotonic() + 300
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        compiler.finish(found, seconds=0.01)
        begin = time.perf_counter()
    assert time.perf_counter() - begin < 120  # its child, which holds the pipe, has ended too
    assert compiler.started and all(each.poll() is not None for each in compiler.started)
    assert all(each.cancelled() or not each.result(timeout=0).ok for each in found)


@needs_triton
@pytest.mark.parametrize("crash", ["raise SystemExit", "import sys; sys.stdin.buffer.read(1)"])
def test_processes_that_crash_are_replaced_a_few_times_only(monkeypatch, crash):
    monkeypatch.setattr(workers, "WORKER", crash)
    with Precompiler("sm_90", processes=2) as compiler:
        found = compiler.start([("forward_shuffle", UP, {})] * 20)
        compiler.finish(found)
        assert [each.result().ok for each in found] == [False] * 20
    assert len(compiler.started) in (3, 4)


@needs_triton
def test_without_a_python_to_start_nothing_is_compiled_ahead(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with Precompiler("sm_90", processes=1) as compiler:
        (found,) = compiler.start([("forward_shuffle", UP, {})])
        assert not found.result().ok


def test_without_a_target_nothing_is_started():
    assert target_of(torch.device("cpu")) is None
    with Precompiler(None) as compiler:
        assert compiler.start([("forward_shuffle", UP, {})]) == []
        compiler.finish([])
