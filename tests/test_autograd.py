"""Derivatives of every order through our own autograd Functions. Float64 on the CPU unless said.

Tiny problems go to torch itself by default, so variants are forced here; ``launches`` shows that they ran.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from plan_calls import watch_pass
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import tritonconv
from tritonconv.problem import PASSES

OURS, TORCH = tritonconv.conv_transpose3d, F.conv_transpose3d


def three(idea: str) -> tuple[str, ...]:
    return tuple(f"{name}_torch_{idea}" for name in PASSES)


PHASES = three("phases")
# id: (forced variants, x shape, weight shape, (stride, padding, output_padding, groups, dilation))
CONFIGS = {
    "phases": (PHASES, (1, 2, 2, 3, 2), (2, 2, 3, 2, 3), (2, 1, 1)),
    "phases, empty ones": (PHASES, (1, 2, 2, 2, 2), (2, 1, 1, 2, 1), (3, 0, (2, 0, 1))),
    "phases, dilated, groups": (PHASES, (2, 2, 2, 2, 2), (2, 1, 2, 2, 2), (2, 1, 0, 2, (3, 2, 1))),
    "phases, uneven crop": (PHASES, (1, 2, 2, 3, 2), (2, 2, 3, 3, 2), (2, ((1, 0), (0, 2), (1, 1)))),
    "shuffle": (three("shuffle"), (2, 2, 2, 1, 2), (2, 3, 1, 2, 2), ((1, 2, 2),)),
    "stride 1": (three("conv"), (1, 2, 2, 3, 2), (2, 2, 2, 3, 2), (1, 1)),
    "depthwise": (three("depthwise"), (1, 2, 2, 2, 2), (2, 1, 3, 3, 2), (2, 1, 0, 2)),
    "columns": (("forward_torch_columns", PHASES[1], PHASES[2]), (2, 3, 2, 2, 2), (3, 1, 3, 2, 2), (2, 1)),
    "mixed": ((PHASES[0], "backward_data_torch_other_layout", "backward_weight_torch_native"), (1, 2, 2, 2, 2),
              (2, 2, 3, 3, 3), (2, 1, 1)),
    "the rules": ((), (1, 2, 2, 2, 3), (2, 2, 3, 2, 3), (2, 1, 1)),
    "unbatched": (PHASES, (2, 2, 3, 2), (2, 2, 3, 2, 3), (2, 1)),
}  # fmt: skip


def tensors(x_shape, weight_shape, hyper, dtype=torch.float64, needs=(True, True, True)):
    c_out = weight_shape[1] * (hyper[3] if len(hyper) > 3 else 1)
    shapes = (x_shape, weight_shape, (c_out,))
    return tuple(torch.randn(s, dtype=dtype).requires_grad_(need) for s, need in zip(shapes, needs, strict=True))


def forced(names, hyper, *tensors):
    with tritonconv.use(*names):
        return OURS(*tensors, *hyper)


@pytest.fixture(params=CONFIGS)
def config(request):
    """(the call of three tensors, the tensors)"""
    names, x_shape, weight_shape, hyper = CONFIGS[request.param]
    return functools.partial(forced, names, hyper), tensors(x_shape, weight_shape, hyper)


@pytest.fixture
def launches(monkeypatch):
    """(pass, need_bias or None) of every launch, in order."""
    seen = []

    def note(pass_name):
        return lambda plan, *args: seen.append((pass_name, args[2] if pass_name == "backward_weight" else None))

    for pass_name in PASSES:
        watch_pass(monkeypatch, pass_name, note(pass_name))
    return seen


def reference(x, weight, bias):
    """k3 s2 p1 output_padding 1 as a crop of one plane: torch's own third derivative refuses output_padding."""
    return TORCH(x, weight, bias, 2)[:, :, 1:, 1:, 1:]


def layer(dtype=torch.float64, needs=(True, True, True)):
    """k3 s2 p1 output_padding 1, 2 -> 3 channels: the call with the variants forced, and its tensors."""
    hyper = (2, 1, 1)
    inputs = tensors((2, 2, 2, 3, 2), (2, 3, 3, 3, 3), hyper, dtype, needs)
    assert torch.allclose(reference(*inputs), TORCH(*inputs, *hyper), atol=1e-5)
    return functools.partial(forced, PHASES, hyper), inputs


def clones(inputs):
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]


def test_first_derivatives(config, launches):
    call, inputs = config
    assert gradcheck(call, inputs, fast_mode=True)
    assert call.args[0] == () or {name for name, _ in launches} == set(PASSES)


def test_second_derivatives(config):
    call, inputs = config
    assert gradgradcheck(call, inputs, fast_mode=True)


def test_batched_gradients(config):
    call, inputs = config
    y = call(*inputs)
    directions = torch.randn(3, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, inputs, directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        one = torch.autograd.grad(y, inputs, direction, retain_graph=True)
        assert all(torch.allclose(many[i], alone) for many, alone in zip(batched, one, strict=True))
    assert gradgradcheck(call, inputs, fast_mode=True, check_batched_grad=True)


def test_forward_mode(config):
    call, inputs = config
    checks = {"check_forward_ad": True, "check_backward_ad": False, "check_batched_forward_grad": True}
    assert gradcheck(call, inputs, fast_mode=True, **checks)
    checks = {"check_fwd_over_rev": True, "check_rev_over_rev": False, "check_undefined_grad": False}
    assert gradgradcheck(call, inputs, fast_mode=True, **checks)


def test_all_entries_of_the_jacobians():
    call, _ = layer()
    inputs = tensors((1, 1, 2, 1, 2), (1, 2, 3, 2, 3), ())
    assert gradcheck(call, inputs, fast_mode=False)
    assert gradgradcheck(call, inputs, fast_mode=False)


def derivatives(call, inputs, order: int):
    """The gradient of the gradient ... of a nonlinear loss, contracted with fixed directions."""
    loss, found = call(*inputs).pow(3).sum(), []
    for _ in range(order):
        found = torch.autograd.grad(loss, inputs, create_graph=True)
        loss = sum((g * torch.linspace(-1, 2, g.numel(), dtype=g.dtype).view_as(g)).sum() for g in found)
    return found


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivatives_of_any_order_equal_torchs(order, launches):
    call, inputs = layer()
    got, want = derivatives(call, inputs, order), derivatives(reference, clones(inputs), order)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9 * w.abs().max().item())
    assert len(launches) >= 3 ** min(order, 2)


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
def test_only_what_is_needed_is_computed_and_saved(needs, launches):
    call, inputs = layer(needs=needs)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call(*inputs)
    assert y.requires_grad is any(needs)
    kept = {t.data_ptr() for t in saved}
    x, weight, _ = inputs
    assert kept == {t.data_ptr() for t, need in ((x, needs[1]), (weight, needs[0])) if need}
    wanted = [("forward", None)]
    if any(needs):
        leaves = clones(inputs)
        reference(*leaves).square().sum().backward()
        y.square().sum().backward()
        for got, want in zip(inputs, leaves, strict=True):
            assert (got.grad is None) is (want.grad is None)
            assert got.grad is None or torch.allclose(got.grad, want.grad, rtol=1e-10, atol=1e-12)
        wanted += [("backward_data", None)] if needs[0] else []
        wanted += [("backward_weight", needs[2])] if needs[1] else []
    assert launches == wanted


@pytest.mark.parametrize("needs", [n for n in itertools.product((False, True), repeat=3) if any(n)], ids=str)
def test_double_backward_computes_only_what_is_needed(needs, launches):
    call, inputs = layer(needs=needs)
    found = []
    for function, leaves in ((call, inputs), (reference, clones(inputs))):
        y = function(*leaves)
        direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).requires_grad_()
        wanted = [t for t in leaves if t.requires_grad]
        first = torch.autograd.grad(y, wanted, direction, create_graph=True)
        launches.clear() if function is call else None
        loss = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(loss, [direction, *wanted], allow_unused=True))
        if function is call:
            seen = [name for name, _ in launches]
    for got, want in zip(*found, strict=True):
        assert (got is None or not got.any()) if want is None else torch.allclose(got, want, rtol=1e-9, atol=1e-10)
    # By the direction: T for each of D and W; by the weight: W of D; by x: D of W.
    x, weight, _ = needs
    counts = {"forward": x + weight, "backward_data": x and weight, "backward_weight": x and weight}
    assert {name: seen.count(name) for name in PASSES} == counts


def test_second_derivative_through_the_bias_gradient():
    call, inputs = layer()
    found = []
    for function, leaves in ((call, inputs), (reference, clones(inputs))):
        y = function(*leaves)
        direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).requires_grad_()
        _, grad_weight, grad_bias = torch.autograd.grad(y, leaves, direction, create_graph=True)
        (alone,) = torch.autograd.grad(grad_bias.pow(2).sum(), direction, retain_graph=True)
        together = torch.autograd.grad(grad_bias.pow(2).sum() + grad_weight.sum(), (direction, leaves[0]))
        found.append((alone, *together))
    assert found[0][0].any()
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_hooks_and_a_graph_used_twice():
    call, inputs = layer()
    leaves, seen = clones(inputs), []
    for t in inputs:
        t.register_hook(lambda g: g * 2)
        t.register_post_accumulate_grad_hook(lambda t: seen.append(t.shape))
    y = call(*inputs)
    y.register_hook(lambda g: g + 1)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    reference(*leaves).sum().backward()
    assert sorted(seen) == sorted([t.shape for t in inputs] * 2)
    for got, want in zip(inputs, leaves, strict=True):
        torch.testing.assert_close(got.grad, 8 * want.grad)  # twice, doubled, of a gradient of 2
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
def test_checkpointing(reentrant, needs, launches):
    call, inputs = layer(needs=needs)
    leaves = clones(inputs)
    y = checkpoint(call, *inputs, use_reentrant=reentrant)
    y.square().sum().backward()
    assert [name for name, _ in launches].count("forward") == 2
    reference(*leaves).square().sum().backward()
    for got, want in zip(inputs, leaves, strict=True):
        assert (got.grad is None) is (want.grad is None)
        assert got.grad is None or torch.allclose(got.grad, want.grad, rtol=1e-10, atol=1e-12)


def test_a_checkpoint_whose_second_forward_runs_outside_the_block():
    _, inputs = layer()
    leaves = clones(inputs)
    with tritonconv.use(*PHASES):
        y = checkpoint(lambda *t: OURS(*t, 2, 1, 1), *inputs, use_reentrant=False)
    y.square().sum().backward()
    reference(*leaves).square().sum().backward()
    assert all(torch.allclose(got.grad, want.grad) for got, want in zip(inputs, leaves, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, launches):
    call, inputs = layer(torch.float32)
    leaves = clones(inputs)
    with torch.autocast("cpu", dtype):
        y, want = call(*inputs), reference(*leaves)
        assert y.dtype == want.dtype == dtype
        y.float().square().sum().backward()  # inside the region
        want.float().square().sum().backward()
    limit = torch.finfo(dtype).eps * (2 * 27) ** 0.5  # 54 terms per sum
    assert (y - want).abs().max() <= limit * want.abs().max()
    for got, other in zip(inputs, leaves, strict=True):
        assert got.grad.dtype == torch.float32
        assert (got.grad - other.grad).abs().max() <= 4 * limit * other.grad.abs().max()
    assert [name for name, _ in launches] == list(PASSES)


def test_autocast_leaves_float64_and_finished_graphs_alone():
    call, inputs = layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(*inputs)
        assert y.dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert call(*[t.float() for t in inputs]).dtype == torch.float32
    call, inputs = layer(torch.float32)
    y = call(*inputs)
    outside = torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert all(g.dtype == torch.float32 for g in inside)
    assert all(map(torch.equal, inside, outside)), "a float32 graph is not lowered by the region its backward runs in"


def test_no_grad_and_inference_mode(launches):
    call, inputs = layer()
    with torch.no_grad():
        y = call(*inputs)
    assert not y.requires_grad
    assert y.grad_fn is None
    with torch.inference_mode():
        inferred = call(*inputs)
        assert inferred.is_inference()
    torch.testing.assert_close(inferred, reference(*inputs).detach())
    assert torch.equal(y, inferred)
    assert launches == [("forward", None)] * 2


@pytest.mark.parametrize("which", [0, 1])
def test_changing_a_saved_tensor_is_an_error(which):
    call, inputs = layer()
    y = call(*inputs)
    with torch.no_grad():
        inputs[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_not_saved_may_change():
    call, inputs = layer()
    leaves = clones(inputs)
    y = call(*inputs)
    with torch.no_grad():
        inputs[2].add_(1)  # the bias
    y.mul_(2)  # the result
    y.sum().backward()
    reference(*leaves).mul(2).sum().backward()
    for got, want in zip(inputs, leaves, strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_a_forward_mode_tangent_through_a_finished_graph():
    call, inputs = layer()
    found = []
    for function, leaves in ((call, inputs), (reference, clones(inputs))):
        y = function(*leaves)
        with forward_ad.dual_level():
            direction = forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 2))
            gradients = torch.autograd.grad(y, leaves, direction)
            found.append([forward_ad.unpack_dual(g).tangent for g in gradients])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
