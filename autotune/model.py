"""The cost model: how long a variant with a config would take at best, by counting.

    time = launches * launch cost + factor * (the longest of its parts + a tenth of the others (BESIDE))
    parts: FLOPs / rate * waste, DRAM bytes / copy rate, cache bytes / cache rate * waste, SRAM bytes / SRAM rate *
           waste, instructions / issue rate * waste, waits * waves

SRAM is a multiprocessor's L1 and shared memory, one memory: operands are written there and read by the matrix units.
``waste`` is the idle share of the last wave. A wave has (multiprocessors x programs that fit one) programs, limited by
shared memory, registers and threads. ``waits`` are the latencies of a program's loads that its pipeline does not hide:
they decide where few programs sum over a long depth. This is the roofline (Williams et al., CACM 2009) with the tile's
own traffic, wave quantisation and latency; a kernel without a pipeline adds its parts up where no other program hides
them. It knows no bank conflict and counts instructions roughly; measurements correct it by a factor for each kind of
kernel (``calibrate.py``). It prunes and ranks candidates, and measurements decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tritonconv.autotune.ceilings import COPIES, Ceilings, of_capability
from tritonconv.kernels.registry import variants
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.variant import APART, COPY, Config, Variant
from tritonconv.kernels.work import LINE, WARP, Work, by_torch, bytes_spared
from tritonconv.precision import TF32, float32_precision
from tritonconv.problem import Problem

MOST_CANDIDATES = 12
MOST_CONFIGS = 40
REFERENCE, HOPPER = of_capability((9, 0)), TARGETS["sm_90"]  # of pruned spaces
MOST_REGISTERS = 255  # of one thread; a kernel that wants more spills
# Seconds from the load of a tile to its product: about 300 cycles to L2 and back, and a barrier, at 1.7 GHz:
# an order of magnitude that has not been measured.
LATENCY = 0.25e-6
CLOCK = 1.7e9  # an H100's under load
SRAM = LINE * CLOCK  # bytes per second of one multiprocessor's L1 and shared memory
ISSUE = 4 * CLOCK  # instructions per second of its four schedulers
BESIDE = 0.1  # of the parts beside the longest: what a pipeline does not hide; not measured
SIMILAR = 1.25  # times the best one's time: of such configs one of each tile comes before a second of any
SETS = 5  # of the configs one in so many is of each set of packed axes, and of those with rows along w
SPILLED = 3.0  # a spilling kernel is ranked behind its neighbours

LAUNCH = "launch"
# Factors, like those of the kinds, of the time of a launch: of a call's first launch, and of each further one.
FIRST_LAUNCH, FURTHER_LAUNCH = "first launch", "further launch"
LEAST_TIMINGS = 5  # of a kind: with fewer the factor of all kernels of its backend stands in
UNPIPELINED = " unpipelined"  # behind a form: the kind of its configs without a pipeline


@dataclass(frozen=True)
class Estimate:
    """``ms`` is the predicted time, infinite where the config cannot run; ``limit`` names its bound."""

    ms: float
    limit: str
    work: Work


def work_of(record: Variant, problem: Problem, config: Config) -> Work:
    """The work of a launch; useful FLOPs and compulsory bytes for a variant that does not say."""
    if record.work is None:
        return by_torch(problem, record.pass_name)
    return record.work(problem, config)


def estimate(record: Variant, problem: Problem, config: Config, ceilings: Ceilings) -> Estimate:
    """The predicted time of one call, of a forward with the problem's epilogue: by itself, or by torch's operations."""
    work = work_of(record, problem, config)
    rate = _matrix_rate(problem, ceilings) if work.matrix else ceilings.vector
    resident = _resident(work, ceilings)
    if work.programs and not resident:
        return Estimate(math.inf, "shared memory", work)
    waves, waste, starved = 0.0, 1.0, 1.0
    if work.programs:
        slots = resident * ceilings.multiprocessors
        waves = work.programs / slots
        waste = math.ceil(waves) / waves if waves > 1 else max(1.0, ceilings.multiprocessors / work.programs)
        starved = max(1.0, ceilings.multiprocessors / 2 / work.programs)  # half of them can fill the memory bus
    parts = {
        "matrix" if work.matrix else "vector": work.flops / rate * waste,
        "memory": work.memory_bytes / ceilings.memory * starved,
        "cache": work.cache_bytes / ceilings.cache * waste if work.programs else 0.0,
        "sram": work.sram_bytes / (ceilings.multiprocessors * SRAM) * waste if work.programs else 0.0,
        "issue": work.instructions / (ceilings.multiprocessors * ISSUE) * waste if work.programs else 0.0,
        "latency": work.depth / (1 + work.ahead) * LATENCY * max(1.0, math.ceil(waves)),
    }
    limit = max(parts, key=lambda name: parts[name])
    busy, others = parts[limit] * (SPILLED if work.registers > MOST_REGISTERS else 1.0), sum(parts.values())
    # Without a pipeline only the other resident programs hide the parts of a program from each other.
    busy += (others - parts[limit]) * (BESIDE if work.pipelined else 1 / max(1, resident))
    busy *= _factor(record, config, work, ceilings)
    launch = launches_ms(work.launches, ceilings) * 1e-3
    if problem.epilogue is not None and not record.finishes(problem, config, problem.epilogue):
        busy += bytes_spared(problem) / ceilings.memory
    return Estimate((busy + launch) * 1e3, limit if busy > launch else LAUNCH, work)


def launches_ms(launches: int, ceilings: Ceilings) -> float:
    """The time of so many launches of one call, without their kernels."""
    factors = ceilings.factors
    times = factors.get(FIRST_LAUNCH, 1.0) + (launches - 1) * factors.get(FURTHER_LAUNCH, 1.0)
    return times * ceilings.launch_us * 1e-3


def hosts_of(record: Variant) -> tuple[str, ...]:
    """The names under which :attr:`Ceilings.host_ms` has the host's time for a call, the most exact first: the name of
    a formulation, its pass and backend. The kernels of a pass have one together, for a few launches each differ less
    than samples do."""
    together = f"{record.pass_name} {record.backend}"
    return (together,) if record.backend == "triton" else (record.name, together)


def host_ms(record: Variant, ceilings: Ceilings) -> float:
    """The host's time to enqueue a call, in ms; 0 where none was measured."""
    return next((ceilings.host_ms[name] for name in hosts_of(record) if name in ceilings.host_ms), 0.0)


def eager_ms(ms: float, host_ms: float) -> float:
    """An eager call's mean time in two programs: one keeps the device busy, the other waits for its host.

    In the second the call takes the longer of the device's time and the host's. The least of that alone may take many
    times as long in the first.
    """
    return (ms + max(ms, host_ms)) / 2


def form(record: Variant, config: Config) -> str:
    """The variant's name; configs that copy operands first have a form of their own, as another kernel would."""
    return record.name + COPIES if config.get(COPY) else record.name


def kind(record: Variant, config: Config, work: Work) -> str:
    """The key of a measured factor (measured over predicted time): the :func:`form`, and whether it is pipelined.

    An edit of the kernel keeps the factor: an old measurement is better than none.
    """
    return form(record, config) if work.pipelined else form(record, config) + UNPIPELINED


def _factor(record: Variant, config: Config, work: Work, ceilings: Ceilings) -> float:
    if not ceilings.factors:
        return 1.0
    return ceilings.factors.get(kind(record, config, work), ceilings.factors.get(record.backend, 1.0))


def candidates(
    record: Variant, problem: Problem, device: torch.device, ceilings: Ceilings, most: int = MOST_CANDIDATES
) -> list[tuple[Config, Estimate]]:
    """At most ``most`` configs of each :func:`form` in the pruned space, best first.

    The best one of a form and, besides, the best that loads the other way (through a pipeline or not) are among them,
    for between these two the model knows least; with three or more the default as well; then a part of them, at least
    one, from each set of packed axes (key APART) and of those with and without rows along w, whose orders it has not
    been measured against.
    """
    spaces = [around(record, problem, device, start) for start in record.starts(problem.plain, device)]
    return _ranked([pair for space in spaces for pair in _best(record, problem, space, ceilings, most)])


def pruned_space(record: Variant, problem: Problem, device: torch.device) -> tuple[Config, ...]:
    """The configs that dispatch and tuner choose from: at most :data:`MOST_CONFIGS` per :func:`form`, default first.

    They are few enough to check the machine code of all. The data sheet of an H100 ranks them, without measured
    factors, so that all machines have the same ones.
    """
    starts = record.starts(problem, device)
    return tuple(config for start in starts for config in around(record, problem, device, start))


def around(record: Variant, problem: Problem, device: torch.device, start: Config) -> list[Config]:
    """The part of :func:`pruned_space` with the form of ``start``, which comes first; an epilogue makes none."""
    problem = problem.plain
    same = (config for config in record.space(problem, device) if form(record, config) == form(record, start))
    space = [start, *(config for config in same if config != start)]
    if len(space) <= MOST_CONFIGS:
        return space
    best = [config for config, _ in _best(record, problem, space, REFERENCE, MOST_CONFIGS)]
    return [start, *(config for config in best if config != start)]


def _best(
    record: Variant, problem: Problem, space: Sequence[Config], ceilings: Ceilings, most: int
) -> list[tuple[Config, Estimate]]:
    """The selection of :func:`candidates` from a space, whose first config is the default."""
    default = space[0]
    ranked = [(config, estimate(record, problem, config, ceilings)) for config in space]
    ranked = _ranked([pair for index, pair in enumerate(ranked) if index == 0 or pair[1].ms < math.inf])
    other = next((pair for pair in ranked if pair[1].work.pipelined != ranked[0][1].work.pipelined), None)
    pairs = [ranked[0], *([other] if other else []), *(pair for pair in ranked if pair[0] == default)]
    pairs += [*_some_of_each_set(ranked, most // SETS), *_one_of_each_tile(ranked), *ranked]
    return _ranked(list({id(pair): pair for pair in pairs}.values())[:most])


def _some_of_each_set(ranked: list[tuple[Config, Estimate]], some: int) -> list[tuple[Config, Estimate]]:
    """The best configs of each set of packed axes (key APART), and of those with and without rows along w (BLOCK_W),
    where there are several: of each way to load, half."""
    sets: dict[tuple[tuple[int, bool], bool], list[tuple[Config, Estimate]]] = {}
    for pair in ranked:
        kind = pair[0].get(APART, 0), pair[0].get("BLOCK_W", 0) > 0
        sets.setdefault((kind, pair[1].work.pipelined), []).append(pair)
    several = len({kind for kind, _ in sets}) > 1
    return [pair for pairs in sets.values() for pair in pairs[: max(1, some // 2)]] if several else []


def _one_of_each_tile(ranked: list[tuple[Config, Estimate]]) -> list[tuple[Config, Estimate]]:
    """The best config of each tile, among those about as good as the first."""
    tiles: dict[tuple, tuple[Config, Estimate]] = {}
    for pair in ranked:
        if pair[1].ms <= SIMILAR * ranked[0][1].ms:
            tiles.setdefault((pair[0].get("BLOCK_M"), pair[0].get("BLOCK_N")), pair)
    return list(tiles.values())


def _ranked(pairs: list[tuple[Config, Estimate]]) -> list[tuple[Config, Estimate]]:
    return sorted(pairs, key=lambda pair: pair[1].ms)


def rank(
    problem: Problem, device: torch.device, pass_name: str, ceilings: Ceilings
) -> list[tuple[Variant, Config, Estimate]]:
    """Every variant that serves the problem with its best config, best first."""
    ranking = []
    for record in variants(pass_name):
        if record.supports(problem, device) is None:
            config, guess = candidates(record, problem, device, ceilings)[0]
            ranking.append((record, config, guess))
    return sorted(ranking, key=lambda row: row[2].ms)


def correlation(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; 0 where one side does not vary."""
    left, right = _ranks(predicted), _ranks(measured)
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _matrix_rate(problem: Problem, ceilings: Ceilings) -> float:
    name = str(problem.dtype).removeprefix("torch.")
    if name == "float32" and TF32 in ceilings.matrix and float32_precision() == TF32:
        name = TF32
    return ceilings.matrix.get(name) or ceilings.vector


def _resident(work: Work, ceilings: Ceilings) -> int:
    """Programs that fit one multiprocessor together; 0 where one alone is too large."""
    threads = work.warps * WARP
    fits = [HOPPER.blocks, HOPPER.threads // threads]
    if work.shared_bytes:
        fits.append(ceilings.shared_bytes // work.shared_bytes)
    if work.registers:
        fits.append(max(1, ceilings.registers // (min(work.registers, MOST_REGISTERS) * threads)))
    return min(fits)
