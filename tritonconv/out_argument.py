"""A call that writes its answer into a tensor of the caller's: ``conv_transpose3d(..., out=)``.

The tensor may be any view that does not overlap itself, such as a slice of channels of a larger buffer. A kernel of
ours and most torch formulations write there at once, and torch's operations of an epilogue work there; any other answer
is computed and copied, as it is under torch.compile, torch.export and torch.jit.trace, under dispatch modes (fake
tensors), and for tensor subclasses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tritonconv import autocast, fallback
from tritonconv.arguments import OP
from tritonconv.dispatch import plan_for
from tritonconv.epilogue import check_operands, parsed
from tritonconv.epilogue_road import plain_beside
from tritonconv.errors import ArgumentError, ArgumentTypeError, EmptyOutputError
from tritonconv.private import any_autocast


def written(
    out: Any, input: Any, weight: Any, bias: Any, arguments: tuple, call: Callable[..., Any], epilogue: dict[str, Any]
) -> torch.Tensor:
    """``out`` with the answer in it; ``call`` is :func:`tritonconv.conv_transpose3d`, and ``epilogue`` holds its
    activation, residual and rounding.

    Raises ArgumentError or ArgumentTypeError, with ``out`` as it was, where ``out`` is no tensor of the answer's shape,
    dtype and device, overlaps itself, shares memory with an operand, or where a gradient or a transform is wanted.
    """
    if not isinstance(out, torch.Tensor):
        raise ArgumentTypeError(f"{OP}: out expects a tensor, got {out!r} ({type(out).__name__})")
    record, slopes, residual = None, None, epilogue["residual"]
    if any(each is not None for each in epilogue.values()):
        record, slopes = parsed(**epilogue)
    operands = {"input": input, "weight": weight, "bias": bias, "residual": residual, "prelu: slopes": slopes}
    _refuse_gradients(out, operands)
    if fallback.transformed():
        raise ArgumentError(
            f"{OP}: out= is not served under a torch.func transform or forward-mode differentiation (out has shape "
            f"{tuple(out.shape)}); leave out= away there"
        )
    plain = not torch.compiler.is_compiling() and fallback.plain(input, weight, bias) and fallback.plain(out, out)
    if not plain or not (residual is slopes or plain_beside(residual, slopes)):
        y = call(input, weight, bias, *arguments, **epilogue)
        if fallback.tracing() is None:  # which records each size that is looked at
            _check(out, y.shape, y, operands, memory=False)
        return out.copy_(y)
    if any_autocast():
        input, weight, bias, residual, slopes = autocast.cast_arguments_once(input, weight, bias, residual, slopes)
    batched = input.dim() == 5
    x = input if batched else input.unsqueeze(0)
    try:
        plan = plan_for(x, weight, bias, arguments)
    except EmptyOutputError:
        plan = None
    lazy = out.is_neg() or out._is_zerotensor()  # its memory does not hold its values
    if plan is None or lazy:
        answer = call(input, weight, bias, *arguments, **epilogue)
        _check(out, answer.shape, answer, operands)
        return out.copy_(answer)
    shape = plan.problem.y_shape if batched else plan.problem.y_shape[1:]
    _check(out, shape, x, operands)
    check_operands(shape, x, residual, slopes)
    if out.numel():
        y, residual = (each if batched or each is None else each.unsqueeze(0) for each in (out, residual))
        if record is None:
            plan.forward(x, weight, bias, y)
        else:
            plan.forward_with(record)(x, weight, bias, residual, slopes, y)
        if not out.is_inference():  # a kernel's writes are not seen by torch, which counts them for autograd
            torch.autograd.graph.increment_version(out)
    return out


def _refuse_gradients(out: torch.Tensor, operands: dict[str, Any]) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in (*operands.items(), ("out", out)):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise ArgumentError(
                f"{OP}(): functions with out=... arguments don't support automatic differentiation, but one of the "
                f"arguments requires grad: {name} of shape {tuple(tensor.shape)} (out has shape {tuple(out.shape)}). "
                "Call it under torch.no_grad(), or use tritonconv.up_concat"
            )


def _check(out: torch.Tensor, shape: Any, like: torch.Tensor, operands: dict[str, Any], memory: bool = True) -> None:
    """``out`` can take an answer of this shape, of the dtype and on the device of ``like``."""
    expected = tuple(shape)

    def shapes() -> str:
        given = (f"{name} {tuple(tensor.shape)}" for name, tensor in operands.items() if tensor is not None)
        return ", ".join((f"out {tuple(out.shape)}", *given))

    if tuple(out.shape) != expected:
        raise ArgumentError(f"{OP}: out expects shape {expected}, got {tuple(out.shape)}; {shapes()}")
    if out.dtype != like.dtype:
        given = operands["input"].dtype
        why = "" if given == like.dtype else f", in which autocast computes ({given} given)"
        raise ArgumentTypeError(
            f"{OP}: out is {out.dtype} but the result is {like.dtype}{why}; they must be the same; {shapes()}"
        )
    if out.device != like.device:
        raise ArgumentError(f"{OP}: out is on {out.device} but the result is on {like.device}; {shapes()}")
    if not memory or out.is_meta or out.layout is not torch.strided:
        return
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ArgumentError(
            f"{OP}: out is an inference tensor, which torch writes inside torch.inference_mode() alone; {shapes()}"
        )
    if overlaps_itself(out):
        raise ArgumentError(f"{OP}: out has elements that share memory, its strides are {out.stride()}; {shapes()}")
    for name, tensor in operands.items():
        if tensor is not None and share_memory(out, tensor):
            raise ArgumentError(f"{OP}: out {tuple(out.shape)} shares memory with {name} {tuple(tensor.shape)}")


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Two elements of the tensor lie in the same place."""
    reach = 0  # of the axes so far
    nested = True
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            nested = nested and stride > reach
            reach += stride * (size - 1)
    if nested:
        return False
    if tensor.numel() > reach + 1 or 0 in [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]:
        return True
    places = torch.zeros(reach + 1, dtype=torch.uint8)  # axes that interleave: rare, so it may take its time
    places.as_strided(tuple(tensor.shape), tensor.stride()).fill_(1)
    return int(places.sum()) < tensor.numel()


def share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the tensors may have memory in common; exact for slices of one buffer along one axis.

    False where they have different storages, or the places from their first element to their last are apart, or those
    are apart within each period of a stride that both have: of a batch, a row or a voxel of the buffer.
    """
    if not one.numel() or not other.numel() or one.layout is not torch.strided or other.layout is not torch.strided:
        return False
    if one.is_meta or other.is_meta or one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    pair = _bytes(one), _bytes(other)
    periods = [None, *{stride for _, axes in pair for stride, _ in axes if stride}]
    return not any(_apart(*pair, period) for period in periods)


def _bytes(tensor: torch.Tensor) -> tuple[int, list[tuple[int, int]]]:
    """(offset of the first byte, (stride in bytes, size) of each axis and of the bytes of an element)."""
    unit = tensor.element_size()
    axes = [(stride * unit, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return int(tensor.storage_offset()) * unit, [*axes, (1, unit)]


def _apart(one: tuple[int, list], other: tuple[int, list], period: int | None) -> bool:
    """The two lie apart within each ``period`` bytes; as a whole for None."""
    spans = []
    for first, axes in (one, other):
        last = sum(stride * (size - 1) for stride, size in axes if period is None or stride % period)
        start = first if period is None else first % period
        if period is not None and start + last >= period:
            return False
        spans.append((start, start + last))
    (low, high), (first, last) = spans
    return high < first or last < low
