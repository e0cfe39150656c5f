"""Decides for one problem: the forward by itself, then both gradients together in a training step.

The two gradients are decided together because variants may share work (``Variant.prepare``, ``Variant.joint``) that a
time of one alone does not show. A challenger must beat the choice that holds without tuning beyond noise: even the 20th
percentile of the ratios within a round is above 1, and their median beyond what null rows show. Where torch's own beats
the winner so, torch's own is stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

from tritonconv.autotune.choose import Selection, untuned
from tritonconv.autotune.rules import FALLBACK
from tritonconv.autotune.sources import revision
from tritonconv.autotune.store import Entry
from tritonconv.autotune.tuning.contest import Candidate, Contest, Members
from tritonconv.dispatch import plan_of
from tritonconv.kernels.registry import variant
from tritonconv.kernels.variant import NO_CONFIG
from tritonconv.lab.bench.calls import FORWARD_BACKWARD, TensorCall
from tritonconv.lab.bench.failures import context_is_lost, disqualifies, one_line
from tritonconv.lab.bench.results import BASELINE
from tritonconv.lab.bench.timing import Times
from tritonconv.problem import PASSES

FINALISTS = 3
PAIRS = 4
# Shares of a problem's time.
SCREENING, FORWARD_FINAL = 0.6, 0.15
FORWARD, GRADIENTS = PASSES[:1], PASSES[1:]


@dataclass(frozen=True)
class Winner:
    """The choice to store for one pass; ``timed`` is the pass that was timed.

    ``rivals`` is the number of candidates, ``candidates`` of those that ran.
    """

    pass_name: str
    selection: Selection
    ms: float
    torch_ms: float
    candidates: int
    timed: str
    rivals: int = 0

    @property
    def torch_won(self) -> bool:
        return self.selection.variant.name == FALLBACK[self.pass_name]

    def entry(self, problem, versions: Mapping[str, str | None]) -> Entry:
        return Entry(
            variant=self.selection.variant.name,
            config=dict(self.selection.config),
            ms=self.ms,
            torch_ms=self.torch_ms,
            source=revision(self.selection.variant),
            problem=str(problem),
            timed=self.timed,
            utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions=versions,
            rivals=self.rivals,
        )


class ProblemTuner:
    """Tunes the problem of a contest in about ``seconds``; timings in the journal are used again.

    ``noise`` is the ratio beyond which null rows do not go (:class:`tritonconv.lab.bench.noise.Band`).
    """

    def __init__(
        self, contest: Contest, fields: Mapping[str, list[Candidate]], seconds: float, noise: float = 1.0
    ) -> None:
        self.contest, self.case, self.seconds, self.fields = contest, contest.case, seconds, fields
        self.noise = noise
        whole = max(1, sum(len(found) for found in fields.values()))
        self.screening = {name: SCREENING * seconds * len(found) / whole for name, found in fields.items()}

    def forward(self) -> Winner | None:
        """None where no answer is right, not even torch's. Raises OutOfTime, as :meth:`gradients` does."""
        (name,) = FORWARD
        ran = self.contest.screen(name, self.fields[name], self.screening[name])
        holder = self._untuned(name)
        finalists = {each.label: each for each in (holder, *(candidate for candidate, _ in ran[:FINALISTS]))}
        members: dict[str, Members] = {label: [(name, each)] for label, each in finalists.items()}
        torchs = self.case.baseline(name)
        right = self._right_calls(name, members)
        times = self.contest.final({BASELINE: torchs, **right}, members, FORWARD_FINAL * self.seconds)
        for label in right:
            self.contest.keep_final(name, finalists[label], times)
        best = self._best(times, holder.label, list(right), name)
        if best is None:
            return None
        selection = finalists[best].selection if best != BASELINE else _native(name)
        ms, torch_ms = times.spread(best).median, times.spread(BASELINE).median
        return Winner(name, selection, ms, torch_ms, len(ran), name, len(self.fields[name]))

    def gradients(self, forward: Selection) -> tuple[Winner, ...]:
        """The winners of the two gradients, after those of all three passes where torch alone wins the whole step.

        Empty where no answer is right, not even torch's.
        """
        data, weight = GRADIENTS
        ran = {name: self.contest.screen(name, self.fields[name], self.screening[name]) for name in GRADIENTS}
        holder = self._untuned(data), self._untuned(weight)
        pairs = {_label(pair): pair for pair in [holder, *self._pairs(ran)]}
        members: dict[str, Members] = {label: list(zip(GRADIENTS, pair, strict=True)) for label, pair in pairs.items()}
        torchs = self.case.baseline(FORWARD_BACKWARD)
        right = self._right_calls(FORWARD_BACKWARD, members, forward=forward)
        share = (1 - SCREENING - FORWARD_FINAL) * self.seconds
        times = self.contest.final({BASELINE: torchs, **right}, members, share)
        best = self._best(times, _label(holder), list(right), FORWARD_BACKWARD)
        if best is None:
            return ()
        found = pairs[best] if best != BASELINE else tuple(Candidate(_native(name), 0.0) for name in GRADIENTS)
        step = times.spread(best).median, times.spread(BASELINE).median
        winners = [
            Winner(name, each.selection, *step, len(ran[name]), FORWARD_BACKWARD, len(self.fields[name]))
            for name, each in zip(GRADIENTS, found, strict=True)
        ]
        if best == BASELINE and forward.variant.name != FALLBACK[FORWARD[0]]:
            rivals = len(self.fields[FORWARD[0]])
            winners.append(Winner(FORWARD[0], _native(FORWARD[0]), *step, 0, FORWARD_BACKWARD, rivals))
        return tuple(winners)

    def _pairs(self, ran) -> list[tuple[Candidate, Candidate]]:
        """The best of each gradient, and the pairs that share work, cheapest first by their times apart."""
        data, weight = (ran[name] for name in GRADIENTS)
        if not data or not weight:
            return []
        best = [(data[0][0], weight[0][0])]
        shared = []
        for (left, first), (right, second) in itertools.product(data, weight):
            mine, theirs = left.selection, right.selection
            joint = mine.variant.joint is not None and mine.variant.joint is theirs.variant.joint
            if joint or (mine.prepare is not None and mine.prepare is theirs.prepare):
                shared.append(((first.median_ms or 0.0) + (second.median_ms or 0.0), (left, right)))
        best += [pair for _, pair in sorted(shared, key=lambda each: each[0])[: PAIRS - 2]]
        native = tuple(Candidate(_native(name), 0.0) for name in GRADIENTS)
        if self.case.torch_is_safe:
            best.append(native)  # type: ignore[arg-type]
        return best

    def _untuned(self, pass_name: str) -> Candidate:
        return Candidate(untuned(self.case.problem, self.case.device, pass_name), 0.0)

    def _best(self, times: Times, holder: str, labels: list[str], pass_name: str) -> str | None:
        """The winner's label: challengers in the order of their speed, torch's own last, where its answer is right."""
        ordered = sorted(labels, key=lambda label: -times.speedup(label, BASELINE).median)
        eligible = [*ordered, BASELINE] if self.case.trusts_torch(pass_name) else ordered
        if not eligible:
            return None
        best = holder if holder in labels else eligible[0]
        for label in eligible:
            over = times.speedup(label, best)
            if label != best and over.p20 > 1 and over.median > self.noise:
                best = label
        return best

    def _right_calls(self, pass_name: str, members: Mapping[str, Members], **more: Selection) -> dict[str, TensorCall]:
        """By label the calls whose answers are right."""
        found = {label: self._right_call(pass_name, each, **more) for label, each in members.items()}
        calls = {label: call for label, call in found.items() if call is not None}
        for label, verdict in self.case.judge(pass_name).recheck(calls).items():
            self.contest.keep_wrong(pass_name, members[label][-1][1], str(verdict))
            del calls[label]
        return calls

    def _right_call(self, pass_name: str, members: Members, **more: Selection) -> TensorCall | None:
        """The call of a plan of the members, and of ``more`` in other passes, whose answers are right.

        None where they are wrong or cannot run, which the journal then stores, or already knows.
        """
        if any(self.contest.refuses(*each) for each in members):
            return None
        chosen = {name: each.selection for name, each in members}
        plan = plan_of(self.case.problem, self.case.device, **more, **chosen)
        try:
            verdict = self.case.verdict(plan, pass_name)
        except Exception as error:
            if context_is_lost(error):
                self.contest.keep_loss(members, error)
            if not disqualifies(error):
                raise
            self.contest.keep_wrong(pass_name, members[-1][1], one_line(error))
            return None
        if not verdict.ok:
            self.contest.keep_wrong(pass_name, members[-1][1], str(verdict))
            return None
        return self.case.call(plan, pass_name)


def _label(pair: tuple[Candidate, Candidate]) -> str:
    return " + ".join(each.label for each in pair)


def _native(pass_name: str) -> Selection:
    return Selection(variant(FALLBACK[pass_name]), NO_CONFIG, "torch's own won")
