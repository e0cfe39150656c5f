"""NaN and infinities: where a value that is not finite takes part in an output, no variant makes that output finite.

The definition says which values take part: a tap that finds no voxel does not. torch's own makes further outputs NaN
in places, where one of its algorithms multiplies the zeros of a padding. A variant that does so where torch's own does
not declares it (``Variant.spreads_nonfinite``), on a CPU and on a GPU alike.
"""

from __future__ import annotations

import functools
import math
import random

import pytest
import torch
from odd_cases import LAYOUTS as ODD_LAYOUTS
from odd_cases import ODD, whole_config
from repeated import twice
from test_triton_kernels import NAMES, ON_GPU
from variant_cases import CASES, DEVICE, Case, form, random_case, run

import tritonconv
from tritonconv.autotune import nearby, rules
from tritonconv.kernels.registry import variant, variants
from tritonconv.kernels.variant import Variant
from tritonconv.problem import LAYOUTS, PASSES, Problem

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter

VALUES = math.nan, math.inf, -math.inf
OPERANDS = "x", "weight", "bias", "grad_y"
READS = {"forward": OPERANDS[:3], "backward_data": ("weight", "grad_y"), "backward_weight": ("x", "grad_y")}
TORCH_NAMES = [record.name for record in variants() if record.backend == "torch"]
# Of the problems of variant_cases.py, for the formulations in torch's operations.
KINDS = [
    "tile", "tile 1 channel", "k3 s2", "k3 s2 p1 q1", "k4 s2 p3", "front crop", "k1 s2", "k2 s3 q2", "mixed strides",
    "s1 p1", "s1 dilation", "grouped", "s3 dilation 2", "one voxel k4", "depthwise k5 s2", "depthwise dilated",
]  # fmt: skip


def spoiled(tensor: torch.Tensor) -> torch.Tensor:
    """One NaN and one infinity of each sign: at both ends, where a tile has its border, and in the middle."""
    found = tensor.clone()
    flat, last = found.view(-1), found.numel() - 1
    for place, value in zip((last // 2, 0, last), VALUES, strict=True):
        flat[place] = value
    return found


@functools.cache
def inputs(case: Case, operand: str) -> list[torch.Tensor]:
    """x, weight, bias, grad_y with such values in the one operand."""
    problem, generator = case.problem(), torch.Generator().manual_seed(0)
    shapes = problem.x_shape, problem.weight_shape, (problem.c_out,), problem.y_shape
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    return [spoiled(each) if name == operand else each for name, each in zip(OPERANDS, found, strict=True)]


@functools.cache
def reached(case: Case, operand: str) -> dict[str, list[torch.Tensor]]:
    """By pass the outputs in which a value of the operand that is not finite takes part."""
    tensors = [torch.ones(each.shape, dtype=torch.float64) for each in inputs(case, operand)]
    place = OPERANDS.index(operand)
    tensors[place] = (~inputs(case, operand)[place].isfinite()).double()
    x, weight, bias, grad_y = tensors
    leaves = [each.clone().requires_grad_() for each in (x, weight)]
    y = case.reference(*leaves, None)
    grad_x, grad_weight = torch.autograd.grad(y, leaves, grad_y)
    if operand == "bias":
        y = bias.view(1, -1, 1, 1, 1).expand_as(y)
    sums = {"forward": [y], "backward_data": [grad_x], "backward_weight": [grad_weight, grad_y.sum((0, 2, 3, 4))]}
    return {
        # An operand that an output does not depend on adds nothing.
        name: [(each > 0) & (operand in READS[name] and (place != 0 or index == 0)) for index, each in enumerate(found)]
        for name, found in sums.items()
    }


def answers(record: Variant, problem: Problem, config, case: Case, operand: str) -> list[torch.Tensor]:
    """Where the variant's outputs are not finite."""
    x, weight, bias, grad_y = inputs(case, operand)
    dense = {"device": DEVICE, "dtype": problem.dtype, "memory_format": LAYOUTS[problem.layout]}
    of_parameters = [each.to(DEVICE, problem.dtype) for each in (weight, bias)]

    def call():
        return run(record, problem, config, (x.to(**dense), *of_parameters), grad_y.to(**dense), True)

    return [~each.isfinite().cpu() for each in (twice(call) if ON_GPU and record.backend == "triton" else call())]


@functools.cache
def torchs(problem: Problem, pass_name: str, case: Case, operand: str) -> list[torch.Tensor]:
    return answers(variant(rules.FALLBACK[pass_name]), problem, {}, case, operand)


def more(record: Variant, problem: Problem, config, case: Case, operand: str, than_torch: bool = True) -> bool:
    """The variant has outputs that are not finite and by the definition are, as are torch's own; it loses none."""
    spread = False
    found, of_torch = answers(record, problem, config, case, operand), torchs(problem, record.pass_name, case, operand)
    for mine, theirs, want in zip(found, of_torch, reached(case, operand)[record.pass_name], strict=True):
        # In bfloat16 torch's CPU weight gradient of depthwise layers loses some itself (torch 2.13).
        assert not (want & theirs & ~mine).any(), f"{record.name} makes {operand} finite: {problem}"
        spread |= bool((mine & ~want & ~(theirs & than_torch)).any())
    return spread


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in NAMES])
def test_a_kernel_loses_none_and_declares_where_it_has_more(name):
    """On the first of the odd problems that it serves in each layout."""
    record, spread = form(name), []
    for layout in ODD_LAYOUTS:
        served = ((case, case.problem(torch.float16, layout)) for case in ODD.values())
        case, problem = next((each for each in served if record.supports(each[1], DEVICE) is None), (None, None))
        if case is None or problem is None:
            continue
        config = whole_config(record, problem)
        for operand in READS[record.pass_name]:
            if operand != "bias" or len(spread) < 3:
                assert any(each.any() for each in reached(case, operand)[record.pass_name])
                # torch's own differs from one processor to the next, what a kernel makes does not
                spread.append(more(record, problem, config, case, operand, than_torch=ON_GPU))
    assert spread and (ON_GPU or any(spread) == bool(record.spreads_nonfinite))
    assert record.spreads_nonfinite or not any(spread)


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_a_formulation_loses_none_and_declares_where_it_has_more(name):
    record, spread = variant(name), []
    for turn, kind in enumerate(KINDS):
        case = CASES[kind]
        for layout in LAYOUTS:
            for dtype in (torch.float32, (torch.float64, torch.bfloat16)[turn % 2]):
                problem = case.problem(dtype, layout)
                if record.supports(problem, DEVICE) is None:
                    config = record.default(problem, DEVICE)
                    spread += [more(record, problem, config, case, each) for each in READS[record.pass_name]]
    assert spread and (record.spreads_nonfinite or not any(spread))


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
@pytest.mark.parametrize("pass_name", PASSES[:2])
def test_by_default_a_cpu_has_no_more_than_torch(pass_name, vendor, monkeypatch):
    """Of whatever is chosen for the two passes that read the weight, small problems and slow choices included."""
    for module in (rules, nearby):
        monkeypatch.setattr(module, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(nearby, "MARGIN", {"forward": 0.3, "gradients": 0.3})
    monkeypatch.setattr(nearby, "LEAST_US", {"forward": 0.0, "gradients": 0.0})
    monkeypatch.setattr(nearby, "CAUTION", 0.0)
    nearby.picks.cache_clear()
    rng, cpu, chosen = random.Random(0), torch.device("cpu"), set()
    cases = [*(CASES[kind] for kind in KINDS), *[random_case(rng) for _ in range(15)], THIRDS]
    for case in cases:
        for layout in LAYOUTS:
            problem = case.problem(torch.float32, layout)
            record, _ = rules.choose(problem, cpu, pass_name)
            chosen.add(record.name)
            for operand in READS[pass_name]:
                assert not more(record, problem, record.default(problem, cpu), case, operand), f"{record.name}: {case}"
    nearby.picks.cache_clear()
    assert len(chosen) > 3


THIRDS = Case(1, (16, 16), 12, 3, 3, 1, 1, dilation=2)
APPENDED = Case(1, (3, 5), (3, 4, 5), 2, 3, 0, 0, 2)  # oneDNN multiplies zeros along w, torch's own has no oneDNN


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 2])
def test_an_infinite_weight_over_zeros_is_nan_where_its_tap_meets_a_voxel_alone(n, layout):
    """One small image goes past oneDNN in torch, two do not."""
    x = torch.zeros(n, 16, 12, 12, 12).to(memory_format=LAYOUTS[layout])
    weight = torch.randn(16, 16, 3, 3, 3)
    weight[0, 0, 0, 0, 0] = weight[-1, -1, -1, 0, -1] = math.inf
    arguments = 3, 1, 0, 1, 2
    found = tritonconv.conv_transpose3d(x, weight, None, *arguments)
    want = torch.nn.functional.conv_transpose3d(x, weight, None, *arguments)
    assert torch.equal(found.isnan(), want.isnan()) and found.isnan().sum() == n * 2662


def test_planes_appended_to_one_small_image_are_not_made_by_onednn():
    record, problem = variant("forward_torch_onednn"), APPENDED.problem(torch.float32)
    assert "planes appended along w" in record.supports(problem, torch.device("cpu"))
    for other in (Case(2, *APPENDED[1:]), Case(1, (3, 5), (3, 4, 5), 2, 3, 0, 0, (2, 2, 0))):
        assert record.supports(other.problem(torch.float32), torch.device("cpu")) is None


def test_explain_says_what_a_chosen_variant_declares(capsys):
    with tritonconv.use("forward_torch_phases"):
        text = tritonconv.explain(CASES["k3 s2"].problem()).text
    assert f"NaN and infinities: {variant('forward_torch_phases').spreads_nonfinite}" in text
    with tritonconv.use("forward_torch_native"):
        assert "forward: forward_torch_native" in (text := tritonconv.explain(CASES["k3 s2"].problem()).text)
    assert "NaN and infinities" not in text.split("backward_data:")[0]
