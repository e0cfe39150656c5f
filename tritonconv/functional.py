"""``conv_transpose3d`` decides which road a call takes.

* repeated plain eager call: known by its weight (:func:`tritonconv.dispatch.keep_call`)
* other plain eager call: a plan looked up by one tuple, run directly or under ordinary autograd
* ``torch.compile``: torch's operation where it would run and no size is symbolic, else the registered operators
* everything else (export, tracing, functorch, forward-mode, fake and meta tensors, subclasses, complex, integer):
  torch itself, with the shapes checked
"""

from __future__ import annotations

import torch

from tritonconv import autocast, autograd, fallback, guards, operators
from tritonconv.arguments import check_types, geometry
from tritonconv.dispatch import keep_call, plan_for, repeated
from tritonconv.errors import ArgumentTypeError, EmptyOutputError, VariantNotApplicable
from tritonconv.forced import forced, forced_variants, restore_forced, trained
from tritonconv.private import any_autocast, deterministic, dispatch_modes, forward_mode
from tritonconv.switches import graphs

_in_dynamo = torch.compiler.is_dynamo_compiling  # torch.compile takes it for True, wherever it is kept


def conv_transpose3d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1,
    *, out=None, activation=None, residual=None, rounding=None,
):  # fmt: skip
    """Transposed 3-D convolution; the signature, answers and refusals of ``torch.nn.functional.conv_transpose3d``.

    Beyond torch, an epilogue: ``activation(y + residual)``, where y is the convolution with its bias.

    Args:
        input: (n, c_in, d, h, w), or (c_in, d, h, w) without a batch.
        weight: (c_in, c_out/groups, kd, kh, kw).
        bias: (c_out,) or None.
        stride, dilation: an integer or three.
        padding: planes cropped from both ends of each axis: an integer or three; beyond torch, three
            ``(begin, end)`` pairs.
        output_padding: planes appended at the end, smaller than either stride or dilation.
        groups: divides c_in and c_out.
        out: None, or a tensor of the answer's shape, dtype (under autocast that of the region) and device, which is
            filled and returned. It may have any strides, as a slice of a buffer has, that do not overlap. As in torch
            no gradient goes through it. Under a transform of torch.func it is refused.
        activation: "relu", "sigmoid", "tanh", "silu", ("leaky_relu", slope), ("prelu", slopes) with a tensor of 1 or
            c_out values, "gelu" or ("gelu", "tanh"); "leaky_relu" alone has torch's slope.
        residual: a tensor of the answer's shape and dtype (under autocast it is cast along with the others).
        rounding: "torch" rounds to the dtype after the sum of products, the bias, the residual and the activation, as
            torch's separate operations do, for outputs that must not change by a bit. By default a kernel that computes
            all of them rounds once.

    Returns:
        (n, c_out, od, oh, ow) with od = (d - 1)*stride - begin - end + dilation*(kd - 1) + output_padding + 1
        (torch's formula with the two crops apart), with the strides of torch's answer: channels_last_3d if input or
        weight is, except on a CPU where torch does not call oneDNN (one small image, float64): NCDHW.

    Raises:
        ArgumentError (a ValueError and a RuntimeError): a value or a shape is refused. An output with an axis of no
            planes is refused where torch refuses it, which depends on the dtype and the device.
        ArgumentTypeError (a TypeError and a RuntimeError): a type or a dtype is refused.
        VariantNotApplicable: a variant forced by ``tritonconv.use`` does not serve the call.
    """
    arguments = stride, padding, output_padding, groups, dilation
    if out is not None:
        from tritonconv import out_argument  # the plain road does without

        epilogue = {"activation": activation, "residual": residual, "rounding": rounding}
        return out_argument.written(out, input, weight, bias, arguments, conv_transpose3d, epilogue)
    if activation is not None or residual is not None or rounding is not None:
        from tritonconv import epilogue_road  # the plain road does without

        operands = input, weight, bias
        return epilogue_road.call(conv_transpose3d, _torch_serves, operands, arguments, activation, residual, rounding)
    if not _in_dynamo():  # which would trace what follows
        for check, s, p, q, g, r, unbiased, only_without, leaves, direct, plan in repeated.get(id(weight), ()):
            if (
                stride is s and padding is p and output_padding is q and groups is g and dilation is r
                and unbiased is (bias is None)
                and (check(input, weight) if unbiased else check(input, weight, bias))
                and not (only_without and torch.is_grad_enabled())
                and not (forced.get() or graphs.get() or (trained and id(weight) in trained))
            ):  # fmt: skip
                if direct is not None:
                    return torch.conv_transpose3d(input, weight, bias, *direct)
                if forward_mode._current_level < 0 and dispatch_modes() == 0 and not deterministic():
                    if leaves and torch.is_grad_enabled():
                        return autograd.differentiable_forward(input, weight, bias, plan)
                    return plan.forward(input, weight, bias)
    if torch.compiler.is_compiling():
        return _traced(input, weight, bias, arguments)
    if not fallback.ordinary(input, weight, bias):
        return _by_torch(input, weight, bias, arguments)
    forced_again = restore_forced(weight)
    if forced_again is None:
        return eager(input, weight, bias, arguments)
    with forced_again:
        return eager(input, weight, bias, arguments)


def eager(input, weight, bias, arguments):
    """The call with plain tensors, outside every compiler."""
    if any_autocast():
        if not fallback.undisturbed(input, weight, bias):
            return _by_torch(input, weight, bias, arguments)
        input, weight, bias = autocast.cast_arguments_once(input, weight, bias)
    if input.dim() == 4:
        return eager(input.unsqueeze(0), weight, bias, arguments).squeeze(0)
    if not fallback.undisturbed(input, weight, bias):
        return _by_torch(input, weight, bias, arguments)
    try:
        plan = plan_for(input, weight, bias, arguments)
    except EmptyOutputError as refusal:
        return _empty(input, weight, bias, arguments, refusal)
    if plan is None:
        return _by_torch(input, weight, bias, arguments)
    recorded = autograd.needs_gradient(input, weight, bias)
    # The gradients' variants are not chosen for a call that needs none.
    direct = plan.torch_alone if recorded else plan.torch_forward
    lasting = plan.lasting(recorded)
    if lasting is not None and (direct is None or plan.torch_forward is not None):  # it serves without gradients too
        keep_call(direct, lasting, input, weight, bias, arguments, recorded)
    if direct is not None:
        return torch.conv_transpose3d(input, weight, bias, *direct)
    if recorded:
        return autograd.differentiable_forward(input, weight, bias, plan)
    return plan.forward(input, weight, bias)


def _empty(input, weight, bias, arguments, refusal):
    """An output with an axis of no planes: torch's answer, or the refusal where torch has none."""
    geo = geometry(*arguments)
    try:
        return torch.conv_transpose3d(
            input, weight, bias, geo.stride, geo.crop, geo.output_padding, geo.groups, geo.dilation
        )
    except RuntimeError:
        raise refusal from None


def _by_torch(input, weight, bias, arguments):
    operands = {"input": input, "weight": weight, "bias": bias}
    if not all(isinstance(t, torch.Tensor) for t in (input, weight)) or not isinstance(
        bias, (torch.Tensor, type(None))
    ):
        return _not_tensors(operands, geometry(*arguments))
    if fallback.tracing() is not None:
        return fallback.traced(input, weight, bias, arguments)
    geo = geometry(*arguments)
    if not fallback.is_dtensor(input):
        input, weight, bias = autocast.cast_arguments(input, weight, bias)
        check_types(input, weight, bias)
    forced, why_not = forced_variants(), fallback.unserved(input, weight, bias)
    if forced and why_not is not None and not input.is_meta:
        raise VariantNotApplicable(f"{', '.join(forced)} forced but torch itself serves this call: {why_not}")
    return _composed(input, weight, bias, geo)


def _composed(input, weight, bias, geo):
    """The call as torch's own operations, its shapes checked."""
    if input.dim() == 4:
        return _composed(input.unsqueeze(0), weight, bias, geo).squeeze(0)
    if fallback.spatially_sharded(input) and not torch.compiler.is_compiling():
        from tritonconv.distributed import dtensor_call  # other calls do without torch.distributed

        return dtensor_call.call(input, weight, bias, geo)
    return fallback.forward(fallback.call_of(input, weight, bias, geo), input, weight, bias)


def _not_tensors(operands, geo):
    """A call that torch records (the proxies of torch.fx), or else something that is no tensor."""
    if not torch.overrides.has_torch_function(tuple(operands.values())):
        for name, value in operands.items():
            if not isinstance(value, torch.Tensor) and not (name == "bias" and value is None):
                raise ArgumentTypeError(
                    f"conv_transpose3d: {name} expects a tensor, got {value!r} ({type(value).__name__})"
                )
    if geo.crop != geo.back:
        raise ArgumentTypeError(f"conv_transpose3d: padding {geo.crop}, {geo.back} cannot be recorded symbolically")
    return torch.nn.functional.conv_transpose3d(
        *operands.values(),
        geo.stride,
        geo.crop,
        geo.output_padding,
        geo.groups,
        geo.dilation,  # type: ignore[call-arg]
    )


def _traced(input, weight, bias, arguments):
    if input.dim() == 4:
        return _traced(input.unsqueeze(0), weight, bias, arguments).squeeze(0)
    own = _call_of_fixed_sizes(input, weight, bias, arguments)
    if own is not None and getattr(guards, own[0]) == "torch":
        return torch.conv_transpose3d(input, weight, bias, *own[2:])
    geo = geometry(*arguments)
    input, weight, bias = autocast.cast_arguments(input, weight, bias)
    served = input.dtype in fallback.DTYPES and input.device.type in fallback.DEVICES
    if fallback.exporting() or fallback.transformed() or not served:
        return _composed(input, weight, bias, geo)
    call = fallback.call_of(input, weight, bias, geo)
    check_types(input, weight, bias)
    return operators.forward(
        input, weight, bias, call.size, call.out_size, tuple(weight.shape[2:]),
        geo.stride, geo.crop, geo.dilation, geo.groups, None if own is None else own[1],
    )  # fmt: skip


def _torch_serves(input, weight, bias, arguments) -> bool:
    """A call that is traced is torch's own operation in the graph."""
    if fallback.exporting() or fallback.transformed():
        return True
    own = _call_of_fixed_sizes(input, weight, bias, arguments)
    return own is not None and getattr(guards, own[0]) == "torch"


def _call_of_fixed_sizes(input, weight, bias, arguments) -> tuple | None:
    """:func:`tritonconv.guards.guard_of_call` for a traced call of fixed sizes, else None.

    It reads few globals: each is a guard more than torch's layer has.
    """
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not _fixed((*[t.shape for t in tensors], *[t.stride() for t in tensors], *arguments)):
        return None
    facts = [(type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors]
    return guards.guard_of_call(torch.is_grad_enabled(), arguments, *facts)


def _fixed(values) -> bool:
    """Integers, however nested, none of them symbolic."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # loaded while torch.compile traces

    for value in values:
        if isinstance(value, (tuple, list)):
            if not _fixed(value):
                return False
        elif not isinstance(value, int) or not has_static_value(value):
            return False
    return True
