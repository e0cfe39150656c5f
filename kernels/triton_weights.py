"""The weight as the kernels read it: strides instead of copies, and a packed copy where that pays."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache, partial

import torch

from tritonconv.kernels.triton_tape import derived
from tritonconv.kernels.weight_orders import AS_GIVEN, CACHED_BYTES, IN_INNERMOST, OUT_INNERMOST, SMALL_PROBLEM
from tritonconv.problem import Problem

_INNERMOST = {OUT_INNERMOST: 1, IN_INNERMOST: 0}  # axes of the weight
MOST_PACKERS = 1024  # kinds of weights whose launches are kept

Packs = dict[tuple, torch.Tensor]
_remembered: ContextVar[Packs | None] = ContextVar("tritonconv_packs", default=None)


def packed(weight: torch.Tensor, order: int) -> torch.Tensor:
    """``weight`` (c_in, c_out/groups, kd, kh, kw), with the same shape, its memory in the wanted order of axes.

    The packed orders are (tap, c_in, c_out) and (tap, c_out, c_in); a weight whose last wanted axis is contiguous
    already (channels_last_3d) stays as it is. A copy lives for one launch, or inside :func:`remembering` for as long
    as the weight keeps its version.
    """
    return derived(weight, partial(_packed, order=order))


def _packed(weight: torch.Tensor, order: int) -> torch.Tensor:
    innermost = _INNERMOST.get(order)
    if innermost is None or (weight.stride(innermost) == 1 and weight.shape[innermost] > 1):
        return weight if _one_tap_stride(weight) else weight.contiguous()
    packs = _remembered.get()
    if packs is None:
        return _pack(weight, order)
    key = (order, weight.data_ptr(), weight._version, weight.shape, weight.stride())
    if key not in packs:
        packs[key] = _pack(weight, order)
    return packs[key]


def _pack(weight: torch.Tensor, order: int) -> torch.Tensor:
    if weight.is_contiguous():
        return _packer(order, weight.shape, weight.dtype)(weight)
    axes = (2, 3, 4, 0, 1) if order == OUT_INNERMOST else (2, 3, 4, 1, 0)
    return weight.permute(axes).contiguous().permute([axes.index(axis) for axis in range(5)])


@lru_cache(MOST_PACKERS)
def _packer(order: int, shape: torch.Size, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that copies contiguous weights of this kind, in a launch that it repeats from call to call."""
    from tritonconv.kernels.triton_replay import Replay  # needs Triton, which autograd imports this file without
    from tritonconv.kernels.triton_transpose import taps_first

    return Replay(taps_first, innermost=_INNERMOST[order])


def _one_tap_stride(weight: torch.Tensor) -> bool:
    (_, _, kd, kh, kw), (_, _, sd, sh, sw) = weight.shape, weight.stride()
    return (kd == 1 or kh * kw == 1 or sd == kh * kw * sw) and (kh == 1 or kw == 1 or sh == kw * sw)


@contextlib.contextmanager
def remembering(packs: Packs) -> Iterator[None]:
    """Inside, :func:`packed` keeps its copies in ``packs`` and finds them there: one copy per version of the weight.

    Autograd opens this around a forward and its backward. Beyond that pair nothing is remembered: an edit through
    ``weight.data`` (weight clipping, averaged models) changes no version counter, and a copy kept from call to call
    would be stale after it.
    """
    token = _remembered.set(packs)
    try:
        yield
    finally:
        _remembered.reset(token)


def strides(weight: torch.Tensor) -> tuple[int, int, int]:
    """(c_in, c_out, tap) strides of a weight that :func:`packed` returned."""
    step = weight.stride()
    kd, kh, kw = weight.shape[2:]
    tap = step[4] if kw > 1 else step[3] if kh > 1 else step[2] if kd > 1 else math.prod(weight.shape)
    return step[0], step[1], tap


def oriented(weight: torch.Tensor, pass_name: str) -> tuple[int, int, int]:
    """The strides as (k, n, tap) of the GEMM: the forward sums over c_in, the backward-data over c_out."""
    c_in, c_out, tap = strides(weight)
    return (c_in, c_out, tap) if pass_name == "forward" else (c_out, c_in, tap)


def preferred(problem: Problem, pass_name: str = "forward") -> int:
    """The default order: torch's where there is one tap, or the weight fits a cache in a small problem; else packed.

    16-bit dots take either operand order from shared memory, so forward and backward-data read the same copy. TF32 on
    Hopper needs the summed axis innermost: c_in in the forward, c_out in the backward-data.
    """
    nbytes = math.prod(problem.weight_shape) * problem.dtype.itemsize
    if max(problem.kernel) == 1 or (nbytes <= CACHED_BYTES and problem.bytes(pass_name) <= SMALL_PROBLEM):
        return AS_GIVEN
    return IN_INNERMOST if problem.dtype.itemsize == 4 and pass_name == "forward" else OUT_INNERMOST
