"""Both gradients in one grid: exact, one launch beside the sums of partials, used where both halves are chosen."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from variant_cases import DEVICE, Case, inputs_of, ran_in_backward, same

from tritonconv import dispatch
from tritonconv.autotune.choose import Selection
from tritonconv.kernels import backward_data_gemm as gemm
from tritonconv.kernels import backward_together as together
from tritonconv.kernels import backward_weight_splitk as splitk
from tritonconv.kernels.registry import variant
from tritonconv.kernels.triton_arrival import ARRIVE
from tritonconv.kernels.triton_program import Program
from tritonconv.problem import LAYOUTS

NAMES = ("backward_data_together", "backward_weight_together")
JOINT = "backward_together_kernel"
APART = {"backward_data_gemm_kernel", "backward_weight_splitk_kernel"}

CASES = {
    "k3 s2 p1 q1": Case(channels=(20, 9), size=(3, 2, 5), stride=2, front=1, back=1, extra=1),
    "k4 s2, crops": Case(n=1, channels=(5, 16), size=(3, 4, 4), kernel=4, stride=2, front=(1, 0, 3), back=(3, 1, 0)),
    "groups": Case(n=1, channels=(6, 9), size=(2, 2, 3), stride=2, front=1, groups=3),
    "packed groups": Case(n=1, channels=(8, 8), size=(2, 2, 3), stride=2, front=1, back=1, groups=4),
    "dilation": Case(n=1, size=(2, 2, 3), dilation=(1, 2, 3), front=(1, 2, 3), back=(1, 0, 3), extra=(0, 1, 0)),
    "mixed strides": Case(n=1, channels=(3, 17), size=(2, 3, 2), kernel=(3, 2, 4), stride=(2, 1, 3), front=(1, 0, 2)),
    "batch 0": Case(n=0, channels=(16, 16), size=2, stride=2),
}


def configs_of(problem):
    """The default; small tiles with partial sums of grad_weight, of grad_x, and of both in the other orders."""
    default = together.default(problem, DEVICE)
    small = {**default, "D_BLOCK_M": 16, "D_BLOCK_N": 16, "D_BLOCK_K": 16, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    small |= {"D_BLOCK_W": min(default["D_BLOCK_W"], 8), "BLOCK_W": min(default["BLOCK_W"], 8), "BIAS_V": 16}
    yield default
    yield {**small, "SPLITS": 3}
    yield {**small, "SPLITS": 1, "D_SPLITS": 2, "WEIGHT": 1}
    yield {**small, "SPLITS": 2, "D_SPLITS": 3, "WEIGHT": 2 - default["WEIGHT"], "SKIP": 1 - default["SKIP"], ARRIVE: 1}


def names_of(program: Program) -> list[str]:
    return [kernel.name for kernel in program.kernels]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("label", CASES)
def test_one_grid_gives_all_gradients(label, layout):
    case, joint = CASES[label], variant(NAMES[0]).joint
    assert joint is variant(NAMES[1]).joint
    for dtype, need_bias in ((torch.float32, True), (torch.float16, False)):
        x, weight, _, grad_y, wanted = inputs_of(case, layout, dtype)
        problem = case.problem(dtype, layout)
        assert [variant(name).supports(problem, DEVICE) for name in NAMES] == [None, None]
        for config in configs_of(problem):
            operands = x, weight, grad_y, need_bias
            program = Program.of(partial(joint, problem, config), operands)
            grad_x, grad_weight, grad_bias = program.run(operands)
            assert same(grad_x, wanted[0])
            assert same(grad_weight, wanted[1])
            assert same(grad_bias, wanted[2]) if need_bias else grad_bias is None
            names = names_of(program)
            assert names.count(JOINT) == (1 if case.n else 0) and not APART & set(names)
            sums = (config["D_SPLITS"] > 1) + (config["SPLITS"] > 1 and not config.get(ARRIVE))
            assert names.count("sum_partials_kernel") == (sums if case.n else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sums_are_those_of_the_halves_bit_by_bit(layout):
    """A program does the same work, whichever grid it is of."""
    case = CASES["k3 s2 p1 q1"]
    problem = case.problem(torch.float16, layout)
    x, weight, grad_y = (
        torch.randn(shape, device=DEVICE).half().contiguous(memory_format=LAYOUTS[layout])
        for shape in (problem.x_shape, problem.weight_shape, problem.y_shape)
    )
    for config in configs_of(problem):
        grad_x = variant(NAMES[0]).compute(problem, config, grad_y, weight)
        grad_weight, grad_bias = variant(NAMES[1]).compute(problem, config, x, grad_y, True)
        operands = x, weight, grad_y, True
        found = Program.of(partial(together.backward, problem, config), operands).run(operands)
        assert all(map(torch.equal, found, (grad_x, grad_weight, grad_bias)))


def test_autograd_takes_the_joint_call_where_both_halves_are_chosen(launches, monkeypatch):
    dispatch.forget()  # an earlier test's call may have worked it out
    joined, run = [], together.run
    monkeypatch.setattr(
        together, "run", lambda kernel, *more, **named: joined.append(kernel) or run(kernel, *more, **named)
    )
    case = CASES["k3 s2 p1 q1"]
    assert ran_in_backward(NAMES, case, "ndhwc", launches) == list(NAMES)
    assert joined == [together.backward_together_kernel]


def test_beside_another_variant_each_half_runs_alone(launches):
    case = CASES["groups"]
    for names in ((NAMES[0], "backward_weight_splitk"), ("backward_data_gemm", NAMES[1])):
        assert ran_in_backward(names, case, "ncdhw", launches) == list(names)


def test_the_weight_that_the_forward_packed_is_not_packed_again():
    case = CASES["k3 s2 p1 q1"]
    problem = case.problem(torch.float32, "ndhwc")
    x, weight, bias, grad_y, wanted = inputs_of(case, "ndhwc", torch.float32)
    records = [variant(name) for name in ("forward_gather", *NAMES)]
    chosen = {each.pass_name: Selection(each, {**each.default(problem, DEVICE), "WEIGHT": 1}, "") for each in records}
    plan = dispatch.plan_of(problem, DEVICE, **chosen)
    _, kept = plan.forward_and_pack(x, weight, bias)
    assert all(map(same, plan.backward(x, weight, grad_y, True, kept), wanted))
    (kind,) = plan.backward.kept.values()
    names = names_of(kind.program)
    assert JOINT in names and "transpose_kernel" not in names


def test_a_config_holds_one_of_each_half():
    problem = CASES["groups"].problem(torch.float16)
    config = together.default(problem, DEVICE)
    assert set(together.of_data(config)) == set(gemm.default(problem, DEVICE))
    assert set(together.of_weight(config)) == set(splitk.gemm(problem).default())
    for each in (config, *together.space(problem, DEVICE)):
        assert set(each) == set(config)
        assert each["num_warps"] == together.of_data(each)["num_warps"] == together.of_weight(each)["num_warps"]


def test_where_it_cannot_pay_it_says_so():
    large = Case(channels=(16, 16), size=64, stride=2).problem(torch.float16)
    depthwise = Case(channels=(16, 16), stride=2, groups=16).problem(torch.float16)
    tiled = Case(channels=(16, 16), kernel=2, stride=2).problem(torch.float16)
    for name in NAMES:
        supports = variant(name).supports
        assert "more than 528 fill a GPU" in supports(large, DEVICE)
        assert "depthwise" in supports(depthwise, DEVICE)
        assert "no taps overlap" in supports(tiled, DEVICE)
