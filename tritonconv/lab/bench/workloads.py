"""The layers that are measured: ConvTranspose3d of real models and of KernelBench, each with its source.

``data/layers.json`` holds them; a suite is a family of models. The suite ``random`` is drawn (``random_layers.py``).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from tritonconv.errors import ArgumentError
from tritonconv.lab.bench import stages
from tritonconv.lab.bench.layer_sizes import RANDOM, Workload
from tritonconv.lab.bench.random_layers import COUNT, random_layers
from tritonconv.problem import Problem

DATA = files("tritonconv") / "data" / "layers.json"
ALL, OF_HEROES = "all", "heroes"

# One or two layers of each class, which a reader knows: a run that ends early has these.
HEROES = (
    "nnunet_dynunet_128_up4",
    "mednext_k3_dw_64",
    "psmnet_train_64_32",
    "3dgan_64_1",
    "vqvae3d_256_256",
    "nnunet_resenc_160x192_up4",
    "segresnet_deconv_up2",
    "3dgan_128_64",
    "mednext_res_k1s2_64_32",
    "anisotropic_unetpp_128_64",
    "vnet_up3",
    "pangu_patch_recovery3d",
)


@cache
def _data() -> tuple[dict[str, str], tuple[Workload, ...]]:
    with DATA.open(encoding="utf-8") as file:
        data = json.load(file)
    rows: list[dict[str, Any]] = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        for row in data["layers"]
    ]
    return data["suites"], tuple(Workload(**row) for row in rows)


def suites() -> dict[str, str]:
    """The suites and what is in each; ``all``, ``heroes``, ``random`` and ``stages`` last."""
    named = dict(_data()[0])
    drawn = f"{COUNT} layers drawn by the seed, of the others' families, with their batch at each scale; not in 'all'"
    every = f"every suite: {len(_data()[1])} layers"
    known = "one or two known layers of each class, of all suites"
    return {**named, ALL: every, OF_HEROES: known, RANDOM: drawn, stages.SUITE: stages.SUITE_TEXT}


def workloads(suite: str | Iterable[str] = ALL, only: str = "", seed: int = 0) -> tuple[Workload, ...]:
    """The layers of a suite, or of several, whose name contains ``only``, in the order of the file.

    ``seed`` is that of the suite ``random``, whose layers come last. Raises ArgumentError for an unknown suite, and
    where no layer is left.
    """
    wanted = (suite,) if isinstance(suite, str) else tuple(suite)
    for name in wanted:
        if name not in suites():
            raise ArgumentError(f"suite expects one of {', '.join(suites())}, got {name!r}")
    heroes = HEROES if OF_HEROES in wanted else ()
    layers = tuple(each for each in _data()[1] if ALL in wanted or each.suite in wanted or each.name in heroes)
    if RANDOM in wanted:
        layers += random_layers(_data()[1], seed)
    if stages.SUITE in wanted:
        layers += stages.stages(_data()[1])
    named = tuple(layer for layer in layers if only in layer.name)
    if not named:
        raise ArgumentError(
            f"only={only!r} matches none of the {len(layers)} layers of suite {','.join(wanted)}; "
            f"among them are {', '.join(_near(only, layers))}"
        )
    return named


def workload(name: str) -> Workload:
    """The layer of this name, of a model or drawn; raises ArgumentError that lists names like it."""
    drawn = re.fullmatch(rf"{RANDOM}_(\d+)_\d+", name)
    for layer in workloads(RANDOM, seed=int(drawn[1])) if drawn else workloads((ALL, stages.SUITE)):
        if layer.name == name:
            return layer
    near = ", ".join(_near(name, _data()[1]))
    raise ArgumentError(f"unknown layer {name!r}; names like it: {near} (tritonconv list --layers shows all)")


def _near(text: str, layers: Sequence[Workload]) -> list[str]:
    names = [layer.name for layer in layers]
    containing = [name for name in names if text and text in name]
    return (containing or difflib.get_close_matches(text, names, n=5, cutoff=0.3) or names)[:5]


def in_turn(layers: Iterable[Workload]) -> tuple[Workload, ...]:
    """The layers with their suites taking turns, evenly: a run that ends early has seen as much of each suite.

    A suite's k-th of m layers stands at (k + 1/2)/m, so large suites come up more often and all end together.
    """
    groups: dict[str, list[Workload]] = {}
    for layer in layers:
        groups.setdefault(layer.suite, []).append(layer)
    placed = [((k + 0.5) / len(group), layer) for group in groups.values() for k, layer in enumerate(group)]
    return tuple(layer for _, layer in sorted(placed, key=lambda pair: pair[0]))


def in_order(layers: Iterable[Workload]) -> tuple[Workload, ...]:
    """The layers as a run takes them: HEROES first, then the suites in turn, layers at sizes of no model last."""
    layers = tuple(layers)
    heroes = [layer for name in HEROES for layer in layers if layer.name == name]
    rest = in_turn(layer for layer in layers if layer not in heroes)
    return (*heroes, *sorted(rest, key=lambda layer: bool(layer.family)))


def distinct(layers: Iterable[Workload], scale: str = "full") -> tuple[tuple[Workload, tuple[str, ...]], ...]:
    """Layers that are one problem at this scale, once: (the first of them, the names of the others)."""
    groups: dict[Problem, list[Workload]] = {}
    for layer in layers:
        groups.setdefault(layer.problem(scale=scale), []).append(layer)
    return tuple((group[0], tuple(layer.name for layer in group[1:])) for group in groups.values())
