"""Variant files, torch.compile, sizes, classes, compare, roofs. CPU only."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch

from tritonconv import ArgumentError
from tritonconv.autotune import choose
from tritonconv.errors import ResultsError
from tritonconv.kernels import registry
from tritonconv.lab import cli
from tritonconv.lab.bench import gpu, results, standings, summary
from tritonconv.lab.bench.classes import CLASSES, layer_class
from tritonconv.lab.bench.layer_sizes import at_sizes
from tritonconv.lab.bench.workloads import workload, workloads

TINY = "monai_unet_spleen_32_2"
MINE = """
import torch
from tritonconv import Variant

def launch(problem, config, x, weight, bias):
    padding, output_padding = problem.torch_crop.padding, problem.torch_crop.output_padding
    return torch.conv_transpose3d(x, weight, bias, problem.stride, padding, output_padding, problem.groups)

VARIANT = Variant(name="forward_mine", pass_name="forward", idea="my own kernel", backend="torch", launch=launch,
                  supports=lambda problem, device: None)
"""

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """A ten-line variant file, forgotten after the test."""
    records = dict(registry._records())
    monkeypatch.setattr(registry, "_records", lambda: records)
    path = tmp_path / "my_kernel.py"
    path.write_text(MINE)
    return path


def bench(folder: Path, *more: str) -> results.Run:
    command = ["bench", "--only", TINY, "--passes", "forward", "--layout", "ncdhw", "--quiet", "--output", str(folder)]
    assert cli.main([*command, *more]) == 0
    return results.read(results.latest(folder))


# ------------------------------------------------------------------ variant files


def test_a_variant_file_is_in_the_table_the_plots_and_explain(mine, tmp_path, capsys):
    run = bench(tmp_path / "out", "--variant-file", str(mine))
    assert "forward_mine" in capsys.readouterr().out
    (row,) = run.only(variant="forward_mine").results
    assert row["chosen"] == {"forward": "forward_mine"} and row["max_error"] <= row["tolerance"]
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    assert any("roofline" in path.name for path in (tmp_path / "out").glob("*.svg"))
    del registry._records()["forward_mine"]  # as in a new process
    assert cli.main(["explain", TINY, "--variant-file", str(mine)]) == 0
    assert "not forward_mine: applies" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["no such"]), ("x = 1", ["VARIANT", "None"]), ("import nowhere_at_all", ["ModuleNotFoundError"]),
        ("def f(:", ["SyntaxError"]),
        (MINE.replace("forward_mine", "forward_torch_conv"), ["forward_torch_conv", "taken"]),
        (MINE.replace('"forward_mine"', '"mine"'), ["must start with its pass"]),
    ],
    ids=["missing", "no record", "import", "syntax", "name taken", "name without pass"],
)  # fmt: skip
def test_a_bad_variant_file_is_told_and_nothing_is_registered(mine, capsys, text, words):
    before = set(registry._records())
    if text is None:
        mine.unlink()
    else:
        mine.write_text(text)
    assert cli.main(["explain", TINY, "--variant-file", str(mine)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("my_kernel.py", *words)), said
    assert set(registry._records()) == before


# ------------------------------------------------------------------ contestants and fields


def test_torch_compile_is_a_contestant_and_its_failure_a_row(tmp_path, monkeypatch):
    calls = []

    def compiled(function, **options):
        calls.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    run = bench(tmp_path, "--compile")
    assert [row["variant"] for row in run.results] == ["torch", "tritonconv", "torch_compile"]
    assert calls == [{"fullgraph": True, "dynamic": False}]

    def fails(function, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fails)
    command = ["bench", "--only", TINY, "--passes", "forward", "--layout", "ncdhw", "--quiet", "--compile"]
    assert cli.main([*command, "--output", str(tmp_path / "b")]) == 1
    run = results.read(results.latest(tmp_path / "b"))
    assert [row["variant"] for row in run.results] == ["torch", "tritonconv"]
    assert "no compiler" in run.errors[0]["message"]


def test_rows_say_what_was_executed_and_their_class(tmp_path):
    run = bench(tmp_path, "--variants", "forward_torch_phases")
    rows = {row["variant"]: row for row in run.results}
    assert rows["torch"]["executed_flops"] is None
    phases = rows["forward_torch_phases"]
    assert phases["executed_flops"] >= phases["flops"]
    assert phases["class"] == "few channels" and phases["timing"] == "wall"
    assert phases["wall_ms"] == phases["median_ms"] and phases["compile_s"] >= 0


def test_every_layer_has_a_class():
    found = {}
    for layer in workloads():
        problem = layer.problem()
        sizes = {name: getattr(problem, name) for name in ("groups", "c_in", "c_out", "kernel", "stride")}
        found.setdefault(layer_class(sizes), []).append(layer.name)
    assert set(found) <= set(CLASSES) and len(found) >= 6
    assert "mednext_k3_dw_64" in found["depthwise"] and "segresnet_deconv_up0" in found["k = s"]
    assert TINY in found["few channels"]


def test_sizes_measure_a_layer_at_other_sizes_too(tmp_path):
    run = bench(tmp_path, "--sizes", "4,2")
    found = {row["layer"]: (row.get("family"), row["problem"]["size"], row["problem"]["n"]) for row in run.results}
    assert found[f"{TINY}@2"] == (TINY, [2, 2, 2], 1) and found[f"{TINY}@4"] == (TINY, [4, 4, 4], 1)
    assert found[TINY][0] is None
    assert [each.size for each in at_sizes(workload("psmnet_train_64_32"), (1, 8))] == [(1, 1, 1), (8, 8, 8)]


def test_cells_of_an_earlier_run_are_left_out(tmp_path):
    from tritonconv.lab.bench.options import Options
    from tritonconv.lab.bench.progress import Progress
    from tritonconv.lab.bench.runner import bench as run_bench

    layers = workloads(only=TINY)
    done = frozenset({(TINY, "float32", "ncdhw", "forward")})
    outcome = run_bench(Options(layers, ("forward",), done=done), tmp_path, Progress())
    run = results.read(outcome.path)
    assert {(row["layout"]) for row in run.results} == {"ndhwc"} and run.end["of_cells"] == 1


# ------------------------------------------------------------------ summary


def row(layer="a", layout="ncdhw", variant="torch", ms=1.0, **more) -> dict:
    made = {"layer": layer, "layout": layout, "variant": variant, "dtype": "float32", "pass": "forward",
            "median_ms": ms, "p20_ms": ms * 0.9, "p80_ms": ms * 1.1, "speedup": 1.0, "speedup_p20": 0.9,
            "speedup_p80": 1.1}  # fmt: skip
    return {**made, **more}


def test_the_best_torch_is_the_fastest_of_all_layouts_and_of_compile():
    rows = [row(ms=3.0), row(layout="ndhwc", ms=2.0), row(variant="torch_compile", ms=2.5)]
    native = row("c", variant="tritonconv", chosen={"forward": "forward_torch_native"})
    ours = [
        row(variant="tritonconv", ms=1.5),
        row(variant="tritonconv", ms=1.0),
        row("b", variant="tritonconv"),
        native,
    ]
    found = standings.standings([*rows, row("c", ms=0.5), *ours])
    assert [(each.ours["layer"], each.torch["layout"], each.ratio) for each in found] == [
        ("a", "ndhwc", 2.0),
        ("c", "ncdhw", 0.5),
    ]
    assert [each.torch_chosen for each in found] == [False, True]
    assert geometric_mean(one.ratio for one in found) == pytest.approx(1.0)
    assert list(standings.by_pass(found)) == [("forward", "float32")]
    assert list(standings.by_column(ours)) == ["wall"]
    graphs = [{**each, "timing": "graph", "wall_ms": 3 * each["median_ms"] + 1} for each in (*rows, *ours)]
    by_column = standings.by_column(graphs)
    assert list(by_column) == ["graph", "wall"]
    assert [each.ratio for each in by_column["graph"]] == [2.0]
    assert [each.ratio for each in by_column["wall"]] == [7 / 4]
    events = [{**each, "timing": "events"} for each in (*rows, *ours)]  # with the host in them: in none of the columns
    assert standings.by_column(events) == {} and standings.standings(events) == []


def test_fast_p_is_the_share_above_p():
    assert summary.fast_p([0.9, 1.0, 1.6, 2.5], 1.0) == 0.5
    assert summary.fast_p([], 1.0) == 0.0


def write(path: Path, rows: list[dict], device: str = "cuda", name: str = "a GPU") -> Path:
    head = {"kind": "environment", "schema": 1, "run": path.stem, "utc": "", "device": device, "device_name": name,
            "threads": 1, "torch": "2", "triton": None, "scale": "full", "scale_rule": "", "commit": None}  # fmt: skip
    more = {"kind": "result", "suite": "s", "n_runs": 5, "flops": 1, "bytes": 1}
    path.write_text("".join(json.dumps(each) + "\n" for each in [head, *({**more, **each} for each in rows)]))
    return path


# ------------------------------------------------------------------ several files, roofs


def test_files_of_one_device_are_merged_the_newest_row_of_each_kind(tmp_path):
    old = results.read(write(tmp_path / "a.jsonl", [row(ms=3.0), row("b", ms=5.0)]))
    new = results.read(write(tmp_path / "b.jsonl", [row(ms=2.0)]))
    whole = results.merged([old, new])
    assert {each["layer"]: each["median_ms"] for each in whole.results} == {"a": 2.0, "b": 5.0}
    assert whole.run == new.run
    with pytest.raises(ResultsError, match="one device"):
        results.merged([old, results.read(write(tmp_path / "c.jsonl", [row()], name="other"))])


def test_roofs_are_printed_written_and_kept_for_the_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITONCONV_CACHE", str(tmp_path / "store"))
    choose.forget()
    assert not choose.ceilings_of(torch.device("cpu")).measured
    command = ["bench", "--roofs", "--seconds", "0.1", "--dtype", "float32", "--output", str(tmp_path)]
    assert cli.main(command) == 0
    assert "GFLOP/s" in capsys.readouterr().out
    run = results.read(results.latest(tmp_path))
    kept = choose.ceilings_of(torch.device("cpu"))
    assert kept.measured and kept.launch_us == min(r["value"] for r in run.roofs if r["name"] == "launch")
    choose.forget()


def test_a_call_that_cannot_be_captured_is_timed_eagerly(monkeypatch):
    class Stream:
        def wait_stream(self, other):
            pass

    class Nothing:
        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return False

    cuda = torch.cuda
    for name, stand_in in (("Stream", lambda device: Stream()), ("current_stream", lambda device: Stream()),
                           ("stream", Nothing), ("CUDAGraph", Nothing), ("graph", Nothing),
                           ("synchronize", lambda device=None: None)):  # fmt: skip
        monkeypatch.setattr(cuda, name, stand_in)
    made = []
    replay = gpu.captured(lambda: made.append(1) or (torch.ones(1),), torch.device("cuda"))
    assert replay is not None and len(made) == gpu.WARM_CALLS + 1

    def synchronises():
        raise RuntimeError("operation not permitted when stream is capturing")

    assert gpu.captured(synchronises, torch.device("cuda")) is None

    left = []

    @contextlib.contextmanager
    def ends_badly(graph):  # as torch's: its end raises before it has left its stream
        left.append("graph")
        yield
        raise RuntimeError("capture_end")

    @contextlib.contextmanager
    def stream(wanted):
        left.append(wanted)
        try:
            yield
        finally:
            del left[left.index(wanted) :]

    monkeypatch.setattr(cuda, "graph", ends_badly)
    monkeypatch.setattr(cuda, "stream", stream)
    assert gpu.captured(lambda: None, torch.device("cuda")) is None and not left


def test_a_bad_list_of_sizes_is_refused():
    assert cli.main(["bench", "--sizes", "4,0"]) == 2
    with pytest.raises(ArgumentError, match="no such Python file"):
        registry.load(Path("nowhere.py"))
