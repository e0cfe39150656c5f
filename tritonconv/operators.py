"""The three passes as registered torch operators, for calls that are compiled.

A compiled graph holds ``tritonconv::forward`` and its two gradients as opaque nodes; each runs its plan when the
graph runs, so a compiled model uses the same variants as an eager one, with any image size. torch.export, ONNX export
and every other tracer see torch's own operation instead (:mod:`tritonconv.functional`).
"""

from __future__ import annotations

import torch

from tritonconv import fallback
from tritonconv.arguments import layout_of
from tritonconv.dispatch import Plan, plan
from tritonconv.flops import conv_flop_count, register_flop_formula
from tritonconv.problem import LAYOUTS, Problem, TorchCrop, Triple

_library = torch.library.Library("tritonconv", "DEF")
_GEOMETRY = "SymInt[] size, SymInt[] out_size, int[] kernel, int[] stride, int[] crop, int[] dilation, int groups"
_library.define(f"forward(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor")
_library.define(f"backward_data(Tensor grad_y, Tensor weight, {_GEOMETRY}) -> Tensor")
_library.define(f"backward_weight(Tensor x, Tensor grad_y, {_GEOMETRY}) -> (Tensor, Tensor)")


def _plan(n, c_in, c_out, tensor, layout, geometry, bias=False) -> Plan:
    size, out_size, kernel, stride, crop, dilation, groups = geometry
    problem = Problem(
        n=n, c_in=c_in, c_out=c_out,
        size=_triple(size), kernel=_triple(kernel), stride=_triple(stride), crop=_triple(crop),
        out_size=_triple(out_size), dilation=_triple(dilation),
        groups=groups, dtype=tensor.dtype, layout=layout, bias=bias,
    )  # fmt: skip
    return plan(problem, tensor.device)


def _triple(values) -> Triple:
    first, second, third = (int(value) for value in values)
    return first, second, third


def _forward(x, weight, bias, *geometry):
    c_out = weight.shape[1] * geometry[-1]
    made = _plan(x.shape[0], x.shape[1], c_out, x, layout_of(x, weight), geometry, bias is not None)
    return made.forward(x, weight, bias)


def _backward_data(grad_y, weight, *geometry):
    made = _plan(grad_y.shape[0], weight.shape[0], grad_y.shape[1], grad_y, layout_of(grad_y, weight), geometry)
    return made.backward_data(grad_y, weight)


def _backward_weight(x, grad_y, *geometry):
    made = _plan(x.shape[0], x.shape[1], grad_y.shape[1], x, layout_of(x, grad_y), geometry)
    grad_weight, grad_bias = made.backward_weight(x, grad_y, True)
    return grad_weight.contiguous(), grad_bias


def _fake_forward(x, weight, bias, size, out_size, kernel, stride, crop, dilation, groups):
    return _empty(x, (x.shape[0], weight.shape[1] * groups, *out_size), layout_of(x, weight))


def _fake_backward_data(grad_y, weight, size, *rest):
    return _empty(grad_y, (grad_y.shape[0], weight.shape[0], *size), layout_of(grad_y, weight))


def _fake_backward_weight(x, grad_y, size, out_size, kernel, stride, crop, dilation, groups):
    grad_weight = x.new_empty((x.shape[1], grad_y.shape[1] // groups, *kernel))
    return grad_weight, x.new_empty((grad_y.shape[1],))


def _empty(tensor, shape, layout):
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=LAYOUTS[layout])


for _name, _kernel, _fake in (
    ("forward", _forward, _fake_forward),
    ("backward_data", _backward_data, _fake_backward_data),
    ("backward_weight", _backward_weight, _fake_backward_weight),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tritonconv::{_name}", _fake, lib=_library)

forward = torch.ops.tritonconv.forward
backward_data = torch.ops.tritonconv.backward_data
backward_weight = torch.ops.tritonconv.backward_weight


# ------------------------------------------------------------------ derivatives: the table of tritonconv.autograd


def _save_first_two(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.geometry = inputs[-7:]


def _forward_backward(ctx, grad_y):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_x = backward_data(grad_y, weight, *ctx.geometry) if need_x else None
    grad_weight = grad_bias = None
    if need_weight:
        grad_weight, grad_bias = backward_weight(x, grad_y, *ctx.geometry)
    elif need_bias:
        grad_bias = grad_y.sum((0, 2, 3, 4))
    return (grad_x, grad_weight, grad_bias if need_bias else None, *[None] * 7)


def _backward_data_backward(ctx, grad):
    grad_y, weight = ctx.saved_tensors
    need_grad_y, need_weight = ctx.needs_input_grad[:2]
    by_grad_y = forward(grad, weight, None, *ctx.geometry) if need_grad_y else None
    by_weight = backward_weight(grad, grad_y, *ctx.geometry)[0] if need_weight else None
    return (by_grad_y, by_weight, *[None] * 7)


def _backward_weight_backward(ctx, grad_weight, grad_bias):
    x, grad_y = ctx.saved_tensors
    need_x, need_grad_y = ctx.needs_input_grad[:2]
    by_x = backward_data(grad_y, grad_weight, *ctx.geometry) if need_x else None
    by_grad_y = forward(x, grad_weight, grad_bias, *ctx.geometry) if need_grad_y else None
    return (by_x, by_grad_y, *[None] * 7)


for _name, _backward in (
    ("forward", _forward_backward),
    ("backward_data", _backward_data_backward),
    ("backward_weight", _backward_weight_backward),
):
    torch.library.register_autograd(f"tritonconv::{_name}", _backward, setup_context=_save_first_two, lib=_library)


# --------------------------------------------------- vmap inside a compiled function, and the FLOP counter


def _call(c_out, geometry, weight_shape):
    size, out_size, kernel, stride, crop, dilation, groups = geometry
    full = [(i - 1) * s + r * (k - 1) + 1 for i, s, r, k in zip(size, stride, dilation, kernel, strict=True)]
    back = tuple(f - p - o for f, p, o in zip(full, crop, out_size, strict=True))
    return fallback.SymbolicCall(
        c_out=c_out,
        size=tuple(size),  # type: ignore[arg-type]
        stride=tuple(stride),  # type: ignore[arg-type]
        torch_crop=TorchCrop.of(tuple(crop), back, tuple(stride), tuple(dilation)),  # type: ignore[arg-type]
        out_size=tuple(out_size),  # type: ignore[arg-type]
        dilation=tuple(dilation),  # type: ignore[arg-type]
        groups=groups,
        weight_shape=tuple(weight_shape),
    )


def _torch_forward(x, weight, bias, *geometry):
    return fallback.forward(_call(weight.shape[1] * geometry[-1], geometry, weight.shape), x, weight, bias)


def _torch_backward_data(grad_y, weight, *geometry):
    return fallback.backward_data(_call(grad_y.shape[1], geometry, weight.shape), grad_y, weight)


def _torch_backward_weight(x, grad_y, *geometry):
    shape = (x.shape[1], grad_y.shape[1] // geometry[-1], *geometry[2])
    return fallback.backward_weight(_call(grad_y.shape[1], geometry, shape), x, grad_y), grad_y.sum((0, 2, 3, 4))


def _register_vmap(name, function):
    def rule(info, in_dims, *args):
        tensors = len(args) - 7

        def one(*operands):
            return function(*operands, *args[tensors:])

        out = torch.vmap(one, in_dims=in_dims[:tensors], randomness=info.randomness)(*args[:tensors])
        return out, (0, 0) if isinstance(out, tuple) else 0

    torch.library.register_vmap(f"tritonconv::{name}", rule, lib=_library)


for _name, _function in (
    ("forward", _torch_forward),
    ("backward_data", _torch_backward_data),
    ("backward_weight", _torch_backward_weight),
):
    _register_vmap(_name, _function)


# torch counts a transposed convolution's cropped taps too; the counter must agree with torch's own layer.
@register_flop_formula(forward)
def _flops_forward(x_shape, weight_shape, bias_shape, *args, out_shape=None, **kwargs) -> int:
    return conv_flop_count(x_shape, weight_shape, out_shape, transposed=True)


@register_flop_formula(backward_data)
def _flops_backward_data(grad_y_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return conv_flop_count(out_shape, weight_shape, grad_y_shape, transposed=True)


@register_flop_formula(backward_weight)
def _flops_backward_weight(x_shape, grad_y_shape, *args, out_shape=None, **kwargs) -> int:
    return conv_flop_count(x_shape, out_shape[0], grad_y_shape, transposed=True)
