"""The road of a call with an epilogue: ``conv_transpose3d(..., activation=, residual=, rounding=)``.

* plain eager call: the plan of the plain call, whose forward takes the epilogue along
  (:meth:`tritonconv.plan.Plan.forward_with`), under ordinary autograd where a gradient is needed
* everything else (``torch.compile``, export, tracing, functorch, forward-mode, fake tensors, subclasses): the plain
  call by its own road, then torch's separate operations, which a compiler fuses and each transform knows

The derivative of an activation is read off y where that suffices, so a training step keeps no more than torch's
convolution does without one. Double backward runs torch's derivatives of the same operations.
"""

from __future__ import annotations

import torch

from tritonconv import autocast, autograd, fallback
from tritonconv.dispatch import Plan, plan_for
from tritonconv.epilogue import Epilogue, activated, before_activation, check_operands, finish, parsed
from tritonconv.errors import EmptyOutputError
from tritonconv.forced import restore_forced
from tritonconv.kernels.torch_layout import to_layout
from tritonconv.private import any_autocast, function_base


def call(plain_call, torch_serves, operands, arguments, activation, residual, rounding):
    """The answer to a call; ``operands`` are (input, weight, bias), ``arguments`` those of ``plain_call`` behind them.

    ``plain_call`` is ``conv_transpose3d``, ``torch_serves`` (operands, arguments) -> whether a compiled call is torch's
    own operation.
    """
    epilogue, slopes = parsed(activation, residual, rounding)
    if torch.compiler.is_compiling():
        apart = epilogue.rounding is not None and not torch_serves(*operands, arguments)
        return _separate(plain_call, operands, arguments, epilogue, residual, slopes, apart)
    if not (fallback.plain(*operands) and (residual is slopes or plain_beside(residual, slopes))):
        return _separate(plain_call, operands, arguments, epilogue, residual, slopes)
    forced_again = restore_forced(operands[1])
    if forced_again is None:
        return _eager(plain_call, operands, arguments, epilogue, residual, slopes)
    with forced_again:
        return _eager(plain_call, operands, arguments, epilogue, residual, slopes)


def plain_beside(residual, slopes) -> bool:
    """As :func:`tritonconv.fallback.plain`, of a residual and slopes of which one is no None."""
    first, second = (slopes, slopes) if residual is None else (residual, slopes)
    return fallback.plain(first, first, second)


def _separate(plain_call, operands, arguments, epilogue: Epilogue, residual, slopes, bias_apart: bool = False):
    """The plain call and torch's operations behind it, each with an answer of its own."""
    input, weight, bias = operands
    y = plain_call(input, weight, None if bias_apart else bias, *arguments)
    if isinstance(y, torch.Tensor):  # and no proxy of torch.fx
        residual, slopes = autocast.cast_beside(y, residual, slopes)
        if fallback.tracing() is None:
            check_operands(y.shape, y, residual, slopes)
        if bias_apart and bias is not None:
            (bias,) = autocast.cast_beside(y, bias)
            y = y + bias.view(-1, 1, 1, 1)
    if residual is not None:
        y = y + residual
    return activated(y, epilogue, slopes)


def _eager(plain_call, operands, arguments, epilogue: Epilogue, residual, slopes):
    input, weight, bias = operands
    if any_autocast():
        input, weight, bias, residual, slopes = autocast.cast_arguments_once(input, weight, bias, residual, slopes)
    batched = input.dim() != 4
    try:
        plan = plan_for(input if batched else input.unsqueeze(0), weight, bias, arguments)
    except EmptyOutputError:  # the plain call has torch's answer, or refuses
        plan = None
    if plan is None:
        return _separate(plain_call, (input, weight, bias), arguments, epilogue, residual, slopes)
    check_operands(plan.problem.y_shape if batched else plan.problem.y_shape[1:], input, residual, slopes)
    if batched:
        return _run(plan, epilogue, input, weight, bias, residual, slopes)
    residual = None if residual is None else residual.unsqueeze(0)
    return _run(plan, epilogue, input.unsqueeze(0), weight, bias, residual, slopes).squeeze(0)


def _run(plan: Plan, epilogue: Epilogue, x, weight, bias, residual, slopes):
    operands = x, weight, bias, residual, slopes
    if not torch.is_grad_enabled() or not any(each is not None and each.requires_grad for each in operands):
        return plan.forward_with(epilogue)(*operands)
    if plan.torch_alone is not None:  # torch's autograd records all of it
        y = torch.conv_transpose3d(x, weight, bias, *plan.torch_alone)
        return finish(to_layout(y, plan.problem.memory_format), epilogue, None, residual, slopes, recorded=True)
    if epilogue.from_output:
        return _finished(x, weight, bias, residual, plan, epilogue)
    z = _finished(x, weight, bias, residual, plan, epilogue.linear)
    return activated(z, epilogue, slopes)


class _Finished(torch.autograd.Function):
    """A forward with its epilogue, whose derivative follows from its output."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, plan, epilogue):
        need_x, need_weight = ctx.needs_input_grad[:2]
        y = plan.forward_with(epilogue, pack=need_x)(x, weight, bias, residual, None)
        y, ctx.packed = y if need_x else (y, None)
        ctx.plan, ctx.epilogue = plan, epilogue
        kept = None if epilogue.activation is None else y
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None, kept)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, y = ctx.saved_tensors
        grad_z = grad_y if y is None else before_activation(grad_y, y, ctx.epilogue)
        wanted = ctx.needs_input_grad[:3]
        gradients = (None, None, None)
        if any(wanted):
            gradients = autograd.backward_of_call(grad_z, x, weight, wanted, ctx.plan, ctx.packed)
        return *gradients, grad_z if ctx.needs_input_grad[3] else None, None, None


# Without the look for functorch's transforms, as in :mod:`tritonconv.autograd`.
_finished = super(torch.autograd.Function, _Finished).apply if function_base else _Finished.apply
