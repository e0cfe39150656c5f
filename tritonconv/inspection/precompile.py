"""Compiles kernels in other processes, ahead of their first launch here, into Triton's cache on disk.

A process compiles for the GPU's target without touching the GPU, so the tuner's candidates are ready when their turn to
be timed comes. Whatever fails here is left to the launch itself, which says why.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from types import TracebackType

import torch

from tritonconv.inspection.compiling import compile_launch, compiling_for, products_in
from tritonconv.inspection.targets import TARGETS
from tritonconv.kernels.registry import Config, have_triton, variant
from tritonconv.problem import Problem

MOST_PROCESSES = 14
Job = tuple[str, Problem, Config]


def target_of(device: torch.device) -> str | None:
    """The name of the target of a CUDA device, None where none is listed for it or nothing can compile."""
    if device.type != "cuda" or not have_triton() or torch.version.hip is not None:
        return None
    name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return name if name in TARGETS else None


@dataclass
class Precompiler:
    """A pool of compiling processes for one target; a context manager. With ``target`` None it does nothing."""

    target: str | None
    precision: str = "tf32"
    processes: int = field(default_factory=lambda: max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 2)))
    _pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Precompiler:
        if self.target is not None:
            # A forked child would share the threads' locks of torch and LLVM.
            self._pool = ProcessPoolExecutor(self.processes, mp_context=multiprocessing.get_context("spawn"))
        return self

    def start(self, jobs: Iterable[Job]) -> list[Future]:
        """Begins with the jobs behind those that wait already."""
        if self._pool is None or self.target is None:
            return []
        found = []
        with contextlib.suppress(BrokenProcessPool):  # a crash of the compiler: the rest is compiled at its launch
            for name, problem, config in jobs:
                found.append(self._pool.submit(compile_one, name, problem, dict(config), self.target, self.precision))
        return found

    def finish(self, started: Iterable[Future], seconds: float | None = None) -> None:
        """Waits until the jobs are done, at most so many seconds."""
        wait(list(started), timeout=seconds)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def compile_one(name: str, problem: Problem, config: Config, target: str, precision: str) -> bool:
    """Whether the launch of a variant compiled; in this process, into the cache on disk."""
    try:
        with compiling_for(TARGETS[target]), products_in(precision):
            compile_launch(variant(name), problem, config)
        return True
    except Exception:  # the launch itself will say so
        return False
