"""For tests of captured models: code beside the stand-in for a GPU, with a block of a U-Net's decoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent

HEAD = """
import copy, torch, tritonconv
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose3d(4, 6, 2, 2)
        self.norm = nn.BatchNorm3d(9)
        self.unused = nn.Linear(2, 2)
        self.conv = nn.Conv3d(9, 4, 3, padding=1)

    def forward(self, x, skip):
        return torch.relu(self.conv(self.norm(torch.cat([self.up(x), skip], 1))))

KERNELS = "forward_phases", "backward_data_gemm", "backward_weight_splitk"

def data(requires_grad=True):
    x, skip = torch.randn(1, 4, 2, 3, 2).cuda(), torch.randn(1, 3, 4, 6, 4).cuda()
    return x.requires_grad_(requires_grad), skip

def blocks():
    torch.manual_seed(0)
    mine = Block()
    assert len(tritonconv.convert(mine).replaced) == 1
    return copy.deepcopy(mine).cuda(), mine.cuda()

def said(call):
    try:
        call()
    except (RuntimeError, TypeError) as error:
        print(type(error).__name__, error)
    else:
        print("no error")
"""


@pytest.fixture(scope="module", name="beside")
def beside_stand_in(tmp_path_factory):
    """The standard output of a piece of code in a process that has the stand-in."""
    pytest.importorskip("triton")
    import stand_in_gpu

    if torch.cuda.is_available() or shutil.which(stand_in_gpu.COMPILER) is None:
        pytest.skip(f"needs {stand_in_gpu.COMPILER}, and no GPU: test_graphed_gpu.py asks that")
    from stand_in_process import python_beside, script

    run_python = python_beside(tmp_path_factory.mktemp("stand_in_gpu"))

    def run(code: str) -> str:
        done = run_python(*script(code, HEAD))
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
