"""The GPU that launches go to; without a GPU the one that kernels are compiled for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache

import torch
import triton

from tritonconv.kernels.targets import LEAST_SHARED_BYTES, NVIDIA

INTERPRETED = bool(triton.knobs.runtime.interpret)
STEP = 16  # widths that it divides, as Triton's own specialisation of strides has it, permit wide masks
LEAST_STEP = 8  # that is worth a compilation of its own: 16 bytes of two-byte elements
BARRIERS = 128  # bytes of shared memory, at most, beside the tiles: of what copies and products on sm_100 wait at


_assumed: ContextVar[int | None] = ContextVar("tritonconv_assumed_capability", default=None)


def step_of(width: int) -> int:
    """A divisor of ``width`` for the compiler: STEP, LEAST_STEP or 1."""
    step = math.gcd(width, STEP)
    return step if step >= LEAST_STEP else 1


@contextlib.contextmanager
def assume_capability(capability: int) -> Iterator[None]:
    """Inside the block configs and their costs are those of a GPU of this compute capability, as 90 for 9.0."""
    token = _assumed.set(capability)
    try:
        yield
    finally:
        _assumed.reset(token)


def target():
    """Triton's GPUTarget (backend, arch); None where there is none (the interpreter)."""
    try:
        return None if INTERPRETED or driver_fault() else triton.runtime.driver.active.get_current_target()
    except RuntimeError:
        return None


@cache
def driver_fault() -> str | None:
    """Why no kernel can be launched on the GPU that is here, in words; None where one can, or where there is no GPU.

    With its driver Triton builds a library, once for all processes that share its cache.
    """
    if INTERPRETED or not torch.cuda.is_available():
        return None
    try:
        triton.runtime.driver.active.get_current_target  # noqa: B018  looked up alone, it asks nothing of the GPU
    except Exception as error:
        needs = "a C compiler, and a cache that can be written (TRITON_CACHE_DIR)"
        return f"Triton cannot build its driver for the GPU, which takes {needs}: {type(error).__name__}: {error}"
    return None


def target_name() -> str | None:
    """As ``sm_90`` or ``gfx942``; None where there is no GPU."""
    gpu = target()
    if gpu is None:
        return None
    return f"sm_{gpu.arch}" if gpu.backend == "cuda" else str(gpu.arch)


def compute_capability() -> int:
    """Of the NVIDIA GPU, as 90 for 9.0; 0 where there is none."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    gpu = target()
    return gpu.arch if gpu is not None and gpu.backend == "cuda" else 0


def registers_in_flight() -> bool:
    """Whether the compiler lets a loop overwrite registers that products of its last turn still read (triton #9433).

    It happens on sm_90 where operand A goes through registers, to be reshaped after its load, and is multiplied
    asynchronously. Seen in the machine code of Triton 3.6.0 to 3.8.0, never in that of 3.9.0.
    """
    return compute_capability() == 90 and triton_version() < (3, 9)


def zeros_behind_loops() -> bool:
    """Whether the zeros that a loop's sums have where it is not entered may lie behind it in the code, between its
    products and their last wait: ptxas then has the loop wait for each product (its remark C7515).

    Seen on sm_90 with Triton 3.6.0, not with 3.9.0. The interpreter does as if.
    """
    return INTERPRETED or (compute_capability() == 90 and triton_version() < (3, 9))


def triton_version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def shared_bytes() -> int:
    """Shared memory that one block may have."""
    limits = NVIDIA.get(compute_capability())
    return LEAST_SHARED_BYTES if limits is None else limits.shared_per_block


def pipeline_buffers(num_stages: int) -> int:
    """Copies of a loop's operands in shared memory: on Hopper the products read one while ``num_stages - 1`` fill, on
    sm_100 likewise.

    Compiled for sm_80, sm_86 and sm_120 the kernels of one pipeline take 2 copies in 3 stages, for sm_90 3.
    """
    return max(1, num_stages if 90 <= compute_capability() < 120 else num_stages - 1)
