"""What runs where nothing was measured: the variant and config that the fit expects to be fastest, or torch's own.

Variants are compared by their default configs, then the configs of the best one, by the cost model's time with the
factors and corrections of what was measured (``fit.py``). torch's own stays unless a kernel is expected to beat it by a
margin. Only variants that were timed take part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from tritonconv.autotune import fit as fits
from tritonconv.autotune import model
from tritonconv.autotune.ceilings import Ceilings
from tritonconv.autotune.fit import Fit, place
from tritonconv.autotune.rules import FALLBACK
from tritonconv.autotune.serving import HOPPER
from tritonconv.kernels.registry import variant, variants
from tritonconv.kernels.variant import NO_CONFIG, Config, Variant
from tritonconv.problem import Problem

MARGIN = 0.92  # of torch's own time that a kernel must be expected to take at most; chosen by the left-out layers


class First(NamedTuple):
    """A variant with a config, and why in words."""

    variant: Variant
    config: Config
    reason: str


def first(
    problem: Problem,
    device: torch.device,
    pass_name: str,
    ceilings: Ceilings,
    refused: Callable[[Variant, Problem, Config], str | None] = lambda record, problem, config: None,
    fitted: Fit | None = None,
) -> First:
    """The choice for one pass; ``ceilings`` are the device's, ``fitted`` None the fit that is shipped.

    ``refused`` says why a config is not to run, None where it may. torch's own where nothing was fitted.
    """
    native = variant(FALLBACK[pass_name])
    fitted = fitted or fits.shipped_fit(HOPPER)
    if fitted is None or pass_name not in fitted.passes:
        return First(native, NO_CONFIG, "nothing was fitted for such a GPU: torch's own")
    ceilings = replace(ceilings, factors={**ceilings.factors, **fitted.ceilings.factors})
    expected = _Expected(problem, pass_name, ceilings, fitted, refused)
    torch_ms = fitted.torch_ms(problem, pass_name, ceilings)
    found = []
    for record in variants(pass_name):
        if takes_part(record, fitted) and record.supports(problem, device) is None:
            found += [(expected.ms(record, config), record, config) for config in record.starts(problem, device)]
    if found:
        _, record, best = min(found, key=lambda each: each[0])
        near = model.around(record, problem, device, best)
        found += [(expected.ms(record, config), record, config) for config in near]
    ms, record, config = min(found, key=lambda each: each[0], default=(math.inf, native, NO_CONFIG))
    said = f"nothing was tuned near this size; the cost model expects torch's own to take {torch_ms * 1e3:.3g} us"
    if record is native:
        return First(native, NO_CONFIG, said)
    said += f" and {record.name} {ms * 1e3:.3g} us"
    return First(record, config, said) if ms < MARGIN * torch_ms else First(native, NO_CONFIG, said)


def takes_part(record: Variant, fitted: Fit, unseen: bool = False) -> bool:
    """It was timed on some layer, or with ``unseen`` may not have been; a formulation in torch's operations on several,
    for what cuDNN makes of it varies more than a kernel does."""
    if record.name == FALLBACK[record.pass_name]:
        return False
    timings = fitted.timings(record.pass_name, record.name)
    return timings >= model.LEAST_TIMINGS if record.backend == "torch" else unseen or timings > 0


class _Expected:
    """Expected times of one problem and pass, in ms; infinite for a config that is refused."""

    def __init__(self, problem, pass_name, ceilings, fitted, refused) -> None:
        self.problem, self.ceilings, self.refused = problem, ceilings, refused
        self.kernels, self.where = fitted.passes[pass_name].kernels, place(problem)
        self._corrections: dict[str, float] = {}

    def ms(self, record: Variant, config: Config) -> float:
        if self.refused(record, self.problem, config) is not None:
            return math.inf
        guess = model.estimate(record, self.problem, config, self.ceilings)
        kind = model.kind(record, config, guess.work)
        if kind not in self._corrections:
            self._corrections[kind] = self.kernels.at(kind, self.where)
        return guess.ms * self._corrections[kind]
