"""Processes that compile, each one request after the other, and that can be killed meanwhile.

We do not use multiprocessing: it re-imports the user's main script, which need not guard against that, and it cannot
kill a worker in mid-compile. A process that ends costs the request that it had, and another takes its place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from types import MappingProxyType
from typing import Any, TypeVar

from tritonconv.kernels.triton_compiled import CompiledWarning

Result = TypeVar("Result")
Own = TypeVar("Own", bound="Workers")

# A process finds the modules where this one does.
WORKER = "import sys; sys.path[:] = sys.argv[1:]; from tritonconv.lab.inspection.workers import serve; serve()"

CRASHED, ENDED = "the compiler ended its process", "compiling ended before this launch"
GIVEN_UP = "not begun, for the compilers before it ended their processes one after the other"


class Workers:
    """Up to ``processes`` of them, each started when it is first needed; a context manager, whose end kills them.

    ``environment`` holds variables of the processes; with ``quiet`` their stderr is dropped. Where more of them end one
    after the other than there are, no other is started.
    """

    def __init__(
        self, processes: int, environment: Mapping[str, str] = MappingProxyType({}), quiet: bool = False
    ) -> None:
        self.started: list[subprocess.Popen] = []
        self._idle: list[Connection] = []
        self._variables, self._quiet, self._most_crashes = environment, quiet, processes
        self._crashes = 0  # one after the other
        self._ended = False
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(processes)  # each waits for a process

    def __enter__(self: Own) -> Own:
        return self

    def submit(self, function: Callable[..., Result], *arguments: Any, lost: Callable[[str], Result]) -> Future[Result]:
        """The result of ``function`` (of a module) in a process, or ``lost(reason)`` where that ends without one."""
        return self._threads.submit(self._answer, (function, arguments), lost)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._ended = True
        for worker in self.started:
            kill(worker)
        self._threads.shutdown(cancel_futures=True)  # at once: no process is left to wait for
        for worker in self.started:
            worker.wait()
        for pipe in self._idle:
            pipe.close()

    def _answer(self, request: tuple, lost: Callable[[str], Any]) -> Any:
        try:
            pipe = self._pipe()
            if pipe is None:
                return lost(ENDED if self._ended else GIVEN_UP)
            pipe.send(request)
            answer = pipe.recv()
        except (OSError, EOFError):  # there is no such Python, or it ended before the request or its answer came
            self._crashes += 1  # of the compiler, or the end
            return lost(ENDED if self._ended else CRASHED)
        self._idle.append(pipe)
        self._crashes = 0
        return answer

    def _pipe(self) -> Connection | None:
        """To a process that waits for a request; None at the end, and after too many crashes."""
        with self._lock:
            if self._ended or self._crashes > self._most_crashes:
                return None
            if self._idle:
                return self._idle.pop()
            here, there = Pipe()
            errors = subprocess.DEVNULL if self._quiet else None
            with there:
                # Its own process group, which a kill reaches with the assembler in it, and Ctrl-C does not.
                worker = subprocess.Popen(
                    [sys.executable, "-c", WORKER, *map(str, sys.path)], env={**os.environ, **self._variables},
                    stdin=there.fileno(), stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
                )  # fmt: skip
            self.started.append(worker)
            return here


def kill(worker: subprocess.Popen) -> None:
    """Ends a process that leads a group, and the group. Triton's files are complete or not there, so none is spoilt."""
    with contextlib.suppress(ProcessLookupError):  # where children are not waited for, it may be gone
        if hasattr(os, "killpg"):
            os.killpg(worker.pid, signal.SIGKILL)
        else:
            worker.kill()


def serve() -> None:
    """A process of the pool: answers one request after the other until the pipe, which is its stdin, ends."""
    warnings.simplefilter("ignore", CompiledWarning)  # the process that started this one says it
    os.dup2(2, 1)  # where compilers print
    with Connection(os.dup(0)) as pipe, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # so that no child holds the pipe open
        with contextlib.suppress(EOFError):
            while True:
                function, arguments = pipe.recv()
                pipe.send(function(*arguments))
