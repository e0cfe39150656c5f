"""Decides for one problem: the forward by itself, then both gradients together in a training step.

The two gradients are decided together because variants may share work (a copy of grad_y, ``Variant.joint``) that a
time of one alone does not show. A challenger must beat the choice that holds without tuning beyond noise: even the 20th
percentile of the ratios within a round is above 1, and their median beyond what null rows show. Where torch's own beats
the winner so, torch's own is stored.

That winner is the fastest on the device, and runs in CUDA graphs. An eager call also takes the host's time, which grows
with its launches: by both (:func:`tritonconv.autotune.model.eager_ms`) a challenger must beat the winner in the same
way to be stored beside it, for eager calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import NamedTuple

from tritonconv.autotune.choose import Selection, untuned
from tritonconv.autotune.rules import FALLBACK
from tritonconv.autotune.sources import revision
from tritonconv.autotune.store import Eager, Entry
from tritonconv.autotune.tuning.candidates import Candidate, Group
from tritonconv.autotune.tuning.contest import FINALISTS, Contest, Members
from tritonconv.autotune.tuning.journal import FINAL, SCREEN, WRONG, Timing
from tritonconv.dispatch import plan_of
from tritonconv.kernels.registry import variant
from tritonconv.kernels.variant import COPY, NO_CONFIG
from tritonconv.lab.bench import roofs
from tritonconv.lab.bench.calls import FORWARD_BACKWARD, TensorCall
from tritonconv.lab.bench.case import CHANGED_BY_ONE
from tritonconv.lab.bench.results import BASELINE
from tritonconv.lab.bench.timing import Times
from tritonconv.problem import PASSES

PAIRS = 4
HOST_NOISE = 1.05  # the host's time for a call varies more than the device's
# Shares of a problem's time.
SCREENING, FORWARD_FINAL = 0.6, 0.15
FORWARD, GRADIENTS = PASSES[:1], PASSES[1:]

Ran = list[tuple[Candidate, Timing]]


@dataclass(frozen=True)
class Winner:
    """The choice to store for one pass; ``timed`` is the pass that was timed.

    ``rivals`` is the number of candidates, ``candidates`` of those that ran. ``host_ms`` and ``eager`` are those of
    the entry; ``warning`` says that it is faster than its memory.
    """

    pass_name: str
    selection: Selection
    ms: float
    torch_ms: float
    candidates: int
    timed: str
    rivals: int = 0
    host_ms: float | None = None
    eager: Eager | None = None
    warning: str = ""

    @classmethod
    def stored(cls, pass_name: str, entry: Entry) -> Winner:
        """Raises ArgumentError where the entry's variant is not there."""
        selection = Selection(variant(entry.variant), entry.config, "stored")
        measured = entry.timed, entry.rivals, entry.host_ms, entry.eager
        return cls(pass_name, selection, entry.ms, entry.torch_ms, 0, *measured)

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
            host_ms=self.host_ms,
            eager=self.eager,
        )


class Decision(NamedTuple):
    """The labels of the fastest call on the device and of the fastest eager call, and their winners by pass."""

    best: str
    eager: str
    times: Times
    winners: list[Winner]


class ProblemTuner:
    """Tunes the problem of a contest in about ``seconds``; timings in the journal are used again.

    ``noise`` is the ratio beyond which null rows do not go (:class:`tritonconv.lab.bench.noise.Band`); ``pairs`` of the
    gradients are tried whatever their halves take by themselves.
    """

    def __init__(
        self,
        contest: Contest,
        fields: Mapping[str, list[Candidate]],
        seconds: float,
        noise: float = 1.0,
        pairs: Sequence[Group] = (),
    ) -> None:
        self.contest, self.case, self.seconds, self.fields = contest, contest.case, seconds, fields
        self.noise, self.pairs = noise, pairs
        whole = max(1, sum(len(found) for found in fields.values()))
        self.screening = {name: SCREENING * seconds * len(found) / whole for name, found in fields.items()}

    def forward(self) -> Winner | None:
        """None where no answer is right, not even torch's. Raises OutOfTime, as :meth:`gradients` does."""
        ran = self._ran(FORWARD)
        found = ran[FORWARD[0]]
        proposed = [(candidate,) for candidate, _ in [*found[:FINALISTS], *_most_eager(found)]]
        decision = self._decided(FORWARD, proposed, ran, FORWARD_FINAL)
        return decision.winners[0] if decision else None

    def gradients(self, forward: Winner | None) -> tuple[Winner, ...]:
        """The winners of the two gradients, and the forward's anew where torch alone wins the whole step.

        All steps are timed with the forward's winner on the device; None stands for what runs untuned. Empty where no
        answer is right, not even torch's.
        """
        ran = self._ran(GRADIENTS)
        share = 1 - SCREENING - FORWARD_FINAL
        first = forward.selection if forward else untuned(self.case.problem, self.case.device, FORWARD[0])
        decision = self._decided(GRADIENTS, self._pairs(ran), ran, share, forward=first)
        if decision is None:
            return ()
        return (*decision.winners, *self._forward_anew(decision, first, forward.eager if forward else None))

    def _forward_anew(self, decision: Decision, first: Selection, eager: Eager | None) -> list[Winner]:
        """The forward's winner where torch's own step beats all others, on the device or in eager calls."""
        native = _native(FORWARD[0])
        was = first, first if eager is None else Selection(variant(eager.variant), eager.config, "for eager calls")
        both = [
            native if label == BASELINE else each
            for label, each in zip((decision.best, decision.eager), was, strict=True)
        ]
        if [each.variant for each in both] == [each.variant for each in was]:
            return []
        chosen, quick = both
        other = None if quick.variant is chosen.variant else _eager(quick, decision.times, decision.eager)
        step, rivals = decision.winners[0], len(self.fields[FORWARD[0]])
        measured = FORWARD_BACKWARD, rivals, step.host_ms, other, step.warning
        return [Winner(FORWARD[0], chosen, step.ms, step.torch_ms, 0, *measured)]

    def _ran(self, passes: Sequence[str]) -> dict[str, Ran]:
        return {name: self.contest.screen(name, self.fields[name], self.screening[name]) for name in passes}

    def _decided(
        self, passes: Sequence[str], proposed: Sequence[Group], ran: Mapping[str, Ran], share: float, **more: Selection
    ) -> Decision | None:
        """A winner for each pass: of the proposed groups, of the choice that holds without tuning and of torch's own.

        None where no answer is right.
        """
        timed = FORWARD_BACKWARD if len(passes) > 1 else passes[0]
        holder = tuple(Candidate(untuned(self.case.problem, self.case.device, name), 0.0) for name in passes)
        groups = {_label(group): group for group in (holder, *proposed)}
        members: dict[str, Members] = {label: list(zip(passes, each, strict=True)) for label, each in groups.items()}
        torchs = self.case.baseline(timed)
        right = self._right_calls(timed, members, **more)
        times = self.contest.final({BASELINE: torchs, **right}, members, share * self.seconds)
        if len(passes) == 1:
            for label in right:
                self.contest.keep(timed, groups[label][0], FINAL, times)
        best, eager = self._fastest(times, _label(holder), list(right), timed)
        if any(self._beyond(times, label, timed) for label in (best, eager)):  # a second look
            times = self.contest.final({BASELINE: torchs, **right}, members, share * self.seconds)
            best, eager = self._fastest(times, _label(holder), list(right), timed)
        while self._spoilt(timed, right, members, best, eager):
            best, eager = self._fastest(times, _label(holder), list(right), timed)
        if best is None or eager is None:
            return None
        groups[BASELINE] = tuple(Candidate(_native(name), 0.0) for name in passes)
        ms, torch_ms, host_ms = times.spread(best).median, times.spread(BASELINE).median, times.host_ms(best)
        winners, warning = [], self._beyond(times, best, timed)
        for name, each, quick in zip(passes, groups[best], groups[eager], strict=True):
            other = None if quick.label == each.label else _eager(quick.selection, times, eager)
            measured = timed, len(self.fields[name]), host_ms, other, warning
            winners.append(Winner(name, each.selection, ms, torch_ms, len(ran[name]), *measured))
        return Decision(best, eager, times, winners)

    def _pairs(self, ran: Mapping[str, Ran]) -> list[Group]:
        """The pairs that were given, the best of each gradient, also for eager calls, and the pairs that share work,
        cheapest first by their times apart."""
        data, weight = (ran[name] for name in GRADIENTS)
        if not data or not weight:
            return list(self.pairs)
        best: list[Group] = [*self.pairs, (data[0][0], weight[0][0])]
        shared = []
        for (left, first), (right, second) in itertools.product(data, weight):
            mine, theirs = left.selection, right.selection
            joint = mine.variant.joint is not None and mine.variant.joint is theirs.variant.joint
            prepared = mine.variant.prepare is not None and mine.variant.prepare is theirs.variant.prepare
            if joint or prepared or (mine.config.get(COPY) and theirs.config.get(COPY)):
                shared.append(((first.median_ms or 0.0) + (second.median_ms or 0.0), (left, right)))
        best += [pair for _, pair in sorted(shared, key=lambda each: each[0])[: PAIRS - 2]]
        best += [(left, right) for (left, _), (right, _) in zip(_most_eager(data), _most_eager(weight), strict=True)]
        if self.case.torch_is_safe:
            best.append(tuple(Candidate(_native(name), 0.0) for name in GRADIENTS))
        return best

    def _fastest(self, times: Times, holder: str, labels: list[str], timed: str) -> tuple[str | None, str | None]:
        """The labels of the fastest call on the device and of the fastest eager call; None where no answer is right."""
        best = self._best(times, holder, labels, timed, self.noise)
        if best is None or not times.hosts:
            return best, best
        return best, self._best(times.eager(), best, labels, timed, max(self.noise, HOST_NOISE)) or best

    def _spoilt(
        self, timed: str, right: dict[str, TensorCall], members: Mapping[str, Members], *labels: str | None
    ) -> bool:
        """Whether one of the labels, or what changed operands meanwhile, is wrong behind its timing: it is stored as
        such, and no longer ``right``."""
        changed = self.case.put_back()
        looked = right if changed else {label: right[label] for label in labels if label in right}
        red = {label: str(verdict) for label, verdict in self.case.judge(timed).look_again(looked).items()}
        if changed and not red:
            red = dict.fromkeys(right, CHANGED_BY_ONE.format(changed))
        for label, message in red.items():
            self._keep_wrong(members[label], message)
            del right[label]
        return bool(red)

    def _beyond(self, times: Times, label: str | None, timed: str) -> str:
        """A warning where a call is faster than its memory (:func:`roofs.beyond`); else ""."""
        if label is None:
            return ""
        rate = self.contest.memory_rate
        return roofs.beyond(self.case.problem, timed, times.spread(label).median, rate)

    def _best(self, times: Times, holder: str, labels: list[str], pass_name: str, noise: float) -> str | None:
        """The winner's label: challengers in the order of their speed, torch's own last, where its answer is right."""
        ordered = sorted(labels, key=lambda label: -times.speedup(label, BASELINE).median)
        eligible = [*ordered, BASELINE] if self.case.trusts_torch(pass_name) else ordered
        if not eligible:
            return None
        best = holder if holder in eligible else eligible[0]
        for label in eligible:
            over = times.speedup(label, best)
            if label != best and over.p20 > 1 and over.median > noise:
                best = label
        return best

    def _right_calls(self, pass_name: str, members: Mapping[str, Members], **more: Selection) -> dict[str, TensorCall]:
        """By label the calls whose answers are right."""
        found = {label: self._right_call(pass_name, each, **more) for label, each in members.items()}
        calls = {label: call for label, call in found.items() if call is not None}
        for label, verdict in self.case.judge(pass_name).recheck(calls).items():
            self._keep_wrong(members[label], str(verdict))
            del calls[label]
        return calls

    def _right_call(self, pass_name: str, members: Members, **more: Selection) -> TensorCall | None:
        """The call of a plan of the members, and of ``more`` in other passes, whose answers are right.

        None where they are wrong or cannot run, which the journal then stores, or already knows.
        """
        if any(self.contest.refuses(*each) for each in members):
            return None
        wrong = self.contest.fault(members, lambda plan: self.case.verdict(plan, pass_name), **more)
        if wrong is None:
            chosen = {name: each.selection for name, each in members}
            return self.case.call(plan_of(self.case.problem, self.case.device, **more, **chosen), pass_name)
        self._keep_wrong(members, wrong)
        return None

    def _keep_wrong(self, members: Members, message: str) -> None:
        pass_name, last = members[-1]
        self.contest.keep(pass_name, last, SCREEN, message=message, status=WRONG)


def _label(group: Group) -> str:
    return " + ".join(each.label for each in group)


def _most_eager(ran: Ran) -> Ran:
    """The candidate whose eager call takes least, alone in a list; none where none ran."""
    return sorted(ran, key=lambda pair: pair[1].eager_ms)[:1]


def _eager(selection: Selection, times: Times, label: str) -> Eager:
    """A choice for eager calls, with the times of the call that was timed."""
    host_ms = times.host_ms(label)
    assert host_ms is not None  # else the choice is the device's own
    source = revision(selection.variant)
    return Eager(selection.variant.name, dict(selection.config), times.spread(label).median, host_ms, source)


def _native(pass_name: str) -> Selection:
    return Selection(variant(FALLBACK[pass_name]), NO_CONFIG, "torch's own won")
