"""No cache grows with the image sizes that a process has seen: each is bounded, and forgets the oldest."""

from __future__ import annotations

import ast
import importlib
import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from named_gpu import CUDA, name_gpu
from test_house import module_of, sources

import tritonconv
from tritonconv import Problem, dispatch, guards
from tritonconv.autotune import choose
from tritonconv.bounded import remember
from tritonconv.kernels.registry import have_triton

# Functions whose cache has no bound, by module: what each is keyed by, which no image size adds to.
UNBOUNDED = {
    "autotune.choose": {"_sources": "device, number of threads"},
    "autotune.fit": {"shipped_fit": "compute capability"},
    "autotune.nearby": {"table": "vendor of a CPU", "rows_of": "vendor of a CPU, dtype"},
    "autotune.pins": {"_load": "file"},
    "autotune.serving": {"part": "device"},
    "autotune.sources": {
        "_definitions": "module", "_imports": "module", "_tree": "module", "_uses": "definition", "revision": "variant",
    },
    "kernels.registry": {"_called_without_overlap": "variant", "_modules": "beginnings of names"},
    "kernels.triton_compiled": {"warn": "text about a folder"},
    "kernels.triton_launch": {"_config_type": "kernel, and names in its configs", "_multiplies_tf32": "GPU"},
    "kernels.triton_replay": {"_warn_once": "text of a compiler's error"},
}  # fmt: skip
# Empty dicts, lists and sets that a module fills: the reason why each has an end.
FILLED = {
    "autotune.choose": {"_firsts": "remember", "_adopted": "device, and kind of layer that was tuned"},
    "autotune.online": {"_trials": "remember"},
    "autotune.tuning.first_use": {"_kinds": "remember"},
    "kernels.registry": {"_files": "variant"},
    "kernels.triton_arrival": {"_buffers": "device, and stream of torch's few"},
    "kernels.triton_compiled": {"_active": "folder"},
    "autocast": {"_probes": "device", "_casts": "device"},
    "convert": {"_SUBCLASSES": "class"},
    "dispatch": {"_by_call": "remember", "_by_problem": "remember", "repeated": "_keep", "stages": "_keep"},
    "forced": {"trained": "weight that is alive"},
    "guards": {"_names": "remember", "_calls": "remember"},
}


def modules():
    """Of the product and the tuner; a run of the laboratory ends."""
    found = ((module_of(path), path) for path in sources())
    return [(name, path) for name, path in found if not name.startswith(("lab.", "plots.", "__main__"))]


def test_every_function_that_caches_by_size_has_a_bound():
    found: dict[str, set[str]] = {}
    for name, _ in modules():
        if not have_triton() and name.startswith("kernels.") and "torch_" not in name:
            continue
        module = importlib.import_module(f"tritonconv.{name}".removesuffix(".__init__"))
        for each, value in vars(module).items():
            if hasattr(value, "cache_parameters") and value.__module__ == module.__name__:
                unbounded = value.cache_parameters()["maxsize"] is None
                if unbounded and inspect.signature(value).parameters:
                    found.setdefault(name, set()).add(each)
    assert found == {name: set(reasons) for name, reasons in UNBOUNDED.items() if name in found or have_triton()}


def test_every_memory_of_a_module_has_an_end():
    found: dict[str, set[str]] = {}
    for name, path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and _empty(node.value):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.setdefault(name, set()).update(ast.unparse(each) for each in targets)
    assert found == {name: set(reasons) for name, reasons in FILLED.items()}
    for name, reasons in FILLED.items():
        text = inspect.getsource(importlib.import_module(f"tritonconv.{name}"))
        for memory, reason in reasons.items():
            assert reason not in ("remember", "_keep") or f"{reason}({memory}, " in text
    kept = inspect.getsource(dispatch._keep)
    assert "remember(known_calls, " in kept and "known_calls[" not in kept


def _empty(value) -> bool:
    if isinstance(value, (ast.Dict, ast.List, ast.Set)):
        return not (value.keys if isinstance(value, ast.Dict) else value.elts)
    named = isinstance(value, ast.Call) and isinstance(value.func, (ast.Name, ast.Attribute))
    return bool(named and not value.args and ast.unparse(value.func).rpartition(".")[2] in CONTAINERS)


CONTAINERS = {"dict", "list", "set", "OrderedDict", "defaultdict", "WeakKeyDictionary", "WeakValueDictionary"}


def test_the_oldest_goes():
    memory: dict[int, int] = {}
    for number in range(6):
        assert remember(memory, number, -number, 3) == -number
    assert memory == {3: -3, 4: -4, 5: -5}
    remember(memory, 4, 0, 3)
    assert memory == {3: -3, 4: 0, 5: -5}, "a value that is replaced drives nothing out"


def test_many_threads_that_remember_stay_within_the_bound():
    memory: dict[tuple[int, int], int] = {}
    failures: list[Exception] = []
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        start.wait()
        try:
            for number in range(3000):
                remember(memory, (seed, number), number, 4)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    remember(memory, (9, 9), 9, 4)
    assert failures == [] and len(memory) == 4


def test_plans_of_old_sizes_are_forgotten_and_those_of_new_ones_kept(monkeypatch):
    monkeypatch.setattr(dispatch, "_by_call", {})
    monkeypatch.setattr(dispatch, "_by_problem", {})
    monkeypatch.setattr(dispatch, "MAX_PLANS", 4)
    weight = torch.ones(2, 3, 2, 2, 2)
    for width in range(1, 8):
        x = torch.ones(1, 2, 2, 2, width)
        assert torch.equal(tritonconv.conv_transpose3d(x, weight), F.conv_transpose3d(x, weight))
        for memory in (dispatch._by_call, dispatch._by_problem):
            assert [plan.problem.size[2] for plan in memory.values()] == list(range(1, 8))[max(0, width - 4) : width]


def test_choices_of_the_model_are_forgotten_too(monkeypatch):
    pytest.importorskip("triton")
    name_gpu(monkeypatch)
    monkeypatch.setattr(choose, "MOST_FIRSTS", 2)
    for channels in (16, 32, 48, 64):
        problem = Problem(1, channels, 16, (8, 8, 8), (2, 2, 2), (2, 2, 2), (0, 0, 0), (16, 16, 16), (1, 1, 1), 1,
                          torch.bfloat16)  # fmt: skip
        assert choose.untuned(problem, CUDA, "forward") == choose.untuned(problem, CUDA, "forward")
    assert [key.c_in for key, *_ in choose._firsts] == [48, 64]


def test_a_graph_whose_call_is_forgotten_is_traced_anew(monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    monkeypatch.setattr(guards, "_names", {})
    monkeypatch.setattr(guards, "_calls", {})
    monkeypatch.setattr(dispatch, "MAX_PLANS", 1)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(tritonconv.conv_transpose3d, backend=counter, fullgraph=True, dynamic=False)
    weight, small, large = torch.randn(2, 3, 2, 2, 2), torch.randn(1, 2, 2, 2, 2), torch.randn(1, 2, 2, 2, 3)
    for x, graphs in ((small, 1), (small, 1), (large, 2), (large, 2), (small, 3)):
        torch.testing.assert_close(call(x, weight), F.conv_transpose3d(x, weight))
        assert counter.frame_count == graphs
    assert len(guards._names) == len(guards._calls) == 1
