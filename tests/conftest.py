"""Shared by every test: the device of the run, and the rule for tests that need a GPU."""

from __future__ import annotations

import gc
import os
import tempfile

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # The processes of pytest-xdist, and those that their tests start, share the cores: torch reads this at its import.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

# torch.compile would compile a program for each vector extension that the CPU names, to see whether that works: 6 s.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import torch
from repeated import poisoned_memory

if not torch.cuda.is_available():
    # The Triton kernels themselves run, on the CPU: Triton reads this when it is imported, so it comes first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test sees the choices that were tuned on this machine, and none changes them.
os.environ["TRITONCONV_CACHE"] = tempfile.mkdtemp(prefix="tritonconv-tests-")

from beside_torch import PHASES
from plan_calls import in_one_program, watch_pass

import tritonconv
from tritonconv import dispatch
from tritonconv.lab.bench import roofs, runner
from tritonconv.problem import PASSES

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.speed_up()


# torch, Triton and the project are a million objects that stay: a collection looks at all of them, so it comes seldom.
gc.set_threshold(50_000, 20, 20)

# In a test a warning is an error, with these exceptions. Not in pytest's configuration, where they would hold for its
# plugins too: one that warns while it is set up would end the run.
WARNINGS = (
    "error",
    "ignore::DeprecationWarning",
    "ignore::PendingDeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning:torch.*",
    "ignore::UserWarning:monai.*",
)


def pytest_report_header(config) -> str:
    interpreted = " with the Triton interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"tritonconv: torch {torch.__version__} on {where}{interpreted}"


def pytest_collection_modifyitems(config, items) -> None:
    """The filters of warnings, and the rule of the tests for a GPU.

    A test marked ``gpu`` runs where a CUDA device is, and is deselected (and counted so) elsewhere.
    """
    asked = config.getoption("pythonwarnings") or ()
    for item in items:  # in front, because the last filter wins: a test's own, then those of the command line
        item.add_marker(pytest.mark.filterwarnings(*WARNINGS, *asked), append=False)
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
    from tritonconv.lab.inspection.compiling import products_in

    with products_in("ieee"):
        yield


@pytest.fixture
def own_store(tmp_path, monkeypatch):
    """The user's store is the test's own, and no plan outlives it; what else the test changes is put back first."""
    monkeypatch.setenv("TRITONCONV_CACHE", str(tmp_path / "store"))
    dispatch.forget()
    yield tmp_path / "store"
    monkeypatch.undo()
    dispatch.forget()


@pytest.fixture
def poisoned():
    with poisoned_memory():
        yield


@pytest.fixture(params=[(), PHASES], ids=["rules", "forced"])
def variants(request):
    """The variants that are in force in the test: none, so that the rules choose, or ours of all passes."""
    with tritonconv.use(*request.param):
        yield request.param


@pytest.fixture
def launches(monkeypatch):
    """The names of the variants that ran, in order."""
    names = []

    def ran(*passes):
        return lambda plan, *operands: names.extend(plan.choice(name).variant.name for name in passes)

    for name in PASSES:
        watch_pass(monkeypatch, name, ran(name))
    watch_pass(monkeypatch, "forward_and_pack", ran("forward"))
    both = ran(*PASSES[1:])
    watch_pass(monkeypatch, "backward", lambda plan, *operands: in_one_program(plan) and both(plan))
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


@pytest.fixture
def standing_by(monkeypatch) -> None:
    """Plans are those of a GPU: torch's own stands in until their kernels are compiled."""
    real = dispatch.plan

    def plan(*call):
        made = real(*call)
        made.standby = True
        return made

    monkeypatch.setattr(dispatch, "plan", plan)
