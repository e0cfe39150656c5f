"""Compiles launches in a thread of its own: no call waits for Triton's compiler.

Most of a compilation is in LLVM and ptxas, outside Python's lock. The thread ends when nothing is left to compile, and
with the program: what was not begun by then is left.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

Task = Callable[[], object]

_changed = threading.Condition()
_waiting: deque[Task] = deque()
_thread: threading.Thread | None = None

submitted = 0  # tasks so far


def submit(task: Task) -> None:
    """Has the task run behind those before it; it must not raise.

    Raises RuntimeError where no thread can be started; the task is then left.
    """
    global _thread, submitted
    with _changed:
        submitted += 1
        _waiting.append(task)
        if _thread is None or not _thread.is_alive():
            # No daemon: a thread that is killed inside LLVM would take the interpreter's end down with it.
            _thread = threading.Thread(target=_work, name="tritonconv-compiler", daemon=False)
            try:
                _thread.start()
            except RuntimeError:
                _thread = None
                _waiting.remove(task)
                raise


def wait(seconds: float | None = None) -> bool:
    """Waits until nothing is being compiled; False where that takes longer than ``seconds``."""
    with _changed:
        return _changed.wait_for(lambda: _thread is None or not _thread.is_alive(), seconds)


def _work() -> None:
    global _thread
    while True:
        with _changed:
            if not _waiting or not threading.main_thread().is_alive():
                _thread = None
                _changed.notify_all()
                return
            task = _waiting.popleft()
        task()


def _in_a_forked_child() -> None:
    """The thread is not there, what it had begun is not finished here, and it may have held the lock."""
    global _changed, _thread
    _changed, _thread = threading.Condition(), None
    _waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_forked_child)
