"""The campaign: its steps in one file, resumed in a folder, ended by its budget or by hand. CPU only."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tritonconv import campaign, cli, contestants, dispatch, runner
from tritonconv.bench import results
from tritonconv.errors import ResultsError
from tritonconv.tuning import session

pytestmark = pytest.mark.usefixtures("quick")
SMALL = ("--suite", "unet", "--only", "spleen_64_16", "--layout", "ncdhw", "--quiet")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Two classes of layers are verified, and a problem is tuned in no time."""
    monkeypatch.setattr(campaign, "CLASSES", {"k2s2": "segresnet_deconv_up2", "k3s2": "psmnet_train_64_32"})
    monkeypatch.setattr(campaign, "CHECKED_AXES", 3)
    monkeypatch.setattr(session, "WHOLE", session.WHOLE._replace(seconds=0.2))
    monkeypatch.setattr(runner, "MOST_CELL_SECONDS", 0.2)


def run(folder: Path, seconds: float, *more: str) -> int:
    return cli.main(["campaign", "--seconds", str(seconds), "--out", str(folder), *SMALL, *more])


def test_one_command_does_all_steps_in_one_file_and_a_second_run_repeats_nothing(tmp_path, capsys):
    before = os.environ["TRITONCONV_CACHE"]
    assert run(tmp_path, 10) == 0
    out = capsys.readouterr().out
    assert all(step in out for step in ("verify:", "roofs:", "tune: 3 choices", "bench: 2 of 2 cells", "overhead:"))
    (path,) = results.files(tmp_path)
    first = results.read(path)
    assert first.end["reason"] == "complete" and first.end["seconds"] < 10
    assert all(getattr(first, kind) for kind in ("roofs", "checks", "timings", "tuned", "results", "overheads"))
    assert {row["layer"] for row in first.checks} == {"segresnet_deconv_up2", "psmnet_train_64_32"}
    assert os.environ["TRITONCONV_CACHE"] == before
    assert list((tmp_path / "store").glob("*threads.json")) and not list(Path(before).glob("*.json"))

    assert run(tmp_path, 10) == 0
    again = capsys.readouterr().out
    assert "verify: 0 answers" in again and "roofs: known" in again and "tune: 0 choices" in again
    assert "bench: 0 of 0 cells, 2 known before" in again
    second = results.read(results.latest(tmp_path))
    assert not (second.roofs or second.checks or second.timings or second.results or second.overheads)
    whole = results.load(tmp_path)
    assert len(whole.results) == len(first.results) and whole.run == second.run


def test_torch_compile_is_asked_last_and_adds_its_rows_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contestants, "_compiled", lambda: torch.nn.functional.conv_transpose3d)
    assert run(tmp_path, 10, "--compile") == 0
    out = capsys.readouterr().out
    assert "bench: 2 of 2 cells" in out and "torch.compile: 2 of 2 cells" in out
    (path,) = results.files(tmp_path)
    rows = results.read(path).results
    assert Counter(row["variant"] for row in rows) == {"torch": 2, "tritonconv": 2, "torch_compile": 2}
    assert [row["variant"] for row in rows[-2:]] == ["torch_compile"] * 2 and rows[-1]["speedup"] > 0
    assert run(tmp_path, 10, "--compile") == 0
    assert "torch.compile: 0 of 0 cells, 2 known before" in capsys.readouterr().out


def test_a_cell_whose_choice_has_changed_is_measured_again(tmp_path, capsys):
    assert run(tmp_path, 10) == 0
    for path in (tmp_path / "store").glob("*.json"):
        path.unlink()
    assert run(tmp_path, 10) == 0
    out = capsys.readouterr().out
    assert "tune: 3 choices" in out


def test_a_budget_ends_it_in_time_with_everything_kept(tmp_path, capsys):
    begin = time.monotonic()
    assert cli.main(["campaign", "--seconds", "3", "--out", str(tmp_path), "--suite", "unet", "--quiet"]) == 0
    assert time.monotonic() - begin < 6
    assert "the same command goes on from here" in capsys.readouterr().out
    found = results.read(results.latest(tmp_path))
    assert found.end["reason"] == "budget" and found.roofs and (found.timings or found.results)
    taken = Counter(row["stage"] for row in found.timings)
    assert cli.main(["campaign", "--seconds", "3", "--out", str(tmp_path), "--suite", "unet", "--quiet"]) == 0
    assert len(results.load(tmp_path).timings) >= taken["screen"]


def test_an_interrupt_keeps_the_file_and_puts_the_store_back(tmp_path, monkeypatch):
    before = os.environ["TRITONCONV_CACHE"]

    def stop(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(campaign.Session, "run", stop)
    assert run(tmp_path, 10) == 130
    found = results.read(results.latest(tmp_path))
    assert found.end["reason"] == "interrupted" and found.checks and found.roofs
    assert os.environ["TRITONCONV_CACHE"] == before


def test_a_wrong_variant_is_a_row_and_exit_code_1(tmp_path, monkeypatch):
    real = campaign.Case.judge

    def judge(case, plan, pass_name):
        verdict = real(case, plan, pass_name)
        if pass_name == "forward" and plan.choice(pass_name).variant.name == "forward_torch_phases":
            return type(verdict)("y", 1.0, 0.0, 0.1)
        return verdict

    monkeypatch.setattr(campaign.Case, "judge", judge)
    assert run(tmp_path, 10) == 1
    found = results.read(results.latest(tmp_path))
    assert {row["variant"] for row in found.errors if row["status"] == "wrong"} == {"forward_torch_phases"}


def test_a_folder_of_another_device_is_refused(tmp_path, monkeypatch):
    assert run(tmp_path, 10) == 0
    path = results.latest(tmp_path)
    name = results.read(path).environment["device_name"]
    other = path.read_text().replace(name, "another box")
    (tmp_path / "campaign-20200101T000000Z-0000.jsonl").write_text(other)
    with pytest.raises(ResultsError, match="another box"):
        results.load(tmp_path)
    assert run(tmp_path, 10) == 2
    assert dispatch.forced_variants() == ()
