"""The fused backward: all three gradients from one launch that reads grad_y, exact, and used where both halves are."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from variant_cases import DEVICE, Case, inputs_of, ran_in_backward, same

import tritonconv
from tritonconv import dispatch
from tritonconv.kernels import backward_fused as fused
from tritonconv.kernels import triton_reduce
from tritonconv.kernels.registry import variant
from tritonconv.kernels.triton_buffers import Buffer
from tritonconv.kernels.triton_program import compute
from tritonconv.lab.inspection.compiling import products_in
from tritonconv.problem import LAYOUTS

NAMES = ("backward_data_fused", "backward_weight_fused")
GRAD_Y = 2  # its place among the operands of the whole backward

FUSED = {
    "several tiles and splits": Case(channels=(20, 3), size=(3, 2, 9), kernel=2, stride=2),
    "rows of whole width": Case(n=1, channels=(5, 6), size=(2, 2, 16), kernel=(1, 2, 2), stride=(1, 2, 2)),
    "groups": Case(n=1, channels=(4, 6), size=(2, 1, 10), kernel=2, stride=2, groups=2),
    "stride 3": Case(n=1, channels=(3, 2), size=(2, 1, 9), kernel=3, stride=3),
    "one channel": Case(channels=(1, 1), kernel=(4, 2, 3), stride=(4, 2, 3)),
    "k1 s1": Case(n=1, channels=(16, 5), kernel=1),
    "batch 0": Case(n=0, kernel=2, stride=2),
}


@pytest.fixture(autouse=True)
def _tf32():
    """Exact for small integers; with other products of float32 the variants serve none on a GPU."""
    with products_in("tf32"):
        yield


@pytest.fixture
def arguments(monkeypatch):
    """The buffers among the arguments of each launch that is worked out, by name."""
    dispatch.forget()  # an earlier test's call may have worked it out
    seen = []

    def recorded(run):
        def launch(kernel, grid, config, written, **given):
            seen.append({name: value for name, value in given.items() if isinstance(value, Buffer)})
            return run(kernel, grid, config, written, **given)

        return launch

    for module in (fused, triton_reduce):
        monkeypatch.setattr(module, "run", recorded(module.run))
    return seen


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("label", FUSED)
def test_one_read_of_grad_y_gives_all_gradients(label, layout, arguments):
    case = FUSED[label]
    for dtype, need_bias in ((torch.float32, True), (torch.float16, False)):
        x, weight, _, grad_y, wanted = inputs_of(case, layout, dtype)
        problem, record = case.problem(dtype, layout), variant("backward_weight_fused")
        assert record.joint is variant("backward_data_fused").joint
        default = record.default(problem, DEVICE)
        small = {**default, "BLOCK_M": 16, "BLOCK_W": min(default["BLOCK_W"], 8), "SPLITS": 2}
        for config in (default, small, {**small, "ROWS": 1 - default["ROWS"]}):
            arguments.clear()
            grad_x, grad_weight, grad_bias = compute(
                partial(record.joint, problem, config), (x, weight, grad_y, need_bias)
            )
            assert same(grad_x, wanted[0])
            assert same(grad_weight, wanted[1])
            assert same(grad_bias, wanted[2]) if need_bias else grad_bias is None
            readers = [given for given in arguments if any(each.place == GRAD_Y for each in given.values())]
            assert len(readers) == (1 if case.n else 0)
            assert len(arguments) <= 2, "the fused launch and the sum of its parts"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autograd_takes_the_joint_call_where_both_halves_are_chosen(layout, arguments, launches):
    case = FUSED["several tiles and splits"]
    assert ran_in_backward(NAMES, case, layout, launches) == list(NAMES)
    assert len(arguments) == 2
    assert {"x_ptr", "w_ptr", "grad_y_ptr", "grad_x_ptr", "partial_ptr", "bias_partial_ptr"} <= set(arguments[0])


@pytest.mark.parametrize("needed", [0, 1])
def test_a_half_reads_only_what_it_needs(needed, arguments):
    case = FUSED["groups"]
    x, weight, bias, grad_y, wanted = inputs_of(case, "ndhwc", torch.float32)
    leaf = (x, weight)[needed].requires_grad_()
    with tritonconv.use(*NAMES):
        y = case.call(x, weight, bias)
    (gradient,) = torch.autograd.grad(y, leaf, grad_y)
    assert same(gradient, wanted[needed])
    expected_tensors = ({"w_ptr", "grad_y_ptr", "grad_x_ptr"}, {"x_ptr", "grad_y_ptr", "partial_ptr"})[needed]
    assert set(arguments[0]) == expected_tensors


def test_beside_another_variant_each_half_runs_alone(launches):
    case = FUSED["groups"]
    for names in ((NAMES[0], "backward_weight_torch_native"), ("backward_data_torch_native", NAMES[1])):
        assert ran_in_backward(names, case, "ncdhw", launches) == list(names)


def test_what_does_not_fit_the_chip_says_so():
    big = Case(channels=(320, 256), size=2, kernel=2, stride=2).problem(torch.float16)
    cropped = Case(channels=(4, 4), kernel=2, stride=2, front=1).problem(torch.float16)
    for name in NAMES:
        assert "registers" in variant(name).supports(big, DEVICE)
        assert "cropped" in variant(name).supports(cropped, DEVICE)
