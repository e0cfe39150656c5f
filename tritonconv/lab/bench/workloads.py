"""The layers that are measured: ConvTranspose3d of real models and of KernelBench, each with its source.

``data/layers.json`` holds them; a suite is a family of models. :func:`scaled` shrinks a problem for the CPU.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from tritonconv.errors import ArgumentError
from tritonconv.problem import Problem, Triple, output_size

DATA = files("tritonconv") / "data" / "layers.json"
ALL = "all"

# The limits keep one call near 10 ms on two cores, so a whole suite is timed in a minute or two.
CPU_BATCH = 2
CPU_GFLOP = 0.6
CPU_MBYTES = 40.0
MOST_CPU_GFLOP = 10.0  # of a layer at a size that was asked for
SCALE_RULE = (
    f"batch at most {CPU_BATCH}; then the largest spatial axis is halved (rounding up) until one call has at most "
    f"{CPU_GFLOP} GFLOP and x, weight and y together at most {CPU_MBYTES:g} MB in float32; no axis below 2 or so small "
    "that the output is empty; channels, kernel, stride and crop as in the model; a layer whose weight alone is over "
    "the limit is left out"
)
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
SCALES = {"cpu": SCALE_RULE, "full": "the sizes of the model, nothing shrunk"}


@dataclass(frozen=True)
class Workload:
    """One layer of a real model. ``size`` is the input (d, h, w); ``padding`` and ``output_padding`` are torch's.

    ``used_in`` is the precision in which the source trains or runs the layer, ``gflop`` and ``mbytes_bf16`` are
    independent counts (10^9 useful FLOP; 10^6 bytes of x, weight and y in bfloat16) that the tests hold against
    :class:`~tritonconv.problem.Problem`. ``family`` names the layer that this one is at another size.
    """

    name: str
    suite: str
    n: int
    c_in: int
    c_out: int
    size: Triple
    kernel: Triple
    stride: Triple
    padding: Triple
    output_padding: Triple
    dilation: Triple
    groups: int
    bias: bool
    used_in: str
    gflop: float
    mbytes_bf16: float
    source: str
    family: str = ""

    def problem(self, dtype: torch.dtype = torch.float32, layout: str = "ncdhw", scale: str = "full") -> Problem:
        """The layer as a problem; ``scale`` is ``"full"`` or ``"cpu"`` (see :func:`scaled`).

        Raises ArgumentError for another scale or an unknown layout.
        """
        if scale not in SCALES:
            raise ArgumentError(f"Workload.problem: scale expects one of {', '.join(SCALES)}, got {scale!r}")
        out = output_size(
            self.size, self.kernel, self.stride, self.padding, self.padding, self.output_padding, self.dilation
        )
        same = ("n", "c_in", "c_out", "size", "kernel", "stride", "dilation", "groups", "bias")
        sizes: dict[str, Any] = {name: getattr(self, name) for name in same}
        problem = Problem(**sizes, crop=self.padding, out_size=out, dtype=dtype, layout=layout)
        return scaled(problem) if scale == "cpu" and not self.family else problem


def scaled(problem: Problem) -> Problem:
    """``problem`` shrunk by :data:`SCALE_RULE`; itself where it is small enough already.

    A problem whose weight alone is over the limit ends at the smallest axes; :func:`left_out` says so.
    """
    problem = resized(problem, problem.size, min(problem.n, CPU_BATCH))
    while problem.flops > CPU_GFLOP * 1e9 or _float32_bytes(problem) > CPU_MBYTES * 1e6:
        smaller = _halved(problem)
        if smaller is None:
            break
        problem = smaller
    return problem


def left_out(layer: Workload, scale: str) -> str | None:
    """Why a layer is not measured at this scale, or None.

    torch takes 20 s for the gradients of the one layer this concerns, DPOT's patch decoder (2 cores of a Xeon,
    torch 2.13, 2026-11-22): a third of a whole run.
    """
    mbytes = 4 * math.prod(layer.problem().weight_shape) / 1e6
    if scale != "cpu" or mbytes <= CPU_MBYTES:
        too_large = scale == "cpu" and layer.family and layer.problem().flops > MOST_CPU_GFLOP * 1e9
        return f"over {MOST_CPU_GFLOP:g} GFLOP, the limit of --sizes at scale cpu" if too_large else None
    return f"its weight alone is {mbytes:.0f} MB in float32, and scale cpu allows {CPU_MBYTES:g} MB in all"


def at_sizes(layer: Workload, sizes: Iterable[int]) -> tuple[Workload, ...]:
    """The layer with batch 1 at cubic input sizes, to see how time grows with work; never shrunk.

    A size whose output would be empty is left out.
    """
    layers = []
    for size in sizes:
        sized = replace(layer, name=f"{layer.name}@{size}", n=1, size=(size,) * 3, family=layer.name)
        try:
            sized.problem()
        except ArgumentError:
            continue
        layers.append(sized)
    return tuple(layers)


def resized(problem: Problem, size: Triple, n: int | None = None) -> Problem:
    """``problem`` with another input size (and batch), the crops kept. Raises ArgumentError where y would be empty."""
    out: Triple = tuple(  # type: ignore[assignment]
        (new - 1) * axis.stride + axis.dilation * (axis.kernel - 1) + 1 - axis.crop - axis.back_crop
        for new, axis in zip(size, problem.axes, strict=True)
    )
    return replace(problem, size=size, out_size=out, n=problem.n if n is None else n)


def _float32_bytes(problem: Problem) -> int:
    return 4 * sum(math.prod(shape) for shape in (problem.x_shape, problem.weight_shape, problem.y_shape))


def _halved(problem: Problem) -> Problem | None:
    """The problem with its largest axis that can be halved, halved; of equal axes the first."""
    for index in sorted(range(3), key=lambda axis: -problem.size[axis]):
        size = list(problem.size)
        size[index] = (size[index] + 1) // 2
        if 2 <= size[index] < problem.size[index]:
            try:
                return resized(problem, tuple(size))  # type: ignore[arg-type]
            except ArgumentError:  # a crop larger than what is left
                continue
    return None


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
    """The suites and what is in each, ``all`` last."""
    named = dict(_data()[0])
    return {**named, ALL: f"every suite: {len(_data()[1])} layers"}


def workloads(suite: str | Iterable[str] = ALL, only: str = "") -> tuple[Workload, ...]:
    """The layers of a suite, or of several, whose name contains ``only``, in the order of the file.

    Raises ArgumentError for an unknown suite, and where no layer is left.
    """
    wanted = (suite,) if isinstance(suite, str) else tuple(suite)
    for name in wanted:
        if name not in suites():
            raise ArgumentError(f"suite expects one of {', '.join(suites())}, got {name!r}")
    layers = tuple(layer for layer in _data()[1] if ALL in wanted or layer.suite in wanted)
    named = tuple(layer for layer in layers if only in layer.name)
    if not named:
        raise ArgumentError(
            f"only={only!r} matches none of the {len(layers)} layers of suite {','.join(wanted)}; "
            f"among them are {', '.join(_near(only, layers))}"
        )
    return named


def workload(name: str) -> Workload:
    """The layer of this name; raises ArgumentError that lists names like it."""
    for layer in _data()[1]:
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
