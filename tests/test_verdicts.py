"""The machine code of all that dispatch and tuner can choose: the committed verdicts, and a sample compiled.

The compilations run in a process of their own, without the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritonconv.autotune.sources import revision
from tritonconv.errors import ResultsError
from tritonconv.kernels.registry import variant, variants
from tritonconv.lab import cli
from tritonconv.lab.inspection import verdicts
from tritonconv.lab.inspection.records import Record

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "kernels" / "verdicts"
VERSIONS = ("3.6.0", "3.9.0")  # the oldest that is served and the newest


def process(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=900, check=False
    )


@pytest.mark.parametrize("triton", VERSIONS)
def test_nothing_that_can_be_chosen_writes_a_register_in_flight(triton):
    found = verdicts.read(verdicts.path_of(FOLDER, triton))
    multiply = {record.name for record in variants() if record.backend == "triton" and "depthwise" not in record.name}
    assert set(found) == multiply
    assert verdicts.configs_of(found, verdicts.UNSAFE) == verdicts.configs_of(found, verdicts.BROKEN) == []
    classes = [each for of_variant in found.values() for each in of_variant["classes"].values()]
    assert all(each[verdicts.SAFE] for each in classes)
    assert sum(len(each[verdicts.SAFE]) for each in classes) > 1500


def test_what_changed_since_and_a_sample_of_the_rest_are_safe_on_this_triton():
    done = process("-m", "tritonconv", "inspect", "--verdicts", str(FOLDER), "--sample", "3", "--jobs", "1", "--quiet")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": 0 are unsafe, 0 do not compile" in done.stdout


WITHOUT_WAIT = """
from tritonconv.lab import cli
from tritonconv.autotune.sources import revision
from tritonconv.lab.inspection import verdicts
from tritonconv.kernels import triton_launch
from tritonconv.kernels.registry import variant

triton_launch.registers_in_flight = lambda: False
jobs = verdicts.jobs_of(variant("backward_data_shuffle_given"), ["bfloat16"])
deep = [job for job in jobs if job.config["BLOCK_M"] == 256 and job.config["num_stages"] == 4][:1]
print([each.early_write for job in deep for each in verdicts.check(job)])
"""


def test_without_the_wait_the_check_finds_what_old_tritons_do():
    """On 3.9 nothing: there the compiler copies the operand first."""
    done = process("-c", WITHOUT_WAIT)
    assert done.returncode == 0, done.stderr
    from tritonconv.kernels.triton_target import triton_version

    (found,) = json.loads(done.stdout.replace("'", '"'))
    assert bool(found) == (triton_version() < (3, 9))


SPACES = """
import json, sys
from collections import Counter
import torch
from tritonconv.autotune.model import MOST_CONFIGS, form, pruned_space
from tritonconv.lab.bench.workloads import workload, workloads
from tritonconv.lab.inspection.compiling import GPU, compiling_for
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.registry import renamed, variant, variants
from tritonconv.problem import LAYOUTS, Problem

def problem_of(row):
    fields = row["problem"]
    triples = {name: tuple(fields[name]) for name in ("size", "kernel", "stride", "crop", "out_size", "dilation")}
    plain = {name: fields[name] for name in ("n", "c_in", "c_out", "groups", "bias")}
    return Problem(**plain, **triples, dtype=getattr(torch, row["dtype"]), layout=row["layout"])

with compiling_for(TARGETS["sm_90"]):
    sizes = []
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for place, layer in enumerate(workloads()):
        every = [(dtype, layout) for dtype in dtypes for layout in LAYOUTS]
        for dtype, layout in every if "--all" in sys.argv else [every[place % len(every)]]:
            problem = layer.problem(dtype, layout)
            served = [each for each in variants() if each.backend == "triton" and each.supports(problem, GPU) is None]
            forms = [Counter(form(each, config) for config in pruned_space(each, problem, GPU)) for each in served]
            sizes += [size for each in forms for size in each.values()]
    lost = []
    for line in open(sys.argv[1]):
        row = json.loads(line)
        if row["kind"] == "tuned" and row["config"]:
            name, config = renamed(row["variant"], row["config"])
            record, problem = variant(name), problem_of(row)
            # A verdict is of both orders of a packed weight.
            orders = [{**config, "WEIGHT": order} for order in (1, 2)] if config.get("WEIGHT") else [config]
            if not any(dict(each) in orders for each in pruned_space(record, problem, GPU)):
                lost.append((row["variant"], row["text"], row["config"]))
print(json.dumps({"largest": max(sizes), "spaces": len(sizes), "most": MOST_CONFIGS, "lost": lost}))
"""


def test_spaces_have_at_most_40_configs_and_hold_every_one_that_won():
    """With EVERY_LAYER each layer in both layouts and three dtypes, else in one of the six after the other."""
    (rows,) = (ROOT / "plots" / "examples" / "nvidia_h200").glob("*-a737a92.jsonl")
    done = process("-c", SPACES, str(rows), *(["--all"] if "EVERY_LAYER" in os.environ else []))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["largest"] == said["most"] == 40 and said["spaces"] > 500
    assert said["lost"] == []


def record(config, **fields) -> Record:
    return Record(
        "forward_phases", "a layer", "a problem", "bfloat16", "bfloat16", "ndhwc", "sm_90", config, False, **fields
    )


def test_the_verdict_of_a_launch_is_that_of_its_worst_kernel(tmp_path):
    configs = [{"BLOCK_M": size, "num_warps": 4} for size in (32, 64, 128)]
    records = [
        record(configs[0], kernel="one"), record(configs[0], kernel="other"),
        record(configs[1], kernel="one"), record(configs[1], kernel="other", early_write="LDS R8, [R2]"),
        record(configs[2], error="RuntimeError: no"),
    ]  # fmt: skip
    found = verdicts.verdicts(records, {"forward_phases": "1234"})
    kind = "a layer bfloat16 ndhwc"
    assert found["forward_phases"] == {
        "revision": "1234",
        "classes": {
            kind: {
                "keys": ["BLOCK_M", "num_warps"],
                "safe": [[32, 4]], "unsafe": [[64, 4]], "not compiled": [[128, 4]],
            }
        },
    }  # fmt: skip
    assert verdicts.configs_of(found, verdicts.UNSAFE) == [("forward_phases", kind, configs[1])]
    assert verdicts.configs_of(found, verdicts.BROKEN) == [("forward_phases", kind, configs[2])]
    path = verdicts.path_of(tmp_path / "verdicts", "3.9.0")
    verdicts.write(path, "3.9.0", found)
    assert verdicts.read(path) == found
    assert verdicts.read(tmp_path / "none.json") == {}
    path.write_text("[]")
    with pytest.raises(ResultsError, match="not a file of verdicts"):
        verdicts.read(path)


def test_a_sample_is_of_what_changed_and_of_the_others_and_the_same_each_time():
    records = [variant("forward_boxes"), variant("backward_data_boxes")]
    known = {"forward_boxes": {"revision": revision(records[0])}}
    chosen = verdicts.sample(records, known, 2)
    assert sorted(job.variant for job in chosen) == 2 * ["backward_data_boxes"] + 2 * ["forward_boxes"]
    assert chosen == verdicts.sample(records, known, 2)
    assert {job.variant for job in verdicts.sample(records[:1], {}, 2)} == {"forward_boxes"}


def test_sample_is_of_verdicts(capsys):
    assert cli.main(["inspect", "--sample", "3"]) == 2
    assert "--sample" in capsys.readouterr().err
