"""The decoder stage of a U-Net: a transposed convolution written straight into its slice of a concatenation.

``torch.cat((layer(x), skip), 1)`` writes y, reads it and writes it again. Here y is written once, at its place in the
buffer, and the gradient of y is read there, as a view.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torchs_module
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from tritonconv import autocast, autograd, fallback
from tritonconv.arguments import layout_of
from tritonconv.dispatch import MAX_PLANS, Plan, keep_stage, plan_for, stages
from tritonconv.errors import ArgumentError, ArgumentTypeError, EmptyOutputError
from tritonconv.forced import forced, restore_forced, trained
from tritonconv.functional import eager
from tritonconv.kernels.torch_layout import filled
from tritonconv.layer import ConvTranspose3d
from tritonconv.matlab.layer import TransposedConv3dLayer
from tritonconv.private import any_autocast, deterministic, dispatch_modes, forward_mode, function_base
from tritonconv.problem import LAYOUTS
from tritonconv.switches import graphs

OP = "up_concat"
FORWARDS = (nn.ConvTranspose3d.forward, ConvTranspose3d.forward)


def up_concat(layer: nn.Module, x: Any, skip: Any, skip_first: bool = False) -> Any:
    """``torch.cat((layer(x), skip), 1)``, or with ``skip_first`` ``torch.cat((skip, layer(x)), 1)``.

    The transposed convolution is written at its place in the result, where its layer is a
    ``tritonconv.ConvTranspose3d``, ``tritonconv.TransposedConv3dLayer`` or ``torch.nn.ConvTranspose3d`` (whose call is
    then ours too) without hooks, parametrizations or a forward of its own. In every other case the two operations run
    one after the other: another layer, a skip of a wider dtype, ``torch.compile`` (one graph, no break), transforms,
    tracers, fake tensors and subclasses, and a call whose fastest forward is torch's own.

    Gradients of any order reach x, skip, the weight and the bias. Under autocast the layer computes in the region's
    dtype; the result has the wider of that and the skip's. The result is channels_last_3d if both parts are so, else
    NCDHW: torch's rule.

    Args:
        layer: a module of one input, the transposed convolution.
        x: (n, c_in, d, h, w), the layer's input; or (c_in, d, h, w) without a batch.
        skip: (n, c_skip, od, oh, ow) where the layer's output is (n, c_out, od, oh, ow); without a batch if x is.
        skip_first: the skip's channels come first.

    Returns:
        (n, c_out + c_skip, od, oh, ow), or without n; new memory.

    Raises:
        ArgumentError (a ValueError and a RuntimeError): the skip does not fit the layer's output; or as the layer does.
        ArgumentTypeError (a TypeError and a RuntimeError): ``layer`` is no module, or ``skip`` no tensor.
    """
    if not isinstance(layer, nn.Module):
        raise ArgumentTypeError(f"{OP}: layer expects a torch.nn.Module, got {layer!r} ({type(layer).__name__})")
    if torch.compiler.is_compiling():
        return _composed(layer, x, skip, skip_first)
    arguments = geometry_of(layer)
    if arguments is None:
        return _composed(layer, x, skip, skip_first)
    own: Any = layer._parameters
    if "weight" in own and "bias" in own:  # torch takes ten times as long to find them
        weight, bias = own["weight"], own["bias"]
    else:  # another tensor in the place of one
        weight, bias = layer.weight, layer.bias
    known = stages.get(id(weight))
    if known:
        stride, padding, output_padding, groups, dilation = arguments
        for check, s, p, q, g, r, unbiased, only_without, leaves, direct, place in known:
            if (
                stride is s and padding is p and output_padding is q and groups is g and dilation is r
                and unbiased is (bias is None)
                and (check(x, skip, weight) if unbiased else check(x, skip, weight, bias))
                and not (only_without and torch.is_grad_enabled())
                and not (forced.get() or graphs.get() or (trained and id(weight) in trained))
            ):  # fmt: skip
                if direct is not None:
                    y = torch.conv_transpose3d(x, weight, bias, *direct)
                    return torch.cat((skip, y) if skip_first else (y, skip), 1)
                if forward_mode._current_level < 0 and dispatch_modes() == 0 and not deterministic():
                    if leaves and torch.is_grad_enabled():
                        return _differentiable(x, weight, bias, skip, skip_first, place)
                    return _concatenation(x, weight, bias, skip, skip_first, place)[0]
    if isinstance(x, torch.Tensor) and not isinstance(skip, torch.Tensor):
        raise ArgumentTypeError(f"{OP}: skip expects a tensor, got {skip!r} ({type(skip).__name__})")
    if not fallback.ordinary(x, weight, bias) or type(skip) not in fallback.PLAIN_TYPES:
        return _composed(layer, x, skip, skip_first)
    if not fallback.undisturbed(x, weight, bias) or fallback.old_vmap(skip):
        return _composed(layer, x, skip, skip_first)
    forced_again = restore_forced(weight)
    if forced_again is None:
        return _eager(x, weight, bias, skip, skip_first, arguments)
    with forced_again:
        return _eager(x, weight, bias, skip, skip_first, arguments)


def geometry_of(layer: Any) -> tuple | None:
    """(stride, padding, output_padding, groups, dilation) of a layer whose call is its transposed convolution alone,
    else None."""
    own = type(layer).forward
    if "forward" in vars(layer) or type(layer).__call__ is not nn.Module.__call__ or hooked(layer):
        return None
    if layer._compiled_call_impl is not None:
        return None
    if own is TransposedConv3dLayer.forward:
        return None if _lazy(layer, "weight") or _lazy(layer, "bias") else (*layer._geometry, 1, 1)
    if own not in FORWARDS or not isinstance(layer, nn.ConvTranspose3d) or layer.padding_mode != "zeros":
        return None
    if _lazy(layer, "weight"):
        return None
    return layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation


def _lazy(layer: Any, name: str) -> bool:
    """A parameter that has no shape yet; ``layer.weight`` takes ten times as long to find."""
    return is_lazy(layer._parameters.get(name))


def hooked(layer: nn.Module) -> bool:
    """The conditions of ``nn.Module.__call__``, and parametrizations."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or torchs_module._global_forward_hooks
        or torchs_module._global_forward_pre_hooks
        or torchs_module._global_backward_hooks
        or torchs_module._global_backward_pre_hooks
        or ("parametrizations" in layer._modules and is_parametrized(layer))
    )


def _composed(layer, x, skip, skip_first):
    """The two operations of torch."""
    return _concatenated(layer(x), skip, skip_first)


def _concatenated(y, skip, skip_first):
    """torch's; of tensors without a batch the channels are the first axis."""
    if isinstance(y, torch.Tensor) and isinstance(skip, torch.Tensor):
        _check(y.shape, y.device, skip)
        axis = y.dim() - 4
    else:  # a tracer's proxies, which have no axes: a batch, as in training
        axis = 1
    return torch.cat((skip, y) if skip_first else (y, skip), axis)


def _check(shape, device, skip) -> None:
    """Raises ArgumentError where the skip does not fit an output of this shape on this device."""
    if fallback.tracing() is not None:  # which records each size that is looked at
        return
    fits = len(shape) == skip.dim() == 5 and shape[0] == skip.shape[0] and shape[2:] == skip.shape[2:]
    if not fits and not (len(shape) == skip.dim() == 4 and shape[1:] == skip.shape[1:]):
        raise ArgumentError(
            f"{OP}: the layer's output {tuple(shape)} and skip {tuple(skip.shape)} must agree in all axes but the "
            "channels"
        )
    if skip.device != device:
        raise ArgumentError(f"{OP}: skip is on {skip.device} but the layer's output is on {device}")


def _eager(x, weight, bias, skip, skip_first, arguments):
    if any_autocast():
        x, weight, bias = autocast.cast_arguments_once(x, weight, bias)
    batched = x.dim() == 5
    image = x if batched else x.unsqueeze(0)
    try:
        plan = plan_for(image, weight, bias, arguments)
    except EmptyOutputError:
        plan = None
    if plan is None:
        return _concatenated(eager(x, weight, bias, arguments), skip, skip_first)
    shape = plan.problem.y_shape
    _check(shape if batched else shape[1:], x.device, skip)
    recorded = autograd.needs_gradient(x, weight, bias)
    direct = plan.torch_alone if recorded else plan.torch_forward
    if direct is None and not _in_slice(plan, x, skip):
        return _concatenated(eager(x, weight, bias, arguments), skip, skip_first)
    if not batched:
        skip = skip.unsqueeze(0)
    place = None if direct is not None else _place(plan, skip)
    lasting = plan.lasting(recorded) if batched and x.is_cpu and skip.layout is torch.strided else None
    if lasting is not None and (direct is None or plan.torch_forward is not None):  # it serves without gradients too
        keep_stage(direct, place and place._replace(plan=lasting), x, weight, bias, skip, arguments, recorded)
    if direct is not None:
        joined = _concatenated(torch.conv_transpose3d(image, weight, bias, *direct), skip, skip_first)
    else:
        assert place is not None
        joined = _joined(image, weight, bias, skip, skip_first, place)
    return joined if batched else joined.squeeze(0)


def _in_slice(plan: Plan, x, skip) -> bool:
    """The layer's output is written at its place in the result."""
    if not plan.writes_out or skip.layout is not torch.strided or not _keeps(x.dtype, skip.dtype):
        return False
    problem = plan.problem
    if problem.layout != "ndhwc" or not x.is_cpu or not problem.tiles_exactly:
        return True
    # The copy of the weight for channels_last_3d, beside the result and with a part of y, would be larger than y.
    return 2 * math.prod(problem.weight_shape) <= math.prod(problem.y_shape)


def _keeps(dtype: torch.dtype, skips: torch.dtype) -> bool:
    """torch's concatenation of the two has ``dtype``, the layer's."""
    return dtype == skips or torch.promote_types(dtype, skips) == dtype


class InSlice(NamedTuple):
    """Of y in its concatenation with skips of one kind."""

    plan: Plan
    shape: tuple[int, ...]  # of the result
    memory_format: torch.memory_format
    channels: tuple[int, int]  # of y and of the skip


def _place(plan: Plan, skip) -> InSlice:
    n, c_out, *size = plan.problem.y_shape
    layout = _layout(plan.problem.layout, plan.problem.y_shape)
    if layout == "ndhwc":
        layout = layout_of(skip, skip)
    more = skip.shape[1]
    return InSlice(plan, (n, c_out + more, *size), LAYOUTS[layout], (c_out, more))


def _joined(x, weight, bias, skip, skip_first, place: InSlice):
    if autograd.needs_gradient(x, weight, bias) or (torch.is_grad_enabled() and skip.requires_grad):
        return _differentiable(x, weight, bias, skip, skip_first, place)
    return _concatenation(x, weight, bias, skip, skip_first, place)[0]


def _concatenation(x, weight, bias, skip, skip_first, place: InSlice, pack: bool = False):
    """(the result, the packed weight that a backward takes, or None)."""
    plan, shape, memory_format, (c_out, more) = place
    if type(plan) is not Plan:  # each contestant runs and is timed as it would serve
        run = partial(_contestants, x, weight, bias, skip, skip_first, place)
        return plan.stage(run, more)
    buffer = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    if skip_first:
        beside, y = buffer.split_with_sizes((more, c_out), 1)
    else:
        y, beside = buffer.split_with_sizes((c_out, more), 1)
    packed = None
    if y.numel():
        if pack:
            _, packed = plan.forward_and_pack(x, weight, bias, y)
        elif plan.takes_room:  # the products lie where the skip will: no memory beside the result
            plan.forward(x, weight, bias, y, room=beside)
        else:
            plan.forward(x, weight, bias, y)
    filled(beside, skip)
    return buffer, packed


def _contestants(x, weight, bias, skip, skip_first, place: InSlice, plan: Plan):
    """As :func:`_concatenation` by ``plan``, or torch's two operations where that is torch's own."""
    direct = plan.torch_forward
    if direct is None:
        return _concatenation(x, weight, bias, skip, skip_first, place._replace(plan=plan))
    return _concatenated(torch.conv_transpose3d(x, weight, bias, *direct), skip, skip_first), None


@lru_cache(MAX_PLANS)
def _layout(layout: str, shape: tuple[int, ...]) -> str:
    """That of the concatenation with a skip in channels_last_3d, by torch's rule: both parts must seem to be so, and a
    tensor of one channel and one voxel does not."""
    y = torch.empty(shape, device="meta", memory_format=LAYOUTS[layout])
    return layout_of(y, y)


def _parts(whole, c_out: int, skip_first: bool):
    """The views of the layer's channels and of the skip's."""
    beside = whole.shape[1] - c_out
    if skip_first:
        return whole.narrow(1, beside, c_out), whole.narrow(1, 0, beside)
    return whole.narrow(1, 0, c_out), whole.narrow(1, c_out, beside)


class _UpConcat(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, skip, skip_first, place):
        need_x, need_weight = ctx.needs_input_grad[:2]
        plan = place.plan
        ctx.plan, ctx.skip_first, ctx.skip_dtype = plan, skip_first, skip.dtype
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        pack = need_x and plan.kept_order is not None
        buffer, ctx.packed = _concatenation(x, weight, bias, skip, skip_first, place, pack)
        return buffer

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        grad_y, grad_skip = _parts(grad, ctx.plan.problem.c_out, ctx.skip_first)
        gradients = (None, None, None)
        if any(wanted):
            gradients = autograd.backward_of_call(grad_y, x, weight, wanted, ctx.plan, ctx.packed)
        return *gradients, grad_skip.to(ctx.skip_dtype) if ctx.needs_input_grad[3] else None, None, None


_differentiable = super(torch.autograd.Function, _UpConcat).apply if function_base else _UpConcat.apply
