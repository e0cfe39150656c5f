"""``tritonconv.tune``: tunes the problems of a model, or problems given as such; once per group of processes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from tritonconv import dispatch
from tritonconv.autotune import choose, store
from tritonconv.autotune.key import device_name
from tritonconv.autotune.store import Entry
from tritonconv.autotune.tuning.session import Session, tasks_of
from tritonconv.autotune.tuning.tasks import Report, Task
from tritonconv.convert import TORCHS, convert
from tritonconv.errors import ArgumentError, ArgumentTypeError
from tritonconv.lab.bench.progress import Progress
from tritonconv.problem import Problem

Tunable = nn.Module | Problem | Iterable[Problem]


def tune(
    target: Tunable,
    *inputs: Any,
    seconds: float | None = None,
    device: torch.device | str | None = None,
    folder: str | os.PathLike | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measures the variants on this machine for every transposed convolution of ``target`` and stores the fastest.

    Args:
        target: a model, which is run once on ``inputs`` to see its problems (its ``torch.nn.ConvTranspose3d`` layers
            count as if converted; the model is left as it was); or a Problem, or several.
        seconds: a budget in seconds; everything decided by then is stored, and the same call goes on from there.
        device: where to tune problems; a model is tuned on the device of the tensors that its layers got.
        folder: of the store; None is the user's own (``TRITONCONV_CACHE``, else the XDG cache directory).
        again: also measure what is stored already.

    Returns what was decided. Calls made afterwards use it, in this process and in later ones. Under
    ``torch.distributed`` rank 0 measures and the others wait for its result.

    Raises ArgumentTypeError or ArgumentError for a target that holds no problem, StoreError where the store cannot be
    written, before anything is measured.
    """
    tasks, where = _tasks(target, inputs, device)
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ArgumentError(f"tune: seconds expects a number above 0, got {seconds!r}")
    session = Session(where, None if folder is None else Path(folder), seconds, again)
    shown = progress or Progress()
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (_on_rank_0 if several else Session.run)(session, tasks, shown)


def problems_of(model: nn.Module, *inputs: Any) -> list[tuple[Problem, torch.device]]:
    """The distinct problems of a model's transposed convolutions, seen while it runs once; the model stays as it was.

    Its buffers and the random state are put back too. Raises whatever the model raises.
    """
    classes = {module: type(module) for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers() if not is_lazy(buffer)}
    convert(model)
    try:
        with dispatch.watch() as seen, torch.no_grad(), torch.random.fork_rng():
            model(*inputs)
            for buffer, before in buffers.items():
                buffer.copy_(before)
    finally:
        for module, cls in classes.items():
            if type(module) is not cls:  # a lazy layer has become a real one, of our class
                module.__class__ = TORCHS.get(type(module), cls) if issubclass(cls, LazyModuleMixin) else cls
    return seen


def _tasks(target: Tunable, inputs: tuple, device: torch.device | str | None) -> tuple[list[Task], torch.device]:
    if isinstance(target, nn.Module):
        seen = problems_of(target, *inputs)
        if not seen:
            raise ArgumentError("tune: the model ran no 3-D transposed convolution that tritonconv serves")
        places = {place for _, place in seen}
        if len(places) > 1:
            raise ArgumentError(
                f"tune: the model's layers ran on {', '.join(map(str, places))}; tune one device a time"
            )
        return tasks_of(problem for problem, _ in seen), places.pop()
    problems = [target] if isinstance(target, Problem) else list(target) if isinstance(target, Iterable) else None
    if problems is None or not all(isinstance(each, Problem) for each in problems):
        raise ArgumentTypeError(f"tune: target expects a model, a Problem or several Problems, got {target!r}")
    if inputs or not problems:
        raise ArgumentError("tune: problems take no inputs" if inputs else "tune: target holds no problem")
    return tasks_of(problems), torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _on_rank_0(session: Session, tasks: list[Task], progress: Progress) -> Report:
    """Rank 0 tunes; its table and its report, or its failure, reach every rank."""
    message: list[Any] = [None]
    failure: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            report = session.run(tasks, progress)
            entries = store.read(report.device, session.folder).entries
            message = [(report.device, {key: entry.to_json() for key, entry in entries.items()}, None)]
        except Exception as error:
            failure, message = error, [(None, {}, f"{type(error).__name__}: {error}")]
    torch.distributed.broadcast_object_list(message, src=0)
    name, data, problem = message[0]
    if failure is not None:
        raise failure
    if problem is not None:
        raise RuntimeError(f"tune: rank 0 failed: {problem}")
    if torch.distributed.get_rank() != 0:
        report = Report(name, known=tasks)
        own = device_name(session.device)
        choose.adopt(own, {key: Entry.from_json(entry) for key, entry in data.items()})
        dispatch.forget()
    return report
