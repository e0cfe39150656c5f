"""The stand-in for a GPU under another name, and without Triton or with ``TRITONCONV=torch`` beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import stand_in_gpu
import torch

from tritonconv.kernels.registry import have_triton
from tritonconv.switches import REASON

TESTS = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here"),
    pytest.mark.skipif(shutil.which(stand_in_gpu.COMPILER) is None, reason=f"needs {stand_in_gpu.COMPILER}"),
]
H200 = {"STAND_IN_NAME": "NVIDIA H200", "STAND_IN_CAPABILITY": "9.0", "STAND_IN_MULTIPROCESSORS": "132",
        "STAND_IN_MEMORY": "139"}  # fmt: skip
# A step of a layer for some sizes, each as torch's on the CPU; the warnings of the project.
STEPS = """
import warnings, torch, tritonconv
ours, theirs = tritonconv.ConvTranspose3d(4, 6, 2, 2), torch.nn.ConvTranspose3d(4, 6, 2, 2)
ours.load_state_dict(theirs.state_dict())
ours.cuda()
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for size in (2, 3, 4):
        mine = torch.randn(1, 4, size, 2, 2).cuda().requires_grad_()
        x = mine.detach().cpu().requires_grad_()
        y, right = ours(mine), theirs(x)
        y.sum().backward(), right.sum().backward()
        assert torch.allclose(y.cpu(), right) and torch.allclose(mine.grad.cpu(), x.grad)
warned = [str(each.message) for each in told if each.category is tritonconv.KernelWarning]
"""


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """Runs code beside the stand-in, the folders before the project's on the path; its lines of output."""
    folder = tmp_path_factory.mktemp("stand_in_facts")
    library = stand_in_gpu.build(folder)

    def run(code: str, *folders: Path, **variables: str) -> list[str]:
        path = os.pathsep.join(map(str, (*folders, TESTS.parent, TESTS)))
        own = {**os.environ, "STAND_IN_GPU": str(library), "PYTHONPATH": path, **variables}
        whole = f"import stand_in_gpu\nstand_in_gpu.install()\n{textwrap.dedent(code)}"
        done = subprocess.run(
            [sys.executable, "-c", whole], env=own, cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    return run


def test_it_has_the_name_and_the_size_that_are_asked_for_and_a_store_of_its_own(beside, tmp_path):
    code = """
    import os, torch
    from pathlib import Path
    from tritonconv.autotune import store
    facts = torch.cuda.get_device_properties(0)
    print(facts.name, torch.cuda.get_device_name(), sep="|")
    print((facts.major, facts.minor) == torch.cuda.get_device_capability(), facts.major, facts.minor)
    print(facts.multi_processor_count, facts.total_memory >> 30, torch.cuda.mem_get_info()[1] == facts.total_memory)
    from tritonconv.kernels import registry
    if registry.have_triton():
        from tritonconv.kernels import triton_launch, triton_target
        assert triton_launch.multiprocessors(torch.device("cuda", 0)) == facts.multi_processor_count
        assert triton_target.compute_capability() == 10 * facts.major + facts.minor
    store.merge(store.Table(torch.cuda.get_device_name()))
    print(store.user_folder())
    """
    home = {"TRITONCONV_CACHE": "", "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    *facts, folder = beside(code, **home, **H200)
    assert facts == ["NVIDIA H200|NVIDIA H200", "True 9 0", "132 139 True"]
    assert list(tmp_path.iterdir()) == [] and not Path(folder).exists()
    *facts, folder = beside(code, **{**home, "TRITONCONV_CACHE": str(tmp_path / "mine")})
    assert facts == ["stand-in for a GPU|stand-in for a GPU", "True 0 0", "3 16 True"]
    assert folder == str(tmp_path / "mine") and len(list((tmp_path / "mine").glob("*.json"))) == 1


@pytest.mark.parametrize("facts", [{}, H200], ids=["any GPU", "H200"])
def test_a_gpu_with_a_broken_triton_runs_torchs_own_and_warns_at_most_once(beside, tmp_path, facts):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('GLIBC_2.99 not found')")
    more = "print(*warned, sep='\\n'); tritonconv.explain(mine, ours.weight, ours.bias, 2)"
    explained = beside(f"{STEPS}\n{more}", tmp_path, **facts)
    warned = explained.pop(0)
    # Of a GPU for which no kernel would be chosen there is nothing to tell.
    assert warned.startswith("Triton cannot be imported: OSError: GLIBC_2.99 not found: ") if facts else warned == ""
    assert "no Triton variant: Triton cannot be imported: OSError: GLIBC_2.99 not found" in explained
    chosen = [line for line in explained if line.startswith(("forward: ", "backward_"))]
    assert len(chosen) == 3 and all("_torch_" in line for line in chosen)


def test_with_triton_there_is_no_warning(beside):
    assert beside(f"{STEPS}\nprint(warned)", **H200) == ["[]"] or not have_triton()


def test_switched_off_all_is_torchs_own_whatever_is_deterministic(beside):
    more = """
torch.use_deterministic_algorithms(True)
found = tritonconv.explain(mine, ours.weight, ours.bias, 2)
print(*(found.plan.choice(name).variant.name for name in ("forward", "backward_data", "backward_weight")))
"""
    *explained, names = beside(STEPS + more, TRITONCONV="torch", **H200)
    assert names == "forward_torch_native backward_data_torch_native backward_weight_torch_native"
    assert explained.count(f"  because: {REASON}") == 3
