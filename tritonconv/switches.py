"""The switches of every choice: the variable ``TRITONCONV``, and a block whose calls a CUDA graph will hold."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

from tritonconv.errors import ArgumentError

VARIABLE, TORCH = "TRITONCONV", "torch"
REASON = f"{VARIABLE}={TORCH} in the environment: torch's own"

graphs: ContextVar[bool] = ContextVar("tritonconv_graphs", default=False)


@contextlib.contextmanager
def for_graphs() -> Iterator[None]:
    """Chooses the kernels that are fastest in a CUDA graph for the calls made inside the ``with`` block.

    Outside it a call takes those that are fastest in an eager call, where the host's time counts too. A capture by hand
    has its warm-up calls and the capture itself in one block; the backward of a call keeps the call's choices. The
    block reaches no other thread.
    """
    token = graphs.set(True)
    try:
        yield
    finally:
        graphs.reset(token)


def torch_only() -> bool:
    """Whether every pass is torch's own operation: ``TRITONCONV=torch``. Unset or empty it changes nothing.

    It is read when a pass is planned: a call that has its plan keeps it. ``tritonconv.use`` still forces a variant.
    Raises ArgumentError for any other value.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", TORCH):
        raise ArgumentError(
            f"environment variable {VARIABLE}: got {value!r}, expected {TORCH!r} (every call is torch's own operation) "
            "or nothing"
        )
    return value == TORCH
