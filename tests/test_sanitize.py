"""Every Triton variant once, on a small shape that no tile fits: exact, and with all of its launches.

``make sanitize`` runs this file under compute-sanitizer, each allocation of its own.
"""

from __future__ import annotations

from functools import partial

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
        "forward": [(record.launches, (x, weight, bias), exact["forward"])],
        "backward_data": [(record.launches, (grad_y, weight), exact["backward_data"])],
        "backward_weight": [(record.launches, (x, grad_y, True), exact["backward_weight"])],
    }[record.pass_name]
    if record.joint is not None:
        calls.append((record.joint, (x, weight, grad_y, True), exact["backward_data"] + exact["backward_weight"]))
    for launches, given, wanted in calls:
        replay = Replay(partial(launches, problem, config))  # the second call repeats the program
        found = twice(lambda replay=replay, given=given: [*_several(replay(*given))])
        assert all(map(same, found, wanted)) and len(found) == len(wanted)
        assert (replay.counts.anew, replay.counts.repeated) == (1, 1)


def _several(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)
