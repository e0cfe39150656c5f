"""Operands of NCDHW layers in channels_last_3d: one copy, so that a tile's loads are 16 bytes wide.

In NCDHW the neighbours of a tap start at any address, and every load of a tile is 2 bytes (4 of float32) wide. Where
taps overlap, each element is loaded several times, and one copy in the other order can cost less than that.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, wraps

import torch

from tritonconv.kernels import triton_transpose
from tritonconv.kernels.triton_tape import derived
from tritonconv.kernels.variant import COPY, Config, Toolchain, Variant
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


def copying(base: Variant, copied: tuple[str, ...], gathered: str) -> Variant:
    """``base`` with the key COPY in its configs: 1 runs it on channels-last copies of the operands ``copied`` of an
    NCDHW layer, in the tiles of an NDHWC layer. The default has 0.

    ``gathered`` (``c_in`` or ``c_out``) are the channels of the operand that the taps gather. The space has configs
    with 1 where these fill a sector and an element is read more than once.
    """

    def pays(problem: Problem) -> bool:
        overlap = any(axis.kernel > axis.stride for axis in problem.axes)
        return problem.layout == "ncdhw" and overlap and getattr(problem, gathered) // problem.groups >= LEAST_CHANNELS

    @wraps(base.launch)
    def launch(problem, config, *operands, **more):
        plain = {key: value for key, value in config.items() if key != COPY}
        return base.launch(problem, plain, *(_copied(base, *operands) if config.get(COPY) else operands), **more)

    def space(problem: Problem, device: torch.device) -> tuple[Config, ...]:
        configs = [{**config, COPY: 0} for config in base.space(problem, device)]
        if pays(problem):
            configs += [{**config, COPY: 1} for config in base.space(_last(problem), device)]
        return tuple(configs)

    def default_of_copies(problem: Problem, device: torch.device) -> Config | None:
        return {**base.default(_last(problem), device), COPY: 1} if pays(problem) else None

    def work(problem: Problem, config: Config) -> Work:
        assert base.work is not None
        if not config.get(COPY):
            return base.work(problem, config)
        counts, moved = base.work(_last(problem), config), 2 * size_of(problem, *copied)
        return replace(
            counts,
            memory_bytes=counts.memory_bytes + moved,
            cache_bytes=counts.cache_bytes + moved,
            launches=counts.launches + len(copied),
        )

    def workspace_bytes(problem: Problem) -> int:
        most = base.workspace_bytes(problem)
        if pays(problem):
            most = max(most, base.workspace_bytes(_last(problem)) + int(size_of(problem, *copied)))
        return most

    def hazard(problem: Problem, config: Config, target: Toolchain) -> str | None:
        assert base.hazard is not None
        return base.hazard(_last(problem) if config.get(COPY) else problem, config, target)

    return replace(
        base,
        launch=launch,
        space=space,
        default=lambda problem, device: {**base.default(problem, device), COPY: 0},
        copied=default_of_copies,
        prepare=None if base.pass_name == "forward" else grad_y_last,
        workspace_bytes=workspace_bytes,
        work=work,
        hazard=None if base.hazard is None else hazard,
    )


def _copied(base: Variant, *operands):
    """The operands of a launch with x and grad_y in channels_last_3d; of grad_y the copy may be there, as the last."""
    if base.pass_name == "forward":
        x, *more = operands
        return channels_last(x), *more
    if base.pass_name == "backward_data":
        grad_y, weight, *prepared = operands
        return *(prepared or [channels_last(grad_y)]), weight
    x, grad_y, need_bias, *prepared = operands
    return channels_last(x), *(prepared or [channels_last(grad_y)]), need_bias


@lru_cache(4096)  # a count calls it for each config, and the problem caches the sums over its phases
def _last(problem: Problem) -> Problem:
    return replace(problem, layout="ndhwc")
