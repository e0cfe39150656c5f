"""Volumes in slabs: four gloo ranks on this machine (sharded_ranks.py) run every check, once for all tests here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritonconv.distributed import output_sizes, slabs
from tritonconv.lab import cli
from tritonconv.lab.bench import results
from tritonconv.problem import Axis

ROOT = Path(__file__).resolve().parent.parent
RANKS = range(4)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """For each rank its findings by check."""
    folder = tmp_path_factory.mktemp("ranks")
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "",
           "TRITONCONV_CACHE": str(folder / "store")}  # fmt: skip
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "sharded_ranks.py"), str(folder)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=600, check=False)
    files = [folder / f"{rank}.json" for rank in RANKS]
    assert all(file.exists() for file in files), done.stderr
    every = [json.loads(file.read_text()) for file in files]
    assert [rank for rank in every if any("failed" in str(check) for check in rank.values())] == []
    return [{**rank, "folder": str(folder)} for rank in every]


def test_slabs_equal_the_whole_on_random_problems(found):
    """Outputs, gradients, second derivatives, and the bytes that went through the group against the formula."""
    results = [rank["problems"] for rank in found]
    assert [text for result in results for text in result["wrong"]] == []
    assert [rank["gradients_wanted"] for rank in found] == [[]] * len(RANKS)
    for kind, least in (("halo of two", 40), ("empty", 50), ("stride > kernel", 100), ("bytes", 1000)):
        assert sum(result[kind] for result in results) >= least, kind


def test_layers_train_as_torchs_do_on_the_whole(found):
    for rank in found:
        result = rank["layers"]
        assert result["same keys"] and result["copied"] and result["half"] == "torch.bfloat16"
        assert result["apart"] < 1e-12 and result["ddp apart"] < 1e-9
        assert result["repr"] == "ShardedConvTranspose3d(2, 4, kernel_size=(4, 4, 4), stride=(2, 2, 2), "\
                                 "padding=(1, 1, 1), axis=2)"  # fmt: skip


def test_other_arguments_of_one_rank_are_an_error_on_each(found):
    texts = {
        "stride": "stride: rank 1 of the group has [1, 1, 1], rank 0 has [1, 2, 1]",
        "axis": "axis: rank 1 of the group has [3], rank 0 has [2]",
        "dtype": "dtype: rank 2 of the group",
        "input shape": "input shape without the axis: rank 3 of the group has [1, 2, 3, 2], rank 0 has [1, 2, 2, 2]",
        "bias": "bias (axes, values): rank 1 of the group has [0, 0], rank 0 has [1, 2]",
        "bias shape": "bias (axes, values): rank 2 of the group has [1, 3], rank 0 has [1, 2]",
        "gradients": "gradients wanted (input, weight, bias): rank 1 of the group has [1, 0, 0]",
        "sizes": "sizes (their checksum): rank 2 of the group",
    }
    for number, rank in enumerate(found):
        result = rank["other_arguments"]
        for name, text in texts.items():
            assert result[name]["error"] == "ArgumentError" and text in result[name]["text"], (name, result[name])
        assert result["then"] == [1, 2, 4 if number == 3 else 2, 4, 4]  # the group works as before
        assert result["equal"]


def test_a_rank_that_refuses_its_own_arguments_is_an_error_on_each(found):
    odd_ranks = {
        "refuses its own": (2, "ArgumentError", "stride must be at least 1"),
        "refuses its own too": (3, "ArgumentTypeError", "torch.int64"),
        "sizes and a refusal": (2, "ArgumentError", "stride must be at least 1"),
        "no tensor": (2, "ArgumentTypeError", "input expects a tensor, got 'x'"),
    }
    alike = {
        "channels": "but x has 3",
        "nothing left": "the output would be empty",
        "axis 5": "2, 3 or 4",
        "out_sizes": "out_sizes (1, 1, 1, 1) are 4 planes, the answer has 10",
        "no group": "expects a process group",
    }
    for number, rank in enumerate(found):
        result = rank["other_arguments"]
        for name, (odd, error, text) in odd_ranks.items():
            if number != odd:
                error, text = "ArgumentError", f"rank {odd} of the group refuses its own arguments"
            assert result[name]["error"] == error and text in result[name]["text"], (name, result[name])
        for name, text in alike.items():
            assert result[name]["error"] == "ArgumentError" and text in result[name]["text"], (name, result[name])
        for name, text in (("axis 2.0", "axis expects an integer, got 2.0"), ("sizes of floats", "got [2.0, 2.0,")):
            assert result[name]["error"] == "ArgumentTypeError" and text in result[name]["text"], (name, result[name])
        late = result["refusal after all have met"]
        assert (late["error"], late["seconds"] < 50) == ("ArgumentError" if number == 2 else "", True), late
        assert "call init_process_group first" in rank["no group"]["text"]


def test_a_rank_that_does_not_come_or_dies_is_an_error_within_the_timeout(found):
    """The groups' timeout is three seconds, that of all ranks 100. The kernel of the silent check reaches all ranks, so
    that all wait for one."""
    for rank in found[:-1]:
        for errors in (rank["silent_rank"], rank["dead_rank"]):
            assert len(errors) == 2
            for name, result in errors.items():
                assert result["error"] and result["seconds"] < 50, (name, result)


def test_dtensors_with_spatial_shards_equal_the_whole_and_others_are_refused(found):
    for number, rank in enumerate(found):
        result = rank["placements"]
        assert result["wrong"] == []
        texts = {
            "channels": "DTensor with placement S",
            "channels of both": "DTensor with placement S",
            "two axes": "one axis of the mesh",
            "partial": "placement P",
            "weight": "weight must be a replicated DTensor",
            "weight and a batch": "it must be replicated",
        }
        for name, text in texts.items():
            assert result["refused"][name]["error"] == "ArgumentError", (name, result["refused"])
            assert text in result["refused"][name]["text"]
        assert ("which this rank is not in" in result["refused"]["outside"]["text"]) == (number in (0, 2))


def test_the_benchmark_of_slabs(found, monkeypatch, tmp_path):
    """Strong and weak scaling on 1, 2 and 4 ranks; without torchrun it says how to start it."""
    assert [rank["benched"] for rank in found] == [0] * len(RANKS)
    (path,) = results.written(Path(found[0]["folder"]) / "results")
    run = results.read(path)
    rows = run.slabs
    kinds = {(row["scaling"], row["ranks"], row["pass"], row["part"]) for row in rows}
    assert len(rows) == len(kinds) == 2 * 3 * 2 * 3
    for row in rows:
        passes, planes = (1 if row["pass"] == "forward" else 2), row["ranks"] - 1  # one plane of each next rank
        assert row["exchanged_bytes"] == passes * planes * 2 * 2 * 3 * 4
        assert (row["efficiency"] is None) == (row["part"] != "total")
        assert row["efficiency"] in (None, 1) or row["ranks"] > 1
    monkeypatch.setenv("RANK", "0")  # of no launcher that torch knows
    assert cli.main(["bench", "--slabs", "--layout", "ncdhw"]) == 2
    pytest.importorskip("matplotlib")
    from tritonconv.plots import html

    assert ">Slabs<" in html.write(run, tmp_path, {}).read_text()


def test_the_plan_of_an_exchange():
    """Kernel 3, stride 1, padding 1: one plane of each neighbour; kernel = stride: none."""
    sizes = (3, 0, 1, 2)
    plan = slabs.exchange(Axis(6, 3, 1, 1, 1, 6), sizes, output_sizes(sizes, 1, 6))
    transfers = [tuple(each) for each in plan.transfers]
    assert transfers == [(2, 0, 3, 4), (0, 2, 2, 3), (3, 2, 4, 5), (2, 3, 3, 4)]
    assert (plan.planes(), plan.planes(2), plan.planes(1)) == (4, 2, 0)
    assert slabs.exchange(Axis(6, 2, 2, 0, 1, 12), sizes, output_sizes(sizes, 2, 12)).transfers == ()
    assert output_sizes(sizes, 2, 13) == (6, 0, 2, 5)
    assert output_sizes((2, 2, 0), 3, 7) == (6, 1, 0)
