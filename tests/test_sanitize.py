"""Every Triton variant once, on a small shape that no tile fits: exact, and with all of its launches.

``make sanitize`` runs this file under compute-sanitizer, each allocation of its own.
"""

from __future__ import annotations

import pytest
import torch
from odd_cases import odd, whole_config
from repeated import twice
from test_triton_kernels import NAMES, operands
from variant_cases import form, same

from tritonconv.kernels.triton_replay import Replay


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in NAMES])
def test_exact(name):
    record = form(name)
    case, problem = odd(record)
    (x, weight, bias, grad_y), exact = operands(case, torch.float16, problem.layout)
    config = whole_config(record, problem)
    calls = {
        "forward": [(record.launch, (x, weight, bias), exact["forward"])],
        "backward_data": [(record.launch, (grad_y, weight), exact["backward_data"])],
        "backward_weight": [(record.launch, (x, grad_y, True), exact["backward_weight"])],
    }[record.pass_name]
    if record.joint is not None:
        calls.append((record.joint, (x, weight, grad_y, True), exact["backward_data"] + exact["backward_weight"]))
    for launch, given, wanted in calls:
        replay = Replay(launch, problem, config)  # the second call goes past Triton's launcher
        found = twice(lambda replay=replay, given=given: [*_several(replay(*given))])
        assert all(map(same, found, wanted)) and len(found) == len(wanted)
        (kept,) = replay.kept.values()
        assert kept is not None


def _several(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)
