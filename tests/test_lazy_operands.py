"""Operands whose memory does not hold their values: negated views, zeros without memory; in each place and pass."""

from __future__ import annotations

import pytest
import torch
from odd_cases import odd, whole_config
from test_triton_kernels import NAMES
from variant_cases import DEVICE, form

import tritonconv
from tritonconv.autotune.choose import Selection
from tritonconv.dispatch import plan_of
from tritonconv.lab.bench.calls import make_tensors

OPERANDS = {
    "forward": ("x", "weight", "bias"),
    "backward_data": ("grad_y", "weight"),
    "backward_weight": ("x", "grad_y"),
}
KINDS = {
    "negated": lambda tensor: torch._neg_view(-tensor),
    "zeros": lambda tensor: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype, device=tensor.device),
}
LAZY = [(name, operand) for name in NAMES for operand in OPERANDS[form(name).pass_name]]


@pytest.mark.parametrize(
    ("name", "operand"), [pytest.param(*pair, marks=pytest.mark.xdist_group(pair[0])) for pair in LAZY]
)
def test_a_kernel_reads_the_values_of_lazy_operands(name, operand):
    """Before and after a call with an operand of the same kind that is not lazy, which is kept and replayed."""
    record = form(name)
    problem = odd(record)[1]
    tensors = make_tensors(problem, DEVICE, 0)
    chosen = Selection(record, whole_config(record, problem), "tested")
    plan = plan_of(problem, DEVICE, **{record.pass_name: chosen})

    def run(operands) -> list[torch.Tensor]:
        values = [operands[each] for each in OPERANDS[record.pass_name]]
        if record.pass_name == "backward_weight":
            return list(plan.backward_weight(*values, True))
        return [getattr(plan, record.pass_name)(*values)]

    usual = {each: getattr(tensors, each) for each in OPERANDS[record.pass_name]}
    zeros, negated = (KINDS[kind](usual[operand]) for kind in ("zeros", "negated"))
    assert zeros._is_zerotensor() and negated.is_neg()
    of_zeros = run({**usual, operand: zeros})
    assert all(map(torch.equal, of_zeros, run({**usual, operand: torch.zeros_like(usual[operand])})))
    want = run(usual)
    assert all(map(torch.equal, run({**usual, operand: negated}), want))
    assert not all(map(torch.equal, want, of_zeros))


def test_a_complex_loss_has_torchs_gradients():
    """Its gradient arrives as a negated view."""

    def step(cls, *forced):
        torch.manual_seed(0)
        up, x = cls(2, 2, 2, stride=2).to(DEVICE), torch.randn(1, 2, 2, 2, 2).to(DEVICE).requires_grad_()
        with tritonconv.use(*forced):
            y = up(x)
            (torch.complex(torch.zeros_like(y), y).conj() * (1 + 1j)).imag.square().sum().backward()
        return x.grad, up.weight.grad, up.bias.grad

    ours = step(tritonconv.ConvTranspose3d, "forward_phases", "backward_data_gemm", "backward_weight_splitk")
    for mine, theirs in zip(ours, step(torch.nn.ConvTranspose3d), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_formulations_in_torchs_operations_do_so_too(launches):
    layer = tritonconv.ConvTranspose3d(2, 3, 2, stride=2)
    x = torch.fft.fftn(torch.randn(1, 2, 4, 4, 4), dim=(2, 3, 4)).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(layer(x), torch.conv_transpose3d(x, layer.weight, layer.bias, 2))


@pytest.mark.parametrize("names", [("forward_phases", "backward_data_gemm", "backward_weight_splitk"), ()], ids=str)
def test_a_tensor_that_left_a_transform(names):
    """torch.func wraps its tensors; one that is kept beyond the transform has no memory of its own."""
    left = []
    torch.func.grad(lambda x: left.append(x * 1) or x.sum())(torch.randn(1, 4, 2, 3, 4, device=DEVICE))
    weight = torch.randn(4, 3, 2, 2, 2, device=DEVICE, requires_grad=True)
    with tritonconv.use(*names):
        y = tritonconv.conv_transpose3d(left[0], weight, stride=2)
        (grad_weight,) = torch.autograd.grad(y.square().sum(), weight)
        with torch.no_grad():
            assert torch.allclose(tritonconv.conv_transpose3d(left[0], weight, stride=2), y)
    want = torch.conv_transpose3d(left[0], weight, stride=2)
    assert torch.allclose(y, want, atol=1e-5)
    assert torch.allclose(grad_weight, torch.autograd.grad(want.square().sum(), weight)[0], atol=1e-3)
