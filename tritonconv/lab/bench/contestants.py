"""The contestants of a cell: torch's own, torch.compile, the public operation, single variants; prepared and judged."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from tritonconv.autotune.sources import revision
from tritonconv.dispatch import Selection, choice_now, plan, wait_until_compiled
from tritonconv.forced import in_force, pinned, use
from tritonconv.kernels.variant import Variant
from tritonconv.lab.bench import cudnn_graph, gate, spent
from tritonconv.lab.bench.calls import FORWARD_BACKWARD, TensorCall, Tensors, operation_call
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.first_calls import let_choose
from tritonconv.lab.bench.operations import our_operation, torchs_operation
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS
from tritonconv.lab.bench.stages import CONCAT
from tritonconv.problem import PASSES, Problem


@dataclass(frozen=True)
class Contestant:
    """A contestant of a cell: the choices that it runs by pass (none for torch), its call at size, the gate's verdict,
    and the seconds of its first call, compilation included.

    ``in_graph`` is the same in a CUDA graph, where other choices hold there: the public operation's.
    """

    name: str
    chosen: Mapping[str, Selection]
    call: TensorCall
    verdict: gate.Verdict
    first_s: float
    in_graph: Contestant | None = None

    @property
    def fields(self) -> dict[str, object]:
        """Its choices as fields of a row."""
        return chosen_fields(self.chosen, {} if self.in_graph is None else self.in_graph.chosen)


def why_not(record: Variant, problem: Problem, device: torch.device) -> str | None:
    """Why a variant is not measured on a device; None where it is."""
    if record.backend == "triton" and device.type == "cpu":
        return "on a CPU Triton's interpreter runs this kernel, which says nothing about its speed"
    return record.supports(problem, device)


def launched(record: Variant | None, problem: Problem, device: torch.device, pass_name: str) -> dict[str, Selection]:
    """The choices that a variant by itself, or the public operation, runs now, by pass."""
    if record is not None:
        return {pass_name: Selection(record, record.default(problem, device), "by itself")}
    choice = plan(problem, device).choice
    return {name: choice(name) for name in (PASSES if pass_name == FORWARD_BACKWARD else (pass_name,))}


def launched_in_graph(problem: Problem, device: torch.device, pass_name: str) -> dict[str, Selection]:
    """As :func:`launched`, of the public operation in a CUDA graph; nothing where that launches the same."""
    if device.type != "cuda":
        return {}
    eager = launched(None, problem, device, pass_name)
    chosen = {name: choice_now(problem, device, name, in_graph=True) for name in eager}
    alike = all(
        (each.variant, each.config) == (eager[name].variant, eager[name].config) for name, each in chosen.items()
    )
    return {} if alike else chosen


def served(record: Variant | None, problem: Problem, device: torch.device, pass_name: str) -> dict[str, object]:
    """The same as fields of a row (:func:`chosen_fields`); for a variant by itself only its source."""
    if record is not None:
        return {"sources": {pass_name: revision(record)}}
    here = problem, device, pass_name
    return chosen_fields(launched(None, *here), launched_in_graph(*here))


def chosen_fields(chosen: Mapping[str, Selection], in_graph: Mapping[str, Selection]) -> dict[str, object]:
    """A contestant's choices as fields of a row; while they are the same, a later run would measure the same again.

    Those of the graph column have fields of their own where they are others.
    """
    fields: dict[str, object] = {}
    for prefix, selections in (("", chosen), *((("graph_", in_graph),) if in_graph else ())):
        fields[f"{prefix}chosen"] = {name: each.variant.name for name, each in selections.items()}
        fields[f"{prefix}config"] = {name: dict(each.config) for name, each in selections.items()}
        fields[f"{prefix}sources"] = {name: revision(each.variant) for name, each in selections.items()}
    return fields


def contestant(name: str, record: Variant | None, case: Case, pass_name: str, at_size: bool) -> Contestant:
    """Prepares and judges a contestant; ``record`` is the variant to force, None for torch and the public operation.

    ``at_size`` is false where torch cannot run the cell: then the answer is not held against torch's at full size.
    """
    own = _judged(name, case, pass_name, at_size, *prepared(name, record, case, pass_name))
    in_graph = launched_in_graph(case.problem, case.device, pass_name) if name == OURS else {}
    if not in_graph or not own.verdict.ok:
        return own
    with pinned(*in_graph.values()):
        call = in_force(_call(case, pass_name, public=True))
    other = _judged(name, case, pass_name, at_size, call, in_graph)
    return replace(own, in_graph=other, verdict=own.verdict if other.verdict.ok else other.verdict)


def _judged(
    name: str, case: Case, pass_name: str, at_size: bool, call: TensorCall, chosen: Mapping[str, Selection]
) -> Contestant:
    begin = perf_counter()
    with spent.on({BASELINE: spent.TRIALS, COMPILED: spent.TORCH_COMPILE}.get(name, spent.COMPILING)):
        call()
        if case.device.type == "cuda":
            wait_until_compiled()  # torch's own stood in
            call()
            torch.cuda.synchronize(case.device)
    first_s = perf_counter() - begin

    def on(other: Case) -> TensorCall:
        if other is case:
            return call
        if not chosen:  # torch's, also for torch.compile and cuDNN's graph, which would be compiled anew
            return other.torch(pass_name)
        with pinned(*chosen.values()):
            return in_force(_call(other, pass_name, public=name == OURS))

    with spent.on(spent.GATE):
        variants = [each.variant for each in chosen.values()]
        at_size = at_size and (name != BASELINE or not case.torch_serves)  # torch's is not held against itself
        verdict = case.judge(pass_name)(on, variants, at_size)
    return Contestant(name, chosen, call, verdict, first_s)


def prepared(name: str, record: Variant | None, case: Case, pass_name: str) -> tuple[TensorCall, dict[str, Selection]]:
    """The call of a contestant, and what it runs by pass; nothing for torch's own and torch.compile's."""
    if name == BASELINE:
        return case.torch(pass_name), {}
    if name == cudnn_graph.NAME:
        return cudnn_graph.call(case.problem, case.tensors, case.device), {}
    if name == COMPILED:
        return operation_call(_compiled, case.problem, case.tensors, pass_name), {}
    with use(record.name) if record else contextlib.nullcontext():
        call = _call(case, pass_name, public=record is None)
    if record is None:
        let_choose(call)
    return call, launched(record, case.problem, case.device, pass_name)


def _compiled(problem: Problem, tensors: Tensors):
    """torch.compile of torch's own operations, compiled anew: one graph per problem, as a model's would be."""
    torch.compiler.reset()
    operation = torchs_operation(problem, tensors)
    # A lambda, for torch.compile leaves a function of torch's C++ as it is.
    return torch.compile(lambda *args: operation(*args), fullgraph=True, dynamic=False)


def _call(case: Case, pass_name: str, public: bool) -> TensorCall:
    """The public operation where it has the pass; one gradient alone, or a variant alone, through its plan."""
    public = public or case.problem.epilogue == CONCAT  # no plan writes it
    if pass_name == FORWARD_BACKWARD or (public and pass_name == "forward"):
        return operation_call(our_operation, case.problem, case.tensors, pass_name)
    return case.call(plan(case.problem, case.device), pass_name)
