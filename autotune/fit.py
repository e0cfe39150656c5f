"""Times of unmeasured problems, from measurements of single variants: the fit of one GPU, made by
``tritonconv report --fit`` and shipped as ``fit_sm_90.json``.

It predicts two times, each a counted sum times a correction from measurements on similar layers:

* a variant's: the cost model's (``model.py``) with the factor of its kind (:attr:`Ceilings.factors`);
* torch's own: :func:`torch_terms`, its launches, bytes, FLOPs and, in NCDHW, copies, each with a rate of its own.

The corrections are a Gaussian process on the logarithm of measured over counted time (Rasmussen & Williams, "Gaussian
Processes for Machine Learning", 2006, chapter 2): near a measured layer they follow its time, far from all they tend
to 1. The distance of two layers is that of their :func:`place`. Kinds of one pass share a part of it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tritonconv.autotune.ceilings import Ceilings, from_json
from tritonconv.autotune.model import UNPIPELINED
from tritonconv.problem import Problem

FORMAT = 1
TORCH = "torch's own"  # as a kind
DIGITS = 5
WIDE = 2**30  # elements of a tensor from which offsets take 64 bits (kernels/triton_launch.py)
FEW = 8  # output channels below which a product of the matrix units is mostly padding


class Likeness(NamedTuple):
    """Standard deviations of the logarithms of times: of one kind's own correction and of the one that all kinds share,
    each as a slope along every axis of a place and as a bump around it; of what another pipeline has in common; and
    ``noise``, that of a measurement. Chosen by the left-out layers (``held_out.py``)."""

    slope: float
    bump: float
    shared_slope: float
    shared_bump: float
    noise: float


KERNELS = Likeness(0.15, 0.5, 0.1, 0.3, 0.2)
TORCHS = Likeness(0.15, 0.5, 0.0, 0.0, 0.15)
SIBLING = 0.8  # of a kind's own correction that holds for the same variant with, or without, a pipeline


def place(problem: Problem) -> np.ndarray:
    """A problem's coordinates for the Gaussian process, in units over which times begin to differ: (9,)."""
    taps, strides = math.prod(problem.kernel), math.prod(problem.stride)
    return np.array([
        problem.layout == "ncdhw",
        math.log2(problem.c_in / problem.groups) / 2,
        math.log2(problem.c_out / problem.groups) / 2,
        math.log2(taps) / 1.5,
        math.log2(taps / strides),
        math.log2(problem.n * math.prod(problem.size)) / 4,
        problem.bias,
        2.0 * (problem.groups > 1),
        max(math.prod(problem.x_shape), math.prod(problem.y_shape)) > WIDE,
    ], dtype=float)  # fmt: skip


def torch_terms(problem: Problem, pass_name: str, ceilings: Ceilings) -> np.ndarray:
    """The terms of torch's own time, each in ms at the full rate: (13,)."""
    x, w, y = (
        math.prod(shape) * problem.dtype.itemsize / ceilings.memory * 1e3
        for shape in (problem.x_shape, problem.weight_shape, problem.y_shape)
    )
    rate = ceilings.matrix.get(str(problem.dtype).removeprefix("torch.")) or ceilings.vector
    taps, grouped = math.prod(problem.kernel), problem.groups > 1
    copies, few = problem.layout == "ncdhw", not grouped and problem.c_out < FEW
    launch = ceilings.launch_us * 1e-3
    return np.array([
        launch, launch * copies,
        x, y, w, copies * x, copies * y,
        problem.flops / rate * 1e3,
        (problem.bias and pass_name != "backward_data") * y,  # a pass of its own
        (taps > math.prod(problem.stride) and not grouped) * y,
        grouped * taps * y, few * taps * y, few * x,
    ], dtype=float)  # fmt: skip


@dataclass(frozen=True)
class Smoother:
    """The corrections of some kinds; sample ``i`` has ``kinds[i]``, ``places[i]`` and ``weights[i]``."""

    kinds: tuple[str, ...]
    places: np.ndarray  # (samples, 9)
    weights: np.ndarray  # (samples,)
    likeness: Likeness

    @cached_property
    def names(self) -> Counter[str]:
        """The number of samples by variant."""
        return Counter(kind.partition(" ")[0] for kind in self.kinds)

    @classmethod
    def of(cls, kinds: Sequence[str], places: np.ndarray, logs: np.ndarray, likeness: Likeness) -> Smoother:
        """From the logarithms of measured over counted time."""
        blank = cls(tuple(kinds), places, np.zeros(len(logs)), likeness)
        alike = np.stack([blank.alike(kind) for kind in sorted(set(kinds))])
        rows = {kind: row for row, kind in enumerate(sorted(set(kinds)))}
        own, shared = blank._near(places)
        matrix = own * alike[[rows[kind] for kind in kinds]] + shared
        weights = np.linalg.solve(matrix + likeness.noise**2 * np.eye(len(logs)), logs)
        return cls(blank.kinds, places, weights, likeness)

    def at(self, kind: str, where: np.ndarray) -> float:
        """The correction: the factor on the counted time of a kind at a place."""
        own, shared = self._near(where[None])
        return math.exp(float((own[0] * self.alike(kind) + shared[0]) @ self.weights))

    def alike(self, kind: str) -> np.ndarray:
        """How much of each sample's own correction holds for a kind: (samples,)."""
        name = kind.removesuffix(UNPIPELINED)
        part = {each: SIBLING * (each.removesuffix(UNPIPELINED) == name) for each in set(self.kinds)}
        part[kind] = 1.0
        return np.array([part[each] for each in self.kinds])

    def _near(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The likeness of places with the samples', a kind's own and the shared part: (places, samples) each."""
        along = places @ self.places.T
        apart = (places**2).sum(1)[:, None] + (self.places**2).sum(1)[None] - 2 * along
        bump = np.exp(-apart / 2)
        own = self.likeness.slope**2 * along + self.likeness.bump**2 * bump
        return own, self.likeness.shared_slope**2 * along + self.likeness.shared_bump**2 * bump


@dataclass(frozen=True)
class PassFit:
    """One pass: torch's own time as ``rates`` of its terms (13,) with corrections, and those of the variants."""

    rates: np.ndarray
    torch: Smoother
    kernels: Smoother


@dataclass(frozen=True)
class Fit:
    """The fit of ``ceilings.device``; ``ceilings`` has the factors of all kinds."""

    ceilings: Ceilings
    passes: Mapping[str, PassFit]
    versions: Mapping[str, str | None]

    def torch_ms(self, problem: Problem, pass_name: str, ceilings: Ceilings) -> float:
        """The predicted time of torch's own call, in ms."""
        fit = self.passes[pass_name]
        return float(torch_terms(problem, pass_name, ceilings) @ fit.rates) * fit.torch.at(TORCH, place(problem))

    def timings(self, pass_name: str, name: str) -> int:
        """The number of timings of a variant, in all its forms."""
        return self.passes[pass_name].kernels.names[name]

    def to_json(self) -> dict[str, Any]:
        """Places are written once each: samples name them, and their kinds, by number."""
        smoothers = [one for each in self.passes.values() for one in (each.torch, each.kernels)]
        places = sorted({_rounded(row) for one in smoothers for row in one.places})
        numbers = {row: number for number, row in enumerate(places)}
        return {
            "format": FORMAT,
            "ceilings": self.ceilings.to_json(),
            "versions": dict(self.versions),
            "places": places,
            "passes": {
                name: {"rates": _rounded(each.rates)}
                | {"torch": _samples(each.torch, numbers), "kernels": _samples(each.kernels, numbers)}
                for name, each in self.passes.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fit:
        """The inverse of :meth:`to_json`. Raises ValueError for another format."""
        ceilings = from_json(data["ceilings"])
        if data["format"] != FORMAT or ceilings is None:
            raise ValueError(f"a fit: expected format {FORMAT} with ceilings, got format {data['format']}")
        places = np.array(data["places"])
        passes = {
            name: PassFit(
                np.array(each["rates"]),
                _smoother(each["torch"], places, TORCHS),
                _smoother(each["kernels"], places, KERNELS),
            )
            for name, each in data["passes"].items()
        }
        return cls(ceilings, passes, data["versions"])


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), DIGITS) for value in values)


def _samples(smoother: Smoother, numbers: Mapping[tuple, int]) -> dict[str, list]:
    """By kind the number of the place and the weight of each sample."""
    samples: dict[str, list] = {}
    for kind, where, weight in zip(smoother.kinds, smoother.places, smoother.weights, strict=True):
        samples.setdefault(kind, []).append([numbers[_rounded(where)], round(float(weight), DIGITS)])
    return samples


def _smoother(data: Mapping[str, list], places: np.ndarray, likeness: Likeness) -> Smoother:
    samples = [(kind, number, weight) for kind, pairs in data.items() for number, weight in pairs]
    kinds, numbers, weights = zip(*samples, strict=True)
    return Smoother(kinds, places[list(numbers)], np.array(weights), likeness)


@cache
def shipped_fit(capability: tuple[int, int]) -> Fit | None:
    """The fit that comes with the package for GPUs of this compute capability; None where there is none."""
    path = Path(__file__).with_name(f"fit_sm_{capability[0]}{capability[1]}.json")
    return Fit.from_json(json.loads(path.read_text())) if path.is_file() else None
