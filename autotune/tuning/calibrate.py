"""The cost model's errors by kind of kernel, from what was measured: they correct the predictions that come after.

The model counts work. It knows nothing of a kernel's instructions, bank conflicts or pipeline, whose effect is much the
same at every size. So the median of measured over predicted time is a factor for each kind of kernel: a variant, its
configs without a pipeline being a kind of their own. An edited kernel keeps its factor until it is measured anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import NamedTuple

import torch

from tritonconv.autotune import model, store
from tritonconv.autotune.ceilings import Ceilings, from_json
from tritonconv.autotune.key import device_name
from tritonconv.autotune.sources import revision
from tritonconv.autotune.tuning.journal import OK, SCREEN, Timing
from tritonconv.errors import ArgumentError
from tritonconv.kernels.registry import variant
from tritonconv.kernels.variant import Config, Variant
from tritonconv.problem import Problem

LEAST_HOSTS = 3  # timings: the host's time for one varies with what else it does


class Sample(NamedTuple):
    """A variant with a config on a problem, and the milliseconds that were measured."""

    record: Variant
    problem: Problem
    config: Config
    ms: float


class Count(NamedTuple):
    """A sample as the model counts it: ``busy_ms`` is the plain prediction without its launches."""

    kind: str
    backend: str
    busy_ms: float
    launches: int
    ms: float


def samples(timings: Iterable[Timing], problems: Iterable[Problem], versions: Mapping) -> list[Sample]:
    """The screenings of these problems with these versions. A variant that was not timed in its present revision has
    those of its earlier ones."""
    by_text = {str(problem): problem for problem in problems}
    found: dict[Variant, dict[bool, list[Sample]]] = {}
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
        current = timing.source == revision(record)
        sample = Sample(record, problem, timing.config, timing.median_ms)
        found.setdefault(record, {}).setdefault(current, []).append(sample)
    return [sample for by in found.values() for sample in by.get(True, by.get(False, []))]


def count(sample: Sample, ceilings: Ceilings) -> Count | None:
    """None where the model gives no time, or the config belongs to another revision of the variant."""
    plain = replace(ceilings, factors={})
    try:
        guess = model.estimate(sample.record, sample.problem, sample.config, plain)
    except KeyError:
        return None
    if not guess.ms < math.inf:
        return None
    busy = guess.ms - model.launches_ms(guess.work.launches, plain)
    kind = model.kind(sample.record, sample.config, guess.work)
    return Count(kind, sample.record.backend, busy, guess.work.launches, sample.ms)


def counts(found: Iterable[Sample], ceilings: Ceilings) -> list[Count]:
    """Of the samples that the model can count."""
    return [each for each in (count(sample, ceilings) for sample in found) if each is not None]


def factors(found: Iterable[Count], ceilings: Ceilings) -> dict[str, float]:
    """Measured over predicted time by :func:`~tritonconv.autotune.model.kind`, for :attr:`Ceilings.factors`.

    A backend's name has the factor of all its kinds, for a kind with few timings.
    """
    found = list(found)
    by = {**ratios(found, ceilings), **ratios(found, ceilings, "backend")}
    return {name: median(values) for name, values in by.items() if len(values) >= model.LEAST_TIMINGS}


def ratios(found: Iterable[Count], ceilings: Ceilings, by: str = "kind") -> dict[str, list[float]]:
    """Measured over predicted time of each count, by kind or ``"backend"``.

    The launches, timed by the ceilings' factors of launches, are taken out of both times; a call that is hardly more
    than its launches is left out.
    """
    groups: dict[str, list[float]] = {}
    for each in found:
        launches = model.launches_ms(each.launches, ceilings)
        if each.busy_ms > launches and each.ms > launches:
            groups.setdefault(getattr(each, by), []).append((each.ms - launches) / each.busy_ms)
    return groups


def host_times(timings: Iterable[Timing], versions: Mapping) -> dict[str, float]:
    """The host's median time for a call, in ms, with these versions, for :attr:`Ceilings.host_ms`."""
    found: dict[str, list[float]] = {}
    for timing in timings:
        if timing.status != OK or timing.host_ms is None or dict(timing.versions) != dict(versions):
            continue
        try:
            record = variant(timing.variant)
        except ArgumentError:
            continue
        if timing.pass_name == record.pass_name:  # not of a training step
            for name in model.hosts_of(record):
                found.setdefault(name, []).append(timing.host_ms)
    return {name: median(values) for name, values in found.items() if len(values) >= LEAST_HOSTS}


def keep(found: Ceilings, device: torch.device, folder: Path | None = None) -> None:
    """Puts measured ceilings into the store of the device; factors and times of the host that are there and are not in
    ``found`` stay."""

    def kept(there: store.Known) -> store.Known:
        stored = from_json(there or {}) or found
        factors, host_ms = {**stored.factors, **found.factors}, {**stored.host_ms, **found.host_ms}
        return replace(found, factors=factors, host_ms=host_ms).to_json()

    store.merge(store.Table(device_name(device)), folder, kept)


def keep_factors(
    found: Mapping[str, float],
    device: torch.device,
    folder: Path | None = None,
    hosts: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Puts factors and times of the host beside the ceilings that are in the store of the device, if there are any."""

    def kept(there: store.Known) -> store.Known:
        stored = from_json(there or {})
        if stored is None:
            return there
        factors, host_ms = {**stored.factors, **found}, {**stored.host_ms, **hosts}
        return replace(stored, factors=factors, host_ms=host_ms).to_json()

    if found or hosts:
        store.merge(store.Table(device_name(device)), folder, kept)
