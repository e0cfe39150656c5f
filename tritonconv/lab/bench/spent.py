"""The seconds of a run by step and kind of work, so that one sees where the next run can save time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from time import perf_counter

TRIALS = "torch's first calls"  # in which cuDNN tries its algorithms
COMPILING = "compiling, our first calls"  # and the wait for the compilers
TORCH_COMPILE = "torch.compile"
GATE, TIMING, GRAPHS, TENSORS, OTHER = "gate", "timing", "capturing graphs", "making tensors", "other"

Spent = dict[str, dict[str, float]]  # seconds by step, by kind


class Ledger:
    """Counts each second once, to the innermost kind of work going on. Inside its block it is the ledger in force."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.seconds: Spent = {}
        self._clock = clock
        self._going_on = [OTHER]
        self._step, self._since = "start", clock()

    def step(self, name: str) -> None:
        """The seconds from now on belong to this step."""
        self._count()
        self._step = name

    def rounded(self) -> Spent:
        """Until now, to a hundredth of a second; steps and kinds that took less are left out."""
        self._count()
        steps = {
            step: {kind: round(s, 2) for kind, s in kinds.items() if round(s, 2)}
            for step, kinds in self.seconds.items()
        }
        return {step: kinds for step, kinds in steps.items() if kinds}

    @contextlib.contextmanager
    def on(self, kind: str) -> Iterator[None]:
        self._count()
        self._going_on.append(kind)
        try:
            yield
        finally:
            self._count()
            self._going_on.pop()

    def _count(self) -> None:
        now = self._clock()
        of_step = self.seconds.setdefault(self._step, {})
        kind = self._going_on[-1]
        of_step[kind] = of_step.get(kind, 0.0) + now - self._since
        self._since = now

    def __enter__(self) -> Ledger:
        self._token = _ledger.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _ledger.reset(self._token)


_ledger: ContextVar[Ledger | None] = ContextVar("tritonconv_ledger", default=None)


def on(kind: str) -> contextlib.AbstractContextManager[None]:
    """Inside the block the seconds count to this kind of work, where a ledger is in force."""
    ledger = _ledger.get()
    return contextlib.nullcontext() if ledger is None else ledger.on(kind)


def lines(spent: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """A table of text: a row per kind of work, the largest first, a column per step, and the sums."""
    steps = list(spent)
    kinds = dict.fromkeys(kind for seconds in spent.values() for kind in seconds)
    totals = {kind: sum(seconds.get(kind, 0.0) for seconds in spent.values()) for kind in kinds}
    rows = [["seconds", *steps, "all"]]
    for kind in sorted(kinds, key=lambda kind: -totals[kind]):
        cells = [spent[step].get(kind, 0.0) for step in steps]
        rows.append([kind, *(f"{s:.1f}" for s in cells), f"{totals[kind]:.1f}"])
    sums = [sum(spent[step].values()) for step in steps]
    return [*rows, ["all", *(f"{s:.1f}" for s in sums), f"{sum(sums):.1f}"]]
