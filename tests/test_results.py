"""Results files: what is written comes back, whatever stopped the writing; anything else is an error with its line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tritonconv.errors import ResultsError
from tritonconv.lab.bench import results, schema
from tritonconv.lab.bench.results import Writer, latest, read
from tritonconv.lab.bench.summary import groups, overlaps_one, summary

ENVIRONMENT = {
    "schema": schema.SCHEMA, "run": "bench-x", "utc": "2026-01-02T03:04:05+00:00", "device": "cpu",
    "device_name": "Some CPU", "threads": 2, "torch": "2.13.0", "triton": None, "scale": "cpu", "scale_rule": "small",
    "commit": None,
}  # fmt: skip


def result(layer="a", variant="tritonconv", speedup=2.0, low=None, high=None, layout="ncdhw", **more) -> dict:
    return {
        "layer": layer, "suite": "unet", "pass": "forward", "dtype": "float32", "layout": layout, "variant": variant,
        "median_ms": 1.5, "p20_ms": 1.0, "p80_ms": 2.0, "n_runs": 5, "flops": 10, "bytes": 20, "speedup": speedup,
        "speedup_p20": low or speedup, "speedup_p80": high or speedup, **more,
    }  # fmt: skip


ROOF = {"name": "matmul", "what": "product", "dtype": "float32", "value": 1e9, "unit": "FLOP/s"}
SKIP = {"layer": "a", "pass": "forward", "variant": "v", "message": "does not serve it"}


@pytest.fixture
def path(tmp_path) -> Path:
    with Writer(tmp_path) as writer:
        writer.write("environment", ENVIRONMENT)
        writer.write("roof", ROOF)
        writer.write("result", result())
        writer.write("skip", SKIP)
        writer.write("error", {**SKIP, "status": "wrong"})
        writer.write("end", {"reason": "complete"})
    return writer.path


def edit(path: Path, line: int, **changes) -> Path:
    """The file with fields of one line (from 1) changed; None removes a field."""
    lines = path.read_text().splitlines()
    row = json.loads(lines[line - 1]) | changes
    lines[line - 1] = json.dumps({key: value for key, value in row.items() if value is not ...})
    path.write_text("\n".join(lines) + "\n")
    return path


def test_round_trip(path):
    run = read(path)
    assert run.environment == {"kind": "environment", **ENVIRONMENT}
    assert run.roofs == [{"kind": "roof", **ROOF}]
    assert run.results == [{"kind": "result", **result()}]
    assert len(run.skips) == len(run.errors) == 1
    assert run.end["reason"] == "complete"
    assert run.warnings == []


def test_a_run_never_overwrites_and_latest_points_at_the_newest(path, tmp_path):
    before = path.read_bytes()
    with Writer(tmp_path) as second:
        second.write("environment", ENVIRONMENT)
    assert second.path != path
    assert path.read_bytes() == before
    assert latest(tmp_path) == second.path
    (tmp_path / results.LATEST).unlink()
    assert latest(tmp_path) in (path, second.path)


def test_latest_says_where_it_looked(tmp_path):
    with pytest.raises(ResultsError, match=str(tmp_path)):
        latest(tmp_path)


def test_every_row_is_on_disk_at_once(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write("environment", ENVIRONMENT)
        writer.write("result", result())
        assert len(read(writer.path).results) == 1


def test_a_run_that_ends_before_its_first_row_leaves_nothing_and_a_killed_one_is_passed_over(path, tmp_path):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path) as writer:
        raise KeyboardInterrupt
    assert not writer.path.exists() and latest(tmp_path) == path
    (tmp_path / "bench-20990101T000000Z-00000.jsonl").touch()
    assert results.files(tmp_path) == [path]


def test_a_killed_process_leaves_its_finished_rows(tmp_path):
    script = f"""
import sys, time
from pathlib import Path
sys.path[:0] = {sys.path!r}
from tritonconv.lab.bench.results import Writer
from tests.test_results import ENVIRONMENT, result
writer = Writer(Path({str(tmp_path)!r}))
writer.write("environment", ENVIRONMENT)
writer.write("result", result())
print(writer.path, flush=True)
time.sleep(60)
"""
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    assert len(read(path).results) == 1


@pytest.mark.parametrize("keep", [1, 20, -2])
def test_a_cut_off_last_line_is_left_out_with_a_warning(path, keep):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:keep])
    run = read(path)
    assert (len(run.roofs), len(run.results), run.end) == (1, 0, None)
    assert run.warnings == [f"{path}:3: the last line was cut off and is left out"]


def test_a_last_line_that_lacks_only_its_newline_counts(path):
    path.write_text(path.read_text().rstrip("\n"))
    assert read(path).end["reason"] == "complete"
    assert read(path).warnings == []


@pytest.mark.parametrize(
    ("line", "changes", "words"),
    [
        (3, {"median_ms": ...}, ["median_ms"]),
        (3, {"median_ms": "fast"}, ["median_ms", "'fast'", "float"]),
        (3, {"median_ms": 0}, ["median_ms", "above 0", "0"]),
        (3, {"n_runs": True}, ["n_runs", "True"]),
        (3, {"layer": None}, ["layer", "None"]),
        (3, {"kind": "resutl"}, ["'resutl'", "result"]),
        (3, {"kind": "environment", **ENVIRONMENT}, ["second environment"]),
        (2, {"value": None}, ["value", "None"]),
        (1, {"schema": 99}, ["schema", "99", "1"]),
        (1, {"kind": "end", "reason": "x"}, ["environment row first", "'end'"]),
    ],
)
def test_a_malformed_line_is_named(path, line, changes, words):
    edit(path, line, **changes)
    with pytest.raises(ResultsError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert all(word in message for word in words)


@pytest.mark.parametrize(("text", "words"), [("{oops\n", ":1: not JSON"), ("[1]\n", ":1: kind"), ("", ":1: expected")])
def test_a_file_that_is_no_results_file(tmp_path, text, words):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ResultsError) as caught:
        read(path)
    assert f"{path}{words}" in str(caught.value)


def test_numbers_that_no_reader_could_take(path, tmp_path):
    with Writer(tmp_path) as writer, pytest.raises(ValueError, match="JSON"):
        writer.write("result", result(speedup=float("nan")))
    path.write_text(path.read_text().replace("1.5", "NaN"))
    with pytest.raises(ResultsError, match=":3: median_ms expects a finite number"):
        read(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ResultsError, match=r"nowhere\.jsonl"):
        read(tmp_path / "nowhere.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="output: cannot write"):
        Writer(tmp_path / "file" / "results")


def test_select_and_values(path):
    run = read(path)
    run.results = [result("a"), result("b", "torch", layout="ndhwc")]
    assert [row["layer"] for row in run.only(**{"pass": "forward", "layout": "ndhwc"}).results] == ["b"]
    with pytest.raises(ResultsError, match=r"--variant 'none': .* has rows for"):
        run.only(variant="none")
    assert run.values("layout") == ["ncdhw", "ndhwc"]


def test_summary_groups_and_flags(path):
    run = read(path)
    run.results = [
        result("a", "torch", 1.0), result("a", speedup=4.0, low=3.0, high=5.0),
        result("b", speedup=1.0, low=0.9, high=1.1), result("c", speedup=0.5, low=0.4, high=0.6),
        result("d", speedup=0.9, low=0.7, high=1.2),
        result("a", layout="ndhwc", speedup=2.0),
    ]  # fmt: skip
    first, second, both = groups(run.results)
    assert (first.layout, first.layers, first.faster, first.slower) == ("ncdhw", 4, 1, 1)
    assert first.geomean == pytest.approx((4 * 1 * 0.5 * 0.9) ** 0.25)
    assert first.p5 == pytest.approx(0.5 + 0.15 * 0.4), "between the least two of four"
    assert (second.layout, both.layout, both.layers, len(both.rows)) == ("ndhwc", "all", 4, 5)
    assert [row["layer"] for row in both.worst[:3]] == ["c", "d", "b"]
    assert overlaps_one(run.results[2])
    text = summary(run)
    assert "0.50  0.40 to 0.60  ncdhw  c  below 0.95" in text
    assert "overlaps 1" in text
    assert "wrong: v on a (forward): does not serve it" in text


def test_summary_says_that_a_run_ended_early(path):
    edit(path, 6, reason="budget", cells=3, of_cells=10)
    assert "ended early (the time budget was used up): 3 of 10 cells are in the file" in summary(read(path))


@pytest.mark.parametrize(("busy", "said"), [([0.0, 0.1], None), ([0.5, 1.5], "1 of 2 cores"), ([None], None)])
def test_a_disturbed_run_says_so(path, busy, said):
    run = read(path)
    run.environment["cores"] = 2
    run.results = [result(str(index), other_cores=value) for index, value in enumerate(busy)]
    assert (said is None) == (run.disturbance is None)
    if said:
        assert said in run.disturbance
        assert run.disturbance in summary(run)
        assert "at most 0.1 cores busy" not in summary(run)
        run.results.append(result("quiet", other_cores=0.0))
        assert "at most 0.1 cores busy" in summary(run)


def test_runs_of_one_second_are_in_their_order(tmp_path):
    written = []
    for _ in range(6):
        with Writer(tmp_path) as writer:
            writer.write("environment", ENVIRONMENT)
        written.append(writer.path)
    assert results.files(tmp_path) == written


def test_names_carry_the_time(tmp_path):
    with Writer(tmp_path) as writer:
        assert time.strftime("bench-%Y%m%dT", time.gmtime()) in writer.path.name
