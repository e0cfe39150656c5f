"""The forward of a plan with its epilogue: in the kernel that stores y, or by torch's operations in y's own memory.

Functions of x, weight, bias, residual, slopes, and a tensor for y or None. ``plan`` is a
:class:`tritonconv.plan.Plan`, which keeps them (:meth:`~tritonconv.plan.Plan.forward_with`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tritonconv.autotune import rules
from tritonconv.epilogue import Epilogue, finish


def forward_with(plan: Any, epilogue: Epilogue, pack: bool) -> Callable[..., Any]:
    """-> y, and with ``pack`` the weight's packed copy for the backward, or None."""
    packing = pack and plan.kept_order is not None
    forward = plan.forward_and_pack if packing else lambda *operands: (plan.forward(*operands), None)
    apart = partial(_apart, forward, plan, epilogue, pack)
    if not plan.takes(epilogue):
        return apart
    if plan.choice("forward").variant.launches is not None:
        return _in_a_kernel(plan, epilogue, pack, packing, apart)

    def by_a_formulation(x, weight, bias, residual, slopes, out=None):
        y = plan.forward(x, weight, bias, out, epilogue=epilogue, residual=residual, slopes=slopes)
        return (y, None) if pack else y

    return by_a_formulation


def _apart(forward, plan, epilogue, pack, x, weight, bias, residual, slopes, out=None):
    """By ``forward`` -> (y, packed weight), and torch's operations."""
    # The bias of torch's own operation is torch's to add. A kernel of ours would add it before it rounds.
    bias_apart = epilogue.rounding is not None and plan.choice("forward").variant.name != rules.FALLBACK["forward"]
    y, packed = forward(x, weight, None if bias_apart else bias, out)
    y = finish(y, epilogue, bias if bias_apart else None, residual, slopes)
    if out is not None and y is not out:
        y = out.copy_(y)
    return (y, packed) if pack else y


def _in_a_kernel(plan, epilogue, pack, packing, apart):
    choice, problem = plan.choice("forward"), plan.problem

    def launches(x, weight, bias, residual, slopes, out=None):
        more = {"epilogue": epilogue, "residual": residual, "slopes": slopes}
        return choice.variant.launches(problem, choice.config, x, weight, bias, out, **more)

    def and_nothing(*operands):
        return launches(*operands), None

    standby = plan.stand_in("forward_and_pack")
    inside = plan.replay(
        plan.packing(launches) if packing else and_nothing if pack else launches,
        f"forward with {epilogue}" + " and pack" * pack,
        standby and partial(_apart, standby, plan, epilogue, pack),
    )

    def forward(x, weight, bias, residual, slopes, out=None):
        # The kernel reads the residual at the addresses of y: beside a slice its copy were as large as the buffer.
        dense = out is None or residual is None or out.is_contiguous(memory_format=problem.memory_format)
        function = inside if dense or out.stride() == residual.stride() else apart
        return function(x, weight, bias, residual, slopes, out)

    return forward
