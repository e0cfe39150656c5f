"""``conv_transpose3d``: one place decides which road a call takes.

* plain eager call: a plan looked up by one tuple, run directly or under ordinary autograd
* ``torch.compile``: the registered operators
* everything else (export, tracing, functorch, forward-mode, fake and meta tensors, subclasses, complex, integer):
  torch itself, with the shapes checked
"""

from __future__ import annotations

import torch

from tritonconv import autocast, autograd, fallback, guards, operators
from tritonconv.arguments import check_types, geometry, layout_of, plain
from tritonconv.dispatch import Plan, plan_for
from tritonconv.errors import ArgumentError, ArgumentTypeError, VariantNotApplicable
from tritonconv.forced import forced_variants


def conv_transpose3d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """Transposed 3-D convolution; the signature, answers and refusals of ``torch.nn.functional.conv_transpose3d``.

    Args:
        input: (n, c_in, d, h, w), or (c_in, d, h, w) without a batch.
        weight: (c_in, c_out/groups, kd, kh, kw).
        bias: (c_out,) or None.
        stride, dilation: an integer or three.
        padding: planes cropped from both ends of each axis: an integer or three; beyond torch, three
            ``(begin, end)`` pairs.
        output_padding: planes appended at the end, smaller than either stride or dilation.
        groups: divides c_in and c_out.

    Returns:
        (n, c_out, od, oh, ow) with od = (d - 1)*stride - begin - end + dilation*(kd - 1) + output_padding + 1
        (torch's formula with the two crops apart); channels_last_3d if input or weight is.

    Raises:
        ArgumentError (a ValueError and a RuntimeError): a value or a shape is refused.
        ArgumentTypeError (a TypeError and a RuntimeError): a type or a dtype is refused.
        VariantNotApplicable: a variant forced by ``tritonconv.use`` does not serve the call.
    """
    if torch.compiler.is_compiling():
        return _traced(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if not fallback.plain(input, weight, bias):
        return _by_torch(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if autocast.any_autocast():
        input, weight, bias = autocast.lowered_once(input, weight, bias)
    if input.dim() == 4:
        args = (stride, padding, output_padding, groups, dilation)
        return _planned(input.unsqueeze(0), weight, bias, *args).squeeze(0)
    return _planned(input, weight, bias, stride, padding, output_padding, groups, dilation)


def _planned(input, weight, bias, stride, padding, output_padding, groups, dilation):
    plan = plan_of_call(input, weight, bias, (stride, padding, output_padding, groups, dilation))
    if plan is None:
        return _by_torch(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if autograd.needs_gradient(input, weight, bias):
        direct = plan.torch_alone
        if direct is None:
            return autograd.differentiable_forward(input, weight, bias, plan)
    else:  # the gradients' variants are not chosen for it
        direct = plan.torch_forward
        if direct is None:
            return plan.forward(input, weight, bias)
    return _in_layout(torch.conv_transpose3d(input, weight, bias, *direct), plan.problem.layout)


def plan_of_call(input, weight, bias, arguments) -> Plan | None:
    """The plan of a batched call with these hyper-parameters; None where no variant serves such tensors."""
    try:
        return plan_for(input, weight, bias, *plain(arguments))
    except ArgumentError:
        geometry(*arguments)  # names the values as they were given
        raise


def _in_layout(y, layout):
    # torch answers some channels_last_3d calls on the CPU in NCDHW.
    return y if layout == "ncdhw" else y.contiguous(memory_format=torch.channels_last_3d)


def _by_torch(input, weight, bias, stride, padding, output_padding, groups, dilation):
    geo = geometry(stride, padding, output_padding, groups, dilation)
    operands = {"input": input, "weight": weight, "bias": bias}
    if not all(isinstance(t, torch.Tensor) for t in (input, weight)) or not isinstance(
        bias, (torch.Tensor, type(None))
    ):
        return _not_tensors(operands, geo)
    if not fallback.is_dtensor(input):
        input, weight, bias = autocast.lowered(input, weight, bias)
        check_types(input, weight, bias)
    forced, why_not = forced_variants(), fallback.unserved(input, weight, bias)
    if forced and why_not is not None and not input.is_meta:
        raise VariantNotApplicable(f"{', '.join(forced)} forced but torch itself serves this call: {why_not}")
    return _composed(input, weight, bias, geo)


def _composed(input, weight, bias, geo):
    """The call as torch's own operations, its shapes checked."""
    batched = input.unsqueeze(0) if input.dim() == 4 else input
    call = fallback.call_of(batched, weight, bias, geo)
    y = fallback.forward(call, batched, weight, bias)
    return y.squeeze(0) if input.dim() == 4 else y


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


def _traced(input, weight, bias, stride, padding, output_padding, groups, dilation):
    geo = geometry(stride, padding, output_padding, groups, dilation)
    input, weight, bias = autocast.lowered(input, weight, bias)
    served = input.dtype in fallback.DTYPES and input.device.type in fallback.DEVICES
    if fallback.exporting() or fallback.transformed() or not served:
        return _composed(input, weight, bias, geo)
    batched = input.unsqueeze(0) if input.dim() == 4 else input
    call = fallback.call_of(batched, weight, bias, geo)
    check_types(batched, weight, bias)
    layout = _torchs_layout(batched, weight, bias, call, geo)
    if layout is None:
        kernel = tuple(weight.shape[2:])
        y = operators.forward(
            batched, weight, bias, call.size, call.out_size, kernel, geo.stride, geo.crop, geo.dilation, geo.groups
        )
    else:
        y = _in_layout(fallback.forward(call, batched, weight, bias), layout)
    return y.squeeze(0) if input.dim() == 4 else y


def _torchs_layout(x, weight, bias, call, geo) -> str | None:
    """The layout of the answer where all passes that a traced call needs are torch's own; None elsewhere.

    Symbolic sizes are not known to be torch's own.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value  # loaded while torch.compile traces

    sizes = *x.shape, *x.stride(), *weight.shape, *weight.stride(), *geo.stride, *geo.crop, *geo.dilation
    if not all(has_static_value(size) for size in (*sizes, *call.out_size)):
        return None
    gradients, layout = autograd.needs_gradient(x, weight, bias), layout_of(x, weight)
    name = guards.attribute(
        x.device, gradients, x.shape[0], x.shape[1], call.c_out, call.size, tuple(weight.shape[2:]), geo.stride,
        geo.crop, call.out_size, geo.dilation, geo.groups, x.dtype, layout, bias is not None,
    )  # fmt: skip
    return layout if getattr(guards, name) == guards.TORCH else None
