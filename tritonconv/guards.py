"""What a compiled graph of fixed sizes rests on: the choices that the call had when it was traced.

torch.compile guards every value that traced code reads, by reading it again before each run of the graph, and an
attribute of a module is such a value. The attributes of this module are worked out when they are read: ``call_7`` is
what the seventh call that was ever traced would run *now*, with what ``tritonconv.use`` has in force in this context
and what is tuned by then. So a graph is traced anew exactly when the choice for one of its own calls has changed.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from tritonconv import dispatch
from tritonconv.errors import VariantNotApplicable
from tritonconv.forced import Forced, forced
from tritonconv.problem import PASSES, Problem

_deterministic = torch._C._get_deterministic_algorithms

TORCH = "torch"

_names: dict[tuple, str] = {}
_calls: dict[str, tuple[Problem, torch.device, bool]] = {}


def attribute(device: torch.device, gradients: bool, *fields) -> str:
    """The name of this module's attribute for a call with a Problem of these fields, with its gradients or without."""
    call = Problem(*fields), device, gradients
    name = _names.setdefault(call, f"call_{len(_names)}")
    _calls[name] = call
    return name


attribute._dynamo_marked_constant = True  # type: ignore[attr-defined]  # run while torch.compile traces, as it is


def __getattr__(name: str) -> str:
    """``TORCH`` where all passes that the call needs are torch's own, else what is to run, in words."""
    if name not in _calls:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _choice(name, dispatch.generation, forced.get(), _deterministic())


@lru_cache(dispatch.MAX_PLANS)
def _choice(name: str, generation: int, named: Forced, deterministic: bool) -> str:
    problem, device, gradients = _calls[name]
    try:
        plan = dispatch.plan(problem, device)
    except VariantNotApplicable as refusal:
        return str(refusal)  # the operator raises it where the graph runs
    if (plan.torch_alone if gradients else plan.torch_forward) is not None:
        return TORCH
    chosen = [plan.choice(name) for name in (PASSES if gradients else PASSES[:1])]
    return ", ".join(f"{each.variant.name} {each.config}" for each in chosen)
