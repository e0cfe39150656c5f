"""The three passes of a rank, each with its exchange, as one form that is closed under differentiation.

They are those of :mod:`tritonconv.autograd`: T with x of all slabs, D whose gradients of halos go back to their owners,
W summed over the group. Each exchange is made by every rank in the same order, whatever its slab and the variants it
runs: a rank without planes of y computes with one plane of zeros, and keeps nothing of the answer.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from tritonconv import autograd, fallback
from tritonconv.arguments import OP, Geometry
from tritonconv.dispatch import plan as plan_of
from tritonconv.dispatch import plan_for
from tritonconv.distributed import slabs
from tritonconv.distributed.halo import Halo, total
from tritonconv.distributed.slabs import Share
from tritonconv.errors import ArgumentError
from tritonconv.plan import Plan
from tritonconv.problem import Axis, Problem, Triple

# Products of the inner planes from which three calls beside the exchange are faster than one after it. Two ranks with
# one thread each, gloo, 2 cores of a Xeon, float32, torch 2.13, forward, ms after -> beside: k4 s2 16->16 16x32x32 (268
# million) 34.1 -> 27.9; k3 s1 16->16 16x64x64 (453 million) 28.2 -> 23.8, 16x32x32 (113) 6.6 -> 6.7, 8x16x16 (14)
# 1.5 -> 2.1; k3 s2 32->16 8x32x32 (113) 8.7 -> 9.5.
LEAST_PRODUCTS = 1 << 27


class ShardedPasses:
    """The passes of one call on one rank. The methods record nothing.

    ``one_loss``: a loss of the gradients of weight and bias is one for all ranks, not the sum of theirs.
    """

    plan: Plan

    def __init__(
        self, halo: Halo, geo: Geometry, line: Axis, overlap: bool | None = None, one_loss: bool = False
    ) -> None:
        self.halo, self.geo, self.line, self.overlap, self.one_loss = halo, geo, line, overlap, one_loss
        self.empty = halo.share.y[0] == halo.share.y[1]

    def forward(self, x, weight, bias, pieces=None):
        """T -> (this rank's slab of y, the pieces of x that were received)."""
        if pieces is None and self._overlaps(x, weight):
            return self._beside(x, weight, bias)
        pieces = self.halo.receive(x) if pieces is None else pieces
        read = self.halo.join(x, pieces)
        if not hasattr(self, "plan"):  # a later pass has the first's, as autograd's do
            self.plan = self._plan(read, weight, bias, self.halo.share)
        y = self.plan.forward(read, weight, bias)
        return (self._kept(y) if self.empty else y), pieces

    def _plan(self, read, weight, bias, share: Share) -> Plan:
        """The plan of a share's planes of y from the planes that it reads."""
        at, geo = self.halo.axis - 2, self.geo
        front, back, more = list(geo.crop), list(geo.back), list(geo.output_padding)
        front[at], back[at], more[at] = share.front, max(0, share.back), max(0, -share.back)
        padding = tuple(zip(front, back, strict=True))
        found = plan_for(read, weight, bias, (geo.stride, padding, tuple(more), geo.groups, geo.dilation))
        assert found is not None  # the call looked at the dtype and the device
        return found

    def _overlaps(self, x, weight) -> bool:
        """The planes of y that need no other rank are computed while the halo is on its way."""
        if self.empty or not self.halo.read or self.overlap is False:
            return False
        first, last = slabs.inner(self.line, self.halo.share)
        if self.overlap is None:
            products = x.numel() * weight[0].numel() * (last - first) // (self.halo.share.y[1] - self.halo.share.y[0])
            return x.device.type == "cpu" and products >= LEAST_PRODUCTS
        return first < last

    def _beside(self, x, weight, bias):
        """As :meth:`forward`, in parts: the inner planes of y, then those before and behind."""
        halo, axis = self.halo, self.halo.axis
        pieces_of, (begin, end) = halo.start(x), halo.share.y
        first, last = slabs.inner(self.line, halo.share)
        y, pieces = None, [x.new_empty(0)] * len(halo.read)  # the inner planes read none
        for span in ((first, last), (begin, first), (last, end)):
            if span[0] == span[1]:
                continue
            share = slabs.share_of(self.line, halo.share.x, span)
            read = halo.join(x, pieces, share)
            plan = self._plan(read, weight, bias, share)
            if y is None:
                whole = self._whole(plan.problem)
                self.plan = plan_of(whole, x.device)
                y = torch.empty(whole.y_shape, dtype=x.dtype, device=x.device, memory_format=whole.memory_format)
            plan.forward(read, weight, bias, y.narrow(axis, span[0] - begin, span[1] - span[0]))
            if span == (first, last):
                pieces = pieces_of()
        return y, pieces

    def _whole(self, part: Problem) -> Problem:
        """The problem of all planes of this rank's y, from the one of some."""
        share, at = self.halo.share, self.halo.axis - 2

        def with_number(triple: Triple, number: int) -> Triple:
            return (*triple[:at], number, *triple[at + 1 :])  # type: ignore[return-value]

        size = share.reads[1] - share.reads[0] + share.zeros
        return replace(
            part,
            size=with_number(part.size, size),
            crop=with_number(part.crop, share.front),
            out_size=with_number(part.out_size, share.y[1] - share.y[0]),
        )

    def gradients(self, grad_y, x, weight, wanted, pieces=None):
        """(grad_x, grad_weight, grad_bias), the latter two of all ranks; None where ``wanted`` does not mark one."""
        read = None
        if wanted[1]:
            read = self.halo.join(x, self.halo.receive(x) if pieces is None else pieces)
        if self.empty:
            grad_y = grad_y.new_zeros(self.plan.problem.y_shape)
        grad, *others = autograd.gradients(grad_y, read, weight, wanted, self.plan)
        grad_x = self.halo.give_back(grad) if wanted[0] else None
        return grad_x, *totals(self.halo.group, *others)

    def _kept(self, y):
        """The planes of y that a rank without planes keeps: none."""
        shape = list(y.shape)
        shape[self.halo.axis] = 0
        return y.new_empty(shape)


def forward(x, weight, bias, passes: ShardedPasses):
    """T of this rank's slab, recorded where a gradient is needed."""
    if autograd.needs_gradient(x, weight, bias):
        return _Sharded.apply(x, weight, bias, passes)
    return passes.forward(x, weight, bias)[0]


def backward(grad_y, x, weight, wanted, passes: ShardedPasses, pieces=None):
    """As :meth:`ShardedPasses.gradients`, recorded where a gradient is needed; ``x`` and ``weight`` may be None where
    those of the weight and of x are not wanted.
    """
    operands = grad_y, grad_y if x is None else x, weight
    if not fallback.plain(*operands):
        raise ArgumentError(f"{OP}: gradients of slabs are not served where {fallback.reason(*operands)}")
    if autograd.needs_gradient(*operands[:2], weight):
        return _ShardedBackward.apply(grad_y, x, weight, wanted, passes, pieces)
    return passes.gradients(grad_y, x, weight, wanted, pieces)


def totals(group, *tensors):
    """The sums over the group of the tensors that are not None."""
    present = [tensor for tensor in tensors if tensor is not None]
    sums = iter(_Total.apply(group, *present) if present else ())
    return tuple(None if tensor is None else next(sums) for tensor in tensors)


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, passes):
        need_x, need_weight, _, _ = ctx.needs_input_grad
        ctx.passes = passes
        y, pieces = passes.forward(x, weight, bias)
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None, *(pieces if need_weight else ()))
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, *pieces = ctx.saved_tensors
        return *backward(grad_y, x, weight, ctx.needs_input_grad[:3], ctx.passes, pieces), None


class _ShardedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad_y, x, weight, wanted, passes, pieces):
        ctx.passes = passes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_y, x, weight)
        return passes.gradients(grad_y, x, weight, wanted, pieces)

    @staticmethod
    def backward(ctx, grad_x, *others):
        if not ctx.passes.one_loss:
            others = totals(ctx.passes.halo.group, *others)
        grads = grad_x, *others
        passes = partial(forward, passes=ctx.passes), partial(backward, passes=ctx.passes)
        found = autograd.backward_of_backward(*passes, ctx.saved_tensors, ctx.needs_input_grad[:3], grads)
        return *found, None, None, None


class _Total(torch.autograd.Function):
    """The sum over a group, whose derivative is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        return tuple(total(group, tensors))

    @staticmethod
    def backward(ctx, *grads):
        return None, *_Total.apply(ctx.group, *grads)
