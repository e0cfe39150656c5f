"""Default configs that the compiler refused, or that spilled many registers, as compiled for GPUs that are not here.

Configs and compilations are of a process of their own, without the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from variant_cases import DEVICE, Case, complaints

from tritonconv.kernels.registry import variant

pytestmark = pytest.mark.usefixtures("poisoned")
pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent

COMPILED = """
import json, sys
from dataclasses import replace
from tritonconv.lab.bench.workloads import workload
from tritonconv.lab.inspection.compiling import Job, compile_job
from tritonconv.lab.inspection.records import faults

found = []
for name, layer, width, layout, target in json.loads(sys.argv[1]):
    base = workload(layer)
    layer = replace(base, name="this", size=(*base.size[:2], width)) if width else base
    records = compile_job(Job(name, layer, "bfloat16", layout, target))
    found.append([[*faults(each), *each.loop_loads] for each in records if each.kernel.startswith(name) or each.error])
print(json.dumps(found))
"""

JOBS = [
    ("backward_data_shuffle", "nnunet_dynunet_128_up0", 0, "ncdhw", "sm_100"),
    ("backward_data_shuffle_given", "nnunet_dynunet_128_up0", 0, "ncdhw", "sm_100"),
    ("backward_data_shuffle_given", "nnunet_dynunet_128_up0", 2, "ncdhw", "sm_100"),
    ("backward_data_shuffle_resident", "toothseg_256_last_n4", 0, "ndhwc", "sm_90"),
    ("backward_data_shuffle_resident", "swinunetr_fs48_up4", 0, "ndhwc", "sm_90"),
    ("backward_weight_shuffle", "vnet_up1", 0, "ndhwc", "sm_100"),
]


def test_what_was_refused_or_spilled_has_no_fault():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, json.dumps(JOBS)], capture_output=True, text=True, timeout=600, check=False,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wide, unaligned = ["async 16"], ["async 16", "registers 2"]
    assert [sorted(loads) for (loads,) in json.loads(done.stdout)] == [wide, wide, unaligned, wide, wide, wide]


# (voxels of a row of x, stride, taps along w) and BLOCK_W.
ROWS = {(4, 2, 2): 4, (2, 4, 4): 2, (6, 4, 4): 2, (6, 2, 2): 0, (3, 8, 8): 0, (1, 8, 8): 0, (4, 2, 1): 0, (8, 2, 2): 8}


@pytest.mark.parametrize(("width", "stride", "taps"), ROWS)
def test_rows_of_few_voxels_are_in_runs_where_their_outputs_fill_loads(width, stride, taps):
    extra = (0, 0, max(0, stride - taps))
    case = Case(channels=(5, 16), size=(3, 2, width), kernel=(2, 2, taps), stride=(2, 2, stride), extra=extra)
    for name in ("backward_data_shuffle", "backward_data_shuffle_given"):
        record = variant(name)
        problem = case.problem(torch.float16, "ncdhw")
        if record.supports(problem, DEVICE) is None:
            config = record.default(problem, DEVICE)
            assert config["BLOCK_W"] == ROWS[width, stride, taps]
            assert complaints(record, case, torch.float16, "ncdhw", True, DEVICE, lambda _, only=(config,): only) == []
