"""The choice where nothing was measured: the variant and config that the fit expects to be fastest, or torch's own.

Variants are compared by their default configs, then the configs of the best one, by the cost model's time with the
factors and corrections from measurements (``fit.py``). torch's own stays unless a kernel is expected to beat it by a
margin. Only variants that were timed take part, in the forms that were, and no config of a kind that was not: with an
option of its variant (APART, FOLD, SPLITS of a forward), with rows along w where the default has none, or with steps of
a quarter of the default's depth.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from tritonconv.autotune import model
from tritonconv.autotune.ceilings import Ceilings
from tritonconv.autotune.fit import Fit, place, shipped_fit
from tritonconv.autotune.rules import FALLBACK
from tritonconv.autotune.serving import HOPPER
from tritonconv.kernels.registry import variant, variants
from tritonconv.kernels.variant import NO_CONFIG, Config, Variant
from tritonconv.problem import Problem

MARGIN = 0.92  # of torch's own time that a kernel must be expected to take at most; chosen by the left-out layers


def first(problem: Problem, device: torch.device, pass_name: str, ceilings: Ceilings) -> tuple[Variant, Config, str]:
    """The variant, its config and the reason for one pass; ``ceilings`` are the device's.

    With times of the host among them it is the choice for an eager call (:func:`model.eager_ms`), else for a graph.
    """
    native, fitted = variant(FALLBACK[pass_name]), shipped_fit(HOPPER)
    if fitted is None or pass_name not in fitted.passes:
        return native, NO_CONFIG, "there is no fit for this GPU: torch's own"
    ceilings = replace(ceilings, factors={**ceilings.factors, **fitted.ceilings.factors})
    where = place(problem)
    correction = cache(lambda kind: fitted.passes[pass_name].kernels.at(kind, where))

    def spent(record: Variant, ms: float) -> float:
        return model.eager_ms(ms, model.host_ms(record, ceilings))

    def expected_ms(record: Variant, config: Config) -> float:
        guess = model.estimate(record, problem, config, ceilings)
        return guess.ms * correction(model.kind(record, config, guess.work))

    forms = {kind.removesuffix(model.UNPIPELINED) for kind in fitted.passes[pass_name].kernels.kinds}
    candidates = [
        (spent(record, expected_ms(record, config)), record, config)
        for record in variants(pass_name)
        if takes_part(record, fitted) and record.supports(problem, device) is None
        for config in record.starts(problem, device)
        if model.form(record, config) in forms
    ]
    if candidates:
        _, record, best = min(candidates, key=lambda candidate: candidate[0])
        near = model.around(record, problem, device, best)
        timed = (each for each in near if _was_timed(record, each, best))
        candidates += [(spent(record, expected_ms(record, each)), record, each) for each in timed]
    torch_ms = fitted.torch_ms(problem, pass_name, ceilings)
    reason = f"nothing was tuned near this size; the cost model expects torch's own to take {torch_ms * 1e3:.3g} us"
    if not candidates:
        return native, NO_CONFIG, reason
    least, record, config = min(candidates, key=lambda candidate: candidate[0])
    reason += f" and {record.name} {expected_ms(record, config) * 1e3:.3g} us"
    hosts = [model.host_ms(each, ceilings) * 1e3 for each in (native, record)]
    if all(hosts):
        reason += f", and the host {hosts[0]:.3g} and {hosts[1]:.3g} us to enqueue them"
    return (record, config, reason) if least < MARGIN * spent(native, torch_ms) else (native, NO_CONFIG, reason)


def _was_timed(record: Variant, config: Config, default: Config) -> bool:
    """Whether some layer was timed with a config of this kind."""
    shallow = config.get("BLOCK_K", 0) * 4 <= default.get("BLOCK_K", -1)
    in_rows = config.get("BLOCK_W", 0) > 0 and default.get("BLOCK_W", 0) == 0
    return not shallow and not in_rows and not any(config.get(key) for key in record.options)


def takes_part(record: Variant, fitted: Fit, unseen: bool = False) -> bool:
    """Whether a variant was timed on some layer; ``unseen`` admits a kernel that was not.

    A formulation in torch's operations must have been timed on several, for cuDNN's times vary more than a kernel's.
    """
    if record.name == FALLBACK[record.pass_name]:
        return False
    timings = fitted.timings(record.pass_name, record.name)
    return timings >= model.LEAST_TIMINGS if record.backend == "torch" else unseen or timings > 0
