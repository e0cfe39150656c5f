"""Operands of NCDHW layers in channels_last_3d: one copy, so that a tile's loads are 16 bytes wide.

In NCDHW the neighbours of a tap start at any address, and every load of a tile is 2 bytes (4 of float32) wide. Where
taps overlap, each element is loaded several times, and one copy in the other order can cost less than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

from tritonconv.kernels import triton_transpose
from tritonconv.kernels.triton_tape import derived
from tritonconv.kernels.variant import Config, Toolchain, Variant
from tritonconv.kernels.work import Work, size_of
from tritonconv.problem import Problem

LEAST_CHANNELS = 16  # of a group: fewer fill no 32-byte sector


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``x`` (n, c, d, h, w) dense in channels_last_3d: itself where it is already."""
    if x.is_contiguous(memory_format=torch.channels_last_3d) or not x.is_contiguous():
        return derived(x, lambda tensor: tensor.contiguous(memory_format=torch.channels_last_3d))
    return triton_transpose.channels_last(x)


def grad_y_last(problem: Problem, grad_y: torch.Tensor) -> torch.Tensor:
    """``Variant.prepare`` of the two gradients: one copy of grad_y serves both."""
    return channels_last(grad_y)


def of(base: Variant, launch: Callable, idea: str, copied: tuple[str, ...], gathered: str) -> Variant:
    """The record of ``base`` on channels-last copies of the operands ``copied``, with the tiles of an NDHWC layer.

    ``gathered`` (``c_in`` or ``c_out``) are the channels of the operand that the taps gather.
    """

    def supports(problem: Problem, device: torch.device) -> str | None:
        if problem.layout != "ncdhw":
            return "the operands are channels_last_3d already"
        if all(axis.kernel <= axis.stride for axis in problem.axes):
            return f"kernel {problem.kernel}, stride {problem.stride}: no element is read twice, a copy saves nothing"
        channels = getattr(problem, gathered) // problem.groups
        if channels < LEAST_CHANNELS:
            return f"{gathered}={channels} per group: fewer than {LEAST_CHANNELS} contiguous channels gain nothing"
        return base.supports(_last(problem), device)

    def work(problem: Problem, config: Config) -> Work:
        assert base.work is not None
        found, moved = base.work(_last(problem), config), 2 * size_of(problem, *copied)
        return replace(
            found,
            memory_bytes=found.memory_bytes + moved,
            cache_bytes=found.cache_bytes + moved,
            launches=found.launches + len(copied),
        )

    def hazard(problem: Problem, config: Config, target: Toolchain) -> str | None:
        assert base.hazard is not None
        return base.hazard(_last(problem), config, target)

    return replace(
        base,
        name=f"{base.name}_last",
        idea=idea,
        launch=launch,
        supports=supports,
        space=lambda problem, device: base.space(_last(problem), device),
        default=lambda problem, device: base.default(_last(problem), device),
        prepare=None if base.pass_name == "forward" else grad_y_last,
        workspace_bytes=lambda problem: base.workspace_bytes(_last(problem)) + int(size_of(problem, *copied)),
        work=work,
        hazard=None if base.hazard is None else hazard,
    )


def weight_gradient(base: Variant, idea: str) -> Variant:
    """:func:`of` a backward-weight variant: on copies of x and of grad_y, which the other gradient may have made."""

    def launch(problem, config, x, grad_y, need_bias, prepared=None):
        grad_y = channels_last(grad_y) if prepared is None else prepared
        return base.launch(problem, config, channels_last(x), grad_y, need_bias)

    return of(base, launch, idea, ("x", "y"), "c_out")


@lru_cache(4096)  # asked for each config, and sums over a problem's phases are kept with it
def _last(problem: Problem) -> Problem:
    return replace(problem, layout="ndhwc")
