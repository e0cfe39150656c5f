"""tritonconv compare, and results files of one device as one."""

from __future__ import annotations

import pytest
from test_bench_more import row, write

from tritonconv.lab import cli
from tritonconv.lab.bench import results


@pytest.mark.parametrize(
    ("ms", "code"), [(1.0, 0), (1.1, 0), (1.3, 1), (0.5, 0)], ids=["same", "within noise", "slower", "faster"]
)  # fmt: skip
def test_compare_ends_with_1_on_a_regression_beyond_noise(tmp_path, capsys, ms, code):
    before = write(tmp_path / "a.jsonl", [row(variant="tritonconv"), row("b")])
    after = write(tmp_path / "b.jsonl", [row(variant="tritonconv", ms=ms)])
    assert cli.main(["compare", str(before), str(after)]) == code
    out = capsys.readouterr().out
    assert f"slower beyond noise: {code} of 1" in out and f"{1 / ms:.3f}" in out


def test_compare_on_a_cpu_goes_by_the_ratio_to_torch(tmp_path, capsys):
    slow = {"variant": "tritonconv", "ms": 9.0, "speedup": 2.0, "speedup_p20": 1.9, "speedup_p80": 2.1}
    before = write(tmp_path / "a.jsonl", [row(), row(**{**slow, "ms": 1.0})], "cpu")
    same = write(tmp_path / "b.jsonl", [row(), row(**slow)], "cpu")
    assert cli.main(["compare", str(before), str(same)]) == 0
    worse = write(tmp_path / "c.jsonl", [row(variant="tritonconv", speedup=1.0)], "cpu")
    assert cli.main(["compare", str(before), str(worse)]) == 1
    capsys.readouterr()


def test_compare_refuses_what_cannot_be_compared(tmp_path, capsys):
    before = write(tmp_path / "a.jsonl", [row()])
    other = write(tmp_path / "b.jsonl", [row()], name="another GPU")
    assert cli.main(["compare", str(before), str(other)]) == 2
    assert "another GPU" in capsys.readouterr().err
    assert cli.main(["compare", str(before), str(other), "--any-device"]) == 0
    assert cli.main(["compare", str(before), str(write(tmp_path / "c.jsonl", [row("z")]))]) == 2
    assert "no row in common" in capsys.readouterr().err
    assert cli.main(["compare", str(before), str(before), "--threshold", "-1"]) == 2


def columns_row(layer: str, gpu_ms: float, wall_ms: float, **more) -> dict:
    """As a GPU's rows are now."""
    times = {
        f"{name}_{tail}": ms for name, ms in (("gpu", gpu_ms), ("wall", wall_ms)) for tail in ("ms", "p20_ms", "p80_ms")
    }
    return row(layer, variant="tritonconv", ms=gpu_ms) | {
        "timing": "gpu",
        "gpu_runs": 5,
        "wall_runs": 5,
        **times,
        **more,
    }


def test_compare_holds_one_column_against_the_same_one(tmp_path, capsys):
    graph = {**row("a", variant="tritonconv", ms=1.0), "timing": "graph", "wall_ms": 9.0}
    old = write(tmp_path / "a.jsonl", [graph])
    new = write(tmp_path / "b.jsonl", [columns_row("a", 2.0, 9.0)])
    assert cli.main(["compare", str(old), str(new)]) == 2  # a graph's time, and a call's
    assert "none that was timed alike" in capsys.readouterr().err
    both = {f"graph_{tail}": 1.0 for tail in ("ms", "p20_ms", "p80_ms")} | {"graph_runs": 5}
    new = write(tmp_path / "c.jsonl", [columns_row("a", 2.0, 9.0, **both)])
    assert cli.main(["compare", str(old), str(new)]) == 0
    assert "by the GPU time of a CUDA graph of it" in capsys.readouterr().out
    slower = write(tmp_path / "d.jsonl", [columns_row("a", 1.0, 9.0)])
    assert cli.main(["compare", str(slower), str(new)]) == 1
    assert "by the GPU time of an eager call" in capsys.readouterr().out


def test_results_that_were_timed_otherwise_are_left_out_of_a_folder(tmp_path):
    graph = {**row("a", variant="tritonconv", ms=1.0), "timing": "graph"}
    old = results.read(write(tmp_path / "a.jsonl", [graph, {**graph, "layer": "b"}]))
    new = results.read(write(tmp_path / "b.jsonl", [columns_row("a", 2.0, 9.0)]))
    whole = results.merged([old, new])
    assert [(each["layer"], each["timing"]) for each in whole.results] == [("a", "gpu")]
    assert whole.warnings == ["1 results of earlier runs are left out, which were timed otherwise: graph"]
    assert len(results.merged([old, old]).results) == 2
