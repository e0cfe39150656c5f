"""The tuner as a process: killed and resumed, two at once, several ranks. CPU only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tritonconv.autotune.tuning import journal

ROOT = Path(__file__).resolve().parent.parent

# The command line, with less time for a problem.
QUICK = "import sys; from tritonconv.autotune.tuning import session; session.PROBLEM_SECONDS = 1; " \
    "from tritonconv.lab import cli; sys.exit(cli.main())"  # fmt: skip
COMMAND = [sys.executable, "-c", QUICK, "tune", "--suite", "unet", "--only", "segresnet_deconv_up0"]


def start(folder: Path, tmp_path: Path, *more: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [*COMMAND, "--store", str(folder), "--output", str(tmp_path / "results"), "--quiet", *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stored_lines(folder: Path) -> list[str]:
    return [line for path in folder.glob("*.timings.jsonl") for line in path.read_text().splitlines()]


def stored_keys(folder: Path) -> set[str]:
    return {key for path in folder.glob("*.v2.json") for key in json.loads(path.read_text())["entries"]}


def test_a_killed_run_goes_on_with_nothing_measured_twice_and_nothing_lost(tmp_path):
    folder = tmp_path / "killed"
    process = start(folder, tmp_path, "--layout", "ncdhw")
    deadline = time.monotonic() + 300
    while not stored_keys(folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before, keys = stored_lines(folder), stored_keys(folder)
    assert keys
    second = start(folder, tmp_path, "--layout", "ncdhw")
    out, err = second.communicate(timeout=600)
    assert second.returncode == 0, err
    after = stored_lines(folder)
    assert after[: len(before)] == before and keys <= stored_keys(folder)
    screened = Counter(journal._timing(line).identity for line in after if json.loads(line)["stage"] == "screen")
    assert set(screened.values()) == {1}
    assert "found in the journal" in out
    assert len(stored_keys(folder)) == 3


def test_two_tuners_at_once_keep_all_entries_of_both(tmp_path):
    folder = tmp_path / "both"
    one = start(folder, tmp_path, "--layout", "ndhwc")
    two = start(folder, tmp_path, "--layout", "ncdhw")
    outs = [process.communicate(timeout=600) for process in (one, two)]
    assert [process.returncode for process in (one, two)] == [0, 0], outs
    decided = {row["key"] for path in (tmp_path / "results").glob("tune-*.jsonl") for row in rows(path, "tuned")}
    assert decided and decided == stored_keys(folder)


def rows(path: Path, kind: str) -> list[dict]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == kind]


RANK = """
import sys, torch, tritonconv
from tritonconv.autotune import choose
from tritonconv.autotune.tuning import session
session.PROBLEM_SECONDS = 0.05
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
problem = tritonconv.Problem(1, 4, 3, (3, 4, 5), (2, 2, 2), (2, 2, 2), (0, 0, 0), (6, 8, 10), bias=True)
report = tritonconv.tune(problem)
chosen = choose.choose(problem, torch.device("cpu"), "forward")
print(report.timings > 0, chosen.variant.name, chosen.reason)
torch.distributed.destroy_process_group()
"""


def test_rank_0_tunes_and_the_others_get_its_result(tmp_path):
    def rank(number: int) -> subprocess.Popen:
        own = {"PYTHONPATH": str(ROOT), "TRITONCONV_CACHE": str(tmp_path / f"store{number}"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", RANK, str(number), str(tmp_path)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env={**os.environ, **own, "TRITON_INTERPRET": "0"}, **pipes)

    both = [rank(number) for number in (0, 1)]
    outs = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    (tuned0, choice0), (tuned1, choice1) = (out.strip().split(" ", 1) for out, _ in outs)
    assert (tuned0, tuned1) == ("True", "False")
    assert choice0 == choice1 and "tuned on this size" in choice1
    assert (tmp_path / "store0").exists() and not (tmp_path / "store1").exists()
