"""The calls by which the public operation chooses on a CPU, before it is timed: a program soon has them behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tritonconv.autotune import online
from tritonconv.autotune.online import MOST_ROUNDS, MOST_TRIED

MOST_CALLS = 2 * (1 + MOST_TRIED) * MOST_ROUNDS  # at most: of the forward, and of both gradients
Result = TypeVar("Result")


def let_choose(call: Callable[[], Result]) -> Result:
    """Calls until a call tries nothing, which is once where nothing is tried; returns the last answer."""
    for _ in range(MOST_CALLS):
        before = online.runs_so_far()
        result = call()
        if online.runs_so_far() == before:
            break
    return result
