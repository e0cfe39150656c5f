"""Which variant and config serve a pass: the tuned choice where there is one, else the model's or the rules'.

In this order: a choice that was pinned; the entry of exactly this key, of the same with or without a bias, of half or
twice as many voxels, the user's own before the shipped ones, and for float16 those of bfloat16; of a call with an
epilogue the plain call's choice; on a CPU what a program's first calls found; what the model or the rules say without
measurement. An entry of an earlier revision
of its kernel stays in use: an old measurement beats none. Nothing is tuned here. An entry that cannot be used is passed
over. Dispatch keeps the plan of each distinct call.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from tritonconv.autotune import fit, model, pins, rules, serving, store
from tritonconv.autotune.ceilings import Ceilings, from_json, nominal, scale_to
from tritonconv.autotune.first import first
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.sources import revision
from tritonconv.autotune.store import Entry, Table
from tritonconv.bounded import remember
from tritonconv.errors import ArgumentError, StoreWarning, VariantNotApplicable
from tritonconv.kernels.registry import variant, warn_without_triton
from tritonconv.kernels.safety import unsafe
from tritonconv.kernels.variant import BACKENDS, NO_CONFIG, Config, Variant
from tritonconv.problem import PASSES, Problem
from tritonconv.switches import REASON, torch_only

# A neighbour's choice is refused if its predicted time is more than SLACK times that of the untuned choice.
SLACK = 1.5
# Keys of configs: values under these prefixes are powers of two; values under these names are not 0.
TILES = ("BLOCK_", "BIAS_", "num_warps")
HALVED = ("BLOCK_N", "BLOCK_M")
NEVER_0 = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
# The dtypes of the measurements behind the model. In float32 torch's own runs until a choice is tuned.
MODELLED = (torch.bfloat16, torch.float16)


class Selection(NamedTuple):
    """The variant and config of one pass, and the reason.

    ``entry`` is the stored choice behind it, None where there is none. ``saved_s`` are the seconds that a CPU pass, or
    its two gradients together, saved in the first calls; None where those did not choose. The user named or pinned a
    ``forced`` one: torch's own never replaces it.
    """

    variant: Variant
    config: Config
    reason: str
    entry: Entry | None = None
    forced: bool = False
    saved_s: float | None = None

    @property
    def outdated(self) -> bool:
        """The kernel's source has changed since it was measured; never so for torch's own."""
        if self.entry is None or self.variant.name in rules.FALLBACK.values():
            return False
        return revision(self.variant) not in ("", self.entry.source)


class Source(NamedTuple):
    """A table of choices; ``words`` describe it in a reason."""

    table: Table
    words: str = ""


def choose(problem: Problem, device: torch.device, pass_name: str, graphs: bool = False) -> Selection:
    """The variant, its config and the reason: for an eager call, or for a call in a CUDA graph.

    Raises VariantNotApplicable where a pinned variant does not serve the problem, StoreError where the file of the
    pinned choices cannot be read, ArgumentError where :func:`~tritonconv.switches.torch_only` does.
    """
    if torch_only():
        return Selection(variant(rules.FALLBACK[pass_name]), NO_CONFIG, REASON)
    found = (pins.find(each, device, pass_name, graphs) for each in dict.fromkeys((problem, problem.plain)))
    pinned = next((each for each in found if each is not None), None)
    if pinned is not None:
        return _pinned(*pinned, problem, device)
    if _wants_kernels(device):
        warn_without_triton()
    if problem.n and problem.c_out:
        for entry, words, near in _entries(Key.of(problem, pass_name), device):
            for each in entry.choices(graphs):
                record = usable(each, problem, device)
                if record is not None and (not near or _plausible(record, each, problem, device)):
                    return Selection(record, each.config, _reason(each, entry, words), each)
    if device.type == "cpu" and problem.epilogue is None:
        from tritonconv.autotune import online  # its rows are read where a CPU's call needs them

        decided = online.decided(problem, pass_name)
        if decided is not None:
            record = variant(decided[0])
            return Selection(record, record.default(problem, device), decided[1], saved_s=decided[2])
    return untuned(problem, device, pass_name, graphs)


def _with_epilogue(plain: Selection, problem: Problem, device: torch.device) -> Selection:
    """The plain call's choice for the problem with its epilogue. Where its tile leaves that to torch's operations, it
    has half of the tile's columns, or of its rows, if that computes the epilogue and the model expects it to be faster.
    """
    record = plain.variant
    if plain.forced or record.launches is None or record.finishes(problem, plain.config, problem.epilogue):
        return plain
    because = "; by half of its tile, which computes the epilogue: the whole leaves it to torch's operations"
    ceilings = ceilings_of(device)
    best, least = plain, model.estimate(record, problem, plain.config, ceilings).ms
    for name in HALVED:
        config = {**plain.config, name: plain.config.get(name, 0) // 2}
        if config_fault(record, config, problem, device) or not record.finishes(problem, config, problem.epilogue):
            continue
        ms = model.estimate(record, problem, config, ceilings).ms
        if ms < least:
            best, least = plain._replace(config=config, reason=plain.reason + because, entry=None), ms
    return best


def _wants_kernels(device: torch.device) -> bool:
    """Whether a table or the model may choose a Triton variant there: elsewhere nothing loads Triton."""
    if device.type != "cuda":
        return False
    gpu = serving.part(device)
    return (gpu is not None and serving.has_model(gpu)) or any(source.table.entries for source in sources_of(device))


def _pinned(name: str, config: Config, problem: Problem, device: torch.device) -> Selection:
    try:
        record = variant(name)
    except ArgumentError as error:
        raise VariantNotApplicable(f"{name} is pinned for {problem}: {error}") from None
    fault = _fault(record, config, problem, device)
    if fault is not None:
        raise VariantNotApplicable(f"{name} is pinned for {problem} and does not serve it here: {fault}")
    return Selection(record, config, "pinned", forced=True)


def _entries(key: Key, device: torch.device) -> Iterator[tuple[Entry, str, bool]]:
    """The stored choices for a key, the best first: (entry, description, whether its size is a neighbouring one)."""
    sources = sources_of(device)
    if not any(source.table.entries for source in sources):
        return
    for each, words, near in alike(key, device):
        for source in sources:
            entry = source.table.find(each)
            if entry is not None:
                yield entry, words + source.words, near


def alike(key: Key, device: torch.device) -> list[tuple[Key, str, bool]]:
    """The keys whose entries serve a key, its own first: (key, description, whether its size is a neighbouring one)."""
    found = [(key, "this size", False)]
    if device.type == "cuda":  # where a bias is fused into every kernel
        found.append((key.other_bias(), f"this size {'without' if key.bias else 'with'} a bias", False))
    found += [(near, "the neighbouring size", True) for each, _, _ in list(found) for near in each.neighbours()]
    if key.dtype == "float16" and device.type == "cuda":
        found += [(each.in_bfloat16(), f"{words} in bfloat16", near) for each, words, near in found]
    return found


def untuned(problem: Problem, device: torch.device, pass_name: str, graphs: bool = True) -> Selection:
    """The choice without any stored entry: the cost model's on a GPU that it was validated on, else the rules' (torch's
    own on a GPU). With an epilogue it is the plain call's, stored or not, or half of its tile. Without ``graphs`` it
    heeds the host's time.
    """
    if problem.epilogue is not None:
        return _with_epilogue(choose(problem.plain, device, pass_name, graphs), problem, device)
    record, because = rules.choose(problem, device, pass_name)
    torchs = Selection(record, record.default(problem, device), because)
    gpu = serving.part(device)
    if gpu is None or problem.n == 0 or problem.c_out == 0:
        return torchs
    if not serving.has_model(gpu) or problem.dtype not in MODELLED:
        new = problem.dtype if serving.has_model(gpu) else gpu.name
        return torchs._replace(
            reason=f"{because}; nothing was measured near this size for {new}: `tritonconv tune` measures it here"
        )
    modelled = _first(problem, device, pass_name, graphs)
    return torchs if _fault(modelled.variant, modelled.config, problem, device) else modelled


MOST_FIRSTS = 4096
_firsts: dict[tuple, tuple[Selection, Problem]] = {}


def _first(problem: Problem, device: torch.device, pass_name: str, graphs: bool) -> Selection:
    """The model's first choice, cached by key: ranking the configs takes longer than a layer does."""
    key = Key.of(problem, pass_name), device, graphs
    known = _firsts.get(key)
    if known is None:
        ceilings = ceilings_of(device)
        made = Selection(*first(problem, device, pass_name, replace(ceilings, host_ms={}) if graphs else ceilings))
        known = remember(_firsts, key, (made, problem), MOST_FIRSTS)
    selection, estimated = known
    return selection if estimated == problem else selection._replace(reason=f"{selection.reason}, for {estimated}")


def ceilings_of(device: torch.device) -> Ceilings:
    """The device's measured ceilings, else those of a GPU of its kind that was measured, else nominal ones.

    The host's times of a pass are those of the first table that has them of torch's operations and of kernels: one
    host took both.
    """
    gpu, tables = serving.part(device), [source.table for source in sources_of(device)]
    known = [each for each in (from_json(table.ceilings or {}) for table in tables) if each is not None]
    fitted = fit.shipped_fit(gpu.capability) if gpu is not None and serving.has_model(gpu) else None
    if gpu is None or fitted is None or (known and known[0].device == gpu.name):
        found = known[0] if known else nominal(device)
    else:
        found = scale_to(fitted.ceilings, gpu)
    return replace(found, host_ms={name: ms for each in PASSES for name, ms in _host_ms(each, known).items()})


def _host_ms(pass_name: str, known: list[Ceilings]) -> dict[str, float]:
    both = {f"{pass_name} {backend}" for backend in BACKENDS}
    times = next((each.host_ms for each in known if both <= each.host_ms.keys()), {})
    return {name: ms for name, ms in times.items() if name.startswith(pass_name)}


def _plausible(record: Variant, entry: Entry, problem: Problem, device: torch.device) -> bool:
    """Whether the model expects a neighbour's choice to be about as fast as the untuned one."""
    other = untuned(problem, device, record.pass_name)
    if record.backend != other.variant.backend:  # the model compares kernels with kernels
        return True
    ceilings = ceilings_of(device)
    mine = model.estimate(record, problem, entry.config, ceilings)
    return mine.ms <= SLACK * model.estimate(other.variant, problem, other.config, ceilings).ms


def usable(entry: Entry, problem: Problem, device: torch.device) -> Variant | None:
    """The entry's variant, if it is there and serves the problem with the entry's config."""
    try:
        record = variant(entry.variant)
    except ArgumentError:  # of another version, or of a variant file that is not loaded here
        return None
    if record.supports(problem, device) is not None:
        return None
    fault = config_fault(record, entry.config, problem, device)
    if fault is not None:
        _warn_once(f"tuned choices: the config of {entry.variant} for {entry.problem} is passed over: {fault}")
        return None
    return record


def _fault(record: Variant, config: Config, problem: Problem, device: torch.device) -> str | None:
    """The reason why a variant cannot run with a config, None where it can."""
    return record.supports(problem, device) or config_fault(record, config, problem, device)


def config_fault(record: Variant, config: Config, problem: Problem, device: torch.device) -> str | None:
    """The reason why a launch cannot take a config, None where it can.

    A launch takes the keys of the variant's default and its options, tiles and warps that are powers of two, and no
    negative number.
    """
    usual = record.default(problem, device)
    if config.keys() - record.options != usual.keys():
        return f"its keys are {', '.join(sorted(config)) or 'none'}, expected {', '.join(sorted(usual)) or 'none'}"
    for name, value in config.items():
        if type(value) is not int or value < 0:
            return f"{name} is {value!r}, expected an integer from 0"
        if value == 0 and name in NEVER_0:
            return f"{name} is 0, expected an integer above 0"
        if name.startswith(TILES) and value & (value - 1):
            return f"{name} is {value}, expected a power of two"
    return unsafe(record, problem, config, device)


@lru_cache(1024)
def _warn_once(text: str) -> None:
    warnings.warn(text, StoreWarning, stacklevel=2)


def _reason(chosen: Entry, entry: Entry, where: str) -> str:
    """The reason for one of an entry's choices."""
    part = "forward + backward" if chosen.timed == "forward_backward" else chosen.timed.replace("_", "-")
    timed = (
        f"tuned on {where}, {chosen.utc[:10]}: {part} of {chosen.problem} "
        f"{chosen.ms:.3g} ms, torch's own {chosen.torch_ms:.3g} ms"
    )
    if entry.eager is None or chosen.host_ms is None:
        return timed
    if (chosen.variant, chosen.config) == (entry.eager.variant, entry.eager.config):
        return f"{timed}; for eager calls, where the host takes {chosen.host_ms:.3g} ms to enqueue it"
    return f"{timed}; for CUDA graphs, where the host's {chosen.host_ms:.3g} ms do not count"


def sources_of(device: torch.device) -> tuple[Source, ...]:
    """The tables that serve a device, the user's own first; cached until :func:`forget`."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return _sources(device.type, device.index, threads)


def adopt(name: str, entries: dict[str, Entry]) -> None:
    """Adds entries that another process measured to this process; they win over those of the files."""
    _adopted.setdefault(name, {}).update(entries)
    forget()


_adopted: dict[str, dict[str, Entry]] = {}


@cache
def _sources(kind: str, index: int | None, threads: int) -> tuple[Source, ...]:
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    try:
        name = device_name(device)
    except (RuntimeError, AssertionError):  # a GPU that is named where there is none
        return (Source(Table(kind)),)
    sources = [
        Source(Table(name, _adopted.get(name, {})).over(store.own(name))),
        Source(store.shipped_table(name), " (shipped)"),
    ]
    gpu = serving.part(device)
    other = serving.table_for(gpu) if gpu else None
    if other is not None and other != name:
        sources.append(Source(store.shipped_table(other), f" on an {other} (shipped)"))
    return tuple(sources)


def forget() -> None:
    """Drops the cached tables, and what first calls found; the next call reads them again."""
    from tritonconv.autotune import online  # its rows are read where a CPU's call needs them

    _sources.cache_clear()
    _firsts.clear()
    online.forget()
