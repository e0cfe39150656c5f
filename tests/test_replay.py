"""Launches that a plan keeps: the same answers as a launch made afresh, and nothing kept that a call owns."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from variant_cases import form, form_names

pytest.importorskip("triton")

import tritonconv
from tritonconv import Problem, dispatch
from tritonconv.autotune.choose import Selection
from tritonconv.kernels import registry, triton_launch, triton_replay
from tritonconv.kernels.registry import variant, variants
from tritonconv.kernels.triton_program import Program
from tritonconv.kernels.triton_replay import Replay

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UP = Problem(1, 4, 3, (2, 3, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), (4, 6, 8), bias=True)
GATHER, GEMM = variant("forward_gather"), variant("backward_data_gemm")


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, device=DEVICE).float()


def replay_of(record, problem=UP, **changes) -> Replay:
    config = {**record.default(problem, torch.device(DEVICE)), **changes}
    return Replay(partial(record.launches, problem, config))


def counts(replay: Replay) -> tuple[int, int]:
    return replay.counts.anew, replay.counts.repeated


def test_the_second_call_works_nothing_out_and_is_right_for_its_own_operands():
    replay = replay_of(GATHER)
    for calls in range(3):
        x, weight, bias = integers(*UP.x_shape), integers(*UP.weight_shape), integers(3)
        y = replay(x, weight, bias)
        assert torch.equal(y, torch.conv_transpose3d(x, weight, bias, 2))
        assert counts(replay) == (1, calls)


def test_other_strides_and_no_bias_are_worked_out_by_themselves():
    replay = replay_of(GATHER)
    x, weight, bias = integers(*UP.x_shape), integers(*UP.weight_shape), integers(3)
    last = x.to(memory_format=torch.channels_last_3d)
    sliced = integers(1, 4, 2, 3, 8)[..., ::2]
    for operands in ((x, weight, bias), (last, weight, bias), (sliced, weight, bias), (x, weight, None)) * 2:
        assert torch.equal(replay(*operands), torch.conv_transpose3d(*operands, 2))
    assert counts(replay) == (4, 4)


def test_operands_that_torch_must_copy_first_are_copied_in_each_call():
    replay = replay_of(GATHER, WEIGHT=1)
    for _ in range(3):
        x, bias = integers(*UP.x_shape), integers(6)[::2]
        weight = integers(8, *UP.weight_shape[1:])[::2]
        assert torch.equal(replay(x, weight, bias), torch.conv_transpose3d(x, weight, bias, 2))
    assert counts(replay) == (1, 2)


def test_a_packed_weight_is_made_anew_each_time():
    replay = replay_of(GEMM, WEIGHT=1)
    weight = integers(*UP.weight_shape)
    for _ in range(3):
        grad_y = integers(*UP.y_shape)
        want = torch.nn.functional.conv3d(grad_y, weight, stride=2)
        assert torch.equal(replay(grad_y, weight), want)
        weight.data.mul_(2)  # which no version counter sees
    assert counts(replay) == (1, 2)


def test_operands_may_share_memory():
    square = Problem(1, 4, 4, (3, 3, 3), (3, 3, 3), (1, 1, 1), (1, 1, 1), (3, 3, 3))
    replay = replay_of(variant("backward_weight_splitk"), square)
    both = integers(*square.x_shape)
    for operands in ((both, both), (both, integers(*square.y_shape)), (both, both)):
        want = torch.nn.grad.conv3d_weight(operands[1], square.weight_shape, operands[0], padding=1)
        assert torch.equal(replay(*operands, False)[0], want)
    assert counts(replay) == (1, 2)


def test_operands_of_another_alignment_are_worked_out_by_themselves():
    replay = replay_of(GATHER)
    buffer, weight = integers(UP.x_shape[1] * 24 + 1), integers(*UP.weight_shape)
    for start in (0, 1, 0, 1):
        x = buffer[start : start + 96].view(UP.x_shape)
        assert torch.equal(replay(x, weight, None), torch.conv_transpose3d(x, weight, None, 2))
    assert counts(replay) == (2, 2)


def test_nothing_of_a_call_is_kept_alive():
    replay = replay_of(GATHER)
    x, weight = integers(*UP.x_shape), integers(*UP.weight_shape)
    seen = [weakref.ref(each) for each in (x, weight, replay(x, weight, None))]
    assert len(replay.kept) == 1
    del x, weight
    gc.collect()
    assert [each() for each in seen] == [None, None, None]


def test_the_switch_of_the_products_is_asked_at_each_call(monkeypatch):
    replay = replay_of(GATHER)
    operands = integers(*UP.x_shape), integers(*UP.weight_shape), integers(3)
    for said in ("ieee", "tf32", "ieee"):
        monkeypatch.setattr(triton_replay, "float32_precision", lambda said=said: said)
        replay(*operands)
    assert counts(replay) == (2, 1)


def test_of_endless_kinds_of_operands_the_latest_are_kept(monkeypatch):
    monkeypatch.setattr(triton_replay, "MOST_KEPT", 2)
    replay, weight = replay_of(GATHER), integers(*UP.weight_shape)
    for width in (*range(4, 9), 8, 7, 4):
        x = integers(*UP.x_shape[:-1], width)[..., :4]
        assert torch.equal(replay(x, weight, None), torch.conv_transpose3d(x, weight, None, 2))
        assert len(replay.kept) <= 2
    assert counts(replay) == (6, 2)


def test_each_result_has_memory_of_its_own():
    """In-place operations, saved tensors and torch.save must not meet a view of a larger tensor."""
    record = variant("backward_weight_splitk")
    replay = replay_of(record, SPLITS=3)
    x, weight, grad_y = (integers(*shape) for shape in (UP.x_shape, UP.weight_shape, UP.y_shape))
    for _ in range(2):
        for result in replay(x, grad_y, True):
            assert result.untyped_storage().nbytes() == result.numel() * result.element_size()
            assert not result._is_view()
    (kind,) = replay.kept.values()
    assert kind.program.workspace_bytes >= 3 * weight.numel() * 4  # of the partial sums, in one allocation


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
    config = record.default(problem, torch.device(DEVICE))
    for launches in (each for each in (record.launches, record.joint) if each is not None):
        replay = Replay(partial(launches, problem, config))
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
                if launches is record.joint:
                    results, want = replay(x, weight, grad_y, True), (*grads, sums)
                elif record.pass_name == "forward":
                    results, want = (replay(x, weight, used),), (y,)
                elif record.pass_name == "backward_data":
                    results, want = (replay(grad_y, weight),), grads[:1]
                else:
                    results, want = replay(x, grad_y, True), (grads[1], sums)
            assert [torch.equal(*pair) for pair in zip(results, want, strict=True)] == [True] * len(want)
        assert counts(replay) == (1, 1)


def test_one_copy_of_grad_y_serves_both_gradients(monkeypatch):
    pair = [variant(name) for name in ("backward_data_gemm", "backward_weight_splitk")]
    where = torch.device(DEVICE)
    chosen = {each.pass_name: Selection(each, each.starts(COPIED, where)[1], "tested") for each in pair}
    plan = dispatch.plan_of(COPIED, where, **chosen)
    for _ in range(3):
        x, weight, grad_y = (integers(*shape) for shape in (COPIED.x_shape, COPIED.weight_shape, COPIED.y_shape))
        want = torch.nn.functional.conv3d(grad_y, weight, None, 2, 1)
        results = plan.backward(x, weight, grad_y, True)
        assert torch.equal(results[0], want) and torch.equal(results[2], grad_y.sum((0, 2, 3, 4)))
        assert torch.equal(results[1], torch.nn.grad.conv3d_weight(grad_y, COPIED.weight_shape, x, 2, 1))
    (kind,) = plan.backward.kept.values()
    names = [kernel.name for kernel in kind.program.kernels]
    assert names.count("transpose_kernel") == 2 and counts(plan.backward) == (1, 2)  # of grad_y and of x


def test_a_packed_weight_goes_from_the_forward_to_the_backward():
    """And is a limited one: counted by the plan, dropped above a size."""
    where = torch.device(DEVICE)
    pair = [variant(name) for name in ("forward_gather", "backward_data_gemm")]
    chosen = {each.pass_name: Selection(each, {**each.default(UP, where), "WEIGHT": 1}, "tested") for each in pair}
    plan = dispatch.plan_of(UP, where, **chosen)
    x, weight, grad_y = (integers(*shape) for shape in (UP.x_shape, UP.weight_shape, UP.y_shape))
    y, packed = plan.forward_and_pack(x, weight, None)
    assert torch.equal(packed, weight) and packed.stride(1) == 1
    assert torch.equal(y, torch.conv_transpose3d(x, weight, None, 2))
    grad_x = plan.backward_data(grad_y, weight, packed)
    assert torch.equal(grad_x, torch.nn.functional.conv3d(grad_y, weight, stride=2))
    (kind,) = plan.backward_data.kept.values()
    assert "transpose_kernel" not in [kernel.name for kernel in kind.program.kernels]
    last = weight.contiguous(memory_format=torch.channels_last_3d)
    assert plan.forward_and_pack(x, last, None)[1] is None  # it is in the wanted order already


def test_a_large_packed_weight_is_not_kept(monkeypatch):
    where = torch.device(DEVICE)
    pair = [variant(name) for name in ("forward_gather", "backward_data_gemm")]
    chosen = {each.pass_name: Selection(each, {**each.default(UP, where), "WEIGHT": 1}, "tested") for each in pair}
    assert dispatch.plan_of(UP, where, **chosen).kept_order == 1
    monkeypatch.setattr("tritonconv.plan.MOST_KEPT_BYTES", 4 * 4 * 3 * 8 - 1)
    assert dispatch.plan_of(UP, where, **chosen).kept_order is None


OUTSIDE = """
from tritonconv import Variant
from tritonconv.kernels.registry import variant

gather, factors = variant("forward_gather"), iter(range(1, 9))

def launch(problem, config, x, weight, bias):
    return gather.compute(problem, config, x, weight, bias).mul_(next(factors))

VARIANT = Variant(
    "forward_factor", "forward", "grows", "triton", launch=launch, supports=gather.supports, space=gather.space,
    default=gather.default,
)
"""


def test_a_variant_that_launches_as_it_likes_is_called_each_time(tmp_path):
    (tmp_path / "forward_factor.py").write_text(OUTSIDE)
    (record,) = registry.load(tmp_path / "forward_factor.py")
    try:
        x, weight, bias = integers(*UP.x_shape), integers(*UP.weight_shape), integers(3)
        want = torch.conv_transpose3d(x, weight, bias, 2)
        with tritonconv.use(record.name):
            for factor in (1, 2, 3):
                assert torch.equal(tritonconv.conv_transpose3d(x, weight, bias, 2), factor * want)
    finally:
        del registry._records()[record.name], registry._files[record.name]


def test_a_launch_holds_no_memory_of_its_operands_and_reads_no_switch_when_it_is_played(monkeypatch):
    """A program asks for nothing that its kind does not settle: the precision was read when it was made."""
    program = Program.of(
        partial(GATHER.launches, UP, GATHER.default(UP, torch.device(DEVICE))),
        (integers(*UP.x_shape), integers(*UP.weight_shape), None),
    )
    monkeypatch.setattr(triton_launch, "float32_precision", lambda: pytest.fail("read again"))
    x, weight = integers(*UP.x_shape), integers(*UP.weight_shape)
    assert torch.equal(program.run((x, weight, None)), torch.conv_transpose3d(x, weight, None, 2))
