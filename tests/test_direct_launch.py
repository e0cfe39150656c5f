"""The replayed launch of a compiled kernel is Triton's own: same kernel, grid, stream and arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritonconv.kernels.registry import have_triton

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not have_triton(), reason="needs Triton's compiler")
def test_a_replayed_launch_is_the_one_that_triton_makes():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(ROOT / "tests" / "direct_launches.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "forward_shuffle 1 same",
        "backward_data_gemm 2 same",
        "forward_boxes 2 same",
        "backward_data_boxes 2 same",
        "backward_weight_fused 2 same",
        "backward_weight_fused joint 2 same",
    ]
