"""A stored config that no launch takes is passed over with a warning; the call never fails because of it."""

from __future__ import annotations

import pytest
import torch
from odd_cases import ODD

import tritonconv
from tritonconv import Problem, StoreWarning, dispatch
from tritonconv.autotune import choose, store
from tritonconv.autotune.choose import config_fault
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.sources import revision
from tritonconv.autotune.store import Entry, Table
from tritonconv.kernels.registry import variant, variants
from tritonconv.problem import LAYOUTS

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
PROBLEM = Problem(1, 8, 8, (4, 4, 4), (3, 3, 3), (2, 2, 2), (0, 0, 0), (9, 9, 9))
KERNEL = "forward_phases"
FAULTS = {
    "nothing": (None, "its keys are COPY, expected BLOCK_K, "),
    "a tile of 3": ({"BLOCK_M": 3}, "BLOCK_M is 3, expected a power of two"),
    "a tile of 0": ({"BLOCK_N": 0}, "BLOCK_N is 0, expected an integer above 0"),
    "3 warps": ({"num_warps": 3}, "num_warps is 3, expected a power of two"),
    "a negative number": ({"GROUP_M": -1}, "GROUP_M is -1, expected an integer from 0"),
    "an argument": ({"y_ptr": 4096}, "its keys are "),
}


@pytest.fixture(autouse=True)
def _warns_again(own_store):
    choose._warn_once.cache_clear()


@pytest.mark.parametrize(("change", "said"), FAULTS.values(), ids=FAULTS)
def test_a_config_that_cannot_be_is_passed_over_with_one_warning(change, said):
    pytest.importorskip("triton")
    record = variant(KERNEL)
    config = {} if change is None else {**record.default(PROBLEM, DEVICE), **change}
    entry = Entry(KERNEL, config, 1.0, 2.0, revision(record), str(PROBLEM), "forward", "2026-01-01T00:00:00")
    store.merge(Table(device_name(DEVICE), {str(Key.of(PROBLEM, "forward")): entry}))
    dispatch.forget()
    x, weight = torch.randn(PROBLEM.x_shape, device=DEVICE), torch.randn(PROBLEM.weight_shape, device=DEVICE)
    with pytest.warns(StoreWarning, match="is passed over") as warned:
        y = tritonconv.conv_transpose3d(x, weight, None, 2)
    torch.testing.assert_close(y, torch.conv_transpose3d(x, weight, None, 2), rtol=1e-3, atol=1e-3)
    dispatch.forget()
    tritonconv.conv_transpose3d(x, weight, None, 2)  # planned anew, and the warning is an error in a test
    assert said in str(warned.list[0].message) and len(warned.list) == 1


def test_what_the_tuner_stores_has_no_fault():
    checked = 0
    for case in ODD.values():
        for layout in LAYOUTS:
            problem = case.problem(torch.float16, layout)
            for record in variants():
                if record.supports(problem, DEVICE) is None:
                    configs = (record.default(problem, DEVICE), *record.space(problem, DEVICE))
                    assert [config_fault(record, config, problem, DEVICE) for config in configs] == [None] * len(
                        configs
                    )
                    checked += len(configs)
    assert checked > 50
