"""The gate's reference, its reduced problems, and what TF32 is permitted. CPU only."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tritonconv.bench import gate
from tritonconv.bench.calls import make_tensors, torch_call
from tritonconv.bench.workloads import workloads
from tritonconv.problem import LAYOUTS, Problem

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name", [one.name for one in workloads() if one.name.startswith(("kernelbench_l1", "mednext"))]
)
def test_the_reference_is_the_definition(name):
    """Exact on small integers, against torch in float64, for strides, crops, dilations and groups of real layers."""
    problem = gate.reduced(next(one for one in workloads() if one.name == name).problem(torch.float64), CPU)
    problem = dataclasses.replace(
        problem, c_in=min(problem.c_in, 8), c_out=min(problem.c_out, 8), groups=min(problem.groups, 8), n=1
    )
    t = make_tensors(problem, CPU, 0)
    whole = {key: value.mul(2).round() for key, value in vars(t).items() if value is not None}
    t = dataclasses.replace(t, **whole)
    wanted = gate.OUTPUTS["forward_backward"]
    exact = gate.reference(problem, t.x, t.weight, t.bias, t.grad_y, wanted)
    torchs = dict(zip(wanted, torch_call(problem, t, "forward_backward")(), strict=False))
    assert exact.keys() == torchs.keys()
    assert all(torch.equal(exact[key], torchs[key]) for key in exact)


def test_the_gate_permits_what_tf32_does_to_the_operands_and_no_more():
    problem = Problem(2, 48, 16, (3, 4, 8), (3,) * 3, (2,) * 3, (1,) * 3, (5, 7, 15), bias=True)
    t, wanted = make_tensors(problem, CPU, 0), gate.OUTPUTS["forward_backward"]
    operands = problem, t.x, t.weight, t.bias, t.grad_y, wanted
    exact, cut = gate.reference(*operands), gate.reference_in_tf32(*operands)
    assert cut.keys() == exact.keys() - {"grad_bias"}
    torchs = {key: value.float() for key, value in exact.items()}  # an IEEE answer, as if torch had not taken TF32
    mine = torchs | {key: value.float() for key, value in cut.items()}
    strict, permitted = gate.errors(torchs, exact, {}), gate.errors(torchs, exact, cut)
    assert not gate.against_reference(problem, mine, strict, exact).ok
    assert gate.against_reference(problem, mine, permitted, exact).ok
    assert gate.relative_error(permitted, exact) < 2**-8 and permitted["grad_bias"] == strict["grad_bias"]
    for name in cut:
        off = mine | {name: mine[name] + 4 * permitted[name]}
        assert not gate.against_reference(problem, off, permitted, exact).ok
    assert not gate.in_tf32(problem, CPU)
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert gate.in_tf32(problem, torch.device("cuda"))
        assert not gate.in_tf32(dataclasses.replace(problem, dtype=torch.float16), torch.device("cuda"))
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert not gate.in_tf32(problem, torch.device("cuda"))


KIND = ("kernel", "stride", "crop", "dilation", "groups")


def test_the_gate_is_cheap_and_of_the_same_kind():
    for one in workloads():
        problem = one.problem()
        small = gate.reduced(problem, CPU)
        assert all(getattr(small, key) == getattr(problem, key) for key in KIND)
        assert small.flops < 5e8
        assert min(small.out_size) >= 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu_what_is_judged_has_what_is_timed_compiled_in(layout):
    """What divides each stride of x and y, and which is 1: Triton compiles a kernel for each such case."""
    for one in workloads():
        problem = one.problem(torch.bfloat16, layout)
        small = gate.reduced(problem, torch.device("cuda"))
        assert all(getattr(small, key) == getattr(problem, key) for key in (*KIND, "c_in", "c_out"))
        assert math.prod(small.size) <= 21 * 21 * 20 and small.n <= 2
        for name in ("x_shape", "y_shape"):
            strides = [
                torch.empty(getattr(each, name), device="meta", memory_format=each.memory_format).stride()
                for each in (problem, small)
            ]
            judged, timed = ([(math.gcd(16, stride), stride == 1) for stride in each] for each in strides)
            assert judged == timed, f"{problem}: {small}"
        sizes = [size for size, whole in zip(small.size, problem.size, strict=True) if size != whole]
        assert len(set(sizes)) == len(sizes), "two axes that were mixed up would go unnoticed"
