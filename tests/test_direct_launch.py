"""A repeated launch is Triton's own: the same kernel, grid, stream and arguments reach the launcher in C."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import stub_driver

from tritonconv.kernels.registry import have_triton

needs = pytest.mark.skipif(not have_triton() or shutil.which("cc") is None, reason="needs Triton and a C compiler")


@needs
def test_a_repeated_launch_is_the_one_that_triton_makes():
    script = Path(__file__).with_name("direct_launches.py")
    done = stub_driver.run_beside(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "forward_shuffle forward 1 same",
        "backward_data_gemm backward_data 2 same",
        "forward_boxes forward 2 same",
        "backward_data_boxes backward_data 2 same",
        "backward_weight_fused backward_weight 2 same",
        "backward_weight_fused joint 2 same",
        "backward_weight_together backward_weight 1 same",
        "backward_weight_together joint 1 same",
    ]
