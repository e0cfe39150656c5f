"""Variants that are forced, for a block of code or for a call."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar, copy_context
from typing import Any

import torch

from tritonconv.autotune.choose import Selection
from tritonconv.errors import ArgumentError
from tritonconv.kernels.registry import variant
from tritonconv.private import backward_pass

# (variant, its config as items, None for the default), sorted by name.
Forced = tuple[tuple[str, tuple[tuple[str, int], ...] | None], ...]
forced: ContextVar[Forced] = ContextVar("tritonconv_forced", default=())


def forced_variants() -> tuple[str, ...]:
    """The names that :func:`use` has in force here."""
    return tuple(name for name, _ in forced.get())


@contextlib.contextmanager
def use(*names: str) -> Iterator[None]:
    """Forces the named variants, at most one per pass, for the calls made inside the ``with`` block.

    A call keeps its variants for its backward passes, wherever those run, and for its recomputation by activation
    checkpointing. A compiled graph uses the variants in force where each of its parts runs; one of fixed sizes is
    traced anew where they change its choices. Calls under a transform or a tracer still go to torch itself. Blocks
    nest; the inner one wins per pass.

    Raises ArgumentError for an unknown name or two names of one pass; a call that a forced variant does not serve
    raises VariantNotApplicable with the reason.
    """
    chosen: dict[str, str] = {}
    for name in names:
        pass_name = variant(name).pass_name
        if pass_name in chosen:
            raise ArgumentError(f"use: one variant per pass, got {chosen[pass_name]!r} and {name!r} for {pass_name}")
        chosen[pass_name] = name
    with _forcing((name, None) for name in names):
        yield


def in_force(call: Callable[[], Any], *names: str) -> Callable[[], Any]:
    """The call with the variants forced as by :func:`use`, without the cost of entering a block each time.

    It sees the context variables as they are now. Raises ArgumentError as :func:`use` does.
    """
    context = copy_context()
    with use(*names):
        context.run(forced.set, forced.get())
    return lambda: context.run(call)


def pinned(*selections: Selection) -> contextlib.AbstractContextManager[None]:
    """As :func:`use`, each variant with the selection's config; at most one per pass."""
    return _forcing((selection.variant.name, tuple(selection.config.items())) for selection in selections)


# By the id of a trained weight: the weight, and the variants in force in the last call with it.
trained: dict[int, tuple[weakref.ref[torch.Tensor], Forced]] = {}


def restore_forced(weight: torch.Tensor) -> contextlib.AbstractContextManager[None] | None:
    """A block with the variants of a weight's last call where a checkpoint recomputes it in a backward pass, else None.

    Every eager call runs this.
    """
    named, key = forced.get(), id(weight)
    if named:
        if weight.requires_grad:
            trained[key] = weakref.ref(weight, lambda gone: trained.pop(key, None)), named
        return None
    if not trained or key not in trained:
        return None
    if backward_pass() == -1:
        del trained[key]
        return None
    _, named = trained[key]
    return _forcing(named)


@contextlib.contextmanager
def _forcing(entries: Iterable[tuple]) -> Iterator[None]:
    by_pass = {variant(name).pass_name: (name, items) for name, items in (*forced.get(), *entries)}
    token = forced.set(tuple(sorted(by_pass.values(), key=lambda pair: pair[0])))
    try:
        yield
    finally:
        forced.reset(token)
