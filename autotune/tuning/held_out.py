"""Fits the timings of a device, and says how well what was fitted chooses for layers that it has not seen.

All rows of a layer are left out, in both formats, and those of its siblings. Siblings have the same channels, kernel,
stride, dilation and groups; crop, bias, batch and size may differ. Everything is then fitted to the other rows, and for
each problem that was left out a choice is made among what was measured there, torch's own included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import geometric_mean, median
from typing import NamedTuple

import numpy as np

from tritonconv.autotune import model
from tritonconv.autotune.ceilings import Ceilings
from tritonconv.autotune.first import MARGIN, takes_part
from tritonconv.autotune.fit import KERNELS, TORCH, TORCHS, WIDE, Fit, PassFit, Smoother, place, torch_terms
from tritonconv.autotune.rules import FALLBACK
from tritonconv.autotune.tuning.calibrate import Count, Sample, count, factors
from tritonconv.problem import PASSES, Problem

RULE = (
    "Left out with a layer are its other format and its siblings: same channels, kernel, stride, dilation and groups, "
    "whatever crop, bias, batch and size. Geometric means over torch's own in the same format."
)
# In the first campaign, on sm_90, these wrote registers that products still read (registers_in_flight).
IN_FLIGHT = ("forward_boxes", "backward_data_boxes", "backward_data_shuffle", "backward_data_shuffle_given")
SAFE = "what was measured, without the kernels that were unsafe when they were"

# Before, numbers of voxels had 64 bits wherever offsets had, and divisions of theirs took most of some kernels' time.
COUNTED_IN_32_BITS = "2026-11-30"

SLOW = 0.9  # of torch's speed: a choice below it has made somebody's model slower
# The first launch of a call, and each further one, may take these parts of the time of a launch.
FIRST, FURTHER = np.linspace(0.6, 1.1, 6), np.linspace(0.1, 0.7, 4)

SHORT = 3.0  # launches: a call that takes less consists of launches in large part


class Timed(NamedTuple):
    """One measured candidate. ``speedup`` over torch's own in the same rounds and format; ``last`` of the final."""

    layer: str
    sample: Sample
    speedup: float
    last: bool
    sound: bool  # its answer was not found wrong
    lasting: bool = True  # its kernel is not much faster by now: corrections follow its time

    @property
    def pass_name(self) -> str:
        return self.sample.record.pass_name

    @property
    def torchs(self) -> bool:
        """It is torch's own."""
        return self.sample.record.name == FALLBACK[self.pass_name]


class Trial(NamedTuple):
    """The measured candidates of one problem in one pass, as the model counts them; ``torch_ms`` is torch's own."""

    layer: str
    problem: Problem
    pass_name: str
    timed: Sequence[tuple[Timed, Count]]
    torch_ms: float


class Score(NamedTuple):
    """A choice for a trial: its speed over torch's own, that of the best measured one, and its name."""

    trial: Trial
    chosen: float
    best: float
    chosen_name: str


def trials_of(timed: Iterable[Timed], ceilings: Ceilings) -> list[Trial]:
    """By problem and pass; if a candidate was timed twice, the final counts."""
    found: dict[tuple, dict[tuple, Timed]] = {}
    for each in sorted(timed, key=lambda one: one.last):
        sample = each.sample
        config = sample.record.name, tuple(sorted(sample.config.items()))
        found.setdefault((each.layer, sample.problem, each.pass_name), {})[config] = each
    trials = []
    for (layer, problem, pass_name), candidates in found.items():
        mine = list(candidates.values())
        together = [each for each in mine if each.last] or mine
        torch_ms = median(each.sample.ms * each.speedup for each in together)
        pairs = [(each, count(each.sample, ceilings)) for each in mine]
        known = [(each, counted) for each, counted in pairs if counted is not None]
        trials.append(Trial(layer, problem, pass_name, known, torch_ms))
    return trials


def fit(trials: Sequence[Trial], ceilings: Ceilings, versions: Mapping[str, str | None]) -> Fit:
    """All that is fitted: the time of launches, the factors, torch's own time, and the corrections of each pass."""
    counts = [one for trial in trials for each, one in trial.timed if not each.torchs]
    ceilings = _with_launches(counts, replace(ceilings, factors={}))
    ceilings = replace(ceilings, factors={**ceilings.factors, **factors(counts, ceilings)})
    passes = ((name, [trial for trial in trials if trial.pass_name == name]) for name in PASSES)
    return Fit(ceilings, {name: _pass_fit(mine, name, ceilings) for name, mine in passes if mine}, versions)


def _pass_fit(trials: Sequence[Trial], pass_name: str, ceilings: Ceilings) -> PassFit:
    terms = np.stack([torch_terms(trial.problem, pass_name, ceilings) for trial in trials])
    torch_ms = np.array([trial.torch_ms for trial in trials])
    rates = _not_negative(terms / torch_ms[:, None], np.ones(len(trials)))
    places = np.stack([place(trial.problem) for trial in trials])
    torchs = Smoother.of([TORCH] * len(trials), places, np.log(torch_ms / (terms @ rates)), TORCHS)
    kinds, rows, logs = [], [], []
    for row, trial in enumerate(trials):
        for each, one in trial.timed:
            if each.lasting and not each.torchs:
                kinds.append(one.kind)
                rows.append(row)
                logs.append(math.log(one.ms / _counted_ms(one, ceilings)))
    return PassFit(rates, torchs, Smoother.of(kinds, places[rows], np.array(logs), KERNELS))


def _counted_ms(each: Count, ceilings: Ceilings) -> float:
    factor = ceilings.factors.get(each.kind, ceilings.factors.get(each.backend, 1.0))
    return model.launches_ms(each.launches, ceilings) + each.busy_ms * factor


def _with_launches(counts: Sequence[Count], ceilings: Ceilings) -> Ceilings:
    """With the two factors of launches under which all times are predicted best."""
    ms = np.array([each.ms for each in counts])
    busy = np.array([each.busy_ms for each in counts])
    further = np.array([each.launches - 1 for each in counts])
    short = ms < SHORT * ceilings.launch_us * 1e-3
    names, kinds = np.unique([each.kind for each in counts], return_inverse=True)

    def error(first: float, more: float) -> float:
        launches = ceilings.launch_us * 1e-3 * (first + more * further)
        ratio = np.log(np.maximum(ms - launches, 0.1 * ms) / busy)
        middle = _medians(ratio, kinds, busy > launches, len(names))
        return float(np.abs(np.log(ms / (launches + busy * np.exp(middle[kinds])))[short]).mean())

    first, more = min(((a, b) for a in FIRST for b in FURTHER), key=lambda pair: error(*pair))
    return replace(ceilings, factors={model.FIRST_LAUNCH: float(first), model.FURTHER_LAUNCH: float(more)})


def _medians(values: np.ndarray, kinds: np.ndarray, counted: np.ndarray, number: int) -> np.ndarray:
    """Of the counted values of each kind, 0 where there is none: (number,)."""
    values, kinds = values[counted], kinds[counted]
    values = values[np.lexsort((values, kinds))]
    begin, count = np.searchsorted(np.sort(kinds), np.arange(number)), np.bincount(kinds, minlength=number)
    middle = values[np.minimum(begin + count // 2, len(values) - 1)]
    return np.where(count > 0, middle, 0.0)


def _not_negative(terms: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with the terms whose rate comes out negative left out, the most negative first."""
    left = np.flatnonzero(np.abs(terms).sum(0) > 0)
    while True:
        found = np.linalg.lstsq(terms[:, left], wanted, rcond=None)[0]
        if (found >= 0).all():
            rates = np.zeros(terms.shape[1])
            rates[left] = found
            return rates
        left = np.delete(left, found.argmin())


def folds(trials: Sequence[Trial]) -> Iterator[tuple[list[Trial], list[Trial]]]:
    """(what is left out, the rest)."""
    out: dict[tuple, list[Trial]] = {}
    for trial in trials:
        out.setdefault(_siblings(trial.problem), []).append(trial)
    for mine in out.values():
        layers = {trial.layer for trial in mine}
        alike = {_siblings(trial.problem) for trial in mine}
        rest = [each for each in trials if each.layer not in layers and _siblings(each.problem) not in alike]
        yield mine, rest


def _siblings(problem: Problem) -> tuple:
    return problem.c_in, problem.c_out, problem.kernel, problem.stride, problem.dilation, problem.groups


def fits(trials: Sequence[Trial], ceilings: Ceilings) -> list[tuple[list[Trial], Fit]]:
    """The trials left out, with the fit to the rest, until each was left out once."""
    return [(mine, fit(rest, ceilings, {})) for mine, rest in folds(trials)]


def scores(
    fitted: Iterable[tuple[Sequence[Trial], Fit]],
    served: Callable[[Sample], bool] = lambda sample: True,
    margin: float = MARGIN,
) -> list[Score]:
    """A choice for each trial that was left out, by the fit to the rest, among its sound candidates that are
    ``served``."""
    return [_score(trial, found, served, margin) for mine, found in fitted for trial in mine]


def _score(trial: Trial, fitted: Fit, served: Callable[[Sample], bool], margin: float) -> Score:
    """A kernel is chosen only if the fit expects it to beat torch's own by the margin."""
    of, where = fitted.passes[trial.pass_name], place(trial.problem)
    chosen, best = (1.0, FALLBACK[trial.pass_name]), 1.0
    least = margin * fitted.torch_ms(trial.problem, trial.pass_name, fitted.ceilings)
    for each, one in trial.timed:
        if each.torchs or not each.sound or not served(each.sample):
            continue
        best = max(best, each.speedup)
        ms = _counted_ms(one, fitted.ceilings) * of.kernels.at(one.kind, where)
        if ms < least and takes_part(each.sample.record, fitted, unseen=True):
            chosen, least = (each.speedup, each.sample.record.name), ms
    return Score(trial, chosen[0], best, chosen[1])


def safe(sample: Sample) -> bool:
    """The variant did not read registers in flight when it was timed, in any config."""
    return sample.record.name not in IN_FLIGHT


def lasting(sample: Sample, utc: str) -> bool:
    """Whether what took so long at that time takes about as long now."""
    problem = sample.problem
    wide = max(math.prod(problem.x_shape), math.prod(problem.y_shape)) > WIDE
    return sample.record.backend != "triton" or not wide or utc >= COUNTED_IN_32_BITS


def table(found: Sequence[Score]) -> list[list[str]]:
    """A line per pass: geometric means over torch's own, and how often a choice is slow."""
    lines = [["pass", "problems", "oracle", "choice", "of the oracle", f"below {SLOW}", "torch's own chosen"]]
    for name in PASSES:
        mine = [each for each in found if each.trial.pass_name == name]
        if mine:
            oracle, choice, slow = figures(mine)
            torchs = sum(each.chosen_name == FALLBACK[name] for each in mine) / len(mine)
            line = [name, str(len(mine)), f"{oracle:.2f}", f"{choice:.2f}", f"{choice / oracle:.1%}"]
            lines.append([*line, f"{slow:.1%}", f"{torchs:.0%}"])
    return lines


def figures(found: Sequence[Score]) -> tuple[float, float, float]:
    """Geometric means of the best and of the choice over torch's own, and the part of choices below SLOW."""
    oracle, choice = (geometric_mean(values) for values in ([s.best for s in found], [s.chosen for s in found]))
    return oracle, choice, sum(each.chosen < SLOW for each in found) / len(found)
