"""Every torch formulation against a reference computed without this package: exact, on small integers. CPU.

The inputs are small integers, so every sum is representable and ``torch.equal`` needs no tolerance. All memory from
torch.empty is filled with NaN, so an element that is never written shows.
"""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from variant_cases import CASES, CPU, complaints, expected, random_case, same

import tritonconv
from tritonconv import VariantNotApplicable, dispatch
from tritonconv.autotune.model import work_of
from tritonconv.autotune.rules import FALLBACK
from tritonconv.kernels.registry import variant
from tritonconv.problem import LAYOUTS, PASSES

TORCH_NAMES = [record.name for record in tritonconv.variants() if record.backend == "torch"]
AT_LEAST = 6  # problems of the grid that every torch formulation serves, in each layout and dtype


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TORCH_NAMES)
def test_launch_is_exact(name, layout, dtype):
    record = variant(name)
    answers = [complaints(record, case, dtype, layout, bias) for case in CASES.values() for bias in (True, False)]
    served = [found for found in answers if found is not None]
    assert [complaint for found in served for complaint in found] == []
    if not (name == "forward_torch_onednn" and dtype is torch.float64):
        assert len(served) >= 2 * AT_LEAST


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(8))
def test_random_problems(seed):
    rng = random.Random(seed)
    for _ in range(20):
        case, layout, bias = random_case(rng), rng.choice(list(LAYOUTS)), rng.random() < 0.5
        answers = [complaints(variant(name), case, torch.float32, layout, bias) for name in TORCH_NAMES]
        served = [found for found in answers if found is not None]
        assert [complaint for found in served for complaint in found] == []
        assert len(served) >= len(PASSES)


NATIVES = tuple(FALLBACK[name] for name in PASSES[1:])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TORCH_NAMES)
def test_forced_through_the_public_operation(name, layout, launches):
    """Values, gradients, memory format, and that the forced variant is the one that ran."""
    record, served = variant(name), 0
    dense = {"dtype": torch.float32, "memory_format": LAYOUTS[layout]}
    for case_name, case in CASES.items():
        inputs, grad_y, y, gradients = expected(case, True)
        x, weight, bias = inputs[0].to(**dense), inputs[1].float(), inputs[2].float()
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        why_not = record.supports(case.problem(layout=layout), CPU)
        if why_not is not None:
            with tritonconv.use(name), pytest.raises(VariantNotApplicable) as caught:
                case.call(*leaves)
            assert name in str(caught.value)
            continue
        served += 1
        launches.clear()
        with tritonconv.use(name):
            plan = dispatch.plan_for(*leaves, case.arguments)
            alone = plan.torch_alone is not None
            # torch's two gradients are one operation, which is no launch of either variant.
            together = name in NATIVES and all(plan.choice(each).variant.name in NATIVES for each in PASSES[1:])
            got = case.call(*leaves)
        found = torch.autograd.grad(got, leaves, grad_y.float())  # outside the block: the call keeps its variants
        # With all three passes torch's own, torch's own autograd runs them, and no launch is ours to see.
        assert launches.count(name) == (0 if alone or together else 1), f"{case_name}: {launches}"
        assert same(got, y), case_name
        assert all(map(same, found, gradients)), case_name
        if case.n and case.channels[0] > 1:  # one channel is laid out both ways at once
            memory_format = plan.problem.memory_format  # that of torch's answer
            assert alone or got.is_contiguous(memory_format=memory_format), case_name
            assert alone or found[0].is_contiguous(memory_format=memory_format), case_name
    assert served >= AT_LEAST


@pytest.mark.parametrize("name", [record.name for record in tritonconv.variants()])
def test_what_is_empty_is_answered_for_by_every_variant(name):
    """No batch, no output channels: a config and its work are asked for, whatever then launches nothing."""
    record, served = variant(name), 0
    device = torch.device("cuda") if record.backend == "triton" else CPU
    kinds = itertools.product(CASES.values(), ({"n": 0}, {"c_out": 0}), (torch.float16, torch.float32), LAYOUTS)
    for case, empty, dtype, layout in kinds:
        problem = dataclasses.replace(case.problem(dtype, layout), **empty)
        if record.supports(problem, device) is None:
            served += 1
            for config in (record.default(problem, device), *record.space(problem, device)):
                assert work_of(record, problem, config).launches >= 1
            assert record.workspace_bytes(problem) >= 0
    assert served or name == "forward_torch_onednn"  # which refuses them


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_what_is_out_of_reach_has_a_reason_that_the_error_repeats(name):
    record, refused = variant(name), 0
    for case in CASES.values():
        problem = case.problem()
        why_not = record.supports(problem, CPU)
        if why_not is None:
            continue
        refused += 1
        assert isinstance(why_not, str)
        assert len(why_not) > 10
        inputs, *_ = expected(case, True)
        arguments = [t.float().requires_grad_() for t in inputs]
        with tritonconv.use(name), pytest.raises(VariantNotApplicable) as caught:
            case.call(*arguments)
        assert why_not in str(caught.value)
        assert name in str(caught.value)
        assert str(problem).split(" float32")[0] in str(caught.value), "the problem is named too"
    general = name.removeprefix(f"{record.pass_name}_") in ("torch_native", "torch_other_layout")
    assert refused or general or name in ("backward_data_torch_conv", "backward_weight_torch_conv")
