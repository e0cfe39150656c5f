"""The ranks of a group compare the arguments of a call before they exchange anything that depends on them.

One small all_gather: a rank that comes with other arguments, or refuses its own, is an error on every rank that says
so. A rank that does not come at all is the group's own error, at the latest after the group's timeout.
"""

from __future__ import annotations

from zlib import crc32

import torch
import torch.distributed as dist

from tritonconv.arguments import OP, Geometry
from tritonconv.errors import ArgumentError

# The fields that all ranks must share, with the integers each has.
SHARED = {
    "axis": 1, "dtype": 1, "input shape without the axis": 4, "weight shape": 5, "bias (axes, values)": 2, "stride": 3,
    "padding (begin)": 3, "padding (end)": 3, "output_padding": 3, "groups": 1, "dilation": 3,
    "gradients wanted (input, weight, bias)": 3, "sizes (their checksum)": 1, "out_sizes (their checksum)": 1,
}  # fmt: skip
LENGTH = sum(SHARED.values()) + 1  # and the planes of x
REFUSED = 1 << 40  # in the place of the axis
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def terms(x, weight, bias, geo: Geometry, axis: int, needs: tuple[bool, ...], sizes, out_sizes) -> list[int]:
    """The integers of a checked call, in the order of ``SHARED`` and then the rank's planes of x."""
    rest = (*x.shape[:axis], *x.shape[axis + 1 :])
    return [
        axis, DTYPES.index(x.dtype), *rest, *weight.shape, *((0, 0) if bias is None else (bias.dim(), bias.numel())),
        *geo.stride, *geo.crop, *geo.back, *geo.output_padding, geo.groups, *geo.dilation, *needs, _checksum(sizes),
        _checksum(out_sizes), x.shape[axis],
    ]  # fmt: skip


def _checksum(planes: tuple[int, ...] | None) -> int:
    return 0 if planes is None else crc32(repr(planes).encode())


def compare(own: list[int] | None, device: torch.device, group: dist.ProcessGroup) -> tuple[int, ...]:
    """The planes of x that each rank has; ``own`` are this rank's :func:`terms`, None where it refuses.

    Raises ArgumentError on every rank where two have other terms or one refuses; the refusing rank itself gets none.
    """
    mine = torch.tensor(own or [REFUSED] + [0] * (LENGTH - 1), dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    if own is None:
        return ()
    rows = torch.stack(every).tolist()
    for rank, row in enumerate(rows):
        if row[0] == REFUSED:
            raise ArgumentError(f"{OP}: rank {rank} of the group refuses its own arguments; its error says why")
    for rank, row in enumerate(rows):
        start = 0
        for name, count in SHARED.items():
            theirs, first = row[start : start + count], rows[0][start : start + count]
            if theirs != first:
                raise ArgumentError(f"{OP}: {name}: rank {rank} of the group has {theirs}, rank 0 has {first}")
            start += count
    return tuple(row[-1] for row in rows)
