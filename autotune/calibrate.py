"""The cost model's errors by kind of kernel, from what was measured: they correct the predictions that come after.

The model counts, and knows nothing of a kernel's instructions, bank conflicts or what its compiler made of a pipeline.
These are much the same at every size, so the median of measured over predicted time is a factor for each kind: a
variant, apart for its configs without a pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from tritonconv.autotune import model, store
from tritonconv.autotune.ceilings import Ceilings, from_json
from tritonconv.autotune.journal import OK, SCREEN, Timing
from tritonconv.autotune.key import device_name
from tritonconv.autotune.sources import revision
from tritonconv.errors import ArgumentError
from tritonconv.kernels.registry import BACKENDS, Config, Variant, variant
from tritonconv.problem import Problem

LEAST = 5  # timings of a kind: of fewer the factor of all kernels of its backend stands in


class Sample(NamedTuple):
    """A variant with a config on a problem, and the milliseconds that were measured."""

    record: Variant
    problem: Problem
    config: Config
    ms: float


def samples(timings: Iterable[Timing], problems: Iterable[Problem], versions: Mapping) -> list[Sample]:
    """The screenings that are of these problems and versions, and of the variants as they are now."""
    by_text, found = {str(problem): problem for problem in problems}, []
    for timing in timings:
        problem = by_text.get(timing.problem)
        if problem is None or timing.status != OK or timing.median_ms is None:
            continue
        if timing.stage != SCREEN or dict(timing.versions) != dict(versions):
            continue
        try:
            record = variant(timing.variant)
        except ArgumentError:
            continue
        if revision(record) == timing.source:
            found.append(Sample(record, problem, timing.config, timing.median_ms))
    return found


def factors(found: Iterable[Sample], ceilings: Ceilings) -> dict[str, float]:
    """Measured over predicted time by :func:`~tritonconv.autotune.model.kind`, for :attr:`Ceilings.factors`.

    And of all kinds of a backend, by its name, for those that were hardly timed.
    """
    by_kind, by_backend = ratios(found, ceilings), {backend: [] for backend in BACKENDS}  # type: dict, dict
    for kind, values in by_kind.items():
        by_backend[variant(kind.split()[0]).backend] += values
    return {kind: median(values) for kind, values in {**by_kind, **by_backend}.items() if len(values) >= LEAST}


def ratios(found: Iterable[Sample], ceilings: Ceilings) -> dict[str, list[float]]:
    """Measured over predicted time of each sample, by kind.

    Of calls that are more than their launches; the launches are taken out of both times.
    """
    by_kind: dict[str, list[float]] = {}
    plain = replace(ceilings, factors={})
    for sample in found:
        guess = model.estimate(sample.record, sample.problem, sample.config, plain)
        launches = guess.work.launches * ceilings.launch_us * 1e-3
        if guess.limit != model.LAUNCH and guess.ms < math.inf and sample.ms > launches:
            kind = model.kind(sample.record, guess.work)
            by_kind.setdefault(kind, []).append((sample.ms - launches) / (guess.ms - launches))
    return by_kind


def keep(found: Ceilings, device: torch.device, folder: Path | None = None) -> None:
    """Puts measured ceilings into the store of the device; factors that are there and are not in ``found`` stay."""

    def kept(there: store.Known) -> store.Known:
        stored = from_json(there or {})
        return replace(found, factors={**(stored.factors if stored else {}), **found.factors}).to_json()

    store.merge(store.Table(device_name(device)), folder, kept)


def keep_factors(found: Mapping[str, float], device: torch.device, folder: Path | None = None) -> None:
    """Puts factors beside the ceilings that are in the store of the device, if there are any."""

    def kept(there: store.Known) -> store.Known:
        stored = from_json(there or {})
        return there if stored is None else replace(stored, factors={**stored.factors, **found}).to_json()

    if found:
        store.merge(store.Table(device_name(device)), folder, kept)
