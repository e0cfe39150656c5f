"""An answer computed twice in memory full of NaN: what no kernel writes shows, and what differs from run to run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch fills new memory with NaN while it is asked for deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        fresh = [torch.empty(9), torch.ones(1).new_empty(9), torch.empty_like(torch.ones(9)), torch.ones(1).resize_(9)]
        assert all(t[1:].isnan().all() for t in fresh)
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Also where both are NaN, whose bits nobody promises."""
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def twice(call: Callable[[], list]) -> list:
    """The tensors that the call returns, which it returned twice; None stays None."""
    with poisoned_memory():
        first, second = call(), call()
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one is other is None or same_bits(one, other)
    return first
