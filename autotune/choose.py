"""Which variant and config serve a pass: the tuned choice where there is one, else the rules.

In this order: the entry of exactly this key; the entry of half or of twice as many voxels, where the cost model does
not speak against it; what the rules or the model say without measurement. It never tunes and never fails: what cannot
be used is passed over. Asked once per distinct call; the plan that is made of it is kept by dispatch.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from tritonconv.autotune import rules, store
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.sources import source_hash
from tritonconv.autotune.store import Entry, Table
from tritonconv.errors import ArgumentError
from tritonconv.kernels.registry import Config, Variant, variant
from tritonconv.problem import Problem


class Selection(NamedTuple):
    """What one pass runs, and why."""

    variant: Variant
    config: Config
    reason: str


def choose(problem: Problem, device: torch.device, pass_name: str) -> Selection:
    """The variant, its config and the reason."""
    table = table_of(device)
    if table.entries:
        key = Key.of(problem, pass_name)
        exact = table.find(key)
        found = _usable(exact, problem, device)
        if exact is not None and found is not None:
            return Selection(found, exact.config, _said(exact, "this size"))
        for near in key.neighbours():
            entry = table.find(near)
            found = _usable(entry, problem, device)
            if entry is not None and found is not None:
                return Selection(found, entry.config, _said(entry, "the neighbouring size"))
    return untuned(problem, device, pass_name)


def untuned(problem: Problem, device: torch.device, pass_name: str) -> Selection:
    """The choice without any stored entry."""
    record, because = rules.choose(problem, device, pass_name)
    return Selection(record, record.default(problem, device), because)


def _usable(entry: Entry | None, problem: Problem, device: torch.device) -> Variant | None:
    """The entry's variant, if it is still the one that was measured and serves the problem."""
    if entry is None:
        return None
    try:
        record = variant(entry.variant)
    except ArgumentError:  # of another version, or of a variant file that is not loaded here
        return None
    if source_hash(record) != entry.source or record.supports(problem, device) is not None:
        return None
    return record


def _said(entry: Entry, where: str) -> str:
    faster = f"{entry.ms:.3g} ms, {entry.speedup:.2f} x torch's speed" if entry.speedup != 1 else f"{entry.ms:.3g} ms"
    return f"tuned on {where} ({entry.problem}: {faster}, {entry.utc[:10]})"


def table_of(device: torch.device) -> Table:
    """The table of a device, read when it is first asked for and kept until :func:`forget`."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return _table(device.type, device.index, threads)


@cache
def _table(kind: str, index: int | None, threads: int) -> Table:
    try:
        return store.read(device_name(torch.device(kind, index) if index is not None else torch.device(kind)))
    except (RuntimeError, AssertionError):  # a GPU that is named where there is none
        return Table(kind)


def forget() -> None:
    """Tables are read anew when they are next asked for."""
    _table.cache_clear()
