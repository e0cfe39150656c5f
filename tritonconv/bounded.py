"""A dict that remembers what was worked out, and forgets the oldest: endless new image sizes must not grow it."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import TypeVar

Value = TypeVar("Value")


def remember(memory: dict, key: Hashable, value: Value, most: int) -> Value:
    """Stores the value and returns it; of more than ``most`` entries the oldest goes. Several threads may call it."""
    while len(memory) >= most and key not in memory:
        with contextlib.suppress(RuntimeError, StopIteration):  # another thread has just changed it
            memory.pop(next(iter(memory)), None)
    memory[key] = value
    return value
