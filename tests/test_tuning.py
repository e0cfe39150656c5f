"""The tuner: who wins, what is stored when, what disqualifies, resuming, models. CPU only.

Times are made up where a decision is tested (``clockless``) and taken where the store is.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import tritonconv
from tritonconv import ArgumentError, Problem, dispatch
from tritonconv.autotune import choose, store
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.tuning import api, contest, journal, session
from tritonconv.autotune.tuning.session import Session, tasks_of
from tritonconv.errors import ArgumentTypeError, StoreError
from tritonconv.kernels import registry
from tritonconv.lab.bench import case, failures, measure, noise
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.bench.results import BASELINE
from tritonconv.lab.bench.timing import Times
from tritonconv.problem import PASSES

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
UP = Problem(1, 4, 3, (3, 4, 5), (2, 2, 2), (2, 2, 2), (0, 0, 0), (6, 8, 10), bias=True)
HALO = Problem(2, 4, 2, (4, 4, 4), (3, 3, 3), (2, 2, 2), (1, 1, 1), (8, 8, 8), layout="ndhwc")
TORCH = BASELINE


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The user's store, empty; the plans and tables of the process are put back."""
    monkeypatch.setenv("TRITONCONV_CACHE", str(tmp_path / "store"))
    monkeypatch.setattr(dispatch, "_by_call", {})
    monkeypatch.setattr(dispatch, "_by_problem", {})
    monkeypatch.setattr(session, "PROBLEM_SECONDS", 0.05)
    choose.forget()
    yield tmp_path / "store"
    choose.forget()


@pytest.fixture
def clockless(monkeypatch) -> dict[str, float]:
    """Times by label (ms), 2 for whatever is not named, torch's for null contestants; every call is still made once."""
    times: dict[str, float] = {}

    def interleaved(calls, watch, seconds, **rounds):
        for call in calls.values():
            call()
        return Times({label: [times.get(TORCH if label in noise.NAMES else label, 2.0)] * 3 for label in calls})

    monkeypatch.setattr(measure, "interleave", interleaved)
    monkeypatch.setattr(contest, "HOPELESS", float("inf"))
    return times


def entries(pass_name: str | None = None) -> dict[str, store.Entry]:
    found = store.read(device_name(CPU)).entries
    return {key: each for key, each in found.items() if pass_name is None or key.startswith(f"{pass_name} ")}


def winner(pass_name: str) -> str:
    (found,) = entries(pass_name).values()
    return found.variant


@pytest.fixture
def broken(monkeypatch):
    """Puts another launch into a variant."""

    def put(name: str, launch) -> None:
        record = dataclasses.replace(registry.variant(name), launches=None, launch=launch)
        monkeypatch.setitem(registry._records(), name, record)

    return put


# ------------------------------------------------------------------ decisions


def test_the_fastest_is_stored_and_the_next_call_uses_it(clockless, launches):
    clockless.update({TORCH: 3.0, "forward_torch_phases": 1.0})
    clockless["backward_data_torch_conv + backward_weight_torch_phases"] = 1.0
    clockless.update({"backward_data_torch_conv": 1.0, "backward_weight_torch_phases": 1.0})
    report = tritonconv.tune(UP)
    names = ("forward_torch_phases", "backward_data_torch_conv", "backward_weight_torch_phases")
    assert tuple(winner(name) for name in PASSES) == names
    assert report.torch_won == 0 and len(report.winners) == 3
    forward = next(iter(entries("forward").values()))
    assert (forward.ms, forward.torch_ms, forward.timed) == (1.0, 3.0, "forward")
    layer = tritonconv.ConvTranspose3d(4, 3, 2, stride=2)
    layer(torch.randn(1, 4, 3, 4, 5, requires_grad=True)).sum().backward()
    assert launches[-3:] == list(names)
    assert "tuned on this size" in tritonconv.explain(UP).text


def test_torchs_own_is_stored_where_nothing_beats_it(clockless):
    clockless[TORCH] = 1.0
    report = tritonconv.tune(UP)
    assert [winner(name) for name in PASSES] == [f"{name}_torch_native" for name in PASSES]
    assert report.torch_won == 3
    assert dispatch.plan(UP, CPU).torch_alone is not None


def test_within_noise_the_choice_stays_what_it_was(clockless, monkeypatch):
    def noisy(calls, watch, seconds, **rounds):
        return Times({label: [1.0, 2.0, 3.0] if label == TORCH else [2.0, 1.0, 2.0] for label in calls})

    monkeypatch.setattr(measure, "interleave", noisy)
    before = [choose.untuned(UP, CPU, name).variant.name for name in PASSES]
    tritonconv.tune(UP)
    assert [winner(name) for name in PASSES] == before


def test_a_forward_that_spoils_the_training_step_is_taken_back(clockless):
    clockless.update({TORCH: 1.0, "forward_torch_phases": 0.5})  # but every training step takes 2 ms against 1
    tritonconv.tune(UP)
    assert winner("forward") == "forward_torch_native"


def test_a_wrong_answer_is_never_stored(clockless, broken):
    clockless.update({"forward_torch_phases": 0.1, "forward_torch_shuffle": 1.0})
    right = registry.variant("forward_torch_phases").launch
    broken("forward_torch_phases", lambda *args: right(*args) * 1.01)
    tritonconv.tune(UP)
    assert winner("forward") == "forward_torch_shuffle"
    timings = journal.Journal.open(device_name(CPU)).timings.values()
    (wrong,) = [each for each in timings if each.status == journal.WRONG]
    assert wrong.variant == "forward_torch_phases" and "max error" in wrong.message


def raising(error: Exception):
    def launch(*args):
        raise error

    return launch


def test_what_a_gpu_refuses_disqualifies_and_is_not_tried_again(clockless, broken):
    broken("forward_torch_shuffle", raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")))
    report = tritonconv.tune(UP)
    assert len(report.winners) == 3
    (failed,) = [each for each in journal.Journal.open(device_name(CPU)).timings.values() if each.status == "failed"]
    assert failed.variant == "forward_torch_shuffle" and "OutOfMemoryError" in failed.message


@pytest.mark.parametrize(("times", "tuned"), [(1, {UP, HALO}), (10**6, {HALO})], ids=["once", "always"])
def test_tensors_without_memory_fail_a_problem_and_say_nothing_of_the_candidates(clockless, monkeypatch, times, tuned):
    real, failing = case.make_tensors, iter(range(times))

    def make_tensors(problem, *args):
        if problem == UP and next(failing, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(problem, *args)

    monkeypatch.setattr(case, "make_tensors", make_tensors)
    report = Session(CPU, goes_on=True).run(tasks_of([UP, HALO]), Progress())
    assert {task.problem for task, _ in report.winners} == tuned and report.errors == 2 - len(tuned)
    assert {each.status for each in journal.Journal.open(device_name(CPU)).timings.values()} == {"ok"}


def test_a_mistake_in_the_program_propagates_and_loses_nothing(clockless, monkeypatch):
    tritonconv.tune(HALO)
    before = entries()
    monkeypatch.setattr(case.Case, "baseline", lambda self, pass_name: raising(TypeError("baseline takes 4")))
    with pytest.raises(TypeError, match="takes 4"):
        tritonconv.tune(UP)
    assert entries() == before


@pytest.mark.parametrize("where", ["launch", "supports", "space", "default", "work"])
def test_a_variant_that_raises_is_one_row_and_the_others_are_tuned(clockless, monkeypatch, where):
    rows = []
    record = dataclasses.replace(registry.variant("forward_torch_shuffle"), **{where: raising(KeyError("boom"))})
    monkeypatch.setitem(registry._records(), record.name, record)
    whole = Session(CPU, write=lambda kind, row: rows.append((kind, row)))
    report = whole.run(tasks_of([UP]), Progress())
    assert report.errors == 0 and {winner.pass_name for _, winner in report.winners} == set(PASSES)
    (told,) = [row for kind, row in rows if kind == "error"]
    assert (told["variant"], told["message"]) == (record.name, "KeyError: 'boom'") and told["text"] == str(UP)
    assert "left out: forward_torch_shuffle on problem 1" in str(report) and "KeyError: 'boom'" in str(report)


def test_a_lost_gpu_ends_a_session_that_goes_on(clockless, broken):
    broken("forward_torch_shuffle", raising(RuntimeError("CUDA error: an illegal memory access was encountered")))
    with pytest.raises(RuntimeError, match="illegal"):
        Session(CPU, goes_on=True).run(tasks_of([UP]), Progress())


def test_the_efforts_deepen_and_time_nothing_twice(clockless, monkeypatch):
    everything, tried = session.candidates, []
    efforts = tuple(session.WHOLE._replace(configs=count) for count in (1, 2, 99))
    monkeypatch.setattr(Session, "_efforts", lambda self: efforts)
    monkeypatch.setattr(
        session, "candidates",
        lambda *args: everything(*args)[: args[4].configs],
    )  # fmt: skip
    real = contest.Contest._pair
    monkeypatch.setattr(
        contest.Contest, "_pair", lambda self, *args: tried.append((args[0], args[2])) or real(self, *args)
    )
    report = Session(CPU).run(tasks_of([UP]), Progress())
    fields = {name: len(everything(UP, CPU, name, session.ceilings.nominal(CPU), efforts[-1])) for name in PASSES}
    assert {key.split()[0]: each.rivals for key, each in entries().items()} == fields
    assert len(tried) == len(set(tried)) == sum(fields.values())
    assert len(report.winners) == 3 and report.known == []
    assert len(Session(CPU).run(tasks_of([UP]), Progress()).known) == 1


@pytest.mark.parametrize(
    ("error", "out", "lost"),
    [
        (torch.OutOfMemoryError("x"), True, False),
        (type("OutOfResources", (Exception,), {})("shared memory"), True, False),
        (type("PTXASError", (Exception,), {})("ptxas"), True, False),
        (type("CompilationError", (Exception,), {})("at 1:0"), False, False),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), True, False),
        (RuntimeError("cuDNN error: unable to find an engine to execute this computation"), True, False),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False, True),
        (RuntimeError("PassManager::run failed"), True, False),
        (RuntimeError("shape mismatch"), False, False),
        (NameError("BLOCK_M"), False, False),
        (AssertionError(), False, False),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_which_errors_disqualify(error, out, lost):
    assert (failures.disqualifies(error), failures.context_is_lost(error)) == (out, lost)


def test_a_crop_that_torch_cannot_say_is_tuned_without_torch(clockless):
    asymmetric = dataclasses.replace(UP, crop=(0, 0, 0), out_size=(6, 8, 7))
    assert not asymmetric.torch_crop.exact
    assert len(tritonconv.tune(asymmetric).winners) == 3


# ------------------------------------------------------------------ the store while it runs


def test_what_is_stored_is_not_measured_again_unless_asked(clockless):
    first = tritonconv.tune([UP, HALO])
    assert first.timings > 20 and not first.known
    second = tritonconv.tune([UP, HALO, UP])
    assert (second.timings, len(second.known), second.winners) == (0, 2, [])
    again = tritonconv.tune(UP, again=True)
    assert len(again.winners) == 3 and again.timings > 10


def test_an_edited_kernel_and_a_new_torch_are_measured_again(clockless, monkeypatch):
    tritonconv.tune(UP)
    monkeypatch.setattr(session, "versions_of", lambda device: {"torch": "3.0"})
    assert len(tritonconv.tune(UP).winners) == 3
    assert {each.versions["torch"] for each in entries().values()} == {"3.0"}


def test_a_budget_ends_it_with_everything_stored_and_the_next_run_goes_on():
    tiny = [dataclasses.replace(UP, n=2**power) for power in range(6)]
    first = tritonconv.tune(tiny, seconds=0.2)
    assert first.reason == "budget" and first.left > 0 and "goes on from here" in str(first)
    taken = len(journal.Journal.open(device_name(CPU)).timings)
    second = tritonconv.tune(tiny)
    assert second.reason == "complete"
    assert len(entries()) == 18
    lines = journal.Journal(device_name(CPU)).path.read_text().splitlines()
    screened = Counter(line_identity(line) for line in lines if json.loads(line)["stage"] == "screen")
    assert max(screened.values()) == 1 and len(lines) > taken


def line_identity(line: str) -> str:
    return journal._timing(line).identity


def test_a_store_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "interleave", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        tritonconv.tune(UP, folder=tmp_path / "file" / "store")


# ------------------------------------------------------------------ models and processes


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose3d(4, 3, 2, stride=2), nn.BatchNorm3d(3)
        self.again = tritonconv.ConvTranspose3d(3, 2, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x):
        return self.again(self.norm(self.up(x)))


def test_a_models_problems_are_those_that_it_runs_and_it_stays_as_it_was(clockless):
    model, x = Model(), torch.randn(1, 4, 3, 4, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = [problem for problem, _ in api.problems_of(model, x)]
    assert seen[0] == UP
    assert (seen[1].c_in, seen[1].size, seen[1].crop, seen[1].out_size) == (3, (6, 8, 10), (1, 1, 1), (12, 16, 20))
    assert type(model.up) is nn.ConvTranspose3d and type(model.again) is tritonconv.ConvTranspose3d
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = tritonconv.tune(model, x)
    assert len(report.winners) == 6
    assert str(Key.of(UP, "forward")) in entries()


def test_a_lazy_layer_is_a_layer_of_torchs_afterwards():
    model = nn.Sequential(nn.LazyConvTranspose3d(3, 2, stride=2))
    assert len(api.problems_of(model, torch.randn(1, 4, 3, 4, 5))) == 1
    assert type(model[0]) is nn.ConvTranspose3d


@pytest.mark.parametrize(
    ("target", "inputs", "kind", "words"),
    [
        (3, (), ArgumentTypeError, "got 3"),
        ([], (), ArgumentError, "no problem"),
        (UP, (1,), ArgumentError, "take no inputs"),
        (nn.Linear(2, 2), (torch.ones(1, 2),), ArgumentError, "no 3-D transposed"),
    ],
    ids=["number", "nothing", "inputs", "no layer"],
)
def test_bad_targets_are_refused(target, inputs, kind, words):
    with pytest.raises(kind, match=words):
        tritonconv.tune(target, *inputs)
    with pytest.raises(ArgumentError, match="seconds"):
        tritonconv.tune(UP, seconds=-1)


def test_rows_of_a_session_can_be_read_and_name_their_problem(tmp_path, clockless):
    from tritonconv.lab.bench import results

    with results.Writer(tmp_path, "tune-") as writer:
        header = {"utc": "", "device": "cpu", "device_name": "box", "threads": 1, "torch": "2", "triton": None}
        writer.write("environment", {"schema": 1, "run": writer.run, **header, "scale": "given", "scale_rule": "",
                                     "commit": None})  # fmt: skip
        Session(CPU, write=writer.write).run(tasks_of([UP]), Progress())
    run = results.read(writer.path)
    assert {row["pass"] for row in run.tuned} == set(PASSES)
    assert {row["stage"] for row in run.timings} == {"screen", "final"}
    assert all(row["problem"]["size"] == [3, 4, 5] for row in run.timings)
