"""The choice on a GPU that nobody tuned: the shipped table, the model, or torch's own. The GPUs are only named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from named_gpu import CUDA, H200, name_gpu

from tritonconv import Problem
from tritonconv.autotune import choose, model, serving, store
from tritonconv.autotune.ceilings import from_json
from tritonconv.autotune.first import first
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.serving import Part
from tritonconv.autotune.store import Entry, Table
from tritonconv.autotune.tuning import calibrate
from tritonconv.autotune.tuning.candidates import stored
from tritonconv.autotune.tuning.journal import Timing
from tritonconv.autotune.tuning.session import Session
from tritonconv.autotune.tuning.tasks import Report
from tritonconv.epilogue import Epilogue
from tritonconv.explain import explain_problem
from tritonconv.kernels.registry import renamed, variant
from tritonconv.lab.bench import results
from tritonconv.problem import PASSES

pytest.importorskip("triton")
ROWS = Path(__file__).resolve().parent.parent / "plots" / "examples" / "nvidia_h200"
pytestmark = pytest.mark.usefixtures("own_store")

# nnU-Net's layer of 64->32 channels is in the shipped table; 96->40 channels are in none.
KNOWN = Problem(2, 64, 32, (64,) * 3, (2,) * 3, (2,) * 3, (0,) * 3, (128,) * 3, dtype=torch.bfloat16, layout="ndhwc")
UNKNOWN = replace(KNOWN, c_in=96, c_out=40)
H100 = Part("NVIDIA H100 80GB HBM3", (9, 0), 132)
NARROW = Part("NVIDIA H100 Lite", (9, 0), 78)
SLICE = Part("NVIDIA H100 80GB HBM3 MIG 3g.40gb", (9, 0), 60)
A100 = Part("NVIDIA A100-SXM4-80GB", (8, 0), 108)


def at(problem: Problem, size: int) -> Problem:
    return replace(problem, size=(size,) * 3, out_size=(2 * size,) * 3)


def chosen(problem: Problem, pass_name: str = "forward") -> choose.Selection:
    return choose.choose(problem, CUDA, pass_name)


def test_the_shipped_table_is_sound():
    table = store.shipped_table(serving.MEASURED)
    assert len(table.entries) > 200 and table.ceilings is not None
    assert set(table.entries) >= {str(Key.of(KNOWN, name)) for name in PASSES}
    for entry in table.entries.values():
        assert variant(entry.variant).name == entry.variant and entry.ms > 0


@pytest.mark.parametrize("gpu", [H200, H100, Part("NVIDIA GH200 480GB", (9, 0), 132)], ids=lambda gpu: gpu.name)
def test_a_wide_hopper_is_served_at_once_on_sizes_that_nobody_measured(monkeypatch, gpu):
    name_gpu(monkeypatch, gpu)
    for problem, words in (
        (KNOWN, "this size"), (at(KNOWN, 66), "this size"), (replace(KNOWN, n=1), "neighbouring size"),
        (replace(KNOWN, bias=True), "without a bias"), (replace(KNOWN, dtype=torch.float16), "in bfloat16"),
    ):  # fmt: skip
        found = chosen(problem)
        assert found.variant.backend == "triton" and words in found.reason and "(shipped)" in found.reason
        assert (f"on an {serving.MEASURED}" in found.reason) == (gpu is not H200)
        assert found.reason in explain_problem(problem, CUDA).text


@pytest.mark.parametrize("gpu", [H200, NARROW], ids=lambda gpu: gpu.name)
def test_the_model_decides_what_no_table_knows(monkeypatch, gpu):
    name_gpu(monkeypatch, gpu)
    problem = UNKNOWN if gpu is H200 else KNOWN
    backends = set()
    for dtype in (torch.bfloat16, torch.float16):
        for name in PASSES:
            found = chosen(replace(problem, dtype=dtype), name)
            assert "nothing was tuned near this size" in found.reason
            assert found.variant.supports(problem, CUDA) is None
            backends.add(found.variant.backend)
    assert "triton" in backends


def test_times_that_the_model_expected_are_said_with_the_size_that_they_are_of(monkeypatch):
    name_gpu(monkeypatch)
    first, second = (chosen(at(UNKNOWN, size)) for size in (64, 66))
    assert first.config == second.config and second.reason == f"{first.reason}, for {at(UNKNOWN, 64)}"
    assert chosen(at(UNKNOWN, 64)).reason == first.reason


@pytest.mark.parametrize("gpu", [A100, SLICE, Part("NVIDIA B200", (10, 0), 148)], ids=lambda gpu: gpu.name)
def test_another_gpu_runs_torchs_own_and_says_what_changes_that(monkeypatch, gpu):
    name_gpu(monkeypatch, gpu)
    for name in PASSES:
        found = chosen(KNOWN, name)
        assert found.variant.name == f"{name}_torch_native" and "tritonconv tune" in found.reason
    assert "tritonconv tune" in explain_problem(KNOWN, CUDA).text


def test_float32_stays_torchs_own_until_it_is_tuned(monkeypatch):
    name_gpu(monkeypatch)
    problem = replace(KNOWN, dtype=torch.float32)
    assert chosen(problem).variant.name == "forward_torch_native" and "tritonconv tune" in chosen(problem).reason
    tune_by_hand(problem, "forward_phases", H200)
    assert chosen(problem).variant.name == "forward_phases"


def test_the_users_own_choice_stands_before_the_shipped_one(monkeypatch):
    name_gpu(monkeypatch)
    shipped = chosen(KNOWN).variant.name
    assert shipped != "forward_phases"
    tune_by_hand(KNOWN, "forward_phases", H200)
    found = chosen(KNOWN)
    assert found.variant.name == "forward_phases" and "(shipped)" not in found.reason
    assert chosen(at(KNOWN, 100)).variant.name != "forward_phases"  # the shipped table has that size itself


def test_a_gpu_that_nobody_knows_runs_what_was_tuned_on_it(monkeypatch):
    name_gpu(monkeypatch, A100)
    tune_by_hand(KNOWN, "forward_phases", A100)
    assert chosen(KNOWN).variant.name == "forward_phases"
    assert chosen(UNKNOWN).variant.name == "forward_torch_native"


def test_a_name_on_the_cpu_is_not_served():
    assert serving.part(torch.device("cpu")) is None
    assert not any(source.table.entries for source in choose.sources_of(torch.device("cpu")))
    assert device_name(torch.device("cpu")) != serving.MEASURED


def tune_by_hand(problem: Problem, name: str, gpu: Part) -> None:
    record = variant(name)
    entry = Entry(name, dict(record.default(problem, CUDA)), 1.0, 2.0, "", str(problem), "forward", "2026-01-01T00:00")
    store.merge(Table(gpu.name, {str(Key.of(problem, "forward")): entry}))
    choose.forget()


SMALL = replace(at(KNOWN, 4), c_in=320, c_out=320)  # nnU-Net's first decoder layer, which is in the table
UNSEEN = replace(at(KNOWN, 6), n=1, c_in=768, c_out=128)  # UNETR's, which the model chooses for


@pytest.mark.parametrize("problem", [SMALL, UNSEEN], ids=["tuned", "by the model"])
def test_a_small_layers_eager_calls_have_kernels_where_torchs_own_are_fastest_on_the_device_alone(monkeypatch, problem):
    """They take a few microseconds there, and the host takes twice as long to enqueue them as a kernel."""
    name_gpu(monkeypatch)
    backends = {
        graphs: [choose.choose(problem, CUDA, name, graphs).variant.backend for name in PASSES[1:]]
        for graphs in (True, False)
    }
    assert "torch" in backends[True] and backends[False] == ["triton", "triton"]
    text = explain_problem(problem, CUDA).text
    assert "in CUDA graphs: backward_weight_torch_native" in text
    assert ("to enqueue" in text) and ("(shipped)" in text) == (problem is SMALL)


def test_a_large_layers_eager_calls_have_what_is_fastest_on_the_device(monkeypatch):
    name_gpu(monkeypatch)
    for problem in (KNOWN, at(KNOWN, 128), at(UNKNOWN, 128)):
        for name in PASSES:
            device, eager = (choose.choose(problem, CUDA, name, graphs) for graphs in (True, False))
            assert device[:2] == eager[:2]


def test_another_hopper_has_the_hosts_times_of_the_one_that_was_measured(monkeypatch):
    name_gpu(monkeypatch)
    measured = choose.ceilings_of(CUDA).host_ms
    name_gpu(monkeypatch, H100)
    assert measured and choose.ceilings_of(CUDA).host_ms == measured
    name_gpu(monkeypatch, A100)
    assert not choose.ceilings_of(CUDA).host_ms


@pytest.mark.parametrize("gpu", [H200, H100], ids=lambda gpu: gpu.name)
def test_the_hosts_times_of_a_pass_come_from_one_table_that_has_torchs_and_the_kernels(monkeypatch, gpu):
    """A short tuning run has times of a part: what has none would seem to take the host no time."""
    name_gpu(monkeypatch, gpu)
    shipped = choose.ceilings_of(CUDA)
    before = [choose.choose(UNSEEN, CUDA, name).variant for name in PASSES]
    part = {"forward torch": 0.2, "forward_torch_native": 0.2}
    whole = {"backward_data torch": 0.3, "backward_data_torch_native": 0.3, "backward_data triton": 0.1}
    mine = replace(shipped, device=gpu.name, measured=True, host_ms=part | whole)
    store.merge(Table(gpu.name), None, lambda there: mine.to_json())
    choose.forget()
    found = choose.ceilings_of(CUDA).host_ms
    assert {name: ms for name, ms in found.items() if name.startswith("backward_data")} == whole
    rest = {name: ms for name, ms in shipped.host_ms.items() if not name.startswith("backward_data")}
    assert {name: ms for name, ms in found.items() if not name.startswith("backward_data")} == rest
    assert [choose.choose(UNSEEN, CUDA, name).variant for name in PASSES] == before
    alone = first(UNSEEN, CUDA, "forward", replace(shipped, host_ms=part))
    assert "to enqueue" not in alone[2]


@pytest.mark.parametrize("gpu", [H200, H100], ids=lambda gpu: gpu.name)
def test_a_tuning_run_times_first_what_serves_the_gpu_from_another_key_or_table(monkeypatch, gpu):
    name_gpu(monkeypatch, gpu)
    session = Session(CUDA)
    session.report = Report(gpu.name)
    rates, entries = choose.ceilings_of(CUDA), store.shipped_table(serving.MEASURED).entries
    for problem in (SMALL, replace(SMALL, bias=True), replace(SMALL, dtype=torch.float16), replace(SMALL, n=1)):
        for name in PASSES:
            both = entries[str(Key.of(SMALL, name))].choices(graphs=True)
            found = [each.selection for (each,) in stored(problem, CUDA, (name,), session._tables(), rates)]
            assert [each[:2] for each in found] == [(variant(each.variant), each.config) for each in both]
    assert not any(stored(UNSEEN, CUDA, (name,), session._tables(), rates) for name in PASSES)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_half_of_a_tile_computes_an_epilogue_that_the_plain_calls_tile_leaves_to_torch(monkeypatch, activation):
    name_gpu(monkeypatch)
    stereo = Problem(3, 64, 32, (24, 32, 64), (3,) * 3, (2,) * 3, (1,) * 3, (48, 64, 128), dtype=torch.bfloat16)
    epilogue = Epilogue(activation, residual=True)
    for layout in ("ncdhw", "ndhwc"):
        problem = replace(stereo, layout=layout, epilogue=epilogue)
        plain, found = chosen(problem.plain), chosen(problem)
        assert found.variant is plain.variant and not plain.variant.finishes(problem, plain.config, epilogue)
        assert found.variant.finishes(problem, found.config, epilogue)
        changed = {key: plain.config[key] // value for key, value in found.config.items() if value != plain.config[key]}
        assert list(changed.values()) == [2] and changed.keys() <= {"BLOCK_M", "BLOCK_N"}
        assert "by half of its tile" in found.reason and chosen(problem.plain) == plain
        assert choose.untuned(problem, CUDA, "forward") == found  # what a tuning run holds its challengers against
    wide = replace(KNOWN, c_in=1024, c_out=1024, epilogue=epilogue)  # compute-bound: half a tile costs more
    assert chosen(wide)[:2] == chosen(wide.plain)[:2]


def test_the_hosts_times_that_ship_are_the_medians_of_the_committed_rows():
    run = results.load(ROWS / "2026-11-29-tune")
    timings = [
        Timing(row["text"], row["pass"], row["variant"], row["config"], "", row["stage"], {}, host_ms=row["host_ms"])
        for row in run.timings
    ]
    shipped = store.shipped_table(serving.MEASURED).ceilings["host_ms"]
    assert len(timings) == 149 and shipped == pytest.approx(calibrate.host_times(timings, {}), abs=6e-5)


def test_no_eager_choice_that_ships_is_beaten_by_another_kernel_of_its_rows():
    """By both times; a kernel whose host's time is not known by itself has that of its pass and backend."""
    table, (rows,) = store.shipped_table(serving.MEASURED), ROWS.glob("campaign-*-a737a92.jsonl")
    rates, timed = from_json(table.ceilings), {}
    for row in results.load(rows).timings:
        name, _ = renamed(row["variant"], row["config"])
        timed.setdefault((row["text"], row["pass"]), []).append((name, row["median_ms"]))
    entries = [entry for entry in table.entries.values() if entry.eager]
    for entry in entries:
        record = variant(entry.eager.variant)
        both = [(ms, model.host_ms(variant(name), rates)) for name, ms in timed[entry.problem, record.pass_name]]
        assert entry.eager.host_ms == pytest.approx(model.host_ms(record, rates))
        assert model.eager_ms(entry.eager.ms, entry.eager.host_ms) <= 1.05 * min(model.eager_ms(*each) for each in both)
    assert len(entries) == 31
