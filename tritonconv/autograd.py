"""The three passes as one trilinear form, closed under differentiation.

All passes are partial derivatives of ``F(x, w, g) = <T(x, w), g>``: ``T`` the forward, ``D(g, w)`` backward-data,
``W(x, g)`` backward-weight. Each is bilinear, and the derivative of each is one of the other two:

    T(x, w, b):  by x  D(grad, w)    by w, b  W(x, grad)
    D(g, w):     by g  T(grad, w)    by w     W(grad, g)
    W(x, g):     by x  D(g, grad_w)  by g     T(x, grad_w, grad_b)

(W also returns the bias gradient, the sum of g; a gradient with respect to *that* comes back as T's bias.) So double
backward, and any order beyond, runs the same variants. What ordinary autograd does not drive (functorch transforms,
forward-mode, tracing) goes to :mod:`tritonconv.fallback`.
"""

from __future__ import annotations

import contextlib

import torch

from tritonconv import fallback
from tritonconv.dispatch import Plan
from tritonconv.kernels.torch_layout import bias_gradient
from tritonconv.kernels.triton_weights import remembering

_NOTHING = contextlib.nullcontext()


def needs_gradient(x, weight, bias=None) -> bool:
    """Autograd must record an operation on these tensors."""
    return torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def forward(x, weight, bias, plan: Plan):
    """T: x (n, c_in, d, h, w), weight (c_in, c_out/groups, kd, kh, kw), bias (c_out,) -> y (n, c_out, od, oh, ow)."""
    if not fallback.plain(x, weight, bias):
        return fallback.forward(plan.problem, x, weight, bias)
    if needs_gradient(x, weight, bias):
        return differentiable_forward(x, weight, bias, plan)
    return plan.forward(x, weight, bias)


def backward_data(grad_y, weight, plan: Plan):
    """D: grad_y (n, c_out, od, oh, ow), weight -> grad_x (n, c_in, d, h, w)."""
    if not fallback.plain(grad_y, weight):
        return fallback.backward_data(plan.problem, grad_y, weight)
    if needs_gradient(grad_y, weight):
        return _BackwardData.apply(grad_y, weight, plan)
    return plan.backward_data(grad_y, weight)


def backward_weight(x, grad_y, need_bias: bool, plan: Plan):
    """W: x, grad_y -> (grad_weight, grad_bias (c_out,) or None)."""
    if not fallback.plain(x, grad_y):
        grad_weight = fallback.backward_weight(plan.problem, x, grad_y)
        return grad_weight, bias_gradient(grad_y) if need_bias else None
    if needs_gradient(x, grad_y):
        outputs = _BackwardWeight.apply(x, grad_y, need_bias, plan)
        return outputs if need_bias else (outputs, None)
    return plan.backward_weight(x, grad_y, need_bias)


def gradients(plan: Plan, x, weight, grad_y, wanted):
    """(grad_x, grad_weight, grad_bias), None for what ``wanted`` does not mark; nothing is recorded.

    ``x`` may be None where the gradient of the weight is not wanted, ``weight`` where that of x is not.
    """
    need_x, need_weight, need_bias = wanted
    if need_x and need_weight:
        return plan.backward(x, weight, grad_y, need_bias)
    grad_x = plan.backward_data(grad_y, weight) if need_x else None
    if need_weight:
        return grad_x, *plan.backward_weight(x, grad_y, need_bias)
    return grad_x, None, bias_gradient(grad_y) if need_bias else None


# The old style, forward(ctx, ...), costs about 2 us per call against 40 us for setup_context (measured, torch 2.13);
# what that style cannot do is routed past it above.
class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, plan):
        need_x, need_weight, _, _ = ctx.needs_input_grad
        ctx.plan, ctx.packs = plan, None
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        if not (need_x and plan.packs_weights):
            return plan.forward(x, weight, bias)
        ctx.packs = {}  # autograd refuses a backward with a weight of another version
        with remembering(ctx.packs):
            return plan.forward(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        with remembering(ctx.packs) if ctx.packs else _NOTHING:
            if not torch.is_grad_enabled() and fallback.plain(grad_y, grad_y if x is None else x, weight):
                return *gradients(ctx.plan, x, weight, grad_y, ctx.needs_input_grad[:3]), None
            grad_x = backward_data(grad_y, weight, ctx.plan) if need_x else None
        grad_weight = grad_bias = None
        if need_weight:
            grad_weight, grad_bias = backward_weight(x, grad_y, need_bias, ctx.plan)
        elif need_bias:
            grad_bias = bias_gradient(grad_y)
        return grad_x, grad_weight, grad_bias, None


class _BackwardData(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad_y, weight, plan):
        need_grad_y, need_weight, _ = ctx.needs_input_grad
        ctx.plan = plan
        ctx.save_for_backward(grad_y if need_weight else None, weight if need_grad_y else None)
        return plan.backward_data(grad_y, weight)

    @staticmethod
    def backward(ctx, grad):
        grad_y, weight = ctx.saved_tensors
        need_grad_y, need_weight, _ = ctx.needs_input_grad
        by_grad_y = forward(grad, weight, None, ctx.plan) if need_grad_y else None
        by_weight = backward_weight(grad, grad_y, False, ctx.plan)[0] if need_weight else None
        return by_grad_y, by_weight, None


class _BackwardWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grad_y, need_bias, plan):
        need_x, need_grad_y, _, _ = ctx.needs_input_grad
        ctx.plan = plan
        ctx.save_for_backward(x if need_grad_y else None, grad_y if need_x else None)
        grad_weight, grad_bias = plan.backward_weight(x, grad_y, need_bias)
        return (grad_weight, grad_bias) if need_bias else grad_weight

    @staticmethod
    def backward(ctx, grad_weight, grad_bias=None):
        x, grad_y = ctx.saved_tensors
        need_x, need_grad_y, _, _ = ctx.needs_input_grad
        by_x = backward_data(grad_y, grad_weight, ctx.plan) if need_x else None
        by_grad_y = forward(x, grad_weight, grad_bias, ctx.plan) if need_grad_y else None
        return by_x, by_grad_y, None, None


differentiable_forward = _Forward.apply
