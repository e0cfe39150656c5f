"""A CPU's torch formulations, chosen by measurements of similar layers: ``formulations_<vendor>.json``.

A row holds, for one layer, how long each formulation of a pass took beside torch's own
(``tritonconv bench --formulations``). For another layer the logarithm of that ratio is a Gaussian process over the
nearest rows (Rasmussen & Williams, "Gaussian Processes for Machine Learning", 2006, chapter 2): near measured layers it
follows them, far from all it knows nothing. A formulation is taken only where it is faster by the margin even if it is
CAUTION standard deviations slower than expected. So a layer that is like none of the measured ones stays torch's own.

torch's two gradients are one operation that shares its copies. So the gradients are chosen as a pair, each measured
against that operation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tritonconv.device import cpu_vendor
from tritonconv.kernels.registry import variant
from tritonconv.kernels.torch_native import half
from tritonconv.kernels.torch_onednn import goes_past
from tritonconv.kernels.variant import Variant
from tritonconv.problem import PASSES, Problem

FORMAT = 1
# Whose rows say what is worth a trial on a CPU of another vendor, where that one's own do not know.
VENDORS = "AuthenticAMD", "GenuineIntel"
NATIVE = "torch_native"
BOTH = "torch_native of both gradients"
KINDS = {"forward": "us of the forward", "gradients": "us of both gradients"}  # torch's own time in a row
# Chosen by the rows of a seed that was left out (tests/test_nearby.py).
LENGTH = 2.5  # of a place, over which ratios begin to differ
DEVIATION = 0.5  # of the logarithm of a ratio, far from all rows
NOISE = 0.12  # of a measured one
NEAREST = 40  # rows that are asked
FEWEST = 8  # with fewer a formulation is not known
CAUTION = 1.0
HOPE = 2.0  # standard deviations by which a formulation that a first call tries may be faster than expected
MARGIN = {"forward": 1.1, "gradients": 1.15}
# Microseconds of torch's own below which it stays: the Python around a formulation is not in the rows, and what was
# measured there does not hold beside other calls (0.1 to 0.7 ms, expected 1.2 to 1.4 times as fast: 0.6 to 0.9).
LEAST_US = {"forward": 1000.0, "gradients": 1500.0}
# Rates of a core or two, by which the time of torch's own is counted; the rows correct it.
FLOPS, BYTES, CALL_US = 1e11, 5e9, 30.0


class Guess(NamedTuple):
    """The logarithm of (time / torch's own time): its mean, its standard deviation, and the nearest measured layer."""

    mean: float
    deviation: float
    nearest: str

    @property
    def hopeful(self) -> float:
        return self.mean - HOPE * self.deviation

    @property
    def cautious(self) -> float:
        return self.mean + CAUTION * self.deviation


def place(problem: Problem) -> np.ndarray:
    """A problem's coordinates, in units of which LENGTH makes a difference: (18,)."""
    reached = all(k >= s for k, s in zip(problem.kernel, problem.stride, strict=True))
    # Where torch's weight gradient is slow.
    far = any(p > most for p, most in zip(problem.torch_crop.padding, half(problem), strict=True))
    grouped_in, grouped_out = problem.c_in // problem.groups, problem.c_out // problem.groups
    return np.array([
        4.0 * (problem.layout == "ndhwc"), 2.0 * goes_past(problem), 3.0 * problem.tiles_exactly,
        3.0 * problem.depthwise, 2.0 * (not reached), 1.0 * problem.bias, 1.5 * (problem.stride == (1, 1, 1)),
        1.5 * (problem.dilation != (1, 1, 1)), 2.0 * (problem.groups > 1),
        math.log2(grouped_in) / 2, math.log2(grouped_out) / 2, 1.5 * (grouped_out < 8),
        math.log2(math.prod(problem.kernel)) / 1.5, math.log2(math.prod(problem.stride)) / 2,
        math.log2(math.prod(problem.size)) / 3, math.log2(problem.n) / 2, math.log2(math.prod(problem.y_shape)) / 4,
        2.0 * far,
    ], dtype=float)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """The rows of one dtype: ``problems[i]`` is at ``places[i]``, and ``logs[name][i]`` is the logarithm of a
    variant's time over torch's own, NaN where it was not measured. Under the names of KINDS it is that of torch's own
    microseconds over the counted ones."""

    problems: tuple[Problem, ...]
    places: np.ndarray  # (rows, 18)
    logs: dict[str, np.ndarray]

    @classmethod
    def of(cls, rows: Iterable[tuple[Problem, dict[str, float]]]) -> Rows:
        """From (problem, the logarithm by variant)."""
        problems, logs = zip(*rows, strict=True)
        names = sorted({name for each in logs for name in each})
        columns = {name: np.array([each.get(name, math.nan) for each in logs]) for name in names}
        for name in KINDS.values():
            columns[name] -= np.array([math.log(_counted_us(problem, name)) for problem in problems])
        return cls(problems, np.stack([place(problem) for problem in problems]), columns)

    def guess(self, name: str, problem: Problem) -> Guess | None:
        """None where too few rows have the variant."""
        logs = self.logs.get(name)
        known = np.flatnonzero(~np.isnan(logs)) if logs is not None else ()
        if logs is None or len(known) < FEWEST:
            return None
        where = place(problem)
        squares = ((self.places[known] - where) ** 2).sum(1)
        order = np.argsort(squares, kind="stable")[:NEAREST]
        near = known[order]
        apart = self.places[near][:, None] - self.places[near][None]
        matrix = _alike((apart**2).sum(-1)) + NOISE**2 * np.eye(len(near))
        own = _alike(squares[order])
        mean, explained = np.linalg.solve(matrix, np.stack((logs[near], own), 1)).T @ own
        deviation = math.sqrt(max(DEVIATION**2 - explained, 0.0))
        return Guess(float(mean), deviation, str(self.problems[near[0]]))

    def torchs_us(self, kind: str, problem: Problem) -> float:
        """The expected time of torch's own, in microseconds."""
        guess = self.guess(KINDS[kind], problem)
        return (math.exp(guess.mean) if guess is not None else 1.0) * _counted_us(problem, KINDS[kind])

    def guesses(self, pass_name: str, problem: Problem) -> Iterator[tuple[Guess, str]]:
        for name in self.logs:
            if name.startswith(f"{pass_name}_"):
                guess = self.guess(name, problem)
                if guess is not None:
                    yield guess, name


def _counted_us(problem: Problem, name: str) -> float:
    passes = 1 + (name == KINDS["gradients"])
    return passes * (CALL_US + 1e6 * (problem.flops / FLOPS + problem.bytes() / BYTES))


def _alike(squares: np.ndarray) -> np.ndarray:
    return DEVIATION**2 * np.exp(-squares / (2 * LENGTH**2))


def encode(problem: Problem) -> list[Any]:
    """A problem as a row of the file has it."""
    triples = problem.size, problem.kernel, problem.stride, problem.crop, problem.out_size, problem.dilation
    dtype = str(problem.dtype).removeprefix("torch.")
    return [problem.n, problem.c_in, problem.c_out, problem.groups, *map(list, triples), dtype, problem.layout,
            int(problem.bias)]  # fmt: skip


def decode(numbers: list[Any]) -> Problem:
    """The problem of :func:`encode`."""
    n, c_in, c_out, groups, *triples, dtype, layout, bias = numbers
    size, kernel, stride, crop, out_size, dilation = map(tuple, triples)
    return Problem(n, c_in, c_out, size, kernel, stride, crop, out_size, dilation, groups,
                   getattr(torch, dtype), layout, bool(bias))  # fmt: skip


def path_of(vendor: str) -> Path:
    return Path(__file__).with_name(f"formulations_{vendor.lower()}.json")


@cache
def table(vendor: str) -> dict[str, Any] | None:
    """The file of a vendor's CPUs; None where nothing was measured."""
    path = path_of(vendor)
    return json.loads(path.read_text(encoding="utf-8")) if vendor and path.is_file() else None


@cache
def rows_of(vendor: str, dtype: torch.dtype) -> Rows | None:
    """The measured layers of a dtype; None where there is none."""
    mine = [(problem, logs) for _, problem, logs in unpacked(table(vendor)) if problem.dtype == dtype]
    return Rows.of(mine) if mine else None


def unpacked(found: dict[str, Any] | None) -> list[tuple[str, Problem, dict[str, float]]]:
    """The rows of a file: (name of the layer, problem, the logarithm by variant)."""
    if found is None:
        return []
    names = found["variants"]
    return [
        (layer, decode(numbers), {name: each / 100 for name, each in zip(names, logs, strict=True) if each is not None})
        for layer, numbers, logs in found["rows"]
    ]


def pack(head: dict[str, Any], rows: Iterable[tuple[str, Problem, dict[str, float]]]) -> str:
    """The text of a file: its ``head``, the names of the variants, and a line for each row of :func:`unpacked`, with
    the logarithms in hundredths."""
    rows = list(rows)
    names = sorted({name for _, _, logs in rows for name in logs})
    lines = [
        json.dumps(
            [layer, encode(problem), [round(100 * logs[name]) if name in logs else None for name in names]],
            separators=(",", ":"),
        )
        for layer, problem, logs in rows
    ]
    return f'{json.dumps(head | {"variants": names})[:-1]}, "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def measured(vendor: str) -> bool:
    """Whether there are rows of a vendor's CPUs."""
    return table(vendor) is not None


def choose(problem: Problem, pass_name: str) -> tuple[Variant, str]:
    """The formulation of one pass of a problem with outputs, torch's own included, and the reason."""
    names, because = picks(problem, cpu_vendor())
    return variant(names[PASSES.index(pass_name)]), because[pass_name != PASSES[0]]


@lru_cache(4096)
def picks(problem: Problem, vendor: str) -> tuple[tuple[str, str, str], tuple[str, str]]:
    """(variants by pass, reasons of the forward and of the gradients)."""
    rows = rows_of(vendor, problem.dtype)
    return best(problem, rows, f"{(table(vendor) or {}).get('cpu', vendor)}")


def best(problem: Problem, rows: Rows | None, cpu: str) -> tuple[tuple[str, str, str], tuple[str, str]]:
    """As :func:`picks`, by these rows."""
    native = tuple(f"{name}_{NATIVE}" for name in PASSES)
    if rows is None:
        nothing = f"no formulation was measured in {problem.dtype} on this vendor's CPUs: torch's own"
        return native, (nothing, nothing)  # type: ignore[return-value]
    forward, forward_why = _faster(rows, "forward", PASSES[:1], problem, cpu)
    pair, pair_why = _faster(rows, "gradients", PASSES[1:], problem, cpu)
    return (*forward, *pair), (forward_why, pair_why)  # type: ignore[return-value]


def _faster(rows: Rows, kind: str, passes: tuple[str, ...], problem: Problem, cpu: str) -> tuple[tuple[str, ...], str]:
    """The formulations of the ``passes`` of a kind that together are faster for sure, or torch's own; the reason."""
    own, measured_on = tuple(f"{name}_{NATIVE}" for name in passes), f"by layers measured on {cpu}"
    if rows.torchs_us(kind, problem) < LEAST_US[kind]:
        return own, f"torch's own: it is expected to take less than {LEAST_US[kind] / 1000:g} ms, {measured_on}"
    served = [min(_guesses([rows], name, problem), default=None, key=lambda each: each[0].cautious) for name in passes]
    if all(served):
        guesses, names = zip(*served, strict=True)  # type: ignore[arg-type]
        if math.log(sum(math.exp(each.cautious) for each in guesses)) < -math.log(MARGIN[kind]):
            ratio = 1 / sum(math.exp(each.mean) for each in guesses)
            nearest = " and ".join(dict.fromkeys(each.nearest for each in guesses))
            return names, f"expected to be {ratio:.2f} times as fast as torch's own, {measured_on} (nearest: {nearest})"
    return own, f"torch's own: no formulation that serves it is faster for sure, {measured_on}"


def likely_forwards(problem: Problem, vendor: str, least_us: float, most: int) -> list[tuple[str]]:
    """The formulations of the forward that may be faster than torch's own, the likeliest first; none where torch's own
    is expected to take less than ``least_us``."""
    rows = _rows_for(vendor, problem.dtype)
    if not rows or rows[0].torchs_us("forward", problem) < least_us:
        return []
    return [(name,) for _, name in _hopeful(_guesses(rows, PASSES[0], problem), 0.0)[:most]]


def likely_gradients(problem: Problem, vendor: str, least_us: float, most: int) -> list[tuple[str, str]]:
    """As :func:`likely_forwards`, pairs of formulations of backward-data and backward-weight."""
    rows = _rows_for(vendor, problem.dtype)
    if not rows or rows[0].torchs_us("gradients", problem) < least_us:
        return []
    data, weight = (_guesses(rows, name, problem) for name in PASSES[1:])
    if not data or not weight:
        return []
    least_data, least_weight = (min(math.exp(guess.hopeful) for guess, _ in each) for each in (data, weight))
    names = (
        [name for _, name in _hopeful(data, least_weight)[:most]],
        [name for _, name in _hopeful(weight, least_data)[:most]],
    )
    if not all(names):
        return []
    pairs = (tuple(each[min(index, len(each) - 1)] for each in names) for index in range(max(map(len, names))))
    return list(pairs)  # type: ignore[arg-type]


def _hopeful(guesses: Iterable[tuple[Guess, str]], beside: float) -> list[tuple[float, str]]:
    """(expected logarithm, formulation), the least first, of those that may be faster than torch's own by 3 % together
    with ``beside`` of its time."""
    native = f"{PASSES[0]}_{NATIVE}"
    found = ((guess.mean, name) for guess, name in guesses if math.exp(guess.hopeful) + beside < 0.97)
    return sorted(each for each in found if each[1] != native)


def _guesses(rows: Iterable[Rows], pass_name: str, problem: Problem) -> list[tuple[Guess, str]]:
    """Of the formulations that serve the problem, each by the first of these rows that know it."""
    found: dict[str, Guess] = {}
    for each in rows:
        for guess, name in each.guesses(pass_name, problem):
            if name not in found and _serves(name, problem):
                found[name] = guess
    return [(guess, name) for name, guess in found.items()]


def _serves(name: str, problem: Problem) -> bool:
    return variant(name).supports(problem, torch.device("cpu")) is None


def _rows_for(vendor: str, dtype: torch.dtype) -> list[Rows]:
    """A vendor's rows, then those of others: they say where to look."""
    known = (rows_of(each, dtype) for each in dict.fromkeys((vendor, *VENDORS)))
    return [rows for rows in known if rows is not None]
