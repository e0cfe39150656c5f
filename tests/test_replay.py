"""Launches that a plan keeps: the same answers as a launch made afresh, and nothing kept that a call owns."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from variant_cases import form, form_names

pytest.importorskip("triton")

import tritonconv
from tritonconv import Problem, dispatch
from tritonconv.autotune.choose import Selection
from tritonconv.kernels import registry, triton_convolution, triton_launch, triton_transpose
from tritonconv.kernels.registry import variant, variants
from tritonconv.kernels.triton_replay import Replay

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UP = Problem(1, 4, 3, (2, 3, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), (4, 6, 8), bias=True)
GATHER, GEMM = variant("forward_gather"), variant("backward_data_gemm")


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, device=DEVICE).float()


def config_of(record, **changes) -> dict[str, int]:
    return {**record.default(UP, torch.device(DEVICE)), **changes}


@pytest.fixture
def made(monkeypatch):
    """How many times arguments were worked out, and handed to ``launch``."""
    counts = {"worked out": 0, "launched": 0}
    real = triton_launch.geometry

    def geometry(problem):
        counts["worked out"] += 1
        return real(problem)

    monkeypatch.setattr(triton_convolution, "geometry", geometry)
    launched = triton_launch.launch

    def counted(*args, **kwargs):
        counts["launched"] += 1
        launched(*args, **kwargs)

    monkeypatch.setattr(triton_convolution, "launch", counted)
    return counts


def test_the_second_call_works_nothing_out_and_is_right_for_its_own_operands(made):
    replay = Replay(GATHER.launch, UP, config_of(GATHER, WEIGHT=0))
    for _ in range(3):
        x, weight, bias = integers(*UP.x_shape), integers(*UP.weight_shape), integers(3)
        y = replay(x, weight, bias)
        assert torch.equal(y, torch.conv_transpose3d(x, weight, bias, 2))
        assert made == {"worked out": 1, "launched": 1}


def test_other_strides_and_no_bias_are_worked_out_by_themselves(made):
    replay = Replay(GATHER.launch, UP, config_of(GATHER, WEIGHT=0))
    x, weight, bias = integers(*UP.x_shape), integers(*UP.weight_shape), integers(3)
    last = x.to(memory_format=torch.channels_last_3d)
    sliced = integers(1, 4, 2, 3, 8)[..., ::2]
    for operands in ((x, weight, bias), (last, weight, bias), (sliced, weight, bias), (x, weight, None)) * 2:
        assert torch.equal(replay(*operands), torch.conv_transpose3d(*operands, 2))
    assert made == {"worked out": 4, "launched": 4}


def test_a_packed_weight_is_made_anew_each_time(made):
    replay = Replay(GEMM.launch, UP, config_of(GEMM, WEIGHT=1))
    weight = integers(*UP.weight_shape)
    for _ in range(3):
        grad_y = integers(*UP.y_shape)
        want = torch.nn.functional.conv3d(grad_y, weight, stride=2)
        assert torch.equal(replay(grad_y, weight), want)
        weight.data.mul_(2)  # which no version counter sees
    assert made["worked out"] == 1


def test_a_call_whose_operands_share_memory_is_not_kept(made):
    square = Problem(1, 4, 4, (3, 3, 3), (3, 3, 3), (1, 1, 1), (1, 1, 1), (3, 3, 3))
    record = variant("backward_weight_splitk")
    replay = Replay(record.launch, square, record.default(square, torch.device(DEVICE)))
    both = integers(*square.x_shape)
    for operands in ((both, both), (both, integers(*square.y_shape)), (both, integers(*square.y_shape))):
        want = torch.nn.grad.conv3d_weight(operands[1], square.weight_shape, operands[0], padding=1)
        assert torch.equal(replay(*operands, False)[0], want)
    assert list(replay.kept.values()).count(None) == 0 and len(replay.kept) == 1


def test_a_launch_beside_which_torch_writes_is_not_kept(made):
    def launch(problem, config, x, weight, bias):
        y = triton_launch.empty(problem, problem.y_shape, x)
        GATHER.launch(problem, config, x, weight, bias, out=y)
        return y.mul_(2)

    replay = Replay(launch, UP, config_of(GATHER, WEIGHT=0))
    for _ in range(3):
        x, weight, bias = integers(*UP.x_shape), integers(*UP.weight_shape), integers(3)
        assert torch.equal(replay(x, weight, bias), 2 * torch.conv_transpose3d(x, weight, bias, 2))
    assert list(replay.kept.values()) == [None]
    with torch.inference_mode():  # tensors whose versions torch does not count
        quiet = Replay(GATHER.launch, UP, config_of(GATHER, WEIGHT=0))
        for _ in range(2):
            x, weight, bias = integers(*UP.x_shape), integers(*UP.weight_shape), integers(3)
            assert torch.equal(quiet(x, weight, bias), torch.conv_transpose3d(x, weight, bias, 2))
        assert all(quiet.kept.values())


def test_operands_of_another_alignment_are_worked_out_by_themselves(made):
    replay = Replay(GATHER.launch, UP, config_of(GATHER, WEIGHT=0))
    buffer, weight = integers(UP.x_shape[1] * 24 + 1), integers(*UP.weight_shape)
    for start in (0, 1, 0, 1):
        x = buffer[start : start + 96].view(UP.x_shape)
        assert torch.equal(replay(x, weight, None), torch.conv_transpose3d(x, weight, None, 2))
    assert made["worked out"] == 2


def test_nothing_of_a_call_is_kept_alive():
    replay = Replay(GATHER.launch, UP, config_of(GATHER, WEIGHT=0))
    x, weight = integers(*UP.x_shape), integers(*UP.weight_shape)
    seen = [weakref.ref(each) for each in (x, weight, replay(x, weight, None))]
    assert any(known is not None for known in replay.kept.values())
    del x, weight
    gc.collect()
    assert [each() for each in seen] == [None, None, None]


def test_the_switch_of_the_products_is_asked_at_each_call(made, monkeypatch):
    replay = Replay(GATHER.launch, UP, config_of(GATHER, WEIGHT=0))
    operands = integers(*UP.x_shape), integers(*UP.weight_shape), integers(3)
    for said in ("ieee", "tf32", "ieee"):
        monkeypatch.setattr("tritonconv.kernels.triton_replay.precision", lambda dtype, said=said: said)
        replay(*operands)
    assert made["worked out"] == 2


WIDE = Problem(1, 16, 16, (2, 3, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), (4, 6, 8), layout="ndhwc")
HALO = Problem(1, 3, 5, (2, 3, 4), (3, 3, 3), (2, 2, 2), (1, 1, 1), (4, 6, 8), bias=True)
COPIED = Problem(1, 16, 16, (2, 1, 3), (3, 3, 3), (2, 2, 2), (1, 1, 1), (4, 2, 6), bias=True)
DEPTHWISE = Problem(1, 4, 4, (2, 3, 4), (3, 3, 3), (2, 2, 2), (1, 1, 1), (4, 6, 8), groups=4)
SERVED = [
    (record, problem)
    for record in map(form, form_names(variants()))
    for problem in (UP, WIDE, HALO, COPIED, DEPTHWISE)
    if record.backend == "triton" and record.supports(problem, torch.device(DEVICE)) is None
]


@pytest.mark.parametrize(("record", "problem"), SERVED, ids=[f"{each.name} {problem}" for each, problem in SERVED])
def test_every_variants_second_call_is_right(record, problem, poisoned):
    launches = [record.launch] if record.joint is None else [record.launch, record.joint]
    for launch in launches:
        replay = Replay(launch, problem, record.default(problem, torch.device(DEVICE)))
        for _ in range(2):
            x = integers(*problem.x_shape).contiguous(memory_format=problem.memory_format).requires_grad_()
            weight, bias = integers(*problem.weight_shape).requires_grad_(), integers(problem.c_out).requires_grad_()
            grad_y = integers(*problem.y_shape).contiguous(memory_format=problem.memory_format)
            crop = problem.torch_crop
            used = bias if problem.bias else None
            y = torch.conv_transpose3d(x, weight, used, 2, crop.padding, crop.output_padding, problem.groups)
            grads = torch.autograd.grad(y, (x, weight), grad_y)
            sums = grad_y.sum((0, 2, 3, 4))
            with torch.no_grad():
                if launch is record.joint:
                    found, want = replay(x, weight, grad_y, True), (*grads, sums)
                elif record.pass_name == "forward":
                    found, want = (replay(x, weight, used),), (y,)
                elif record.pass_name == "backward_data":
                    found, want = (replay(grad_y, weight),), grads[:1]
                else:
                    found, want = replay(x, grad_y, True), (grads[1], sums)
            assert [torch.equal(*pair) for pair in zip(found, want, strict=True)] == [True] * len(want)
        assert all(replay.kept.values()) and len(replay.kept) == 1


def test_one_copy_of_grad_y_serves_both_gradients(monkeypatch):
    pair = [variant(name) for name in ("backward_data_gemm", "backward_weight_splitk")]
    where = torch.device(DEVICE)
    chosen = {each.pass_name: Selection(each, each.starts(COPIED, where)[1], "tested") for each in pair}
    plan = dispatch.plan_of(COPIED, where, **chosen)
    copies = []
    real = triton_transpose.launch
    monkeypatch.setattr(triton_transpose, "launch", lambda *args, **kw: copies.append(1) or real(*args, **kw))
    for _ in range(3):
        x, weight, grad_y = (integers(*shape) for shape in (COPIED.x_shape, COPIED.weight_shape, COPIED.y_shape))
        want = torch.nn.functional.conv3d(grad_y, weight, None, 2, 1)
        found = plan.backward(x, weight, grad_y, True)
        assert torch.equal(found[0], want) and torch.equal(found[2], grad_y.sum((0, 2, 3, 4)))
        assert torch.equal(found[1], torch.nn.grad.conv3d_weight(grad_y, COPIED.weight_shape, x, 2, 1))
    assert len(copies) == 2  # of grad_y and of x, in the first call; the later ones replay them


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, bias, and torch's answer."""
    x, weight, bias = integers(*UP.x_shape), integers(*UP.weight_shape), integers(3)
    return x, weight, bias, torch.conv_transpose3d(x, weight, bias, 2)


VIEWS = {"turned": lambda y: y.transpose(3, 4), "cut": lambda y: y[..., :4], "squeezed": lambda y: y.squeeze(0)}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_launch_that_returns_a_view_does_so_each_time(view):
    """The view begins where the tensor does that the kernel wrote."""

    def launch(problem, config, x, weight, bias):
        return view(GATHER.launch(problem, config, x, weight, bias))

    replay = Replay(launch, UP, config_of(GATHER, WEIGHT=0))
    for _ in range(2):
        *given, want = operands()
        assert torch.equal(replay(*given), view(want))


def test_in_inference_mode_what_torch_writes_beside_a_launch_is_seen():
    def launch(problem, config, x, weight, bias):
        return GATHER.launch(problem, config, x, weight, bias).mul_(2)

    replay = Replay(launch, UP, config_of(GATHER, WEIGHT=0))
    with torch.inference_mode():
        for _ in range(2):
            *given, want = operands()
            assert torch.equal(replay(*given), 2 * want)


OUTSIDE = """
from tritonconv import Variant
from tritonconv.kernels.registry import variant

gather, factors = variant("forward_gather"), iter(range(1, 9))

def launch(problem, config, x, weight, bias):
    y = gather.launch(problem, config, x, weight, bias)
    y.data.mul_(next(factors))  # which no count of versions tells
    return y

VARIANT = Variant("forward_factor", "forward", "grows", "triton", launch, gather.supports, gather.space, gather.default)
"""


def test_a_variant_from_outside_the_project_is_never_replayed(tmp_path):
    (tmp_path / "forward_factor.py").write_text(OUTSIDE)
    (record,) = registry.load(tmp_path / "forward_factor.py")
    try:
        *given, want = operands()
        with tritonconv.use(record.name):
            for factor in (1, 2, 3):
                assert torch.equal(tritonconv.conv_transpose3d(*given, 2), factor * want)
    finally:
        del registry._records()[record.name], registry._files[record.name]
