"""Operands of NCDHW layers in channels_last_3d: one copy, so that a tile's loads are 16 bytes wide.

In NCDHW the neighbours of a tap start at any address, and every load of a tile is 2 bytes (4 of float32) wide. Where
taps overlap, each element is loaded several times, or once by programs that issue and wait for such loads; one copy in
the other order can cost less than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, wraps

import torch

from tritonconv.kernels import triton_transpose
from tritonconv.kernels.triton_buffers import Buffer, copied
from tritonconv.kernels.variant import COPY, Config, Toolchain, Variant
from tritonconv.kernels.work import Work, size_of
from tritonconv.problem import Problem

LAST = torch.channels_last_3d
LARGE = {"forward": (0,), "backward_data": (0,), "backward_weight": (0, 1)}  # x and grad_y among the operands
Tiles = tuple[Callable[[Problem, torch.device], Config], Callable[[Problem, torch.device], tuple[Config, ...]]]
LEAST_CHANNELS = 16  # of a group: fewer fill no 32-byte sector


def channels_last(x: Buffer) -> Buffer:
    """``x`` (n, c, d, h, w) dense in channels_last_3d: itself where it is already."""
    if x.is_contiguous(memory_format=LAST) or not x.is_contiguous():
        return copied(x, lambda tensor: tensor.contiguous(memory_format=LAST))
    return x.copy(LAST, lambda: triton_transpose.channels_last(x))


def copying(base: Variant, copied: tuple[str, ...], gathered: str, tiles: Tiles | None = None) -> Variant:
    """``base`` with the key COPY in its configs: 1 runs it on channels-last copies of the operands ``copied`` of an
    NCDHW layer, in the tiles of an NDHWC layer. The default has 0; of a layer that the base serves in NDHWC alone, 1.

    ``gathered`` (``c_in`` or ``c_out``) are the channels of the operand that the taps gather. The space has configs
    with 1 where these fill a sector and the taps overlap: other layers have rows of voxels at known addresses, and wide
    loads of them. ``tiles``: the default config and the space of such configs for the NCDHW problem, by default those
    of the base for its NDHWC twin.
    """
    default_for, space_for = tiles or (
        lambda problem, device: base.default(last(problem), device),
        lambda problem, device: base.space(last(problem), device),
    )

    def pays(problem: Problem) -> bool:
        overlap = any(axis.kernel > axis.stride for axis in problem.axes)
        return problem.layout == "ncdhw" and overlap and getattr(problem, gathered) // problem.groups >= LEAST_CHANNELS

    def plain(problem: Problem, device: torch.device) -> bool:
        """Whether a served problem has configs without a copy."""
        return not pays(problem) or base.supports(problem, device) is None

    def supports(problem: Problem, device: torch.device) -> str | None:
        why_not = base.supports(problem, device)
        if why_not is None or not pays(problem):
            return why_not
        of_copies = base.supports(last(problem), device)
        return of_copies if of_copies in (None, why_not) else f"{why_not}; of a copy in ndhwc: {of_copies}"

    original = base.launches
    assert original is not None  # only Triton kernels read what they have had copied

    @wraps(original)
    def launches(problem, config, *operands, **more):
        plain = {key: value for key, value in config.items() if key != COPY}
        if config.get(COPY):
            places = LARGE[base.pass_name]
            operands = tuple(channels_last(each) if place in places else each for place, each in enumerate(operands))
        return original(problem, plain, *operands, **more)

    def space(problem: Problem, device: torch.device) -> tuple[Config, ...]:
        configs = [{**config, COPY: 0} for config in base.space(problem, device)] if plain(problem, device) else []
        if pays(problem):
            configs += [{**config, COPY: 1} for config in space_for(problem, device)]
        return tuple(configs)

    def default(problem: Problem, device: torch.device) -> Config:
        if plain(problem, device):
            return {**base.default(problem, device), COPY: 0}
        return {**default_for(problem, device), COPY: 1}

    def default_of_copies(problem: Problem, device: torch.device) -> Config | None:
        return {**default_for(problem, device), COPY: 1} if pays(problem) else None

    def work(problem: Problem, config: Config) -> Work:
        assert base.work is not None
        if not config.get(COPY):
            return base.work(problem, config)
        counts, moved = base.work(last(problem), config), 2 * size_of(problem, *copied)
        return replace(
            counts,
            memory_bytes=counts.memory_bytes + moved,
            cache_bytes=counts.cache_bytes + moved,
            launches=counts.launches + len(copied),
        )

    def workspace_bytes(problem: Problem) -> int:
        most = base.workspace_bytes(problem)
        if pays(problem):
            most = max(most, base.workspace_bytes(last(problem)) + int(size_of(problem, *copied)))
        return most

    def hazard(problem: Problem, config: Config, target: Toolchain) -> str | None:
        assert base.hazard is not None
        return base.hazard(last(problem) if config.get(COPY) else problem, config, target)

    return replace(
        base,
        launches=launches,
        supports=supports,
        space=space,
        default=default,
        copied=default_of_copies,
        workspace_bytes=workspace_bytes,
        work=work,
        hazard=None if base.hazard is None else hazard,
    )


@lru_cache(4096)  # a count calls it for each config, and the problem caches the sums over its phases
def last(problem: Problem) -> Problem:
    """The problem in NDHWC."""
    return replace(problem, layout="ndhwc")
