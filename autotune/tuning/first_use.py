"""Tunes a kind of layer in its first calls, where the user has set ``torch.backends.cudnn.benchmark``.

torch's own convolutions are tuned by that switch in the same way. When a layer of a new kind is first planned, its
likely candidates are compiled in the background, while calls run what is chosen without a measurement. Then its plans
are dropped, and the next call times the candidates for at most SECONDS and stores the winners, as ``tritonconv tune``
does. It gives up silently where memory or time runs out, and does not time a kind whose choices are pinned.
``TRITONCONV_TUNE=never`` in the environment switches it off.

Under ``torch.distributed`` rank 0 tunes and writes the store; the others read it when they meet their next new kind.
Nothing waits for another process.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter

import torch

from tritonconv import dispatch
from tritonconv.autotune import choose, pins, store
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.online import NEVER, VARIABLE
from tritonconv.autotune.tuning.candidates import Candidate, Effort, candidates
from tritonconv.autotune.tuning.contest import Contest, OutOfTime
from tritonconv.autotune.tuning.journal import Journal
from tritonconv.autotune.tuning.tuner import ProblemTuner, Winner
from tritonconv.bounded import remember
from tritonconv.device import current
from tritonconv.dispatch import plan_of
from tritonconv.errors import StoreError
from tritonconv.kernels import triton_background
from tritonconv.lab.bench import gpu
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.rows import versions_of
from tritonconv.private import backward_pass
from tritonconv.problem import Problem

SECONDS = 3.0  # of one kind, in the one call that tunes it
TIMING = 0.5  # of these seconds; the gate and cuDNN's trials take the others
FREE_SHARE = 0.25  # of a GPU's free memory that the tensors of a kind may take
COPIES = 5  # of a problem's tensors that are there at once: operands, torch's answers, the candidate's twice, float64
EFFORT = Effort(2, 1.5, 2.5, SECONDS, formulations=False)
NOISE = 1.03  # a challenger must be faster by more; null rows would take too long here

log = logging.getLogger("tritonconv")


@dataclass
class Kind:
    """A kind of layer on a device: its candidates by pass once they are compiled, and whether it has had its turn."""

    problem: Problem
    device: torch.device
    fields: dict[str, list[Candidate]] = field(default_factory=dict)
    compiled: bool = False
    done: bool = False

    def compile(self) -> None:
        """Runs in the background; leaves out candidates that do not compile, and all of them if the ranking fails."""
        try:
            with current(self.device):  # a thread begins with the first GPU
                ceilings = choose.ceilings_of(self.device)
                found = {
                    name: candidates(self.problem, self.device, name, ceilings, EFFORT) for name in self.problem.passes
                }
            self.fields = {name: [each for each in field if self._compiles(each)] for name, field in found.items()}
        except Exception as error:
            log.debug("tritonconv: no candidates for %s: %s", self.problem, error)
            self.done = True
        self.compiled = True
        _drop_plans(self)

    def _compiles(self, candidate: Candidate) -> bool:
        name = candidate.selection.variant.pass_name
        launched = plan_of(self.problem, self.device, **{name: candidate.selection})
        return not candidate.is_kernel or launched.compile(name)


MOST_KINDS = 4096
_kinds: dict[tuple, Kind] = {}


def _drop_plans(kind: Kind) -> None:
    mine = kind_of(kind.problem.plain)  # whose plan keeps those of its epilogues
    dispatch.drop(lambda plan: plan.device == kind.device and kind_of(plan.problem.plain) == mine)


def kind_of(problem: Problem) -> str:
    """Problems of one kind share the choices of all passes."""
    return str(Key.of(problem, "forward"))


def offer(problem: Problem, device: torch.device) -> None:
    """Called before a problem is planned: begins to compile for a new kind, tunes one whose kernels are there."""
    if not _wanted(problem, device):
        return
    key = kind_of(problem), device
    kind = _kinds.get(key)
    if kind is None:
        kind = remember(_kinds, key, Kind(problem, device), MOST_KINDS)
        if _rank() != 0:
            kind.done = True
            choose.forget()  # what rank 0 has stored meanwhile is read anew
        elif _known(problem, device):
            kind.done = True
        else:
            try:
                triton_background.submit(kind.compile)
            except RuntimeError:  # no thread can be started
                kind.done = True
    if kind.compiled and not kind.done:
        kind.done = True
        _tune(kind)


def _wanted(problem: Problem, device: torch.device) -> bool:
    """The user's switch is set, and nothing forbids to measure now."""
    return bool(
        torch.backends.cudnn.benchmark
        and not gpu.switch_is_ours()
        and os.environ.get(VARIABLE) != NEVER
        and problem.n
        and problem.c_out
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.compiler.is_compiling()
        and backward_pass() == -1  # not in a backward pass
        and not torch.cuda.is_current_stream_capturing()
        and any(pins.find(problem.plain, device, name) is None for name in problem.passes)
    )


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _known(problem: Problem, device: torch.device) -> bool:
    """All passes were measured on this device."""
    table = store.read(device_name(device))
    return all(table.find(Key.of(problem, name)) is not None for name in problem.passes)


def _fits(problem: Problem, device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return COPIES * problem.bytes() <= FREE_SHARE * (free + unused)


def _tune(kind: Kind) -> None:
    begin = perf_counter()
    try:
        if not _fits(kind.problem, kind.device):
            return
        with _apart(kind.device):
            winners = _winners(kind, begin + SECONDS)
        if winners:
            versions, name = versions_of(kind.device), device_name(kind.device)
            entries = {
                str(Key.of(kind.problem, each.pass_name)): each.entry(kind.problem, versions) for each in winners
            }
            try:
                store.merge(store.Table(name, entries))
                choose.forget()
            except StoreError:  # this process has them all the same
                choose.adopt(name, entries)
    except Exception as error:  # the user asked for a layer, not for a measurement
        log.debug("tritonconv: %s was not tuned: %s: %s", kind.problem, type(error).__name__, error)
        return
    _drop_plans(kind)  # also plans made in the meantime, for example by a compiled graph
    speeds = ", ".join(f"{each.selection.variant.name} {each.torch_ms / each.ms:.2f} x torch" for each in winners)
    log.info("tritonconv tuned %s in %.1f s: %s", kind.problem, perf_counter() - begin, speeds or "no time")


def _winners(kind: Kind, deadline: float) -> list[Winner]:
    """The winners that were found in time; a pass has none where no answer is right, not even torch's."""
    journal = Journal.open(device_name(kind.device), lasting=False)
    case = Case(kind.problem, kind.device)
    contest = Contest(case, journal, choose.ceilings_of(kind.device), versions_of(kind.device), deadline)
    tuner = ProblemTuner(contest, kind.fields, TIMING * SECONDS, NOISE)
    found: list[Winner] = []
    with contextlib.suppress(OutOfTime):
        forward = tuner.forward()
        if forward is not None:
            found.append(forward)
            found += tuner.gradients(forward) if kind.problem.epilogue is None else ()
    return found


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Inside the block the caller's modes are off; random state and switches are as they were after it."""
    with (
        current(device),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cuda", enabled=False),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        gpu.cudnn_benchmark(device),
    ):
        yield


dispatch.set_tuner(offer)
