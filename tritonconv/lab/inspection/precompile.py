"""Compiles kernels in other processes, ahead of their first launch here, into Triton's cache on disk.

A process compiles for the GPU's target without touching the GPU, so the tuner's candidates are ready when their turn to
be timed comes. A failure here is left to the launch itself, which says why.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from tritonconv.kernels.registry import file_of, have_triton, load, variant
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.variant import Config
from tritonconv.lab.bench.failures import disqualifies, one_line
from tritonconv.lab.inspection.compiling import compile_launch, compiling_for, products_in
from tritonconv.lab.inspection.launchers import compile_launchers
from tritonconv.lab.inspection.launches import Kernel, Launch, Launches, read_active
from tritonconv.lab.inspection.workers import Workers
from tritonconv.precision import float32_precision
from tritonconv.problem import Problem

MOST_PROCESSES = 14
Request = tuple[str, Problem, Config]  # a launch: the variant, the problem and the config


@dataclass(frozen=True)
class Answer:
    """The result of a request: the launch, None where it was compiled before, or the ``error``.

    ``expected``: the compiler refuses such a launch, and nothing is wrong with the program.
    """

    launch: Launch | None = None
    error: str = ""
    expected: bool = False

    @property
    def ok(self) -> bool:
        return not self.error


def ensure_compiler(
    compiler: Precompiler | None, device: torch.device
) -> contextlib.AbstractContextManager[Precompiler]:
    """The given compiler, which an outer block ends; where it is None, one for the device, which this block ends."""
    return Precompiler(target_of(device), ahead=read_active()) if compiler is None else contextlib.nullcontext(compiler)


def target_of(device: torch.device) -> str | None:
    """The name of the target of a CUDA device, None where none is listed for it or nothing can compile."""
    if device.type != "cuda" or not have_triton() or torch.version.hip is not None:
        return None
    name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return name if name in TARGETS else None


class Precompiler(Workers):
    """Workers that compile launches for one target; with ``target`` None they compile nothing.

    Launches in the folder ``ahead`` are not compiled again.
    """

    def __init__(
        self,
        target: str | None,
        processes: int | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
        ahead: Launches | None = None,
        quiet: bool = False,
    ) -> None:
        processes = processes or max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 2))
        super().__init__(processes, environment, quiet)
        self.target, self.ahead = target, ahead

    def start(self, requests: Iterable[Request]) -> list[Future[Answer]]:
        """Puts the requests behind those that wait already; float32 is multiplied as torch's switch says now."""
        return [] if self.target is None else [self._start(*request, self.target) for request in requests]

    def _start(self, name: str, problem: Problem, config: Config, target: str) -> Future[Answer]:
        launch = name, problem, dict(config), float32_precision(), target
        if self.ahead is not None and self.ahead.has(*launch):
            done: Future[Answer] = Future()
            done.set_result(Answer())
            return done
        return self.submit(compile_one, *launch, file_of(name), lost=lambda reason: Answer(error=reason))

    def finish(self, started: Iterable[Future], seconds: float | None = None) -> None:
        """Waits until the requests are done, at most so many seconds."""
        wait(list(started), timeout=seconds)


def compile_one(name: str, problem: Problem, config: Config, precision: str, target: str, file: Path | None) -> Answer:
    """Compiles the launch of a variant in this process, into the cache on disk.

    ``file`` is that of a variant outside the project, which is loaded once.
    """
    try:
        if file is not None and file_of(name) is None:
            load(file)
        with compiling_for(TARGETS[target]), products_in(precision):
            compiled = [kernel for _, kernel in compile_launch(variant(name), problem, config)]
        kernels = tuple(map(Kernel.of, compiled))
        modules = tuple((file.parent.name, file.name) for file in compile_launchers(compiled))
        return Answer(Launch(name, problem, config, precision, target, kernels, modules))
    except Exception as error:  # the launch itself will say so
        return Answer(error=one_line(error), expected=disqualifies(error))
