"""The epilogue of a forward where its kernel stores y: device code, and the arguments and the limits of it on the host.

The record and the contract of a variant are in :mod:`tritonconv.epilogue`. Sums are float32, (rows, columns), and so
is all that is done to them; y is rounded once, or with ROUNDED after each step, as torch's separate operations do. A
kernel takes three things for it, all None in a plain call, which is compiled as if there were none:

* ``residual_ptr``, with the strides of y
* ``slopes``: of leaky_relu the number, of prelu a pointer
* EPILOGUE, in its CONFIG: :class:`Steps`
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from tritonconv.kernels.triton_buffers import Buffer, copied
from tritonconv.kernels.variant import Config
from tritonconv.kernels.work import WARP
from tritonconv.problem import Problem

if TYPE_CHECKING:
    from tritonconv.epilogue import Epilogue

# Float32 sums of a thread beside which a function or a residual finds registers. With twice as many, the widest tiles,
# residual + gelu spills 80 to 528 bytes a thread (bfloat16, sm_80, sm_90, sm_100, Triton 3.6.0).
MOST_SUMS = 64
BOX = ("BLOCK_D", "BLOCK_H", "BLOCK_W")
EXACT = (None, "relu", "leaky_relu", "prelu")  # have torch's bits: a comparison and a product, no function


class Steps(NamedTuple):
    """The argument EPILOGUE: ``SLOPE_STEP`` from a channel's slope to the next's, 0 where all have one."""

    ACTIVATION: str | None
    SLOPE_STEP: int
    ROUNDED: bool


@triton.jit
def rounded(z, y_ptr):
    """``z`` as y would hold it, in float32 again."""
    return z.to(y_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def with_bias(acc, bias, y_ptr, EPILOGUE: tl.constexpr):
    """The sums and the bias (columns,), in any dtype."""
    if EPILOGUE is None:
        acc += bias.to(tl.float32)[None, :]
    elif EPILOGUE.ROUNDED:
        acc = rounded(rounded(acc, y_ptr) + bias.to(tl.float32)[None, :], y_ptr)
    else:
        acc += bias.to(tl.float32)[None, :]
    return acc


@triton.jit
def finished(acc, residual_ptr, offsets, mask, slopes, channel, y_ptr, EPILOGUE: tl.constexpr):
    """The tile that is stored at ``offsets`` of y, of sums that have their bias: with the residual, activated, rounded.

    ``channel`` counts all channels of y, and is broadcast to ``acc``.
    """
    ACTIVATION: tl.constexpr = EPILOGUE.ACTIVATION
    z = acc
    if EPILOGUE.ROUNDED:
        z = rounded(z, y_ptr)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if EPILOGUE.ROUNDED:
            z = rounded(z, y_ptr)
    slope = slopes
    if ACTIVATION == "prelu":
        slope = tl.load(slopes + channel * EPILOGUE.SLOPE_STEP).to(tl.float32)
    return activated(z, slope, ACTIVATION).to(y_ptr.dtype.element_ty)


@triton.jit
def activated(z, slope, ACTIVATION: tl.constexpr):
    """The activation of float32 ``z``; a NaN stays one in each."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu" or ACTIVATION == "prelu":
        z = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "sigmoid":
        z = 1 / (1 + tl.exp(-z))
    elif ACTIVATION == "silu":
        z = z / (1 + tl.exp(-z))
    elif ACTIVATION == "tanh":
        z = tanh(z)
    elif ACTIVATION == "gelu":
        z = z * 0.5 * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), which keeps its digits where u << 0
        z = z / (1 + tl.exp(z * (-1.5957691216057308 - 0.07135481627260025 * z * z)))
    return z


@triton.jit
def tanh(z):
    """In float32, exact to two units in the last place: of Cephes' tanhf, 1 - 2 / (exp(2|z|) + 1) beside a polynomial
    for |z| < 0.625, where that loses its digits."""
    square = z * z
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    size = tl.abs(z)
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.625, near * square * z + z, tl.where(z < 0, -far, far))


def computes(problem: Problem, config: Config, epilogue: Epilogue, most: int = MOST_SUMS) -> bool:
    """``Variant.epilogue`` of the kernels that store a program's own whole sums: with torch's rounding only the
    activations that have torch's bits, and in a tile of more than ``most`` sums a thread only those, without a
    residual."""
    plain = epilogue.activation in EXACT
    wide = _sums_of_a_thread(config) > most
    return (
        config.get("SPLITS", 0) <= 1
        and (plain or epilogue.rounding is None)
        and not (wide and (epilogue.residual or not plain))
    )


def _sums_of_a_thread(config: Config) -> int:
    """0 of a config that names no rows; those of a box are its voxels."""
    rows = math.prod(config[name] for name in BOX) if BOX[0] in config else config.get("BLOCK_M", 0)
    return rows * config.get("BLOCK_N", 0) // (WARP * config.get("num_warps", 4))


def arguments(
    problem: Problem, y: Buffer, epilogue: Epilogue | None = None, residual: Buffer | None = None,
    slopes: Buffer | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The three arguments of a kernel that writes ``y``. A residual of other strides is copied into the problem's
    layout, in which y must be dense then."""
    step = 0
    found: dict[str, Any] = {"residual_ptr": None, "slopes": None, "EPILOGUE": None}
    if epilogue is None:
        return found
    if residual is not None and residual.stride() != y.stride():
        layout = problem.memory_format
        residual = copied(residual, lambda tensor: tensor.contiguous(memory_format=layout))
    found["residual_ptr"] = residual
    if slopes is not None:
        found["slopes"], step = copied(slopes, torch.Tensor.contiguous), int(slopes.numel() > 1)
    elif epilogue.activation == "leaky_relu":
        found["slopes"] = epilogue.slope
    return {**found, "EPILOGUE": Steps(epilogue.activation, step, epilogue.rounding is not None)}
