"""Processes that compile, each one request after the other, and that can be killed meanwhile.

We do not use multiprocessing: it re-imports the user's main script, which need not guard against that, and it cannot
kill a worker in mid-compile. A process that ends costs the request that it had, and another takes its place.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import IO, Any, TypeVar

from tritonconv.kernels.triton_compiled import CompiledWarning

Result = TypeVar("Result")
Own = TypeVar("Own", bound="Workers")

# A process finds the modules where this one does. What its compilers print is no answer, and goes to stderr.
WORKER = (
    "import os, sys; answers = os.dup(1); os.dup2(2, 1); sys.path[:] = sys.argv[1:]; "
    "from tritonconv.lab.inspection.workers import serve; serve(answers)"
)
LENGTH = struct.Struct("<I")  # in bytes, of the pickled answer that follows

CRASHED, ENDED = "the compiler ended its process", "compiling ended before this launch"
GIVEN_UP = "not begun, for the compilers before it ended their processes one after the other"


class Workers:
    """Up to ``processes`` of them, each started when it is first needed; a context manager, whose end kills them.

    ``environment`` holds variables of the processes; with ``quiet`` what they print on stderr is dropped. Where more
    than ``crashes`` of them end one after the other, no other is started.
    """

    def __init__(
        self,
        processes: int,
        environment: Mapping[str, str] = MappingProxyType({}),
        quiet: bool = False,
        crashes: float = math.inf,
    ) -> None:
        self.started: list[subprocess.Popen] = []
        self._idle: list[subprocess.Popen] = []
        self._variables, self._quiet, self._most_crashes = environment, quiet, crashes
        self._crashes = 0  # one after the other
        self._ended = False
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(processes)  # each waits for a process

    def __enter__(self: Own) -> Own:
        return self

    def submit(self, function: Callable[..., Result], *arguments: Any, lost: Callable[[str], Result]) -> Future[Result]:
        """The result of ``function`` (of a module) in a process; where none comes, that of ``lost`` of the reason."""
        return self._threads.submit(self._answer, pickle.dumps((function, arguments)), lost)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._ended = True
        for worker in self.started:
            kill(worker)
        self._threads.shutdown(cancel_futures=True)  # at once: no process is left to wait for
        for worker in self.started:
            with worker:  # closes its pipes
                pass

    def _answer(self, request: bytes, lost: Callable[[str], Any]) -> Any:
        try:
            worker = self._worker()
            if worker is None:
                return lost(ENDED if self._ended else GIVEN_UP)
            assert worker.stdin is not None and worker.stdout is not None  # pipes
            worker.stdin.write(request)
            (length,) = LENGTH.unpack(_exactly(worker.stdout, LENGTH.size))
            answer = pickle.loads(_exactly(worker.stdout, length))
            self._idle.append(worker)
            self._crashes = 0
            return answer
        except (OSError, EOFError):  # there is no such Python, or it ended before the request or its answer came
            self._crashes += 1  # of the compiler, or the end
            return lost(ENDED if self._ended else CRASHED)

    def _worker(self) -> subprocess.Popen | None:
        """A process that waits for a request; None at the end, and after too many crashes."""
        with self._lock:
            if self._ended or self._crashes > self._most_crashes:
                return None
            if self._idle:
                return self._idle.pop()
            command = [sys.executable, "-c", WORKER, *map(str, sys.path)]
            errors = subprocess.DEVNULL if self._quiet else None
            pipe, variables = subprocess.PIPE, {**os.environ, **self._variables}
            # Its own process group, which a kill reaches with the assembler in it, and Ctrl-C does not.
            worker = subprocess.Popen(
                command, bufsize=0, stdin=pipe, stdout=pipe, stderr=errors, env=variables, start_new_session=True
            )
            self.started.append(worker)
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
    """A process of the pool: answers a request after the other from stdin to ``answers``, until stdin ends."""
    warnings.simplefilter("ignore", CompiledWarning)  # the process that started this one says it
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer = pickle.dumps(function(*arguments))
        with open(answers, "wb", closefd=False) as pipe:
            pipe.write(LENGTH.pack(len(answer)) + answer)
