"""The gate's reference, its reduced problems, and what TF32 is permitted. CPU only."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tritonconv.lab.bench import float64, gate
from tritonconv.lab.bench.calls import make_tensors
from tritonconv.lab.bench.case import Case, Judge
from tritonconv.lab.bench.operations import torch_call
from tritonconv.lab.bench.workloads import workloads
from tritonconv.problem import LAYOUTS, Problem

CPU = torch.device("cpu")
OUTPUTS = gate.OUTPUTS["forward_backward"][:4]  # of a layer without an epilogue (those with one: test_stages.py)


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
    wanted = OUTPUTS
    exact = float64.reference(problem, t.x, t.weight, t.bias, t.grad_y, wanted)
    torchs = dict(zip(wanted, torch_call(problem, t, "forward_backward")(), strict=False))
    assert exact.keys() == torchs.keys()
    assert all(torch.equal(exact[key], torchs[key]) for key in exact)


def test_the_gate_permits_what_tf32_does_to_the_operands_and_no_more():
    problem = Problem(2, 48, 16, (3, 4, 8), (3,) * 3, (2,) * 3, (1,) * 3, (5, 7, 15), bias=True)
    t, wanted = make_tensors(problem, CPU, 0), OUTPUTS
    operands = problem, t.x, t.weight, t.bias, t.grad_y, wanted
    exact, cut = float64.reference(*operands), float64.reference_in_tf32(*operands)
    assert cut.keys() == exact.keys() - {"grad_bias"}
    torchs = {key: value.float() for key, value in exact.items()}  # an IEEE answer, as if torch had not taken TF32
    mine = torchs | {key: value.float() for key, value in cut.items()}
    strict, permitted = gate.errors(problem, torchs, exact, {}), gate.errors(problem, torchs, exact, cut)
    assert not gate.against_reference(problem, mine, strict, exact).ok
    assert gate.against_reference(problem, mine, permitted, exact).ok
    assert max(gate.relative_errors(permitted, exact).values()) < 2**-8
    assert permitted["grad_bias"] == strict["grad_bias"]
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
    """The divisor of each stride of x and y, and which is 1: Triton compiles a kernel for each such case."""
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


# ------------------------------------------------------------------ who is wrong

STEP = Problem(3, 4, 6, (9, 8, 7), (3,) * 3, (2,) * 3, (1,) * 3, (17, 15, 13), bias=True)
KINDS = {
    "plain": STEP,
    "grouped": dataclasses.replace(STEP, groups=2),
    "depthwise": dataclasses.replace(STEP, c_out=4, groups=4),
    "bfloat16": dataclasses.replace(STEP, dtype=torch.bfloat16, layout="ndhwc"),
    "no bias": dataclasses.replace(STEP, bias=False),
}
GARBAGE = 5.5e22  # a grad_weight of torch's on a GPU had it, with no error raised


def step_of(case: Case, changed: str = "", change=lambda value: value):
    """The training step by torch's autograd, with one output changed, as a call that counts itself."""

    def call():
        call.made += 1
        outputs = case.torch("forward_backward")()
        return tuple(change(value) if name == changed else value for name, value in zip(OUTPUTS, outputs, strict=False))

    call.made = 0
    return call


def garbage(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value[(-1,) * value.dim()] += GARBAGE
    return value


def a_little(value: torch.Tensor) -> torch.Tensor:
    return value + 1e-3 * value.abs().max()


def spoilt(problem: Problem, changed: str = "", change=lambda value: value) -> Case:
    """Where torch's own answer at full size is changed in one output; ``baseline`` is the same call each time."""
    case = Case(problem, CPU, 0)
    wrong = step_of(case, changed, change)
    case.baseline = lambda pass_name: wrong
    return case


@pytest.mark.parametrize("elements", [1, 700, 5000, 1 << 26])
@pytest.mark.parametrize("kind", KINDS)
def test_float64_piece_by_piece_is_float64(kind, elements, monkeypatch):
    """The scale, and the error of an answer that is wrong in the last element."""
    problem = KINDS[kind]
    t = make_tensors(problem, CPU, 0)
    outputs = OUTPUTS
    exact = float64.reference(problem, t.x, t.weight, t.bias, t.grad_y, outputs)
    assert exact.keys() == {*outputs} - ({"grad_bias"} if t.bias is None else set())
    monkeypatch.setattr(float64, "PIECE_ELEMENTS", elements)
    for name, want in exact.items():
        off, lost = want.clone(), want.clone()
        off[(-1,) * off.dim()] += 3.0
        lost[(0,) * off.dim()] = math.nan
        scale, (right, wrong, nan) = float64.distances(problem, t, name, [want, off, lost])
        assert scale == pytest.approx(want.abs().max().item(), rel=1e-12)
        assert right < 1e-12 * scale and wrong == pytest.approx(3.0, rel=1e-9) and math.isnan(nan)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("change", [garbage, lambda value: value * math.nan, a_little], ids=["huge", "nan", "a little"])
def test_where_torch_is_wrong_at_size_float64_says_so_and_the_candidate_passes(output, change):
    case = spoilt(STEP, output, change)
    judge = case.judge("forward_backward")
    assert judge(step_of).ok
    assert judge.torch_faults.keys() == {output}
    assert judge.torch_faults[output].startswith(f"{output}: torch's own is wrong at this size: max error ")
    # An answer as wrong as torch's passes only until torch is known to be wrong.
    same = step_of(case, output, change)
    finite = bool(change(torch.ones(9)).isfinite().all())
    assert Judge(case, "forward_backward").at_size(same).ok == finite
    verdict = judge.at_size(same)
    assert not verdict.ok and verdict.output == output
    off = next(name for name in OUTPUTS if name != output)
    assert judge.at_size(step_of(case, off, a_little)).output == off  # of the others torch's answer still decides


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_wrong_candidate_is_wrong_and_torch_stays_trusted(output):
    judge = spoilt(STEP).judge("forward_backward")
    verdict = judge(lambda case: step_of(case, output if case.problem == STEP else "", a_little))
    assert not verdict.ok and verdict.output == output and not judge.torch_faults
    assert verdict.torch_error < verdict.tolerance < verdict.max_error
    both = spoilt(STEP, output, garbage).judge("forward_backward")
    assert not both(lambda case: step_of(case, output if case.problem == STEP else "", a_little)).ok
    assert both.torch_faults.keys() == {output}


def test_float64_is_asked_only_where_the_two_disagree(monkeypatch):
    asked = []
    real = float64.distances
    monkeypatch.setattr(float64, "distances", lambda *args: asked.append(args[2]) or real(*args))
    case = spoilt(STEP)
    assert Judge(case, "forward_backward")(step_of).ok and not asked
    assert case.baseline("forward_backward").made == 1
    Judge(case, "forward_backward")(lambda each: step_of(each, "grad_x", a_little))
    assert not asked  # red in step 1
    Judge(case, "forward_backward").at_size(step_of(case, "grad_x", a_little))
    assert asked == ["grad_x"]


def test_torch_is_found_wrong_on_a_problem_too_small_to_be_reduced():
    problem = Problem(1, 4, 3, (3, 4, 5), (2,) * 3, (2,) * 3, (0,) * 3, (6, 8, 10), bias=True)
    assert gate.reduced(problem, CPU) == problem
    case = spoilt(problem, "grad_weight", garbage)
    judge = case.judge("forward_backward")
    assert judge(step_of).ok and judge.torch_faults.keys() == {"grad_weight"}
    assert not judge(lambda each: step_of(each, "grad_weight", a_little)).ok
    assert not judge(lambda each: case.baseline("forward_backward")).ok


def test_each_output_has_the_error_of_torch_in_that_output_alone():
    """torch's coarse grad_weight earns y no tolerance, in either step."""
    coarse = lambda value: value + 0.01 * value.abs().max()  # noqa: E731
    case = Case(STEP, CPU, 0)
    whole = step_of(case)
    exact = case.exact("forward_backward")
    torchs = dict(zip(exact, whole(), strict=True))
    relative = gate.relative_errors(gate.errors(STEP, torchs, exact, {}), exact)
    half = dataclasses.replace(STEP, dtype=torch.bfloat16)
    loose = gate.errors(half, torchs | {"grad_weight": coarse(torchs["grad_weight"])}, exact, {})
    tight = gate.errors(half, torchs, exact, {})
    assert loose["grad_weight"] > 2 * tight["grad_weight"]
    assert {name: loose[name] for name in ("y", "grad_x", "grad_bias")} == {
        name: tight[name] for name in ("y", "grad_x", "grad_bias")
    }
    y = exact["y"].abs().max().item()
    assert gate.limit(STEP, "y", relative["y"], y) < 1e-4 * y
    assert not gate.against_torch(STEP, "y", {"y": coarse(torchs["y"])}, torchs["y"], relative["y"]).ok


def test_an_error_that_no_rounding_makes_earns_no_credit():
    exact = Case(STEP, CPU, 0).exact("forward_backward")
    for dtype in (torch.float32, torch.bfloat16):
        problem = dataclasses.replace(STEP, dtype=dtype)
        rounded = {name: value.to(dtype) for name, value in exact.items()}
        least = gate.errors(problem, rounded, exact, {})
        assert least == {name: gate.distance(rounded[name], exact[name]) for name in exact}
        for spoil in (garbage, lambda value: value * math.nan, lambda value: value + 0.6 * value.abs().max()):
            found = gate.errors(problem, rounded | {"grad_weight": spoil(rounded["grad_weight"])}, exact, {})
            assert found == least
