"""Which variant and config serve a pass: the tuned choice where there is one, else the rules.

In this order: the entry of exactly this key; the entry of half or of twice as many voxels, where the cost model does
not speak against it; what the rules or the model say without measurement. It never tunes and never fails: what cannot
be used is passed over. Asked once per distinct call; the plan that is made of it is kept by dispatch.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

import torch

from tritonconv.autotune import model, rules, store
from tritonconv.autotune.ceilings import Ceilings, from_json, nominal
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.sources import source_hash
from tritonconv.autotune.store import Entry, Table
from tritonconv.errors import ArgumentError, StoreWarning
from tritonconv.kernels.registry import Config, Variant, variant
from tritonconv.problem import Problem

# A neighbour's choice may be predicted so many times slower than the untuned one: the model is no finer than that.
SLACK = 1.5
# Keys of configs: what must be a power of two begins so, and what is a number of something that must be there.
TILES = ("BLOCK_", "BIAS_", "num_warps")
NEVER_0 = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")


class Selection(NamedTuple):
    """What one pass runs, and why."""

    variant: Variant
    config: Config
    reason: str


def choose(problem: Problem, device: torch.device, pass_name: str) -> Selection:
    """The variant, its config and the reason."""
    table = table_of(device)
    if table.entries and problem.n and problem.c_out:
        key = Key.of(problem, pass_name)
        exact = table.find(key)
        found = _usable(exact, problem, device)
        if exact is not None and found is not None:
            return Selection(found, exact.config, _said(exact, "this size"))
        for near in key.neighbours():
            entry = table.find(near)
            found = _usable(entry, problem, device)
            if entry is not None and found is not None and _plausible(found, entry, problem, device, table):
                return Selection(found, entry.config, _said(entry, "the neighbouring size"))
    return untuned(problem, device, pass_name)


def untuned(problem: Problem, device: torch.device, pass_name: str) -> Selection:
    """The choice without any stored entry: the model's on a GPU whose ceilings were measured, else the rules'."""
    record, because = rules.choose(problem, device, pass_name)
    by_rules = Selection(record, record.default(problem, device), because)
    if device.type != "cuda" or problem.n == 0 or problem.c_out == 0:
        return by_rules
    ceilings = _measured(table_of(device))
    if ceilings is None:
        return by_rules
    best, config, guess = model.rank(problem, device, pass_name, ceilings)[0]
    said = f"nothing was tuned near this size; the cost model's first choice: {guess.ms * 1e3:.3g} us, {guess.limit}"
    return Selection(best, config, said)


def ceilings_of(device: torch.device) -> Ceilings:
    """The device's measured ceilings, else nominal ones."""
    return _measured(table_of(device)) or nominal(device)


def _measured(table: Table) -> Ceilings | None:
    return from_json(table.ceilings) if table.ceilings else None


def _plausible(record: Variant, entry: Entry, problem: Problem, device: torch.device, table: Table) -> bool:
    """The model does not expect a neighbour's choice to be much slower than what would run without it."""
    ceilings = _measured(table) or nominal(device)
    other = untuned(problem, device, record.pass_name)
    mine = model.estimate(record, problem, entry.config, ceilings)
    return mine.ms <= SLACK * model.estimate(other.variant, problem, other.config, ceilings).ms


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
    fault = config_fault(record, entry.config, problem, device)
    if fault is not None:
        _warn_once(f"tuned choices: the config of {entry.variant} for {entry.problem} is passed over: {fault}")
        return None
    return record


def config_fault(record: Variant, config: Config, problem: Problem, device: torch.device) -> str | None:
    """Why a config, such as one that was stored, cannot be a launch's; None where it can.

    A launch takes the keys of the variant's default, tiles and warps that are powers of two, and no negative number.
    """
    usual = record.default(problem, device)
    if config.keys() != usual.keys():
        return f"its keys are {', '.join(sorted(config)) or 'none'}, expected {', '.join(sorted(usual)) or 'none'}"
    for name, value in config.items():
        if type(value) is not int or value < 0:
            return f"{name} is {value!r}, expected an integer from 0"
        if value == 0 and name in NEVER_0:
            return f"{name} is 0, expected an integer above 0"
        if name.startswith(TILES) and value & (value - 1):
            return f"{name} is {value}, expected a power of two"
    return None


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, StoreWarning, stacklevel=2)


def _said(entry: Entry, where: str) -> str:
    return (
        f"tuned on {where}, {entry.utc[:10]}: {entry.timed.replace('_', ' + ')} of {entry.problem} "
        f"{entry.ms:.3g} ms, torch's own {entry.torch_ms:.3g} ms"
    )


def table_of(device: torch.device) -> Table:
    """The table of a device, read when it is first asked for and kept until :func:`forget`."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return _table(device.type, device.index, threads)


def adopt(name: str, entries: dict[str, Entry]) -> None:
    """Entries that another process measured, for this process: they stand before those of the files."""
    _adopted.setdefault(name, {}).update(entries)
    forget()


_adopted: dict[str, dict[str, Entry]] = {}


@cache
def _table(kind: str, index: int | None, threads: int) -> Table:
    try:
        name = device_name(torch.device(kind, index) if index is not None else torch.device(kind))
        return Table(name, _adopted.get(name, {})).over(store.read(name))
    except (RuntimeError, AssertionError):  # a GPU that is named where there is none
        return Table(kind)


def forget() -> None:
    """Tables are read anew when they are next asked for."""
    _table.cache_clear()
