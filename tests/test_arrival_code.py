"""The machine code of a split reduction whose last program sums: the order of its stores, its count and its loads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tritonconv.kernels.registry import have_triton

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "backward_weight_splitk": "k2s2",
    "backward_weight_cells": "k3s2",
    "backward_weight_depthwise": "depthwise_k3",
    "backward_weight_depthwise_cells": "depthwise_k3",
    "backward_weight_fused": "k2s2",
    "backward_weight_shuffle": "k2s2",
}
SOURCE = """
import dataclasses, json, sys
from tritonconv.kernels.registry import variant
from tritonconv.kernels.targets import TARGETS
from tritonconv.lab.bench.workloads import workload
from tritonconv.lab.inspection.compiling import GPU, Job, check_compiler, compile_job, compiling_for
from tritonconv.lab.inspection.jobs import SAMPLE_LAYERS

check_compiler()
for name, layer, target in json.loads(sys.argv[1]):
    job = Job(name, workload(SAMPLE_LAYERS[layer]), "bfloat16", "ndhwc", target)
    with compiling_for(TARGETS[target]):
        config = {**variant(name).default(job.problem, GPU), "SPLITS": 4, "ARRIVE": 1}

    def measure(kernel, compiled, *more):
        print(name, target, kernel, compiled.asm["ptx"], sep="\\n", end="\\f")
        return {"kernel": kernel}

    for record in compile_job(dataclasses.replace(job, config=config), measure=measure):
        assert record.error is None, record.error
"""
# Of a kernel's text: a letter for each instruction of these, in order.
LETTERS = {
    "S": r"st\.global", "B": r"bar(rier)?\.sync", "A": r"atom\.global\.gpu\.acq_rel\.add\.u32", "C": r"ld\.global\.cg",
    "L": r"ld\.global|cp\.async\.c[ag]|cp\.async\.bulk\.tensor",
}  # fmt: skip


def letters(ptx: str) -> str:
    """The accesses and barriers of a kernel in the order of its text."""
    found = []
    for line in ptx.splitlines():
        code = line.split("//")[0]
        found += [letter for letter, pattern in LETTERS.items() if re.search(pattern, code)][:1]
    return "".join(found)


# The count is one device function of all kernels: each is compiled for one target, and two kernels for the others.
CASES = [(name, layer, "sm_90") for name, layer in LAYERS.items()]
CASES += [(name, LAYERS[name], other) for name in ("backward_weight_splitk", "backward_weight_fused")
          for other in ("sm_80", "sm_100")]  # fmt: skip


@pytest.mark.skipif(not have_triton(), reason="Triton is not installed")
def test_a_program_counts_behind_its_stores_and_the_last_one_loads_past_the_l1_cache(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SOURCE, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [each.split("\n", 3) for each in done.stdout.split("\f") if each.strip()]
    assert {(name, target) for name, target, *_ in kernels} == {(name, target) for name, _, target in CASES}
    for _, target, kernel, ptx in kernels:
        order = letters(ptx)
        counts = re.findall("A", order)
        # The partial's stores, barriers, the count, a barrier; of the last one: the counter, loads, stores of the sums.
        as_wanted = re.findall("SB+AB+SC+(?=B*S)", order)
        assert counts and len(as_wanted) == len(counts), f"{kernel} for {target}: {order}"
        assert ptx.count("atom.") == len(counts)
