"""Variants that cheat the benchmark: each is an error row with its reason in bench, tune and campaign. CPU only."""

from __future__ import annotations

import textwrap
import threading
from pathlib import Path

import pytest
import torch

from tritonconv import dispatch
from tritonconv.autotune import choose, store
from tritonconv.autotune.key import device_name
from tritonconv.autotune.tuning import contest, journal, session
from tritonconv.kernels import registry
from tritonconv.lab import campaign, cli, verification
from tritonconv.lab.bench import calls, conduct, gate, layer_sizes, results, roofs, runner
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.workloads import workload
from tritonconv.problem import Problem

CPU = torch.device("cpu")
LAYER = "segresnet_deconv_up2"
HEAD = """
import threading, torch
from tritonconv import Variant
from tritonconv.lab.bench.conduct import time
kept, made = {}, []

def later(y):
    late, slept = torch.zeros_like(y), threading.Event()
    thread = threading.Thread(target=lambda: (slept.wait(), late.copy_(y)), daemon=True)
    thread.start()
    time.waiting.append((slept, thread))
    return late

def answer(problem, x, weight, bias):
    return torch.nn.functional.conv_transpose3d(x, weight, bias, *problem.torch_arguments)

VARIANT = Variant(name="forward_torch_cheat", pass_name="forward", idea="cheats", backend="torch",
                  supports=lambda problem, device: None, launch=lambda *args: launch(*args))
"""
REMEMBERED, OPERAND, CHANGED, LATE = "remembered", "memory of the operand", "changes its operand", "not ready"
CHEATS = {
    "by pointer": (REMEMBERED, """
        def launch(problem, config, x, weight, bias):
            key = x.data_ptr(), weight.data_ptr()
            if key not in kept:
                kept[key] = answer(problem, x, weight, bias)
            return kept[key]"""),
    "a copy, by pointer": (REMEMBERED, """
        def launch(problem, config, x, weight, bias):
            key = x.data_ptr(), weight.data_ptr()
            if key not in kept:
                kept[key] = answer(problem, x, weight, bias)
            return kept[key].clone()"""),
    "by sizes": (REMEMBERED, """
        def launch(problem, config, x, weight, bias):
            if problem not in kept:
                kept[problem] = answer(problem, x, weight, bias)
            return kept[problem].clone()"""),
    "after some calls": (REMEMBERED, """
        def launch(problem, config, x, weight, bias):
            made.append(None)
            if len(made) < 6:
                kept[problem] = answer(problem, x, weight, bias)
            return kept[problem].clone() if problem in kept else answer(problem, x, weight, bias)"""),
    "a packed weight, by pointer": ("max error", """
        def launch(problem, config, x, weight, bias):
            packed = kept.setdefault(weight.data_ptr(), weight.clone())
            return answer(problem, x, packed, bias)"""),
    "the operand": (CHANGED + " x", """
        def launch(problem, config, x, weight, bias):
            y = answer(problem, x, weight, bias)
            x.untyped_storage().resize_(max(x.untyped_storage().nbytes(), y.numel() * y.element_size()))
            return x.as_strided(y.shape, y.stride()).copy_(y)"""),
    "one buffer": ("overwritten", """
        def launch(problem, config, x, weight, bias):
            y = answer(problem, x, weight, bias)
            return kept.setdefault(problem, torch.empty_like(y)).copy_(y)"""),
    "x in place": (CHANGED + " x", """
        def launch(problem, config, x, weight, bias):
            y = answer(problem, x, weight, bias)
            x.relu_()
            return y"""),
    "weight in place": (CHANGED + " weight", """
        def launch(problem, config, x, weight, bias):
            y = answer(problem, x, weight, bias)
            weight.detach().numpy().fill(1)
            return y"""),
    "another thread": (LATE, """
        def launch(problem, config, x, weight, bias):
            y = answer(problem, x, weight, bias)
            return y if problem.size[0] < 6 else later(y)  # the gate's problem is small"""),
    "another thread, done by the next call": (LATE, """
        def launch(problem, config, x, weight, bias):
            time.sleep(0)
            y = answer(problem, x, weight, bias)
            return y if problem.size[0] < 6 else later(y)"""),
    "another dtype": ("expected torch.float32, got torch.float64", """
        def launch(problem, config, x, weight, bias):
            return answer(problem, x, weight, bias).double()"""),
    "lazily negated": ("lazily negated", """
        def launch(problem, config, x, weight, bias):
            return torch._neg_view(-answer(problem, x, weight, bias))"""),
}  # fmt: skip


class Waiting:
    """In the place of the module time: a sleep is as long as the threads take that wait for one."""

    def __init__(self) -> None:
        self.waiting: list[tuple[threading.Event, threading.Thread]] = []

    def sleep(self, seconds: float) -> None:
        while self.waiting:
            slept, thread = self.waiting.pop()
            slept.set()
            thread.join()


@pytest.fixture
def cheat(tmp_path, monkeypatch, quick, own_store):
    """Writes a variant file, which is forgotten after the test; the benchmark is short."""
    records, files = dict(registry._records()), dict(registry._files)
    monkeypatch.setattr(registry, "_records", lambda: records)
    monkeypatch.setattr(registry, "_files", files)
    monkeypatch.setattr(session, "PROBLEM_SECONDS", 0.05)
    monkeypatch.setattr(layer_sizes, "CPU_GFLOP", 0.02)
    monkeypatch.setattr(conduct, "time", Waiting())

    def write(text: str) -> Path:
        path = tmp_path / "cheat.py"
        path.write_text(HEAD + textwrap.dedent(text))
        return path

    return write


def rows_of(folder: Path) -> tuple[list[dict], list[dict]]:
    run = results.load(folder)
    named = [row for row in (*run.results, *run.timings, *run.tuned, *run.checks)
             if "forward_torch_cheat" in (row["variant"], *row.get("chosen", {}).values())]  # fmt: skip
    return named, [row for row in run.errors if row["variant"] == "forward_torch_cheat"]


FLAGS = ("--layout", "ncdhw", "--quiet")


@pytest.mark.parametrize("kind", CHEATS)
def test_a_cheat_is_an_error_row_in_bench(cheat, tmp_path, kind, capsys):
    reason, text = CHEATS[kind]
    path, out = cheat(text), tmp_path / "out"
    arguments = ["--variant-file", str(path), "--only", LAYER, "--passes", "forward", "--output", str(out), *FLAGS]
    assert cli.main(["bench", *arguments]) == 1
    named, errors = rows_of(out)
    assert named == [] and len(errors) == 1 and reason in errors[0]["message"], (named, errors)
    others = {row["variant"] for row in results.load(out).results}
    assert others == {"torch", "tritonconv"}  # whose operands are as they were
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize("kind", CHEATS)
def test_a_cheat_is_an_error_row_of_the_tuner_and_is_never_stored(cheat, tmp_path, monkeypatch, kind, capsys):
    monkeypatch.setattr(contest, "FINALISTS", 99)  # the answers of the fastest are looked at: here of all
    reason, text = CHEATS[kind]
    path, out = cheat(text), tmp_path / "out"
    problem = ["--x", "1x8x6x8x10", "--weight", "8x8x2x2x2", "--stride", "2"]
    assert cli.main(["tune", "--variant-file", str(path), *problem, "--output", str(out), *FLAGS]) == 0
    named, errors = rows_of(out)
    assert named == [] and len(errors) == 1 and reason in errors[0]["message"], (named, errors)
    assert f"left out: forward_torch_cheat on problem 1: n1 8->8 6x8x10 k2 s2 ncdhw (forward): y: {reason}"[:60] in (
        capsys.readouterr().out
    )
    stored = store.read(device_name(CPU)).entries
    assert len(stored) == 3 and all("cheat" not in str(each) for each in stored.values())
    kept = [each for each in journal.Journal.open(device_name(CPU)).timings.values() if "cheat" in each.variant]
    assert [each.status for each in kept] == [journal.WRONG]


def test_a_cheat_is_an_error_row_in_a_campaign(cheat, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "SAMPLE_LAYERS", {"k2s2": "segresnet_deconv_up2"})
    monkeypatch.setattr(verification, "CHECKED_AXES", 3)
    monkeypatch.setattr(session, "WHOLE", session.WHOLE._replace(seconds=0.2))
    monkeypatch.setattr(runner, "MOST_CELL_SECONDS", 0.2)
    short = {"roofs": 1e-5, "overhead": 1e-6}  # of a budget that no machine uses up
    monkeypatch.setitem(campaign.SHARES, "cpu", campaign.SHARES["cpu"]._replace(**short))
    reason, text = CHEATS["by pointer"]
    out = tmp_path / "out"
    layer = ["--only", "spleen_64_16", "--passes", "forward"]
    arguments = ["--variant-file", str(cheat(text)), *layer, "--output", str(out), *FLAGS]
    assert cli.main(["campaign", "--seconds", "100000", *arguments]) == 1
    named, errors = rows_of(out)
    assert named == [] and len(errors) == 3  # verified, tuned, timed
    assert all(reason in row["message"] for row in errors), errors
    assert all("cheat" not in str(each) for each in store.own(device_name(CPU), out / "store").entries.values())


@pytest.mark.parametrize("where", ["supports", "default", "work", "launch", "launch, later"])
def test_a_variant_that_raises_anywhere_is_one_error_row(cheat, tmp_path, where):
    attribute, later = where.partition(",")[::2]
    text = f"""
        import dataclasses
        def boom(*args):
            made.append(None)
            if not {bool(later)} or len(made) > 7:
                raise KeyError("boom")
            return answer(args[0], *args[2:])
        launch = lambda problem, config, *operands: answer(problem, *operands)
        VARIANT = dataclasses.replace(VARIANT, {attribute}=boom)
    """
    path, out = cheat(text), tmp_path / "out"
    arguments = ["--variant-file", str(path), "--only", LAYER, "--passes", "forward", "--output", str(out), *FLAGS]
    assert cli.main(["bench", *arguments]) == 1
    named, errors = rows_of(out)
    assert named == [] and [row["message"] for row in errors] == ["KeyError: 'boom'"]
    assert {row["variant"] for row in results.load(out).results} == {"torch", "tritonconv"}


# ------------------------------------------------------------------ the operands


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
def test_operands_change_in_every_place_that_counts_and_come_back_bit_by_bit(dtype, layout):
    problem = Problem(
        2, 4, 3, (3, 4, 5), (2,) * 3, (2,) * 3, (0,) * 3, (6, 8, 10), dtype=dtype, layout=layout, bias=True
    )
    t = calls.make_tensors(problem, CPU, 0)
    before = {name: each.clone() for name, each in conduct.named(t).items()}
    sums = conduct.checksums(t)
    versions = {name: each._version for name, each in before.items()}
    with conduct.Operands(t) as operands:
        seen = []
        for _ in range(conduct.STEPS):
            operands.change()
            seen.append([each.flatten()[[0, -1]].tolist() for each in conduct.named(t).values()])
        assert all(len({str(each) for each in one}) == conduct.STEPS for one in zip(*seen, strict=True))
        operands.change_wholly()
        assert bool((t.x != before["x"]).all()) and bool((t.grad_y != before["grad_y"]).all())
        assert conduct.checksums(t).keys() == sums.keys() and conduct.checksums(t) != sums
    assert conduct.checksums(t) == sums and versions
    assert all(torch.equal(each, before[name]) for name, each in conduct.named(t).items())


@pytest.mark.parametrize("name", ["x", "weight", "bias", "grad_y"])
def test_an_operand_that_changed_is_drawn_anew_in_its_place(name):
    problem = Problem(1, 4, 3, (3, 4, 5), (2,) * 3, (2,) * 3, (0,) * 3, (6, 8, 10), layout="ndhwc", bias=True)
    case = Case(problem, CPU)
    operand = getattr(case.tensors, name)
    before, address = operand.clone(), operand.data_ptr()
    assert case.put_back() == ""
    operand.flatten()[-1:].zero_() if operand.is_contiguous() else operand[-1, -1, -1, -1, -1].zero_()
    assert case.put_back() == name and case.put_back() == ""
    assert torch.equal(operand, before) and operand.data_ptr() == address


def test_an_output_in_the_memory_of_an_operand_is_told():
    """That it changes the operand would be told first, where it does."""
    case = Case(workload(LAYER).problem(scale="cpu"), CPU)
    verdict = case.judge("forward").at_size(lambda: (case.tensors.grad_y.detach(),))
    assert not verdict.ok and str(verdict) == f"y: it lies in the {OPERAND} grad_y"


def test_a_right_call_passes_and_sees_other_operands_each_time():
    case = Case(workload(LAYER).problem(scale="cpu"), CPU)
    seen = set()

    def call():
        seen.add(float(case.tensors.x.flatten()[0]))
        return case.torch("forward")()

    assert case.judge("forward").at_size(call).ok and len(seen) == 2
    assert set(gate.OUTPUTS["forward"]) == {"y"}


# ------------------------------------------------------------------ the roof of the memory


def test_bytes_count_what_is_reached():
    """A kernel of 1 and stride 2 meets every eighth voxel of grad_y; a bias needs the sum over all."""
    problem = Problem(1, 4, 8, (4, 4, 4), (1,) * 3, (2,) * 3, (0,) * 3, (8, 8, 8))
    x, weight, y = 4 * 64, 32, 8 * 512
    moved = {name: calls.work(problem, name)[1] for name in ("forward", "backward_data", "backward_weight")}
    assert moved == {"forward": 4 * (x + weight + y), "backward_data": 4 * (x + weight + y // 8),
                     "backward_weight": 4 * (x + weight + y // 8)}  # fmt: skip
    biased = Problem(1, 4, 8, (4, 4, 4), (1,) * 3, (2,) * 3, (0,) * 3, (8, 8, 8), bias=True)
    assert calls.work(biased, "backward_weight")[1] == biased.bytes("backward_weight")
    whole = workload("vnet_up3").problem()
    assert all(calls.work(whole, name)[1] == whole.bytes(name) for name in moved)
    cropped = Problem(1, 4, 8, (4, 4, 4), (2,) * 3, (2,) * 3, (2,) * 3, (4, 4, 4))  # an input at each end is cut off
    assert calls.work(cropped, "forward")[1] == cropped.bytes() - 4 * 4 * (64 - 8)


def test_the_memory_that_the_data_fits_in():
    cache, memory = ({"name": name, "dtype": None, "value": value, "working_set_bytes": size} for name, value, size in (
        ("copy_cache", 100e9, 16 << 20), ("copy_memory", 20e9, 256 << 20)))  # fmt: skip
    assert [roofs.fastest_rate([cache, memory], size) for size in (1 << 10, 1 << 30)] == [100e9, 20e9]
    l2 = {"name": "copy_l2", "dtype": None, "value": 90e9, "working_set_bytes": 30 << 20}
    assert [roofs.fastest_rate([memory, l2], size) for size in (60 << 20, 61 << 20)] == [90e9, 20e9]
    assert roofs.fastest_rate([], 1) is None
    problem = Problem(1, 4, 8, (4, 4, 4), (2,) * 3, (2,) * 3, (0,) * 3, (8, 8, 8))
    ms = problem.bytes() / 1e9 * 1e3
    assert roofs.beyond(problem, "forward", ms, None) == roofs.beyond(problem, "forward", ms / 1.29, 1e9) == ""
    assert roofs.beyond(problem, "forward", ms / 1.5, 1e9).startswith("1.5 times as fast as memory gives its bytes")


def test_a_result_beyond_its_roof_is_timed_again_and_warned_of(tmp_path, monkeypatch, quick, capsys):
    rounds = []
    real = runner.CellTimer._measured
    monkeypatch.setattr(runner.CellTimer, "_measured", lambda *args: rounds.append(args[2].keys()) or real(*args))
    monkeypatch.setattr(roofs, "fastest_rate", lambda *args: 1.0)  # a byte per second
    arguments = ["--only", LAYER, "--passes", "forward", "--output", str(tmp_path), *FLAGS]
    assert cli.main(["bench", *arguments]) == 0
    assert len(rounds) == 2
    found = results.load(tmp_path).results
    assert [row["warning"].split(":")[0] for row in found] == ["wall", "wall"]
    assert f"warning: tritonconv on {LAYER} (forward): wall: " in capsys.readouterr().out


def test_a_winner_beyond_its_roof_is_timed_again_and_warned_of(tmp_path, monkeypatch, own_store):
    finals = []
    real = contest.Contest.final
    monkeypatch.setattr(contest.Contest, "final", lambda self, *args: finals.append(args) or real(self, *args))
    monkeypatch.setattr(contest.Contest, "memory_rate", 1.0)
    monkeypatch.setattr(session, "PROBLEM_SECONDS", 0.05)
    problem = ["--x", "1x8x3x4x5", "--weight", "8x8x2x2x2", "--stride", "2"]
    assert cli.main(["tune", *problem, "--output", str(tmp_path), *FLAGS]) == 0
    assert len(finals) == 4  # the forward and the step, twice each
    assert all("times as fast as memory" in row["warning"] for row in results.load(tmp_path).tuned)
    choose.forget()
    dispatch.forget()
