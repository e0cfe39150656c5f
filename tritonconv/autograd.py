"""The three passes as one trilinear form, closed under differentiation.

All passes are partial derivatives of ``F(x, w, g) = <T(x, w), g>``: ``T`` the forward, ``D(g, w)`` backward-data,
``W(x, g)`` backward-weight. Each is bilinear, and the derivative of each is one of the other two:

    T(x, w, b):  by x  D(grad, w)    by w, b  W(x, grad)
    D(g, w):     by g  T(grad, w)    by w     W(grad, g)
    W(x, g):     by x  D(g, grad_w)  by g     T(x, grad_w, grad_b)

(W also returns the bias gradient, the sum of g; a gradient with respect to *that* comes back as T's bias.) So double
backward, and any order beyond, runs the same variants. Functorch transforms, forward-mode and tracing go to
:mod:`tritonconv.fallback`.
"""

from __future__ import annotations

from functools import partial

import torch

from tritonconv import fallback
from tritonconv.dispatch import Plan
from tritonconv.kernels.torch_layout import bias_gradient
from tritonconv.private import function_base


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


def backward(grad_y, x, weight, wanted, plan: Plan, packed=None):
    """(grad_x, grad_weight, grad_bias) from grad_y (n, c_out, od, oh, ow); None for a gradient that ``wanted`` does
    not mark.

    ``x`` may be None where the gradient of the weight is not wanted, ``weight`` where that of x is not. ``packed`` is
    the weight's copy that ``plan.forward_and_pack`` left, or None.
    """
    operands = grad_y, grad_y if x is None else x, weight
    if not fallback.plain(*operands):
        return fallback.gradients(plan.problem, grad_y, x, weight, wanted)
    if needs_gradient(*operands):
        return _Backward.apply(grad_y, x, weight, wanted, plan)
    return gradients(grad_y, x, weight, wanted, plan, packed)


def backward_of_call(grad_y, x, weight, wanted, plan: Plan, packed=None):
    """As :func:`backward`, of a call's first gradients: under ``create_graph`` those of x and the weight have a graph,
    as torch's have, also where they depend on no tensor that requires a gradient. A loss of them alone is then no
    error: it leaves no gradient.
    """
    found = backward(grad_y, x, weight, wanted, plan, packed)
    if not torch.is_grad_enabled() or not (wanted[0] or wanted[1]) or not fallback.plain(grad_y, grad_y):
        return found
    if any(each is not None and each.requires_grad for each in found):
        return found
    leaf = torch.empty(0, device=grad_y.device, requires_grad=True)
    return _Constant.apply(leaf, *found)


def gradients(grad_y, x, weight, wanted, plan: Plan, packed=None):
    """As :func:`backward`, with nothing recorded."""
    need_x, need_weight, need_bias = wanted
    if need_x and need_weight:
        return plan.backward(x, weight, grad_y, need_bias, packed)
    grad_x = plan.backward_data(grad_y, weight, packed) if need_x else None
    if need_weight:
        return grad_x, *plan.backward_weight(x, grad_y, need_bias)
    return grad_x, None, bias_gradient(grad_y) if need_bias else None


def backward_of_backward(forward, backward, operands, needs, grads):
    """The gradients with respect to ``operands`` (grad_y, x, weight), None where ``needs`` does not mark one.

    ``grads`` are the gradients of the three results of the backward, each a tensor or None. ``forward(x, weight,
    bias)`` and ``backward(grad_y, x, weight, wanted)`` compute the passes, and are differentiable themselves.
    """
    grad_y, x, weight = operands
    need_grad_y, need_x, need_weight = needs
    grad_x, grad_weight, grad_bias = grads
    parts, by_x, by_weight = [], None, None
    if need_grad_y:
        if grad_x is not None:
            parts.append(forward(grad_x, weight, None))
        if grad_weight is not None:
            parts.append(forward(x, grad_weight, grad_bias))
        elif grad_bias is not None:
            parts.append(grad_bias.view(1, -1, 1, 1, 1).expand_as(grad_y))
    if need_x and grad_weight is not None:
        by_x, _, _ = backward(grad_y, None, grad_weight, (True, False, False))
    if need_weight and grad_x is not None:
        _, by_weight, _ = backward(grad_y, grad_x, None, (False, True, False))
    return sum(parts[1:], parts[0]) if parts else None, by_x, by_weight


# The old style, forward(ctx, ...), costs about 2 us per call against 40 us for setup_context (measured, torch 2.13);
# what that style cannot do is routed past it above.
class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, plan):
        need_x, need_weight, _, _ = ctx.needs_input_grad
        ctx.plan = plan
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        if not need_x or plan.kept_order is None:
            ctx.packed = None
            return plan.forward(x, weight, bias)
        y, ctx.packed = plan.forward_and_pack(x, weight, bias)  # autograd refuses a backward with another weight
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        return *backward_of_call(grad_y, x, weight, ctx.needs_input_grad[:3], ctx.plan, ctx.packed), None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad_y, x, weight, wanted, plan):
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_y, x, weight)
        return gradients(grad_y, x, weight, wanted, plan)

    @staticmethod
    def backward(ctx, *grads):
        passes = partial(forward, plan=ctx.plan), partial(backward, plan=ctx.plan)
        return *backward_of_backward(*passes, ctx.saved_tensors, ctx.needs_input_grad[:3], grads), None, None


class _Constant(torch.autograd.Function):
    """Tensors with a graph, by which they depend on nothing."""

    @staticmethod
    def forward(ctx, leaf, *tensors):
        return tuple(None if each is None else each.view_as(each) for each in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return (None,) * (1 + len(grads))


# ``Function.apply`` without its look for functorch's transforms: a call under one goes to :mod:`tritonconv.fallback`.
differentiable_forward = super(torch.autograd.Function, _Forward).apply if function_base else _Forward.apply
