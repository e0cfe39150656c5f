"""``conv_transpose3d``: one place decides which road a call takes.

* plain eager call: a plan looked up by one tuple, run directly or under ordinary autograd
* ``torch.compile``: the registered operators
* everything else (export, tracing, functorch, forward-mode, fake and meta tensors, subclasses, complex, integer):
  torch itself, with the shapes checked
"""

from __future__ import annotations

import torch

from tritonconv import autograd, fallback, operators
from tritonconv.arguments import check_types, geometry
from tritonconv.dispatch import plan_for

_any_autocast = torch._C._is_any_autocast_enabled


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
    if _any_autocast() and torch.is_autocast_enabled(input.device.type):
        input, weight, bias = _autocast(input, weight, bias)
    if input.dim() == 4:
        args = (stride, padding, output_padding, groups, dilation)
        return _planned(input.unsqueeze(0), weight, bias, *args).squeeze(0)
    return _planned(input, weight, bias, stride, padding, output_padding, groups, dilation)


def _planned(input, weight, bias, stride, padding, output_padding, groups, dilation):
    plan = plan_for(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if plan is None:
        return _by_torch(input, weight, bias, stride, padding, output_padding, groups, dilation)
    direct = plan.torch_alone
    if direct is None:
        if autograd.needs_gradient(input, weight, bias):
            return autograd.differentiable_forward(input, weight, bias, plan)
        direct = plan.torch_forward
        if direct is None:
            return plan.forward(input, weight, bias)
    return torch.conv_transpose3d(input, weight, bias, *direct)


def _by_torch(input, weight, bias, stride, padding, output_padding, groups, dilation):
    geo = geometry(stride, padding, output_padding, groups, dilation)
    if not isinstance(input, torch.Tensor):  # a symbolic proxy (torch.fx): nothing to check, torch records the call
        return _proxy(input, weight, bias, geo)
    batched = input.unsqueeze(0) if input.dim() == 4 else input
    call = fallback.call_of(batched, weight, bias, geo)
    y = fallback.forward(call, batched, weight, bias)
    return y.squeeze(0) if input.dim() == 4 else y


def _proxy(input, weight, bias, geo):
    if geo.crop != geo.back:
        raise TypeError(
            f"conv_transpose3d: padding {geo.crop}, {geo.back} cannot be recorded on a {type(input).__name__}"
        )
    args = (geo.stride, geo.crop, geo.output_padding, geo.groups, geo.dilation)
    return torch.nn.functional.conv_transpose3d(input, weight, bias, *args)


def _traced(input, weight, bias, stride, padding, output_padding, groups, dilation):
    if (
        torch.compiler.is_exporting()
        or fallback.transformed()
        or input.dtype not in fallback.DTYPES
        or input.device.type not in fallback.DEVICES
    ):
        return _by_torch(input, weight, bias, stride, padding, output_padding, groups, dilation)
    geo = geometry(stride, padding, output_padding, groups, dilation)
    if torch.is_autocast_enabled(input.device.type):
        input, weight, bias = _autocast(input, weight, bias)
    batched = input.unsqueeze(0) if input.dim() == 4 else input
    call = fallback.call_of(batched, weight, bias, geo)
    check_types(batched, weight, bias)
    y = operators.forward(
        batched, weight, bias, call.size, call.out_size, tuple(weight.shape[2:]),
        geo.stride, geo.crop, geo.dilation, geo.groups,
    )  # fmt: skip
    return y.squeeze(0) if input.dim() == 4 else y


def _autocast(*tensors):
    # torch's rule for convolutions: everything but float64 is computed in the autocast dtype.
    kind = tensors[0].device.type
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in tensors]
