"""The campaign: its steps in one file, resumed in a folder, ended by its budget or by hand. CPU only."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tritonconv import dispatch
from tritonconv.autotune import choose
from tritonconv.autotune.tuning import session
from tritonconv.errors import ResultsError
from tritonconv.forced import forced_variants
from tritonconv.lab import campaign, cli, verification
from tritonconv.lab.bench import cell, contestants, layer_sizes, results, runner, timing
from tritonconv.lab.bench import clock as watches
from tritonconv.lab.bench.summary import summary
from tritonconv.lab.bench.workloads import workload
from tritonconv.lab.inspection import precompile

pytestmark = pytest.mark.usefixtures("quick")
SMALL = ("--suite", "unet", "--only", "spleen_64_16", "--layout", "ncdhw", "--quiet")
SECONDS = 1e6  # a budget that no machine uses up, however busy it is: what is to be short is so by the fixture
TICK = 0.01  # seconds


@pytest.fixture(autouse=True)
def few(tmp_path, monkeypatch):
    """Two small classes of layers are verified, no step takes long, and the user's store is the test's own."""
    monkeypatch.setenv("TRITONCONV_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(verification, "SAMPLE_LAYERS", {"k2s2": "segresnet_deconv_up2", "k3s2": "psmnet_train_64_32"})
    monkeypatch.setattr(verification, "CHECKED_AXES", 3)
    monkeypatch.setattr(layer_sizes, "CPU_GFLOP", 0.02)
    short = {"roofs": 0.12 / SECONDS, "overhead": 0.06 / SECONDS}
    monkeypatch.setitem(campaign.SHARES, "cpu", campaign.SHARES["cpu"]._replace(**short))
    monkeypatch.setattr(session, "WHOLE", session.WHOLE._replace(seconds=0.2))
    monkeypatch.setattr(runner, "MOST_CELL_SECONDS", 0.2)
    monkeypatch.setattr("tritonconv.lab.commands.campaign.LEAST_SECONDS", SECONDS)  # no new process goes on
    dispatch.forget()
    yield
    monkeypatch.undo()
    dispatch.forget()


@pytest.fixture
def ticking(monkeypatch):
    """Each look at the clock takes a TICK, and nothing else takes time. Returns the clock."""
    looks, real = itertools.count(), time.perf_counter

    def clock() -> float:
        return next(looks) * TICK

    for name, module in list(sys.modules.items()):
        if name.startswith("tritonconv.") and getattr(module, "perf_counter", None) is real:
            monkeypatch.setattr(module, "perf_counter", clock)
    for module in (campaign.roofs, watches):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock))
    for loop in (timing.interleave, timing.warm_up):
        monkeypatch.setitem(loop.__kwdefaults__, "clock", clock)
    return clock


def run(folder: Path, *more: str) -> int:
    return cli.main(["campaign", "--seconds", str(SECONDS), "--out", str(folder), *SMALL, *more])


def test_one_command_does_all_steps_in_one_file_and_a_second_run_repeats_nothing(tmp_path, capsys):
    before = os.environ["TRITONCONV_CACHE"]
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert all(step in out for step in ("verify:", "roofs:", "tune: 3 choices", "bench: 2 of 2 cells", "overhead:"))
    (path,) = results.files(tmp_path)
    first = results.read(path)
    assert first.end["reason"] == "complete" and 0 < first.end["seconds"] < SECONDS
    assert all(getattr(first, kind) for kind in ("roofs", "checks", "timings", "tuned", "results", "overheads"))
    assert {row["layer"] for row in first.checks} == {"segresnet_deconv_up2", "psmnet_train_64_32"}
    assert os.environ["TRITONCONV_CACHE"] == before
    (own,) = Path(before).glob("*.json")
    assert [path.name for path in (tmp_path / "store").glob("*.json")] == [own.name]
    assert "choices: 3 in your store" in out and str(own) in out

    assert run(tmp_path) == 0
    again = capsys.readouterr().out
    assert "verify: 0 answers" in again and "roofs: known" in again and "tune: 0 choices" in again
    assert "bench: 0 of 0 cells, 2 known before" in again
    second = results.read(results.latest(tmp_path))
    assert not (second.roofs or second.checks or second.timings or second.results or second.overheads)
    whole = results.load(tmp_path)
    assert len(whole.results) == len(first.results) and whole.run == second.run


def test_later_calls_take_what_a_campaign_chose(tmp_path, monkeypatch, capsys):
    problem = workload("monai_unet_spleen_64_16").problem(torch.float32, "ncdhw", "cpu")
    assert run(tmp_path, "--no-install") == 0
    assert "TRITONCONV_CACHE=" in capsys.readouterr().out
    assert not (tmp_path / "own").exists()
    assert "tuned" not in choose.choose(problem, torch.device("cpu"), "forward").reason
    assert run(tmp_path) == 0
    assert "tuned on this size" in choose.choose(problem, torch.device("cpu"), "forward").reason


def test_torch_compile_is_asked_last_and_adds_its_rows_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contestants, "_compiled", lambda problem, tensors: torch.nn.functional.conv_transpose3d)
    assert run(tmp_path, "--compile") == 0
    out = capsys.readouterr().out
    assert "bench: 2 of 2 cells" in out and "torch.compile: 2 of 2 cells" in out
    (path,) = results.files(tmp_path)
    rows = results.read(path).results
    assert Counter(row["variant"] for row in rows) == {"torch": 2, "tritonconv": 2, "torch_compile": 2}
    assert [row["variant"] for row in rows[-2:]] == ["torch_compile"] * 2 and rows[-1]["speedup"] > 0
    assert run(tmp_path, "--compile") == 0
    assert "torch.compile: 0 of 0 cells, 2 known before" in capsys.readouterr().out


def test_one_set_of_compiling_processes_serves_all_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(precompile, "Precompiler", None)  # of a step that would start its own
    given = []
    for module in (session, runner):
        monkeypatch.setattr(
            module,
            "ensure_compiler",
            lambda compiler, device: given.append(compiler) or precompile.ensure_compiler(compiler, device),
        )
    assert run(tmp_path) == 0
    assert len(given) == 2 and given[0] is given[1] is not None


def test_a_cell_whose_choice_has_changed_is_measured_again(tmp_path, capsys):
    assert run(tmp_path) == 0
    for path in (tmp_path / "store").glob("*.json"):
        path.unlink()
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "roofs: known" in out and "tune: 3 choices" in out
    (table,) = (tmp_path / "store").glob("*.v2.json")
    assert json.loads(table.read_text())["ceilings"]["measured"]


def test_cells_of_other_sources_other_versions_or_rows_that_do_not_say_are_measured_again(
    tmp_path, monkeypatch, capsys
):
    again, known = "bench: 2 of 2 cells, 0 known", "bench: 0 of 0 cells, 2 known"

    def said() -> str:
        capsys.readouterr()
        assert run(tmp_path) == 0
        return capsys.readouterr().out

    assert again in said() and known in said()
    with monkeypatch.context() as edited:
        edited.setattr(contestants, "revision", lambda record: "an edited kernel")
        assert again in said() and known in said()
    with monkeypatch.context() as updated:
        newer = {"torch": "99", "triton": None}
        updated.setattr(cell, "versions_of", lambda device: newer)
        updated.setattr(campaign, "versions_of", lambda device: newer)
        assert again in said()
    assert again in said()
    for path in results.files(tmp_path):
        path.write_text(path.read_text().replace('"sources": ', '"as it was": '))
    assert again in said()


def test_a_new_dtype_has_its_roof_measured_and_knows_no_cells(tmp_path, capsys):
    assert run(tmp_path) == 0
    for roofs, cells in (("4 measured", "2 of 2 cells, 0 known"), ("known", "0 of 0 cells, 2 known")):
        capsys.readouterr()
        assert run(tmp_path, "--dtype", "bfloat16") == 0
        out = capsys.readouterr().out
        assert f"roofs: {roofs}" in out and f"bench: {cells}" in out
    found = results.load(tmp_path)
    assert Counter(row["dtype"] for row in found.results) == {"float32": 4, "bfloat16": 4}
    assert all(row["percent_of_roof"] > 0 for row in found.results)
    (table,) = (tmp_path / "store").glob("*.v2.json")
    assert json.loads(table.read_text())["ceilings"]["matrix"].keys() == {"float32", "bfloat16"}


@pytest.mark.parametrize("roofs", [1, 3])
def test_roofs_that_an_interrupt_left_out_are_measured_by_the_next_run(tmp_path, monkeypatch, roofs):
    real = campaign.roofs.measure

    def stops(*args):
        yield from itertools.islice(real(*args), roofs)
        raise KeyboardInterrupt

    with monkeypatch.context() as first:
        first.setattr(campaign.roofs, "measure", stops)
        assert run(tmp_path) == 130
    assert len(results.load(tmp_path).roofs) == roofs
    assert run(tmp_path) == 0
    found = results.load(tmp_path)
    assert {row["name"] for row in found.roofs} == {"copy_cache", "copy_memory", "launch", "matmul"}
    assert found.results and all(row["percent_of_roof"] > 0 for row in found.results)


def test_a_budget_ends_it_in_time_with_everything_kept(tmp_path, capsys, ticking):
    command = ["campaign", "--seconds", "3", "--out", str(tmp_path), "--suite", "unet", "--quiet"]
    begin = ticking()
    assert cli.main(command) == 0
    assert ticking() - begin < 4
    assert "the same command goes on from here" in capsys.readouterr().out
    found = results.read(results.latest(tmp_path))
    assert found.end["reason"] == "budget" and found.roofs and (found.timings or found.results)
    taken = Counter(row["stage"] for row in found.timings)
    assert cli.main(command) == 0
    assert len(results.load(tmp_path).timings) >= taken["screen"]


def test_an_interrupt_keeps_the_file_and_puts_the_store_back(tmp_path, monkeypatch):
    before = os.environ["TRITONCONV_CACHE"]

    def stop(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(campaign.Session, "run", stop)
    assert run(tmp_path) == 130
    found = results.read(results.latest(tmp_path))
    assert found.end["reason"] == "interrupted" and found.checks and found.roofs
    assert os.environ["TRITONCONV_CACHE"] == before


def test_a_wrong_variant_is_a_row_and_exit_code_1(tmp_path, monkeypatch):
    real = verification.Case.verdict

    def judge(case, plan, pass_name):
        verdict = real(case, plan, pass_name)
        if pass_name == "forward" and plan.choice(pass_name).variant.name == "forward_torch_phases":
            return type(verdict)("y", 1.0, 0.0, 0.1)
        return verdict

    monkeypatch.setattr(verification.Case, "verdict", judge)
    assert run(tmp_path) == 1
    found = results.read(results.latest(tmp_path))
    assert {row["variant"] for row in found.errors if row["status"] == "wrong"} == {"forward_torch_phases"}


LOST = RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_check_that_loses_the_gpu_ends_the_run_with_its_row_and_the_next_goes_on_behind_it(tmp_path, monkeypatch):
    class Losing(verification.Case):
        def verdict(self, plan, pass_name):
            if pass_name == "forward" and plan.choice(pass_name).variant.name == "forward_torch_phases":
                raise LOST
            return super().verdict(plan, pass_name)

    monkeypatch.setattr(verification, "Case", Losing)  # and not the tuner's, which may find that variant the fastest
    for count in (1, 2):  # one on each layer
        with pytest.raises(RuntimeError, match="illegal memory access"):
            run(tmp_path)
        found = results.load(tmp_path)
        assert found.end["reason"] == "error" and "illegal memory access" in found.end["message"]
        assert len({row["layer"] for row in found.errors}) == len(found.errors) == count
        assert "ended early (error)" in summary(found)
    assert run(tmp_path) == 1  # wrong or failed answers are known, though none was asked for again
    found = results.load(tmp_path)
    assert found.end["reason"] != "error" and len(found.errors) == 2 and found.results
    monkeypatch.setattr(verification, "revision", lambda record: f"{record.name}, edited")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(tmp_path)


def test_a_lost_gpu_is_gone_on_with_in_a_new_process(tmp_path, monkeypatch, capsys):
    class Replaced(BaseException):
        pass

    def execv(program, arguments):
        assert program == sys.executable and not os.get_inheritable(file.fileno())
        raise Replaced(*arguments)

    def lose(*args):
        raise LOST

    monkeypatch.setattr(verification.Case, "verdict", lose)
    monkeypatch.setattr("tritonconv.lab.commands.campaign.LEAST_SECONDS", 1.0)
    monkeypatch.setattr(os, "execv", execv)
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        with pytest.raises(Replaced) as replaced:
            run(tmp_path / "found")
    interpreter, *command = replaced.value.args
    assert interpreter == sys.executable and command[:4] == ["-m", "tritonconv", "campaign", "--seconds"]
    assert command[-2] == "--seconds" and 1 < float(command[-1]) <= SECONDS
    assert "a new one goes on: RuntimeError: CUDA error: an illegal memory" in capsys.readouterr().err
    assert results.load(tmp_path / "found").errors[0]["context_lost"]


def test_a_check_without_memory_and_checks_of_other_versions_are_made_again(tmp_path, monkeypatch, capsys):
    real, name = verification.Case.verdict, "forward_torch_phases"

    def judge(case, plan, pass_name):
        if pass_name == "forward" and plan.choice(pass_name).variant.name == name:
            raise torch.OutOfMemoryError("out of memory")
        return real(case, plan, pass_name)

    with monkeypatch.context() as full:
        full.setattr(verification.Case, "verdict", judge)
        assert run(tmp_path) == 1
    made = len(results.load(tmp_path).checks)
    capsys.readouterr()
    assert run(tmp_path) == 0
    assert "verify: 2 answers held against float64, 0 wrong" in capsys.readouterr().out  # one on each layer
    with monkeypatch.context() as updated:
        updated.setattr(campaign, "versions_of", lambda device: {"torch": "9.9", "triton": None})
        run(tmp_path)
    assert f"verify: {made + 2} answers held against float64" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["contestant", "measure"])
def test_a_cell_that_loses_the_gpu_is_not_begun_again(tmp_path, monkeypatch, capsys, where):
    def lose(*args):
        raise LOST

    real = getattr(cell, where)
    with monkeypatch.context() as broken:
        broken.setattr(
            cell,
            where,
            lambda *args, **how: (lose if args[0] == "tritonconv" or where != "contestant" else real)(*args),
        )
        for count in (1, 2):  # one of each pass
            with pytest.raises(RuntimeError, match="illegal memory access"):
                run(tmp_path)
            found = results.load(tmp_path)
            assert found.end["reason"] == "error" and len({row["pass"] for row in found.errors}) == count
        assert run(tmp_path) == 0
    assert "bench: 0 of 0 cells, 2 known before" in capsys.readouterr().out
    monkeypatch.setattr(contestants, "revision", lambda record: "an edited kernel")
    assert run(tmp_path) == 0
    assert "bench: 2 of 2 cells, 0 known before" in capsys.readouterr().out


def test_a_folder_of_another_device_is_refused(tmp_path, monkeypatch):
    assert run(tmp_path) == 0
    path = results.latest(tmp_path)
    name = results.read(path).environment["device_name"]
    other = path.read_text().replace(name, "another box")
    (tmp_path / "campaign-20200101T000000Z-0000.jsonl").write_text(other)
    with pytest.raises(ResultsError, match="another box"):
        results.load(tmp_path)
    assert run(tmp_path) == 2
    assert forced_variants() == ()
