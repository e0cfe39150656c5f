"""The passes as two registered torch operators, for calls that are compiled.

A compiled graph holds ``tritonconv::conv_transpose3d`` and its backward as opaque nodes where a variant of ours may run
or a size is symbolic. Each runs its plan when the graph runs, so a compiled model uses the same variants as an eager
one, with any image size. Where every pass is torch's own the graph holds torch's operation (:mod:`tritonconv.guards`);
torch.export, ONNX export and every other tracer see that operation too (:mod:`tritonconv.functional`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any
from weakref import WeakSet

import torch

from tritonconv import dispatch, fallback, registries
from tritonconv.arguments import layout_of
from tritonconv.autograd import backward_of_backward, gradients
from tritonconv.dispatch import Plan
from tritonconv.forced import Forced, forced
from tritonconv.kernels.torch_layout import bias_gradient
from tritonconv.private import deterministic as deterministic_algorithms
from tritonconv.problem import LAYOUTS, Axis, Problem, TorchCrop
from tritonconv.switches import graphs

# torch's caches of compiled graphs on the disk find a backward graph by the name and the arguments of the forward
# operator: where the derivatives below are put together otherwise, the operators need other names.
_FORWARD, _BACKWARD = "tritonconv::conv_transpose3d", "tritonconv::conv_transpose3d_backward"
_compiled_plans: dict[str, WeakSet[Plan]] = {_FORWARD: WeakSet(), _BACKWARD: WeakSet()}

_library = torch.library.Library("tritonconv", "DEF")
_GEOMETRY = (
    "SymInt[] size, SymInt[] out_size, SymInt[] kernel, SymInt[] stride, SymInt[] crop, SymInt[] dilation, int groups"
)
# ``layout`` and ``biased`` are those of the call that a derivative belongs to, whose plan it shares; left out, they
# are read off the operands. ``backward`` returns the gradients of x, weight and bias that ``wanted`` marks, in this
# order, and takes None for an operand that those do not need.
_library.define(
    f"conv_transpose3d(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, str? layout=None, bool? biased=None)"
    " -> Tensor"
)
_library.define(
    f"conv_transpose3d_backward(Tensor grad_y, Tensor? x, Tensor? weight, {_GEOMETRY}, str layout, bool biased, "
    "bool[3] wanted) -> Tensor[]"
)


@lru_cache(dispatch.MAX_PLANS)
def _planned(state: tuple[int, Forced, bool, bool], device, dtype, n, c_in, c_out, geometry, layout, biased) -> Plan:
    size, out_size, kernel, stride, crop, dilation, groups = geometry
    problem = Problem(
        n=n, c_in=c_in, c_out=c_out, size=size, kernel=kernel, stride=stride, crop=crop, out_size=out_size,
        dilation=dilation, groups=groups, dtype=dtype, layout=layout, bias=biased,
    )  # fmt: skip
    return dispatch.plan(problem, device, state[-1])


def _plan(tensor, c_in, c_out, geometry, layout, biased) -> Plan:
    """The plan of a call; ``tensor`` has its batch, device and dtype. ``state`` is all else that a plan depends on."""
    in_graph = graphs.get() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    state = dispatch.generation, forced.get(), deterministic_algorithms(), in_graph
    fixed = (*map(tuple, geometry[:6]), geometry[6])
    return _planned(state, tensor.device, tensor.dtype, tensor.shape[0], c_in, c_out, fixed, layout, biased)


def _forward(x, weight, bias, size, out_size, kernel, stride, crop, dilation, groups, layout=None, biased=None):
    geometry = size, out_size, kernel, stride, crop, dilation, groups
    plan = _plan(x, x.shape[1], weight.shape[1] * groups, geometry, *_of_the_call(x, weight, bias, layout, biased))
    return _run(plan, _FORWARD, lambda each: each.forward(x, weight, bias))


def _run(plan: Plan, name: str, call: Callable[[Plan], Any]) -> Any:
    """The result of a plan's call, the first one not before its kernels are compiled, and those for a CUDA graph.

    A CUDA graph of the compiled function is recorded at the second call, and would keep torch's stand-in for good.
    """
    result = call(plan)
    if plan.standby and plan not in _compiled_plans[name] and not torch.cuda.is_current_stream_capturing():
        _compiled_plans[name].add(plan)
        others = _others_for_graphs(plan)
        for each in others:
            call(each)
        dispatch.wait_until_compiled()
        for each in (*others, plan):
            result = call(each)
    return result


def _others_for_graphs(plan: Plan) -> tuple[Plan, ...]:
    """The plan of the same call in a CUDA graph, where it has other choices for the passes that have run."""
    other = dispatch.plan(plan.problem, plan.device, True)
    same = all(other.choice(name)[:2] == chosen[:2] for name, chosen in list(plan.chosen.items()))
    return () if same else (other,)


def _of_the_call(x, weight, bias, layout, biased):
    return layout_of(x, weight) if layout is None else layout, bias is not None if biased is None else biased


def _backward(grad_y, x, weight, *arguments):
    *geometry, layout, biased, wanted = arguments
    c_in = x.shape[1] if weight is None else weight.shape[0]
    plan = _plan(grad_y, c_in, grad_y.shape[1], geometry, layout, biased)
    grad_x, grad_weight, grad_bias = _run(plan, _BACKWARD, partial(gradients, grad_y, x, weight, wanted))
    if grad_weight is not None:
        grad_weight = grad_weight.contiguous()  # as the fake kernel says
    return [gradient for gradient in (grad_x, grad_weight, grad_bias) if gradient is not None]


def _fake_forward(x, weight, bias, size, out_size, kernel, stride, crop, dilation, groups, layout=None, biased=None):
    layout, _ = _of_the_call(x, weight, bias, layout, biased)
    return _empty(x, (x.shape[0], weight.shape[1] * groups, *out_size), layout)


def _fake_backward(grad_y, x, weight, size, out_size, kernel, stride, crop, dilation, groups, layout, biased, wanted):
    n, c_out = grad_y.shape[:2]
    c_in = x.shape[1] if weight is None else weight.shape[0]
    results = [_empty(grad_y, (n, c_in, *size), layout)] if wanted[0] else []
    results += [grad_y.new_empty((c_in, c_out // groups, *kernel))] if wanted[1] else []
    return results + ([grad_y.new_empty((c_out,))] if wanted[2] else [])


def _empty(tensor, shape, layout):
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=LAYOUTS[layout])


for _name, _kernel, _fake in ((_FORWARD, _forward, _fake_forward), (_BACKWARD, _backward, _fake_backward)):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(_name, _fake, lib=_library)

forward = torch.ops.tritonconv.conv_transpose3d
backward = torch.ops.tritonconv.conv_transpose3d_backward


# ------------------------------------------------------------------ derivatives: the table of tritonconv.autograd


def _save_forward(ctx, inputs, output):
    x, weight, bias, *geometry, layout, biased = inputs
    ctx.save_for_backward(x, weight)
    ctx.call = (*geometry, *_of_the_call(x, weight, bias, layout, biased))


def _forward_backward(ctx, grad_y):
    x, weight = ctx.saved_tensors
    need_x, need_weight, _ = wanted = ctx.needs_input_grad[:3]
    if not (need_x or need_weight):
        return None, None, bias_gradient(grad_y), *[None] * 9
    operands = x if need_weight else None, weight if need_x else None
    return *_gradients(ctx.call, grad_y, *operands, wanted), *[None] * 9


def _gradients(call, grad_y, x, weight, wanted):
    """(grad_x, grad_weight, grad_bias) from ``backward``, or from torch's own under the old vmap, which knows no
    operator that returns a list."""
    batched = any(tensor is not None and fallback.old_vmap(tensor) for tensor in (grad_y, x, weight))
    results = iter((_torch_backward if batched else backward)(grad_y, x, weight, *call, wanted))
    return tuple(next(results) if marked else None for marked in wanted)


def _save_backward(ctx, inputs, output):
    grad_y, x, weight, *ctx.call, ctx.wanted = inputs
    ctx.save_for_backward(grad_y, x, weight)


def _backward_backward(ctx, grads):
    entries = iter(grads)
    spread = [next(entries) if marked else None for marked in ctx.wanted]
    by_operands = backward_of_backward(
        lambda *operands: forward(*operands, *ctx.call), partial(_gradients, ctx.call),
        ctx.saved_tensors, ctx.needs_input_grad[:3], spread,
    )  # fmt: skip
    return *by_operands, *[None] * 10


torch.library.register_autograd(_FORWARD, _forward_backward, setup_context=_save_forward, lib=_library)
torch.library.register_autograd(_BACKWARD, _backward_backward, setup_context=_save_backward, lib=_library)


# --------------------------------------------------- vmap inside a compiled function, and the FLOP counter


def _call(geometry, weight_shape) -> fallback.SymbolicCall:
    size, out_size, kernel, stride, crop, dilation = map(tuple, geometry[:6])
    back = tuple(axis.back_crop for axis in map(Axis, size, kernel, stride, crop, dilation, out_size))
    torch_crop = TorchCrop.of(crop, back, stride, dilation)  # type: ignore[arg-type]
    return fallback.SymbolicCall(size, stride, torch_crop, out_size, dilation, geometry[6], tuple(weight_shape))


def _torch_forward(x, weight, bias, *arguments):
    return fallback.forward(_call(arguments[:7], weight.shape), x, weight, bias)


def _torch_backward(grad_y, x, weight, *arguments):
    geometry, wanted = arguments[:7], arguments[-1]
    c_out = grad_y.shape[1]
    c_in = x.shape[1] if weight is None else weight.shape[0]
    call = _call(geometry, (c_in, c_out // geometry[6], *geometry[2]))
    results = fallback.gradients(call, grad_y, x, weight, wanted)
    return [gradient for gradient in results if gradient is not None]


def _register_vmap(name, function):
    def rule(info, in_dims, *args, **more):
        def one(*operands):
            return function(*operands, *args[3:])

        out = torch.vmap(one, in_dims=in_dims[:3], randomness=info.randomness)(*args[:3])
        return out, [0] * len(out) if isinstance(out, list) else 0

    torch.library.register_vmap(name, rule, lib=_library)


_register_vmap(_FORWARD, _torch_forward)
_register_vmap(_BACKWARD, _torch_backward)

registries.register_operators(forward, backward)
