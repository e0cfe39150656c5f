"""A GPU that the tuner loses behind the screening: what did it is remembered, and the next run passes it over.

On a CPU: the error that a lost GPU raises is made up, all else is the tuner's.
"""

from __future__ import annotations

import pytest
from test_tuning import CPU, UP, broken, clockless, entries, folder, raising, winner  # noqa: F401  (fixtures)

import tritonconv
from tritonconv.autotune import choose
from tritonconv.autotune.key import device_name
from tritonconv.autotune.sources import revision
from tritonconv.autotune.tuning import journal
from tritonconv.autotune.tuning.candidates import Candidate
from tritonconv.autotune.tuning.contest import Contest
from tritonconv.kernels import registry
from tritonconv.lab.bench import case, measure
from tritonconv.lab.bench.results import BASELINE
from tritonconv.lab.bench.rows import versions_of
from tritonconv.problem import PASSES

LOST = RuntimeError("CUDA error: an illegal memory access was encountered")
HOLDER = "the choice that holds without tuning"


def records(status: str) -> list[journal.Timing]:
    return [each for each in journal.Journal.open(device_name(CPU)).timings.values() if each.status == status]


@pytest.fixture
def made(broken, monkeypatch):  # noqa: F811
    """The calls of a variant after :func:`arm`; they raise in the final, or before it in the verification."""
    calls = []

    def arm(name: str, where: str) -> list[str]:
        launch, stage = registry.variant(name).launch, ["screening"]

        def launched(*args):
            if stage[0] == where:
                raise LOST
            calls.append(stage[0])
            return launch(*args)

        def in_stage(name, real):
            def run(*args, **more):
                before, stage[0] = stage[0], name
                try:
                    return real(*args, **more)
                finally:
                    stage[0] = before

            return run

        def interleaved(given, watch, seconds, **rounds):
            for call in given.values():
                watch(call)
            return timed(given, watch, seconds, **rounds)

        broken(name, launched)
        timed = measure.interleave
        monkeypatch.setattr(measure, "interleave", interleaved)
        monkeypatch.setattr(case.Case, "verdict", in_stage("verification", case.Case.verdict))
        monkeypatch.setattr(Contest, "final", in_stage("final", Contest.final))
        return calls

    return arm


@pytest.mark.parametrize("where", ["verification", "final"])
@pytest.mark.parametrize("name", ["forward_torch_phases", HOLDER, "backward_weight_torch_phases"])
def test_the_finalist_that_lost_the_gpu_is_not_called_again(clockless, made, name, where):  # noqa: F811
    name = choose.untuned(UP, CPU, "forward").variant.name if name == HOLDER else name
    mates = {"backward_weight_torch_phases": "backward_data_torch_conv"}  # in one training step: each may have done it
    blamed = {name, *([mates[name]] if name in mates else [])}
    clockless.update({"forward_torch_columns": 1.0, **dict.fromkeys(blamed, 1.5), BASELINE: 3.0})
    calls = made(name, where)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tritonconv.tune(UP)
    found = records(journal.FAILED)
    assert {each.variant for each in found} == blamed
    assert all(each.stage == journal.SCREEN and "illegal memory access" in each.message for each in found)
    assert {key.split()[0] for key in entries()} == ({"forward"} if name in mates else set())
    assert "screening" in calls
    calls.clear()
    tritonconv.tune(UP)
    assert calls == [] and {winner(each) for each in PASSES}.isdisjoint(blamed)


@pytest.mark.skipif(not registry.have_triton(), reason="suspects a Triton kernel")
def test_torchs_own_operations_are_suspected_only_where_they_are_alone(folder):  # noqa: F811
    kernel, native, phases = (
        Candidate(choose.Selection(registry.variant(name), {}, ""), 0.0)
        for name in ("backward_weight_cells", "backward_data_torch_native", "backward_weight_torch_phases")
    )
    for mate, names in ((kernel, {"backward_weight_cells"}), (phases, {native.label, phases.label})):
        one = Contest(case.Case(UP, CPU), journal.Journal(device_name(CPU), folder / mate.label), None, {})
        one.keep_loss([("backward_data", native), ("backward_weight", mate)], LOST)
        assert {each.variant for each in one.journal.timings.values()} == names
        assert one.refuses("backward_data", native) == (mate is phases)
        assert one.refuses("backward_weight", mate)


def test_what_torchs_own_call_loses_is_no_candidates_fault(folder):  # noqa: F811
    other = Candidate(choose.untuned(UP, CPU, "forward"), 0.0)
    one = Contest(case.Case(UP, CPU), journal.Journal(device_name(CPU), folder), None, {})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        one.final({"other": lambda: None, BASELINE: raising(LOST)}, {"other": [("forward", other)]}, 1.0)
    assert not one.journal.timings


def test_a_stored_choice_that_lost_the_gpu_since_is_chosen_anew(clockless):  # noqa: F811
    clockless.update({"forward_torch_phases": 1.0, BASELINE: 3.0})
    tritonconv.tune(UP)
    assert winner("forward") == "forward_torch_phases" and len(tritonconv.tune(UP).known) == 1
    record = registry.variant("forward_torch_phases")
    journal.Journal.open(device_name(CPU)).add(
        journal.Timing(str(UP), "forward", record.name, {}, revision(record), journal.SCREEN, versions_of(CPU),
                       status=journal.FAILED, message=str(LOST))
    )  # fmt: skip
    assert tritonconv.tune(UP).known == []
    assert winner("forward") != "forward_torch_phases"
