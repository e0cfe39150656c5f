"""The tuner's second choice, for eager calls: who wins by the device's time and the host's. CPU only.

The device's and the host's times are made up.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_tuning import TORCH, UP, entries, folder  # noqa: F401  (a fixture)

import tritonconv
from tritonconv.autotune import ceilings, store
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.tuning import candidates, contest, journal, session
from tritonconv.autotune.tuning.session import Session, tasks_of
from tritonconv.lab.bench import measure, noise
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.bench.timing import Times
from tritonconv.problem import PASSES

CPU = torch.device("cpu")
FASTEST, QUICK, OTHER = "forward_torch_phases", "forward_torch_shuffle", "forward_torch_columns"
DATA, WEIGHT = "backward_data_torch_phases", "backward_weight_torch_phases"
QUICK_DATA, QUICK_WEIGHT = "backward_data_torch_conv", "backward_weight_torch_conv"
STEP, QUICK_STEP = f"{DATA} + {WEIGHT}", f"{QUICK_DATA} + {QUICK_WEIGHT}"


@pytest.fixture
def times(monkeypatch) -> dict[str, tuple[float, float]]:
    """(device's ms, host's ms) by label: 2 and 1 for whatever is not named, torch's for null contestants."""
    made: dict[str, tuple[float, float]] = {}

    def interleaved(calls, watch, seconds, **rounds):
        for call in calls.values():
            call()
        both = {label: made.get(TORCH if label in noise.NAMES else label, (2.0, 1.0)) for label in calls}
        return Times(*({label: [pair[at]] * 3 for label, pair in both.items()} for at in (0, 1)))

    monkeypatch.setattr(measure, "interleave", interleaved)
    monkeypatch.setattr(contest, "HOPELESS", float("inf"))
    return made


def chosen(pass_name: str) -> tuple[str, str | None]:
    """The names that are stored for CUDA graphs, and for eager calls where that is another."""
    (found,) = entries(pass_name).values()
    return found.variant, found.eager.variant if found.eager else None


def test_both_times_decide_for_eager_calls(times):
    times.update({TORCH: (3.0, 0.5), FASTEST: (1.0, 1.9), QUICK: (1.2, 0.4), OTHER: (1.1, 1.6)})
    times.update({STEP: (1.0, 1.0), DATA: (1.0, 0.1), WEIGHT: (1.0, 0.1)})
    report = tritonconv.tune(UP)
    (forward,) = entries("forward").values()
    assert (forward.variant, forward.ms, forward.host_ms, forward.torch_ms) == (FASTEST, 1.0, 1.9, 3.0)
    assert (forward.eager.variant, forward.eager.ms, forward.eager.host_ms) == (QUICK, 1.2, 0.4)
    assert chosen("backward_data") == (DATA, None) and chosen("backward_weight") == (WEIGHT, None)
    assert f"forward: {FASTEST}; in eager calls {QUICK}" in str(report)
    screened = {
        each.variant: each.host_ms
        for each in journal.Journal.open(device_name(CPU)).timings.values()
        if each.stage == "screen" and each.pass_name == "forward"
    }
    assert screened[FASTEST] == 1.9 and screened[QUICK] == 0.4
    layer, x = tritonconv.ConvTranspose3d(4, 3, 2, stride=2), torch.randn(1, 4, 3, 4, 5)
    found = tritonconv.explain(x, layer.weight, layer.bias, stride=2)
    assert found.plan.choice("forward").variant.name == QUICK and f"in CUDA graphs: {FASTEST}" in found.text


@pytest.mark.parametrize(
    ("device", "host"),
    [((1.0, 1.2), (0.9, 0.5)), ((1.0, 1.2), (1.2, 1.2)), ((1.0, 1.01), (1.05, 1.0)), ((1.0, 2.5), (3.0, 0.1))],
    ids=["the device is busy longer", "the same host's time", "within the host's noise", "too long on the device"],
)
def test_one_choice_serves_both_where_another_gains_nothing(times, device, host):
    times.update({FASTEST: (device[0], host[0]), QUICK: (device[1], host[1])})
    tritonconv.tune(UP)
    assert chosen("forward") == (FASTEST, None)


def test_the_fourth_on_the_device_is_a_finalist_where_its_eager_call_is_the_quickest(times, monkeypatch):
    monkeypatch.setattr("tritonconv.autotune.tuning.tuner.FINALISTS", 1)
    times.update({FASTEST: (1.0, 3.0), OTHER: (1.1, 3.0), QUICK: (1.9, 0.1)})
    tritonconv.tune(UP)
    assert chosen("forward") == (FASTEST, QUICK)


def test_the_gradients_of_an_eager_call_are_chosen_together(times):
    times.update({DATA: (0.5, 3.0), WEIGHT: (0.5, 3.0), QUICK_DATA: (0.6, 0.1), QUICK_WEIGHT: (0.6, 0.1)})
    times.update({STEP: (1.0, 3.0), QUICK_STEP: (1.2, 1.0), TORCH: (4.0, 4.0)})
    tritonconv.tune(UP)
    assert [chosen(name) for name in PASSES[1:]] == [(DATA, QUICK_DATA), (WEIGHT, QUICK_WEIGHT)]
    assert {each.timed for key, each in entries().items() if not key.startswith("forward ")} == {"forward_backward"}


def test_a_stored_pair_of_gradients_is_tried_as_a_pair_however_slow_its_halves_are(times):
    """They may share work that their own times do not show."""
    pair = QUICK_DATA, WEIGHT
    times.update({QUICK_DATA: (9.0, 9.0), " + ".join(pair): (0.5, 0.5)})
    tritonconv.tune(UP)
    assert chosen("backward_data") == ("backward_data_torch_native", None)
    name = device_name(CPU)
    keys = [str(Key.of(UP, each)) for each in PASSES[1:]]
    found = [store.read(name).entries[key] for key in keys]
    quick = [dataclasses.replace(entry, variant=each) for entry, each in zip(found, pair, strict=True)]
    store.merge(store.Table(name, dict(zip(keys, quick, strict=True))))
    tritonconv.tune(UP, again=True)
    assert [chosen(each)[0] for each in PASSES[1:]] == list(pair)


def test_stored_pairs_are_of_one_table_the_pair_for_graphs_first(times):
    tritonconv.tune(UP)
    keys = [str(Key.of(UP, each)) for each in PASSES[1:]]
    entry = store.read(device_name(CPU)).entries[keys[0]]
    both = dataclasses.replace(entry, variant=DATA, eager=store.Eager(QUICK_DATA, {}, "", 1.0, 1.0))
    whole = store.Table("mine", {keys[0]: both, keys[1]: dataclasses.replace(entry, variant=WEIGHT)})
    half = store.Table("half", {keys[0]: entry})

    def labels(*tables):
        pairs = candidates.stored(UP, CPU, PASSES[1:], tables, ceilings.nominal(CPU))
        return [[each.label for each in pair] for pair in pairs]

    assert labels(half, whole) == [[DATA, WEIGHT], [QUICK_DATA, WEIGHT]]
    assert labels(half) == labels() == []
    gone = dataclasses.replace(both, variant="backward_data_torch_of_another_version")
    assert labels(store.Table("gone", {**whole.entries, keys[0]: gone}), whole) == [[QUICK_DATA, WEIGHT]]


@pytest.mark.parametrize(
    ("step", "torchs", "want"),
    [
        ((1.0, 5.0), (1.5, 1.0), [(FASTEST, "forward_torch_native"), (DATA, "backward_data_torch_native")]),
        ((2.0, 0.5), (1.0, 4.0), [("forward_torch_native", FASTEST), ("backward_data_torch_native", DATA)]),
        ((5.0, 5.0), (1.0, 1.0), [("forward_torch_native", None), ("backward_data_torch_native", None)]),
        ((1.0, 1.0), (5.0, 5.0), [(FASTEST, None), (DATA, None)]),
    ],
    ids=["torch's step in eager calls", "torch's step in graphs", "torch's step", "ours"],
)
def test_the_forward_goes_with_the_step_that_torch_alone_wins(times, monkeypatch, step, torchs, want):
    """In eager calls too: torch's own step is one with torch's own forward."""
    times.update({FASTEST: (0.1, 0.1), DATA: (0.1, 0.1), WEIGHT: (0.1, 0.1), TORCH: torchs, STEP: step})
    times["backward_data_torch_native + backward_weight_torch_native"] = (9.0, 9.0)
    tritonconv.tune(UP)
    assert [chosen(name) for name in PASSES[:2]] == want


def test_a_stored_forward_keeps_its_choice_for_eager_calls(times):
    times.update({FASTEST: (1.0, 3.0), QUICK: (1.2, 0.4), STEP: (1.0, 1.0), DATA: (0.1, 0.1), WEIGHT: (0.1, 0.1)})
    tritonconv.tune(UP)
    name = device_name(CPU)
    table = store.read(name)
    forward = str(Key.of(UP, "forward"))
    store.path_of(name).unlink()
    store.merge(store.Table(name, {forward: table.entries[forward]}))
    report = tritonconv.tune(UP)
    assert {winner.pass_name for _, winner in report.winners} == set(PASSES[1:])
    assert chosen("forward") == (FASTEST, QUICK)


def test_a_second_choice_whose_kernel_was_edited_is_measured_again(times, monkeypatch):
    times.update({FASTEST: (1.0, 3.0), QUICK: (1.2, 0.4)})
    tritonconv.tune(UP)
    assert len(Session(CPU).run(tasks_of([UP]), Progress()).known) == 1
    real = session.revision
    monkeypatch.setattr(session, "revision", lambda record: "edited" if record.name == QUICK else real(record))
    assert Session(CPU).run(tasks_of([UP]), Progress()).known == []


def test_a_gpus_entry_without_the_hosts_time_is_made_again(times):
    tritonconv.tune(UP)
    on_gpu = Session(torch.device("cuda"))
    on_gpu.versions = session.versions_of(CPU)
    on_gpu.journal = journal.Journal.open(device_name(CPU))
    table = store.read(device_name(CPU))
    assert on_gpu._stored(table, UP, "forward", 1) is not None
    key = str(Key.of(UP, "forward"))
    old = store.Entry.from_json({**table.entries[key].to_json(), "host_ms": None, "eager": None})
    assert on_gpu._stored(store.Table("a GPU", {key: old}), UP, "forward", 1) is None
    on_cpu = Session(CPU)
    on_cpu.versions, on_cpu.journal = on_gpu.versions, on_gpu.journal
    assert on_cpu._stored(store.Table("a CPU", {key: old}), UP, "forward", 1) is old
