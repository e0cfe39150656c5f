"""Null rows, what they say, and where the seconds went. CPU only; the clocks are in test_clock.py."""

from __future__ import annotations

import pytest
import torch

from tritonconv import Problem
from tritonconv.autotune.tuning import contest, session
from tritonconv.autotune.tuning.session import Session, tasks_of
from tritonconv.autotune.tuning.tuner import ProblemTuner
from tritonconv.forced import forced_variants, use
from tritonconv.lab.bench import measure, noise, nulls, runner, spent
from tritonconv.lab.bench.calls import FORWARD_BACKWARD
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.noise import AGAIN, OUR_ROAD, Band, band
from tritonconv.lab.bench.options import Options
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.bench.results import BASELINE, read
from tritonconv.lab.bench.summary import groups, summary
from tritonconv.lab.bench.timing import Times
from tritonconv.lab.bench.workloads import workload
from tritonconv.problem import PASSES

CPU = torch.device("cpu")
UP = Problem(1, 4, 3, (3, 4, 5), (2, 2, 2), (2, 2, 2), (0, 0, 0), (6, 8, 10), bias=True)


@pytest.mark.parametrize("pass_name", [*PASSES, FORWARD_BACKWARD])
def test_null_contestants_give_torchs_answers_whatever_is_forced(pass_name, launches):
    case = Case(UP, CPU)
    want = case.torch(pass_name)()
    with use("forward_torch_phases", "backward_data_torch_conv", "backward_weight_torch_phases"):
        made = nulls.calls(case, pass_name)
    both = pass_name in ("forward", FORWARD_BACKWARD)  # a gradient by itself has no road of ours
    assert list(made) == ([AGAIN, OUR_ROAD] if both else [AGAIN])
    for call in made.values():
        assert all(map(torch.equal, call(), want))
    assert forced_variants() == () and all(name.endswith("_torch_native") for name in launches)


def test_where_torchs_own_is_wrong_our_road_to_it_is_no_contestant():
    wrong = Problem(1, 4, 3, (6, 6, 6), (3, 3, 3), (1, 1, 1), (2, 1, 1), (4, 6, 6))  # see kernels/torch_native.py
    assert list(nulls.calls(Case(wrong, CPU), FORWARD_BACKWARD)) == [AGAIN]


def null(ratio: float, variant: str = AGAIN, column: str = "gpu") -> dict:
    tails = ("", "_p20", "_p80")
    speedups = {f"{column}_speedup{tail}": ratio for tail in tails}
    return {"variant": variant, "timing": column, f"{column}_runs": 9, **speedups}


def test_the_band_holds_1_and_what_the_null_rows_show():
    rows = [null(1.01), null(1.02, OUR_ROAD), null(0.5, column="wall")]
    assert band(rows, "gpu") == Band(1.0, 1.02, 2) and band(rows, "gpu", AGAIN) == Band(1.0, 1.01, 1)
    assert band(rows, "wall") == Band(0.5, 1.0, 1) and band(rows, "graph") is None
    assert band(rows, "gpu").noise == 1.02 and band(rows, "wall").noise == 2.0
    many = [null(1 + step / 1000) for step in range(20)] + [null(30.0)]  # another program hit one of them
    assert band(many, "gpu").high == pytest.approx(1.018)


def test_a_row_counts_as_faster_or_slower_only_beyond_the_null_rows():
    def row(ratio: float, layer: str) -> dict:
        ratios = {"speedup": ratio, "speedup_p20": ratio - 0.01, "speedup_p80": ratio + 0.01}
        return {
            "variant": "tritonconv",
            "pass": "forward",
            "dtype": "float32",
            "layout": "ncdhw",
            "layer": layer,
            **ratios,
        }

    rows = [row(1.04, "a"), row(1.2, "b"), row(0.93, "c"), row(0.8, "d")]
    (plain,), (noisy,) = groups(rows), groups(rows, noise=1.1)
    assert (plain.faster, plain.slower) == (2, 2) and (noisy.faster, noisy.slower) == (1, 1)


@pytest.mark.usefixtures("quick")
def test_every_run_of_the_bench_has_null_rows_of_each_pass_and_says_where_the_seconds_went(tmp_path):
    layers = tuple(workload(name) for name in ("monai_unet_spleen_64_16", "vnet_up3"))
    outcome = runner.bench(Options(layers, scale="cpu"), tmp_path, Progress())
    found = read(outcome.path)
    assert {(row["pass"], row["variant"]) for row in found.nulls} == {
        (pass_name, name) for pass_name in ("forward", FORWARD_BACKWARD) for name in noise.NAMES
    }
    assert all(row["timing"] == "wall" and row["wall_p20_ms"] <= row["wall_ms"] for row in found.nulls)
    assert len(found.results) == 2 * len(found.nulls) // 2  # as many cells; here each has null rows
    assert "each beyond the null rows, " in summary(found)
    kinds = found.end["spent"]["bench"]
    assert kinds.keys() >= {spent.GATE, spent.TIMING}
    assert sum(kinds.values()) == pytest.approx(found.end["seconds"], rel=0.1)


def test_a_tuning_run_has_null_rows_and_a_choice_is_beyond_them(tmp_path, monkeypatch):
    """Torch against torch differs by a tenth, so a candidate that is faster by a twentieth is not chosen."""
    ms = {BASELINE: 2.0, AGAIN: 2.2, OUR_ROAD: 1.9, "forward_torch_phases": 1.9}
    monkeypatch.setattr(
        measure, "interleave", lambda calls, *_, **more: Times({label: [ms.get(label, 2.0)] * 3 for label in calls})
    )
    monkeypatch.setattr(contest, "HOPELESS", float("inf"))
    written = []
    session = Session(CPU, tmp_path, write=lambda kind, row: written.append((kind, row)))
    report = session.run(tasks_of([UP]), Progress())
    assert [(row["variant"], row["pass"]) for kind, row in written if kind == "null"] == [
        (AGAIN, "forward"), (OUR_ROAD, "forward")
    ]  # fmt: skip
    assert report.noise.noise == pytest.approx(1.1) and "in 2 null rows: 0.909 to 1.053" in str(report)
    assert report.winners[0][1].selection.variant.name != "forward_torch_phases"
    ms["forward_torch_phases"] = 1.7
    report = Session(CPU, tmp_path, again=True).run(tasks_of([UP]), Progress())
    assert report.winners[0][1].selection.variant.name == "forward_torch_phases"


def test_without_memory_for_null_rows_a_problem_is_tuned_all_the_same(tmp_path, monkeypatch):
    def no_room(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(contest.Contest, "null_rows", no_room)
    monkeypatch.setattr(ProblemTuner, "gradients", lambda *args: ())
    monkeypatch.setattr(session, "PROBLEM_SECONDS", 0.2)
    report = Session(CPU, tmp_path).run(tasks_of([UP]), Progress())
    assert len(report.winners) == 1 and report.noise is None and "null rows" not in str(report)


def test_each_second_counts_once_to_the_innermost_kind_of_work():
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    with spent.Ledger(clock=lambda: next(now)) as ledger:
        ledger.step("tune")  # 1 s before it
        # 2 s of other work, 3 of timing, 4 of the gate, 5 of timing, and 6 of other work again
        with spent.on(spent.TIMING), spent.on(spent.GATE):
            pass
        kinds = {spent.OTHER: 2.0 + 6.0, spent.TIMING: 3.0 + 5.0, spent.GATE: 4.0}
        assert ledger.rounded() == {"start": {spent.OTHER: 1.0}, "tune": kinds}
    with spent.on(spent.GATE):  # no ledger is in force
        pass
    lines = spent.lines(ledger.seconds)
    assert lines[0] == ["seconds", "start", "tune", "all"] and lines[-1] == ["all", "1.0", "20.0", "21.0"]
    assert lines[1][0] in (spent.OTHER, spent.TIMING)
