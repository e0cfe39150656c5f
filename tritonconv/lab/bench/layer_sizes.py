"""A layer that is measured, and its sizes: as in the model, or shrunk for a CPU (:func:`scaled`)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tritonconv.epilogue import Epilogue
from tritonconv.errors import ArgumentError
from tritonconv.problem import Problem, Triple, output_size

# The limits keep one call near 10 ms on two cores, so a whole suite is timed in a minute or two.
CPU_BATCH = 2
CPU_GFLOP = 0.6
CPU_MBYTES = 40.0
RANDOM = "random"  # the suite of layers that no model has, whose batch stays as drawn
MOST_CPU_GFLOP = 10.0  # of a layer at a size that was asked for
SCALE_RULE = (
    f"batch at most {CPU_BATCH}; then the largest spatial axis is halved (rounding up) until one call has at most "
    f"{CPU_GFLOP} GFLOP and x, weight and y together at most {CPU_MBYTES:g} MB in float32; no axis below 2 or so small "
    "that the output is empty; channels, kernel, stride and crop as in the model; a layer whose weight alone is over "
    "the limit is left out"
)
SCALES = {"cpu": SCALE_RULE, "full": "the sizes of the model, nothing shrunk"}


@dataclass(frozen=True)
class Workload:
    """One layer of a real model. ``size`` is the input (d, h, w); ``padding`` and ``output_padding`` are torch's.

    ``used_in`` is the precision in which the source trains or runs the layer, ``gflop`` and ``mbytes_bf16`` are
    independent counts (10^9 useful FLOP; 10^6 bytes of x, weight and y in bfloat16) that the tests hold against
    :class:`~tritonconv.problem.Problem`. ``family`` names the layer that this one is at another size. ``epilogue`` is
    what stands behind it, with its words in the name (``stages.py``).
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
    epilogue: Epilogue | None = None

    def problem(self, dtype: torch.dtype = torch.float32, layout: str = "ncdhw", scale: str = "full") -> Problem:
        """The layer as a problem; ``scale`` is ``"full"`` or ``"cpu"`` (see :func:`scaled`).

        Raises ArgumentError for another scale or an unknown layout.
        """
        if scale not in SCALES:
            raise ArgumentError(f"Workload.problem: scale expects one of {', '.join(SCALES)}, got {scale!r}")
        out = output_size(
            self.size, self.kernel, self.stride, self.padding, self.padding, self.output_padding, self.dilation
        )
        same = ("n", "c_in", "c_out", "size", "kernel", "stride", "dilation", "groups", "bias", "epilogue")
        sizes: dict[str, Any] = {name: getattr(self, name) for name in same}
        problem = Problem(**sizes, crop=self.padding, out_size=out, dtype=dtype, layout=layout)
        if scale != "cpu" or self.family:
            return problem
        return scaled(problem, problem.n if self.suite == RANDOM else CPU_BATCH)


def scaled(problem: Problem, batch: int = CPU_BATCH) -> Problem:
    """``problem`` shrunk by :data:`SCALE_RULE`, with ``batch`` images at most; itself where it is small enough already.

    A problem whose weight alone is over the limit ends at the smallest axes; :func:`left_out` says so.
    """
    problem = resized(problem, problem.size, min(problem.n, batch))
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
