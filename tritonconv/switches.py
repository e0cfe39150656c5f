"""The variable ``TRITONCONV`` of the environment, which switches the project's own computation off."""

from __future__ import annotations

import os

from tritonconv.errors import ArgumentError

VARIABLE, TORCH = "TRITONCONV", "torch"
REASON = f"{VARIABLE}={TORCH} in the environment: torch's own"


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
