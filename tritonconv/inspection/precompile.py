"""Compiles kernels in other processes, ahead of their first launch here, into Triton's cache on disk.

A process compiles for the GPU's target without touching the GPU, so the tuner's candidates are ready when their turn to
be timed comes. Whatever fails here is left to the launch itself, which says why.

The processes are no multiprocessing's: those begin with the user's script, which need not guard against that, and they
cannot be ended while they compile.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

from tritonconv.inspection.compiling import compile_launch, compiling_for, products_in
from tritonconv.inspection.targets import TARGETS
from tritonconv.kernels.registry import Config, file_of, have_triton, load, variant
from tritonconv.problem import Problem

MOST_PROCESSES = 14
Job = tuple[str, Problem, Config]

# A process finds the modules where this one does. What its compilers print is no answer, and goes to stderr.
WORKER = (
    "import os, sys; answers = os.dup(1); os.dup2(2, 1); sys.path[:] = sys.argv[1:]; "
    "from tritonconv.inspection.precompile import serve; serve(answers)"
)
DONE, FAILED = b"+", b"-"


def shared(compiler: Precompiler | None, device: torch.device) -> contextlib.AbstractContextManager[Precompiler]:
    """The compiler of an outer block, which ends it; None: one for the device, for this block."""
    return Precompiler(target_of(device)) if compiler is None else contextlib.nullcontext(compiler)


def target_of(device: torch.device) -> str | None:
    """The name of the target of a CUDA device, None where none is listed for it or nothing can compile."""
    if device.type != "cuda" or not have_triton() or torch.version.hip is not None:
        return None
    name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return name if name in TARGETS else None


@dataclass
class Precompiler:
    """Compiling processes for one target, each with a thread that waits for it; a context manager.

    With ``target`` None it does nothing. At the end of the block the processes end too, in the midst of a kernel.
    """

    target: str | None
    processes: int = field(default_factory=lambda: max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 2)))
    _pool: ThreadPoolExecutor | None = None
    _workers: list[subprocess.Popen] = field(default_factory=list)
    _idle: list[subprocess.Popen] = field(default_factory=list)
    _lost: int = 0
    _ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Precompiler:
        if self.target is not None:
            self._pool = ThreadPoolExecutor(self.processes)
        return self

    def start(self, jobs: Iterable[Job]) -> list[Future]:
        """Begins with the jobs behind those that wait already; float32 is multiplied as torch's switch says now."""
        if self._pool is None:
            return []
        said = _precision()
        return [
            self._pool.submit(
                self._compiled, pickle.dumps((name, problem, dict(config), self.target, said, file_of(name)))
            )
            for name, problem, config in jobs
        ]

    def finish(self, started: Iterable[Future], seconds: float | None = None) -> None:
        """Waits until the jobs are done, at most so many seconds."""
        wait(list(started), timeout=seconds)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is None:
            return
        with self._lock:
            self._ended = True
        for worker in self._workers:
            kill(worker)
        self._pool.shutdown(cancel_futures=True)  # at once: no process is left to wait for
        for worker in self._workers:
            with worker:  # closes its pipes
                pass

    def _compiled(self, job: bytes) -> bool:
        """In a thread of the pool: whether a process compiled the job."""
        try:
            worker = self._worker()
            if worker is None:
                return False
            assert worker.stdin is not None and worker.stdout is not None  # pipes
            worker.stdin.write(job)
            answer = worker.stdout.read(1)
            if answer:
                self._idle.append(worker)
                return answer == DONE
        except OSError:  # there is no such Python, or it ended before the job came
            pass
        self._lost += 1  # a crash of the compiler, or the end
        return False

    def _worker(self) -> subprocess.Popen | None:
        """A process that waits for a job; None at the end, and where one after the other ends without an answer."""
        with self._lock:
            if self._ended or self._lost > self.processes:
                return None
            if self._idle:
                return self._idle.pop()
            command = [sys.executable, "-c", WORKER, *map(str, sys.path)]
            # Its own process group, which a kill reaches with the assembler in it, and Ctrl-C does not.
            worker = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            self._workers.append(worker)
            return worker


def _precision() -> str:
    from tritonconv.kernels.triton_launch import PRECISIONS  # needs Triton

    return PRECISIONS.get(torch.backends.cudnn.conv.fp32_precision, "ieee")  # type: ignore[attr-defined]


def kill(worker: subprocess.Popen) -> None:
    """Ends a process that leads a group, and the group. Triton's files are complete or not there, so none is spoilt."""
    with contextlib.suppress(ProcessLookupError):  # where children are not waited for, it may be gone
        if hasattr(os, "killpg"):
            os.killpg(worker.pid, signal.SIGKILL)
        else:
            worker.kill()


def serve(answers: int) -> None:
    """A compiling process: a job after the other from stdin, for each a byte to ``answers``, until stdin is closed."""
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        os.write(answers, DONE if compile_one(*job) else FAILED)


def compile_one(name: str, problem: Problem, config: Config, target: str, precision: str, file: Path | None) -> bool:
    """Whether the launch of a variant compiled; in this process, into the cache on disk.

    ``file`` is that of a variant outside the project, which is loaded once.
    """
    try:
        if file is not None and file_of(name) is None:
            load(file)
        with compiling_for(TARGETS[target]), products_in(precision):
            compile_launch(variant(name), problem, config)
        return True
    except Exception:  # the launch itself will say so
        return False
