"""The tasks of a tuning run, and the report on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tritonconv.autotune.tuning.tuner import Winner
from tritonconv.lab.bench.noise import Band, band
from tritonconv.problem import Problem

COMPLETE, BUDGET = "complete", "budget"
TAKEN = "gradients with an epilogue are the plain layer's, and take its choice: of {} stored before, of {} tuned too"
MOST_FAULTS = 10  # that the text of a report names


@dataclass(frozen=True)
class Task:
    """A problem to tune; ``layer`` and ``suite`` are what the rows call it."""

    problem: Problem
    layer: str
    suite: str

    @property
    def plain(self) -> Task:
        """Of the layer without its epilogue, whose choices its gradients take."""
        name = self.layer.partition(" then ")[0].partition("+")[0]
        return self if self.problem.epilogue is None else replace(self, problem=self.problem.plain, layer=name)


def with_plain(tasks: Iterable[Task]) -> list[Task]:
    """Each task, and behind one with an epilogue that of the plain layer."""
    return [each for task in tasks for each in dict.fromkeys((task, task.plain))]


@dataclass
class Report:
    """The report on a tuning run. ``winners`` by problem; ``known`` are the problems whose key was stored before.

    ``reason`` is ``complete`` or ``budget``; the table has every winner either way. ``left`` problems were left in
    ``round`` (number, of how many). ``gradients``: of each layer with an epilogue, whether the plain layer's gradients,
    whose choice it takes, were stored before.
    """

    device: str
    reason: str = COMPLETE
    winners: list[tuple[Task, Winner]] = field(default_factory=list)
    known: list[Task] = field(default_factory=list)
    left: int = 0
    round: tuple[int, int] = (1, 1)
    errors: int = 0
    timings: int = 0
    reused: int = 0
    null_rows: list[dict[str, object]] = field(default_factory=list)  # their fields
    table: Path | None = None
    faults: list[str] = field(default_factory=list)  # of variants: what was wrong, and what raised
    gradients: list[bool] = field(default_factory=list)

    @property
    def torch_won(self) -> int:
        """How many of the decisions are torch's own."""
        return sum(winner.torch_won for _, winner in self.winners)

    @property
    def noise(self) -> Band | None:
        """The band of the null rows; None without any."""
        return band(self.null_rows, str(self.null_rows[0]["timing"])) if self.null_rows else None

    @property
    def unfinished(self) -> str:
        """How many problems were left, in words."""
        number, rounds = self.round
        return f"{self.left} problems left" + (f" in round {number} of {rounds}" if rounds > 1 else "")

    def __str__(self) -> str:
        choices = f"{len(self.winners)} {'choice' if len(self.winners) == 1 else 'choices'}"
        lines = [f"tuned on {self.device}: {choices}, of which {self.torch_won} torch's own"]
        for task, winner in self.winners:
            config = " ".join(f"{key}={value}" for key, value in winner.selection.config.items())
            what = f"{winner.selection.variant.name} {config}".rstrip()
            other = f"; in eager calls {winner.eager.variant}" if winner.eager is not None else ""
            lines.append(f"  {task.layer} {task.problem.layout} {winner.pass_name}: {what}{other}")
        if self.gradients:
            lines.append(TAKEN.format(self.gradients.count(True), self.gradients.count(False)))
        if self.known:
            lines.append(
                f"{len(self.known)} problems were tuned before, by themselves or by one of their kind and size"
            )
        for line in self.faults[:MOST_FAULTS]:
            lines.append(f"  left out: {line}")
        if len(self.faults) > MOST_FAULTS:
            lines.append(f"  left out: {len(self.faults) - MOST_FAULTS} more, in the results file")
        lines.append(f"{self.timings} timings taken, {self.reused} found in the journal")
        if self.noise is not None:
            lines.append(f"torch against itself, in {self.noise.rows} null rows: {self.noise}; only more counts")
        if self.reason == BUDGET:
            lines.append(f"the budget was used up with {self.unfinished}; the same command goes on from here")
        if self.table is not None:
            lines.append(f"stored in {self.table}")
        return "\n".join(lines)
