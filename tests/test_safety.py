"""Configs that must not run: no default, no candidate, no choice of the store; ``use`` takes a safe one or says why.

No variant of the project has such a config (see test_verdicts.py), so one is given to a variant here.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tritonconv
from tritonconv import Problem, VariantNotApplicable, dispatch
from tritonconv.autotune import ceilings, model
from tritonconv.autotune.choose import config_fault
from tritonconv.kernels import registry, safety
from tritonconv.kernels.safety import unsafe, without_hazards
from tritonconv.kernels.variant import Toolchain
from tritonconv.lab.bench.workloads import workload

pytest.importorskip("triton")

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
PROBLEM = Problem(1, 16, 16, (4, 4, 4), (3, 3, 3), (2, 2, 2), (0, 0, 0), (9, 9, 9))
KERNEL = "forward_phases"
WHY = "a register is written too early"
OLD, NEW = Toolchain(90, (3, 6)), Toolchain(90, (3, 9))
RATES = ceilings.of_capability((9, 0))


def deep(problem, config, target):
    """The hazard: three buffers, as the default has, compiled by an old Triton."""
    return WHY if config["num_stages"] == 3 and target.triton < (3, 9) else None


def always(problem, config, target):
    return WHY if target.triton < (3, 9) else None


launched: list[int] = []  # num_stages of each launch of KERNEL


@pytest.fixture
def given(monkeypatch):
    """Gives KERNEL a hazard, and the process a target: the variant as the registry then lists it."""
    launched.clear()

    def give(hazard, target):
        own = registry.variant(KERNEL)

        def launch(problem, config, *operands):
            launched.append(config["num_stages"])
            return own.compute(problem, config, *operands)

        record = without_hazards(dataclasses.replace(own, launches=None, launch=launch, hazard=hazard))
        monkeypatch.setitem(registry._records(), KERNEL, record)
        monkeypatch.setattr(safety, "toolchain_of", lambda device: target)
        dispatch.forget()
        return record

    yield give
    dispatch.forget()


def test_the_target_is_that_of_the_device():
    from tritonconv.kernels import triton_target

    assert safety.toolchain_of(torch.device("cpu")) == Toolchain(0, triton_target.triton_version())
    assert triton_target.triton_version() >= (3, 6)


def test_an_unsafe_default_gives_way_to_the_first_safe_config(given):
    usual = registry.variant(KERNEL).default(PROBLEM, DEVICE)
    assert usual["num_stages"] == 3
    record = given(deep, OLD)
    default = record.default(PROBLEM, DEVICE)
    assert default != usual and default["num_stages"] != 3
    assert default == record.space(PROBLEM, DEVICE)[0]
    assert record.supports(PROBLEM, DEVICE) is None
    assert given(deep, NEW).default(PROBLEM, DEVICE) == usual


def test_no_candidate_is_unsafe(given):
    record = given(deep, OLD)
    for name, layout in (("psmnet_train_64_32", "ndhwc"), ("vnet_up3", "ncdhw")):
        problem = workload(name).problem(torch.float16, layout)
        found = model.candidates(record, problem, DEVICE, RATES)
        assert found and all(unsafe(record, problem, config, DEVICE) is None for config, _ in found)
        assert all(config["num_stages"] != 3 for config in model.pruned_space(record, problem, DEVICE))


def test_a_stored_config_is_asked_about(given):
    record = given(deep, OLD)
    config = dict(record.default(PROBLEM, DEVICE))
    assert config_fault(record, config, PROBLEM, DEVICE) is None
    assert config_fault(record, config | {"num_stages": 3}, PROBLEM, DEVICE) == WHY


def test_a_variant_without_a_safe_config_serves_nothing_and_is_not_ranked(given):
    record = given(always, OLD)
    assert record.space(PROBLEM, DEVICE) == ()
    assert record.supports(PROBLEM, DEVICE) == f"no config of it is safe here: {WHY}"
    assert KERNEL not in [each.name for each, _, _ in model.rank(PROBLEM, DEVICE, "forward", RATES)]
    assert given(always, NEW).supports(PROBLEM, DEVICE) is None


def test_use_takes_a_safe_config_or_says_why_there_is_none(given):
    x, weight = torch.randn(PROBLEM.x_shape, device=DEVICE), torch.randn(PROBLEM.weight_shape, device=DEVICE)
    given(deep, OLD)
    with tritonconv.use(KERNEL):
        y = tritonconv.conv_transpose3d(x, weight, None, 2)
    torch.testing.assert_close(y, torch.conv_transpose3d(x, weight, None, 2), rtol=1e-3, atol=1e-3)
    assert launched and 3 not in launched
    given(always, OLD)
    with tritonconv.use(KERNEL), pytest.raises(VariantNotApplicable, match=WHY):
        tritonconv.conv_transpose3d(x, weight, None, 2)


def test_the_hazard_is_asked_about_the_problem_without_overlap_and_of_the_problem_in_the_other_layout():
    """As the other fields: ``Problem.without_overlap``, and ndhwc for the kernels that copy their operands."""
    asked = []

    def listen(problem, config, target):
        asked.append(problem)

    from tritonconv.kernels import triton_channels_last

    base = dataclasses.replace(registry.variant(KERNEL), hazard=listen)
    copying = triton_channels_last.copying(base, ("x",), "c_in")
    assert copying.hazard is not None
    problem = workload("psmnet_train_64_32").problem(torch.float16, "ncdhw")
    for copies in (0, 1):
        copying.hazard(problem, {"COPY": copies}, OLD)
    assert [each.layout for each in asked] == ["ncdhw", "ndhwc"]
