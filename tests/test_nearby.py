"""A CPU's formulations chosen by measurements of similar layers: the committed rows, and what follows from them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict

import pytest
import torch

import tritonconv
from tritonconv.autotune import nearby, rules
from tritonconv.errors import ArgumentError
from tritonconv.lab.bench import formulations
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.bench.workloads import workload
from tritonconv.problem import PASSES, Problem

CPU = torch.device("cpu")
VENDOR = "AuthenticAMD"
ROWS = nearby.unpacked(nearby.table(VENDOR))
TILE = Problem(4, 64, 32, (8, 8, 8), (2, 2, 2), (2, 2, 2), (0, 0, 0), (16, 16, 16))
NATIVE = tuple(rules.FALLBACK[name] for name in PASSES)


@pytest.fixture
def on_amd(monkeypatch):
    for module in (rules, nearby):
        monkeypatch.setattr(module, "cpu_vendor", lambda: VENDOR)


def gain(logs: dict[str, float], names: tuple[str, str, str]) -> tuple[float, float]:
    """The logarithms of torch's own time over that of the choices: of the forward and of both gradients."""
    forward, *pair = names
    both = 0.0 if tuple(pair) == NATIVE[1:] else -math.log(sum(math.exp(logs[name]) for name in pair))
    return -logs.get(forward, 0.0), both


@pytest.mark.parametrize(
    ("dtype", "every", "forward", "gradients"), [(torch.float32, 3, 1.12, 1.03), (torch.bfloat16, 1, 1.2, 1.05)]
)
def test_choices_hold_for_layers_that_have_no_row(dtype, every, forward, gradients):
    """By seed: what the rows of the others choose for its layers, every so many, by its own measurements."""
    found = [row for row in ROWS if row[1].dtype == dtype]
    of = [layer.split("_")[1] if layer.startswith("random_") else "" for layer, _, _ in found]
    gains = defaultdict(list)
    for seed in sorted(set(of) - {""}):
        others = nearby.Rows.of([row[1:] for group, row in zip(of, found, strict=True) if group != seed])
        own = [row for group, row in zip(of, found, strict=True) if group == seed]
        for _, problem, logs in own[::every]:
            names, _ = nearby.best(problem, others, "a CPU")
            for kind, each in zip(("forward", "gradients"), gain(logs, names), strict=True):
                gains[kind].append(each)
    for kind, least in (("forward", forward), ("gradients", gradients)):
        values = sorted(gains[kind])
        assert math.exp(sum(values) / len(values)) > least, kind
        assert math.exp(values[len(values) // 20]) > 0.95, kind


def test_a_layer_with_a_row_has_what_was_fastest_by_far():
    rows = nearby.Rows.of([(problem, logs) for _, problem, logs in ROWS if problem.dtype == torch.float32])
    clear = [row for row in ROWS if row[1].dtype == torch.float32 and row[1].flops > 5e6]
    clear = [row for row in clear if min(each for name, each in row[2].items() if name.startswith("forward_")) < -1]
    assert len(clear) > 10
    gains = [gain(logs, nearby.best(problem, rows, "a CPU")[0])[0] for _, problem, logs in clear]
    assert sum(each > 0.3 for each in gains) > 0.8 * len(gains)


def test_what_is_like_no_row_is_torchs_own(on_amd):
    far = dataclasses.replace(TILE, c_in=2**14, c_out=2**14, kernel=(31, 1, 1), stride=(1, 1, 1), out_size=(38, 8, 8))
    for problem in (far, dataclasses.replace(TILE, dtype=torch.float16), dataclasses.replace(TILE, n=0)):
        assert tuple(rules.choose(problem, CPU, name)[0].name for name in PASSES) == NATIVE, problem


def test_a_cpu_of_a_vendor_without_rows_has_torchs_own(monkeypatch):
    monkeypatch.setattr(rules, "cpu_vendor", lambda: "Another")
    for name in PASSES:
        record, because = rules.choose(TILE, CPU, name)
        assert record.name == rules.FALLBACK[name] and "Another" in because


def test_a_trial_asks_the_rows_of_another_vendor_for_what_its_own_do_not_know(monkeypatch):
    """A formulation that was measured on one vendor's CPUs is tried on those of another, and on a third's."""
    few = dataclasses.replace(TILE, c_in=64, c_out=1, size=(32, 32, 32), kernel=(4, 4, 4), crop=(1, 1, 1),
                              out_size=(64, 64, 64))  # fmt: skip
    intel = nearby.rows_of("GenuineIntel", torch.float32)
    without = dataclasses.replace(intel, logs={k: v for k, v in intel.logs.items() if k != "forward_torch_packed"})
    rows = {"AuthenticAMD": without, "GenuineIntel": intel}
    monkeypatch.setattr(nearby, "rows_of", lambda name, dtype: rows.get(name))
    for asked in (*rows, "Another"):
        assert ("forward_torch_packed",) in nearby.likely_forwards(few, asked, 200.0, 4), asked
    rows["GenuineIntel"] = without
    assert ("forward_torch_packed",) not in nearby.likely_forwards(few, "AuthenticAMD", 200.0, 4)
    rows.clear()
    assert nearby.likely_forwards(few, "AuthenticAMD", 200.0, 4) == []


def test_the_reason_names_the_nearest_layer(on_amd):
    wide = dataclasses.replace(TILE, n=2, c_in=28, c_out=3, size=(26, 26, 51), kernel=(2, 4, 4), stride=(2, 4, 4),
                               out_size=(52, 104, 204), bias=True)  # fmt: skip
    record, because = rules.choose(wide, CPU, "forward")
    assert record.name == "forward_torch_shuffle"
    assert "times as fast as torch's own, by layers measured on AMD EPYC" in because and "(nearest: n" in because


def rows_near_tile(**ratios: float) -> nearby.Rows:
    """Rows of layers like TILE, where torch's own forward takes 5 ms and its gradients 10, and a formulation of a pass
    so many times as long."""
    logs = {name: math.log(ratio) for name, ratio in ratios.items()}
    own = {nearby.KINDS["forward"]: math.log(5e3), nearby.KINDS["gradients"]: math.log(1e4)}
    layers = [dataclasses.replace(TILE, c_in=c_in) for c_in in range(48, 80)]
    return nearby.Rows.of([(layer, own | logs) for layer in layers])


def test_a_formulation_that_does_not_serve_hides_none_that_does():
    depthwise = {f"{name}_torch_depthwise": 0.1 for name in PASSES}  # the fastest of the rows, which TILE is not
    shuffle = {f"{name}_torch_shuffle": 0.3 for name in PASSES}
    names, because = nearby.best(TILE, rows_near_tile(**depthwise, **shuffle), "a CPU")
    assert names == tuple(shuffle)
    assert because[0].startswith("expected to be 3.3") and because[1].startswith("expected to be 1.6")
    names, because = nearby.best(TILE, rows_near_tile(**depthwise), "a CPU")
    assert names == NATIVE and all("no formulation that serves it is faster" in each for each in because)


def test_the_reason_of_torchs_own_says_that_the_layer_is_short():
    shuffle = {f"{name}_torch_shuffle": 0.3 for name in PASSES}
    short = dataclasses.replace(TILE, n=1, size=(1, 1, 8), out_size=(2, 2, 16))
    names, because = nearby.best(short, rows_near_tile(**shuffle), "a CPU")
    assert names == NATIVE
    assert "expected to take less than 1 ms" in because[0] and "less than 1.5 ms" in because[1]


def test_a_file_says_what_it_was_packed_from():
    text = nearby.pack({"format": nearby.FORMAT}, ROWS[:5])
    again = nearby.unpacked(json.loads(text))
    assert [(layer, problem) for layer, problem, _ in again] == [(layer, problem) for layer, problem, _ in ROWS[:5]]
    assert again[3][2] == pytest.approx(ROWS[3][2], abs=0.005)


def test_rows_are_of_calls_that_torch_answers_in_their_layout():
    small = workload("nnunet_dynunet_128_up1")
    names = [name for name, _ in formulations.problems([small], torch.float32)]
    assert names == [small.name] * 2
    assert [p.layout for _, p in formulations.problems([small], torch.float64)] == ["ncdhw"]  # torch has no other


def test_measured_rows_go_into_a_file_and_those_of_elsewhere_are_refused(tmp_path, monkeypatch):
    path, layer = tmp_path / "rows.json", dataclasses.replace(workload("swinunetr_fs48_up0"), c_in=8, c_out=4)
    monkeypatch.setattr(formulations, "CELL_SECONDS", 0.0)
    for _ in range(2):  # the second time it replaces its rows
        assert formulations.extend(path, [layer], torch.float32, 30.0, Progress()) == 1
    rows = nearby.unpacked(json.loads(path.read_text()))
    assert [name for name, _, _ in rows] == [layer.name]
    served = {record.name for record in tritonconv.variants() if record.backend == "torch"}
    assert len(rows[0][2]) > 8 and rows[0][2].keys() - nearby.KINDS.values() <= served - {NATIVE[0]}
    assert 1 < math.exp(rows[0][2][nearby.KINDS["gradients"]]) < 1e6
    path.write_text(path.read_text().replace('"threads": ', '"threads": 1'))
    with pytest.raises(ArgumentError, match="measured elsewhere: threads"):
        formulations.extend(path, [layer], torch.float32, 30.0, Progress())
