"""The launches of a tuning run, to compile them without its GPU, and how a run uses those that were compiled ahead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest

import torch

from tritonconv.autotune import ceilings, model, serving, store
from tritonconv.autotune.tuning.candidates import Candidate, Effort, WasCompiled, candidates, joined, stored
from tritonconv.kernels.targets import TARGETS
from tritonconv.lab.bench import gate
from tritonconv.lab.inspection.compiling import GPU, compiling_for
from tritonconv.lab.inspection.launches import read_active
from tritonconv.lab.inspection.precompile import Request, target_of
from tritonconv.precision import float32_precision
from tritonconv.problem import Problem

# The first round of a run takes two configs of a variant. On the GPU measured rates rank them, here the data sheet's,
# so more are compiled, and those that it expects to be somewhat slower.
CONFIGS, NEAR, FAR = 3, 2.0, 4.0


def jobs_of(problems: Iterable[Problem], target: str, configs: int = CONFIGS) -> list[Request]:
    """The launches of a tuning run for the problems on a target: at most so many configs of a variant for each pass.

    The likeliest candidates of all problems come first, and before them the choices of the table that ships for it.
    """
    backend, arch = TARGETS[target].backend, TARGETS[target].arch
    rates = ceilings.of_capability(divmod(int(arch), 10) if backend == "cuda" else ceilings.UNKNOWN)
    effort = Effort(configs, NEAR, FAR, 0.0, formulations=False)
    hopper = TARGETS[target] is model.HOPPER
    shipped = [store.shipped_table(serving.MEASURED)] if hopper else []
    fields: list[list[Request]] = []
    with compiling_for(TARGETS[target]):
        for problem in problems:
            for pass_name in problem.passes:
                field = candidates(problem, GPU, pass_name, rates, effort)
                field = joined(chain(*stored(problem, GPU, (pass_name,), shipped, rates)), field)
                kernels = [each.selection for each in field if each.is_kernel]
                fields.append([(each.variant.name, problem, each.config) for each in kernels])
    return with_reduced(job for jobs in zip_longest(*fields) for job in jobs if job is not None)


def with_reduced(jobs: Iterable[Request]) -> list[Request]:
    """The launches, each also on the reduced problem of the gate, which mostly takes the same kernels."""
    found: dict[tuple, Request] = {}
    for name, problem, config in jobs:
        for each in (problem, gate.reduced(problem, GPU)):
            found.setdefault((name, each, tuple(config.items())), (name, each, config))
    return list(found.values())


def was_compiled(problem: Problem, device: torch.device) -> WasCompiled | None:
    """Whether the launch of a config was compiled ahead; None where no folder of compiled kernels is taken."""
    launches = read_active()
    target = None if launches is None else target_of(device)
    if launches is None or target is None:
        return None
    precision = float32_precision()
    return lambda record, config: launches.has(record.name, problem, config, precision, target)


def compiled_first(field: Sequence[Candidate], was_compiled: WasCompiled | None) -> list[Candidate]:
    """The candidates in their order, but last those that still have to be compiled."""
    if was_compiled is None:
        return list(field)
    return sorted(
        field, key=lambda one: one.is_kernel and not was_compiled(one.selection.variant, one.selection.config)
    )
