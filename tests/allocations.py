"""The memory that torch allocates on the CPU during a call, as its profiler records it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes of each allocation, and negative those of each release, in their order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()  # until the record ends
    del kept
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]  # type: ignore[union-attr]
    return [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that are held at once beside those from before the call; the result counts."""
    return max(accumulate(allocations(call)), default=0)


def largest_allocation(call: Callable[[], Any]) -> int:
    return max(allocations(call), default=0)
