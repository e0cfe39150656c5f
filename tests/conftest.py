"""What every test shares: the device the run used, and the rule for tests that need a GPU."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    # The Triton kernels themselves run, on the CPU: Triton reads this when it is imported, so it comes first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test sees the choices that were tuned on this machine, and none changes them.
os.environ["TRITONCONV_CACHE"] = tempfile.mkdtemp(prefix="tritonconv-tests-")

from tritonconv import dispatch, runner
from tritonconv.bench import roofs
from tritonconv.problem import PASSES

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.speed_up()


def pytest_report_header(config) -> str:
    interpreted = " with the Triton interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"tritonconv: torch {torch.__version__} on {where}{interpreted}"


def pytest_collection_modifyitems(config, items) -> None:
    """A test marked ``gpu`` runs where a CUDA device is, and is deselected (and counted so) elsewhere."""
    if torch.cuda.is_available():
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if item not in needs_gpu]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _exact_products():
    """On a GPU float32 is multiplied as float32, which the limits are for; a test of TF32 says so."""
    if not torch.cuda.is_available():
        yield
        return
    from tritonconv.inspection.compiling import products_in

    with products_in("ieee"):
        yield


@pytest.fixture
def poisoned():
    """torch fills new memory with NaN while it is asked for deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        fresh = [torch.empty(9), torch.ones(1).new_empty(9), torch.empty_like(torch.ones(9)), torch.ones(1).resize_(9)]
        assert all(t[1:].isnan().all() for t in fresh)
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch):
    """The names of the variants that ran, in order."""
    names = []

    def record(method, *passes):
        run = getattr(dispatch.Plan, method)

        def recorded(plan, *args):
            names.extend(plan.choice(pass_name).variant.name for pass_name in passes)
            return run(plan, *args)

        monkeypatch.setattr(dispatch.Plan, method, recorded)

    for pass_name in PASSES:
        record(pass_name, pass_name)
    record("joint_backward", *PASSES[1:])
    return names


@pytest.fixture
def quick(monkeypatch) -> None:
    """A benchmark with small roofs and short cells, and no plan that outlives the test."""
    monkeypatch.setattr(roofs, "MEMORY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(roofs, "LARGE_MATRIX", {"cpu": 128})
    monkeypatch.setattr(runner, "ROOF_SECONDS", 0.0)
    monkeypatch.setattr(runner, "CELL_SECONDS", 0.001)
    monkeypatch.setattr(dispatch, "_by_call", {})
    monkeypatch.setattr(dispatch, "_by_problem", {})
