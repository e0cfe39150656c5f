"""Compiling ahead of the launch: the kernels are in Triton's cache on disk afterwards, whatever fails on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tritonconv import Problem
from tritonconv.inspection.precompile import Precompiler, target_of
from tritonconv.kernels.registry import have_triton

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import torch
from tritonconv import Problem
from tritonconv.inspection import compiling
from tritonconv.inspection.precompile import Precompiler
from tritonconv.inspection.targets import TARGETS
from tritonconv.kernels.registry import variant

up = Problem(1, 32, 16, (4, 4, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), (8, 8, 8), dtype=torch.float16, bias=True)
if __name__ == "__main__":
    record = variant("forward_shuffle")
    config = record.default(up, compiling.GPU)
    with Precompiler("sm_90", processes=1) as compiler:
        jobs = [("forward_shuffle", up, config), ("forward_gone", up, {}), ("forward_shuffle", up, {})]
        started = compiler.start(jobs)
        compiler.finish(started)
        print([each.result() for each in started])
    with compiling.compiling_for(TARGETS["sm_90"]), compiling.products_in("tf32"), compiling._seconds() as seconds:
        compiling.compile_launch(record, up, config)
    print(len(seconds))  # compiled here because the cache did not hold it
"""


@pytest.mark.skipif(not have_triton(), reason="needs Triton's compiler")
def test_a_kernel_compiled_ahead_is_found_in_the_cache_and_failures_are_left_to_the_launch(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[True, False, False]", "0"]


def test_without_a_target_nothing_is_started():
    assert target_of(torch.device("cpu")) is None
    up = Problem(1, 4, 3, (3, 4, 5), (2, 2, 2), (2, 2, 2), (0, 0, 0), (6, 8, 10))
    with Precompiler(None) as compiler:
        assert compiler.start([("forward_shuffle", up, {})]) == []
        compiler.finish([])
