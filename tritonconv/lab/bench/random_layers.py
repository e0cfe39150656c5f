"""Layers at random, of the families of the real ones: whether a choice holds where nobody made it.

The kernel, its stride, crop, dilation and kind of groups are those of a layer of a model, each suite as likely as
another; the channels, the size and the batch are drawn anew.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from tritonconv.errors import ArgumentError
from tritonconv.lab.bench.layer_sizes import CPU_MBYTES, RANDOM, Workload

COUNT = 60
CHANNELS = (1, 2, 3, 4, 5, 8, 16, 24, 28, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 240, 256, 320, 384, 512, 768)
FEWEST_GROUPED = 16  # channels of a layer with groups
BATCHES = (1, 1, 2, 2, 3, 4, 6, 8)
LEAST_EDGE, MOST_EDGE = 2, 64
MOST_MBYTES = 1000.0  # of x, weight and y in float32, at full size


def random_layers(models: Sequence[Workload], seed: int, count: int = COUNT) -> tuple[Workload, ...]:
    """``count`` layers like those of ``models``; the same for the same seed."""
    rng = random.Random(f"tritonconv {seed}")
    suites = sorted({model.suite for model in models})
    layers: list[Workload] = []
    while len(layers) < count:
        suite = rng.choice(suites)
        model = rng.choice([model for model in models if model.suite == suite])
        layer = _drawn(model, rng, f"random_{seed}_{len(layers)}", seed)
        if layer is not None:
            layers.append(layer)
    return tuple(layers)


def _drawn(model: Workload, rng: random.Random, name: str, seed: int) -> Workload | None:
    """A layer like ``model``; None where the draw has an empty output or is too large for a CPU's weight or a GPU."""
    c_in = rng.choice(CHANNELS)
    c_out = rng.choice((c_in, max(1, c_in // 2), *rng.choices(CHANNELS, k=2)))
    groups = model.groups
    if groups == model.c_in == model.c_out:
        c_out = groups = c_in
    edge = math.exp(rng.uniform(math.log(LEAST_EDGE), math.log(MOST_EDGE)))  # each octave as likely as another
    depth, width = rng.choice((0.5, 1, 1, 1)), rng.choice((1, 1, 1, 2))
    size = max(1, round(edge * depth)), round(edge), round(edge * width)
    layer = replace(
        model, name=name, suite=RANDOM, n=rng.choice(BATCHES), c_in=c_in, c_out=c_out, size=size, groups=groups,
        bias=rng.random() < 0.5, used_in="none", source=f"drawn at random, seed {seed}, like {model.name}",
    )  # fmt: skip
    few = groups > 1 and c_in < FEWEST_GROUPED
    if few or c_in % groups or c_out % groups:
        return None
    try:
        problem = layer.problem()
    except ArgumentError:  # an empty output
        return None
    mbytes = sum(math.prod(shape) for shape in (problem.x_shape, problem.weight_shape, problem.y_shape)) / 1e6
    if 4 * mbytes > MOST_MBYTES or 4 * math.prod(problem.weight_shape) / 1e6 > CPU_MBYTES:
        return None
    return replace(layer, gflop=problem.flops / 1e9, mbytes_bf16=2 * mbytes)
