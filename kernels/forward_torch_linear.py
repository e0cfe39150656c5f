"""Forward of images of one voxel: (n, c_in) times the weight (c_in, c_out*taps) is y, in the order of the weight."""

from __future__ import annotations

import math

from tritonconv.kernels.torch_linear import channels_inside, flat, spread, supports
from tritonconv.kernels.torch_products import product
from tritonconv.kernels.variant import Variant


def launch(problem, config, x, weight, bias):
    inside, taps = channels_inside(weight), math.prod(problem.kernel)
    rows, matrix = x.flatten(1), flat(weight, inside)
    offsets = bias
    if bias is not None:
        offsets = bias.repeat(taps) if inside else bias.repeat_interleave(taps)
    return spread(product(rows, matrix, offsets), problem, inside)


VARIANT = Variant(
    name="forward_torch_linear",
    pass_name="forward",
    idea="images of one voxel: a row each of one GEMM",
    backend="torch",
    launch=launch,
    supports=supports,
)
