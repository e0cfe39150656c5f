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
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

import torch

from tritonconv.kernels.registry import file_of, have_triton, load, variant
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.triton_compiled import CompiledWarning
from tritonconv.kernels.variant import Config
from tritonconv.lab.bench.failures import disqualifies, told
from tritonconv.lab.inspection.compiling import compile_launch, compiling_for, products_in
from tritonconv.lab.inspection.launchers import compile_launchers
from tritonconv.lab.inspection.launches import Kernel, Launches, read_active
from tritonconv.precision import float32_precision
from tritonconv.problem import Problem

MOST_PROCESSES = 14
Job = tuple[str, Problem, Config]

# A process finds the modules where this one does. What its compilers print is no answer, and goes to stderr.
WORKER = (
    "import os, sys; answers = os.dup(1); os.dup2(2, 1); sys.path[:] = sys.argv[1:]; "
    "from tritonconv.lab.inspection.precompile import serve; serve(answers)"
)
LENGTH = struct.Struct("<I")  # in bytes, of the pickled answer that follows

CRASHED, ENDED = "the compiler ended its process", "compiling ended before this launch"
GIVEN_UP = "not begun, for the compilers before it ended their processes one after the other"


@dataclass(frozen=True)
class Answer:
    """What became of a job: its kernels, each with the folder that Triton's cache keeps it in, or why there are none.

    ``files`` are compiled host sides of launches (see :mod:`tritonconv.lab.inspection.launchers`). ``expected``: the
    compiler refuses such a launch, and nothing is wrong with the program.
    """

    kernels: tuple[tuple[Kernel, Path], ...] = ()
    files: tuple[Path, ...] = ()
    error: str = ""
    expected: bool = False

    @property
    def ok(self) -> bool:
        return not self.error


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
    ``environment`` holds variables of the processes; launches in the folder ``ahead`` are not compiled. What the
    compilers print is dropped with ``quiet``.
    """

    target: str | None
    processes: int = field(default_factory=lambda: max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 2)))
    environment: Mapping[str, str] = field(default_factory=dict)
    ahead: Launches | None = field(default_factory=read_active)
    quiet: bool = False
    _pool: ThreadPoolExecutor | None = None
    _workers: list[subprocess.Popen] = field(default_factory=list)
    _idle: list[subprocess.Popen] = field(default_factory=list)
    _lost: int = 0  # one after the other
    _ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Precompiler:
        if self.target is not None:
            self._pool = ThreadPoolExecutor(self.processes)
        return self

    def start(self, jobs: Iterable[Job]) -> list[Future[Answer]]:
        """Begins with the jobs behind those that wait already; float32 is multiplied as torch's switch says now."""
        return [] if self._pool is None else [self._started(*job) for job in jobs]

    def _started(self, name: str, problem: Problem, config: Config) -> Future[Answer]:
        assert self._pool is not None and self.target is not None
        said = float32_precision()
        if self.ahead is not None and self.ahead.has(name, problem, config, said, self.target):
            done: Future[Answer] = Future()
            done.set_result(Answer())
            return done
        job = name, problem, dict(config), self.target, said, file_of(name)
        return self._pool.submit(self._compiled, pickle.dumps(job))

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

    def _compiled(self, job: bytes) -> Answer:
        """In a thread of the pool: what a process answers to the job."""
        try:
            worker = self._worker()
            if worker is None:
                return Answer(error=ENDED if self._ended else GIVEN_UP)
            assert worker.stdin is not None and worker.stdout is not None  # pipes
            worker.stdin.write(job)
            (length,) = LENGTH.unpack(_exactly(worker.stdout, LENGTH.size))
            answer = pickle.loads(_exactly(worker.stdout, length))
            self._idle.append(worker)
            self._lost = 0
            return answer
        except (OSError, EOFError):  # there is no such Python, or it ended before the job or its answer came
            self._lost += 1  # a crash of the compiler, or the end
            return Answer(error=ENDED if self._ended else CRASHED)

    def _worker(self) -> subprocess.Popen | None:
        """A process that waits for a job; None at the end, and where one after the other ends without an answer."""
        with self._lock:
            if self._ended or self._lost > self.processes:
                return None
            if self._idle:
                return self._idle.pop()
            command = [sys.executable, "-c", WORKER, *map(str, sys.path)]
            errors = subprocess.DEVNULL if self.quiet else None
            pipe, variables = subprocess.PIPE, {**os.environ, **self.environment}
            # Its own process group, which a kill reaches with the assembler in it, and Ctrl-C does not.
            worker = subprocess.Popen(
                command, bufsize=0, stdin=pipe, stdout=pipe, stderr=errors, env=variables, start_new_session=True
            )
            self._workers.append(worker)
            return worker


def _exactly(pipe: IO[bytes], length: int) -> bytes:
    """So many bytes; raises EOFError where the pipe ends before."""
    found = b""
    while len(found) < length:
        more = pipe.read(length - len(found))
        if not more:
            raise EOFError
        found += more
    return found


def kill(worker: subprocess.Popen) -> None:
    """Ends a process that leads a group, and the group. Triton's files are complete or not there, so none is spoilt."""
    with contextlib.suppress(ProcessLookupError):  # where children are not waited for, it may be gone
        if hasattr(os, "killpg"):
            os.killpg(worker.pid, signal.SIGKILL)
        else:
            worker.kill()


def serve(answers: int) -> None:
    """A compiling process: a job after the other from stdin, for each an answer to ``answers``, until stdin ends."""
    warnings.simplefilter("ignore", CompiledWarning)  # the process that started this one says it
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer = pickle.dumps(compile_one(*job))
        with open(answers, "wb", closefd=False) as pipe:
            pipe.write(LENGTH.pack(len(answer)) + answer)


def compile_one(name: str, problem: Problem, config: Config, target: str, precision: str, file: Path | None) -> Answer:
    """Compiles the launch of a variant in this process, into the cache on disk.

    ``file`` is that of a variant outside the project, which is loaded once.
    """
    try:
        if file is not None and file_of(name) is None:
            load(file)
        with compiling_for(TARGETS[target]), products_in(precision):
            kernels = [kernel for _, kernel in compile_launch(variant(name), problem, config)]
        return Answer(
            tuple((Kernel.of(kernel), Path(next(iter(kernel.metadata_group.values()))).parent) for kernel in kernels),
            compile_launchers(kernels),
        )
    except Exception as error:  # the launch itself will say so
        return Answer(error=told(error), expected=disqualifies(error))
