"""The candidates of a pass: of every variant that serves the problem, the configs that the cost model ranks first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from typing import NamedTuple

import torch

from tritonconv.autotune import model
from tritonconv.autotune.ceilings import Ceilings
from tritonconv.autotune.choose import Selection, alike, usable
from tritonconv.autotune.key import Key
from tritonconv.autotune.store import Entry, Table
from tritonconv.kernels.registry import variants
from tritonconv.kernels.variant import Config, Variant
from tritonconv.lab.bench.contestants import why_not
from tritonconv.problem import Problem


@dataclass(frozen=True)
class Candidate:
    """A variant with one config; ``predicted_ms`` is the model's."""

    selection: Selection
    predicted_ms: float

    @property
    def label(self) -> str:
        config = " ".join(f"{key}={value}" for key, value in self.selection.config.items())
        return f"{self.selection.variant.name} {config}".strip()

    def finishes(self, problem: Problem) -> bool:
        """It computes the epilogue of the problem itself."""
        return self.selection.variant.finishes(problem, self.selection.config, problem.epilogue)

    @property
    def is_kernel(self) -> bool:
        """A Triton kernel, which must be compiled."""
        return self.selection.variant.backend == "triton"


Group = tuple[Candidate, ...]  # the candidates of one call, one for each pass that is decided
Ranked = list[tuple[Config, model.Estimate]]
WasCompiled = Callable[[Variant, Config], bool]  # the launch of a config was compiled ahead
Raised = Callable[[Variant, Exception], None]


class Effort(NamedTuple):
    """How many candidates a problem has: at most ``configs`` of a variant's form, in about ``seconds`` in all.

    A Triton kernel must be compiled, so a variant takes part if the model expects at most ``far`` times the time of the
    best kernel, and a further config of it if the model expects at most ``near`` times that. The same holds for
    formulations in torch's operations on a GPU, where cuDNN tries its algorithms for each of their convolutions; if
    ``formulations`` is false, none takes part. With ``ahead``, in a pass that has kernels compiled ahead, only those
    take part.
    """

    configs: int
    near: float
    far: float
    seconds: float
    formulations: bool = True
    ahead: bool = False


def candidates(
    problem: Problem,
    device: torch.device,
    pass_name: str,
    ceilings: Ceilings,
    effort: Effort,
    was_compiled: WasCompiled | None = None,
    raised: Raised | None = None,
) -> list[Candidate]:
    """The candidates from every variant that serves the problem: first each one's best by the model.

    Of a problem with an epilogue the kernels are those that compute it; torch's operations follow a formulation.
    ``was_compiled`` tells which configs were compiled ahead; None where nothing was. A variant that raises is passed to
    ``raised``, and is no candidate; without ``raised`` its error propagates.
    """
    best: dict[Variant, Ranked] = {}
    if effort.ahead and was_compiled is not None:
        ahead = partial(_compiled_ahead, rates=ceilings, effort=effort, was_compiled=was_compiled)
        best = _ranked(pass_name, problem, device, ahead, raised)
    if not best:
        first = partial(model.candidates, ceilings=ceilings, most=effort.configs)
        best = _ranked(pass_name, problem, device, first, raised)
    found = [
        (place, Candidate(Selection(record, config, "candidate"), guess.ms))
        for record, pairs in best.items()
        for place, (config, guess) in _placed(record, pairs)
    ]
    if problem.epilogue is not None:
        found = [(place, each) for place, each in found if not each.is_kernel or each.finishes(problem)]
    kernels = [each.predicted_ms for _, each in found if each.is_kernel]
    if kernels:  # on a CPU there are none, and each formulation takes part
        found = [
            (place, each)
            for place, each in found
            if (each.is_kernel or effort.formulations)
            and each.predicted_ms <= (effort.near if place else effort.far) * min(kernels)
        ]
    return [each for _, each in sorted(found, key=lambda pair: (pair[0], pair[1].predicted_ms))]


def stored(
    problem: Problem, device: torch.device, passes: Sequence[str], tables: Sequence[Table], rates: Ceilings
) -> list[Group]:
    """The choices that one of these tables has for these passes of the problem's calls, that for CUDA graphs first: of
    its own keys, else of the nearest ones."""

    def candidate(entry: Entry) -> Candidate | None:
        record = usable(entry, problem, device)
        if record is None:
            return None
        ms = model.estimate(record, problem, entry.config, rates).ms
        return Candidate(Selection(record, entry.config, "stored"), ms)

    keys = zip(*(alike(Key.of(problem, name), device) for name in passes), strict=True)
    for like, table in product(keys, tables):
        choices = [entry.choices(graphs=True) for key, _, _ in like if (entry := table.find(key)) is not None]
        if len(choices) < len(passes):
            continue
        of_calls = dict.fromkeys((0, max(map(len, choices)) - 1))  # in CUDA graphs, and eager where one has another
        groups = [[candidate(each[min(place, len(each) - 1)]) for each in choices] for place in of_calls]
        found = [tuple(each for each in group if each is not None) for group in groups]
        if whole := [group for group in found if len(group) == len(passes)]:
            return whole
    return []


def joined(*fields: Iterable[Candidate]) -> list[Candidate]:
    """All of them in their order, each once."""
    found: dict[str, Candidate] = {}
    for each in chain(*fields):
        found.setdefault(each.label, each)
    return list(found.values())


def _ranked(
    pass_name: str, problem: Problem, device: torch.device, ranked: Callable[..., Ranked], raised: Raised | None
) -> dict[Variant, Ranked]:
    """The configs of each variant that serves the problem, where it has any; ``raised`` as of :func:`candidates`."""
    found = {}
    for record in variants(pass_name):
        try:
            if why_not(record, problem, device) is None and (mine := ranked(record, problem, device)):
                found[record] = mine
        except Exception as error:
            if raised is None:
                raise
            raised(record, error)
    return found


def _compiled_ahead(
    record: Variant, problem: Problem, device: torch.device, rates: Ceilings, effort: Effort, was_compiled: WasCompiled
) -> Ranked:
    """The best configs of a kernel that were compiled ahead; empty where none was.

    The rates of this device may rank the configs in another order than the rates that chose what to compile, so this
    looks at all configs.
    """
    if record.backend != "triton":
        return []
    ranked = model.candidates(record, problem, device, rates, model.MOST_CANDIDATES)
    mine = [pair for pair in ranked if was_compiled(record, pair[0])]
    return [pair for place, pair in _placed(record, mine) if place < effort.configs]


def _placed(
    record: Variant, ranked: list[tuple[Config, model.Estimate]]
) -> Iterator[tuple[int, tuple[Config, model.Estimate]]]:
    """Each with its place among those of its form."""
    before: Counter[str] = Counter()
    for pair in ranked:
        form = model.form(record, pair[0])
        yield before[form], pair
        before[form] += 1
