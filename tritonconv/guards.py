"""Guards of a compiled graph of fixed sizes: the choices for its calls when it was traced.

torch.compile guards every value that traced code reads, by reading it again before each run of the graph, and an
attribute of a module is such a value. This module computes an attribute when it is read: ``call_7`` is the choice for
the seventh traced call *now*, under the variants of ``tritonconv.use`` and the tuned choices then. So a graph
is traced anew exactly when the choice for one of its own calls has changed.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count
from typing import Any

import torch

from tritonconv import dispatch, fallback
from tritonconv.arguments import geometry, problem_of
from tritonconv.autocast import lowered_dtype
from tritonconv.bounded import remember
from tritonconv.errors import ArgumentError, ArgumentTypeError, StoreError, VariantNotApplicable
from tritonconv.forced import Forced, forced
from tritonconv.private import deterministic as deterministic_algorithms
from tritonconv.problem import PASSES, Problem
from tritonconv.switches import graphs

# The newest calls. A graph whose call is forgotten is traced anew: its guard finds no attribute.
Call = tuple[Problem, torch.device, bool, bool]  # whether it has gradients, whether a CUDA graph will hold it
_names: dict[Call, str] = {}
_calls: dict[str, Call] = {}
_numbers = count()


def guard_of_call(recorded: bool, arguments: tuple, *facts: tuple) -> tuple | None:
    """The arguments of torch's operation for a traced call, and the attribute here that says whether torch serves it.

    ``facts`` holds (type, shape, stride, dtype, device, requires_grad) of input, weight and a bias where there is one,
    ``recorded`` says whether autograd records. Returns (attribute, layout of the answer, stride, padding,
    output_padding, groups, dilation); None where torch has no such arguments, where the variants do not serve such a
    call, and where the call itself is invalid.
    """
    types, shapes, strides, dtypes, devices, needs = zip(*facts, strict=True)
    device, kind = devices[0], devices[0].type
    if kind not in fallback.DEVICES or not set(types) <= fallback.PLAIN_TYPES or set(devices) != {device}:
        return None
    if fallback.exporting() or fallback.transformed():
        return None
    lowered = [lowered_dtype(dtype, kind) for dtype in dtypes]
    x, weight, *bias = (
        torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        for shape, stride, dtype in zip(shapes, strides, lowered, strict=True)
    )
    try:
        problem = problem_of(x, weight, bias[0] if bias else None, geometry(*arguments), device)
    except (ArgumentError, ArgumentTypeError):
        return None
    if not problem.torch_crop.exact or problem.dtype not in fallback.DTYPES:
        return None
    call = problem, device, recorded and any(needs), _records_graphs()
    name = _names.get(call) or remember(_names, call, f"call_{next(_numbers)}", dispatch.MAX_PLANS)
    remember(_calls, name, call, dispatch.MAX_PLANS)
    return name, problem.layout, *problem.torch_arguments


guard_of_call._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile runs it while it traces


def __getattr__(name: str) -> str:
    """``"torch"`` where all passes that the call needs are torch's own, else a description of the choices."""
    if name not in _calls:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _choice(name, dispatch.generation, forced.get(), deterministic_algorithms(), graphs.get())


def _records_graphs() -> bool:
    """Whether the compiler that traces this call will record CUDA graphs: ``mode="reduce-overhead"``, or inductor's
    switch. False where torch does not say."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._inductor import config

        compiler: Any = InstructionTranslator.current_tx().output.compiler_fn
        return bool(compiler.config.get("triton.cudagraphs", config.triton.cudagraphs))  # of inductor alone
    except (ImportError, AttributeError):
        return False


@lru_cache(dispatch.MAX_PLANS)
def _choice(name: str, generation: int, named: Forced, deterministic: bool, in_block: bool) -> str:
    problem, device, gradients, in_graph = _calls[name]
    try:
        plan = dispatch.plan(problem, device, in_graph)
        if (plan.torch_alone if gradients else plan.torch_forward) is not None:
            return "torch"
        chosen = [plan.choice(name) for name in (PASSES if gradients else PASSES[:1])]
    except (VariantNotApplicable, StoreError, ArgumentError) as refusal:
        return str(refusal)  # the operator raises it where the graph runs
    return ", ".join(f"{each.variant.name} {each.config}" for each in chosen)
