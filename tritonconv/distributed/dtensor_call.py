"""A DTensor that is sharded along a spatial axis: its local slabs by :mod:`tritonconv.distributed.call`.

torch's own DTensor answers such a transposed convolution with wrong numbers and no error (torch 2.13).
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from tritonconv.arguments import OP, Geometry, check_shapes, layout_of
from tritonconv.distributed.call import sharded
from tritonconv.errors import ArgumentError
from tritonconv.problem import LAYOUTS


def call(x: DTensor, weight: DTensor, bias: DTensor | None, geo: Geometry) -> DTensor:
    """The answer of a batched call as a DTensor of x's placements, in torch's own layout: equal chunks, the last less.

    One axis of the mesh shards a spatial axis of x; any other replicates x or shards its batch. Weight and bias are
    DTensors of the same mesh, replicated. Raises ArgumentError for other placements.
    """
    mesh, placements = x.device_mesh, x.placements
    axes = [placement.dim if type(placement) is Shard else None for placement in placements]
    spatial = [index for index, axis in enumerate(axes) if axis is not None and axis >= 2]
    others = [index for index, axis in enumerate(axes) if axis == 0 or type(placements[index]) is Replicate]
    if len(spatial) != 1 or len(spatial) + len(others) != len(placements):
        raise ArgumentError(
            f"{OP}: input is a DTensor with placements {placements}; one axis of the mesh may shard a spatial axis, "
            "the others the batch (axis 0) or nothing"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not _replicated(tensor, mesh):
            raise ArgumentError(f"{OP}: with a DTensor as input {name} must be a replicated DTensor of the same mesh")
    if mesh.get_coordinate() is None:
        raise ArgumentError(f"{OP}: input is a DTensor on {mesh}, which this rank is not in")
    (where,) = spatial
    axis, ranks, out = placements[where].dim, mesh.size(where), check_shapes(x, weight, bias, geo)  # type: ignore[attr-defined]
    # The gradients of weight and bias come summed over the slabs; over shards of the batch torch sums them.
    parts = [Partial() if each == 0 else Replicate() for each in axes]
    y = sharded(
        x.to_local(),
        weight.to_local(grad_placements=parts),
        None if bias is None else bias.to_local(grad_placements=parts),
        (geo.stride, tuple(zip(geo.crop, geo.back, strict=True)), geo.output_padding, geo.groups, geo.dilation),
        mesh.get_group(where),
        axis,
        sizes=_chunks(x.shape[axis], ranks),
        out_sizes=_chunks(out[axis - 2], ranks),
        one_loss=True,
    )
    layout, shape = LAYOUTS[layout_of(x, weight)], (x.shape[0], weight.shape[1] * geo.groups, *out)
    whole = torch.empty(shape, device="meta", memory_format=layout)
    y = y.contiguous(memory_format=layout)  # a slab may lie otherwise than the whole
    return DTensor.from_local(y, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def _replicated(tensor, mesh) -> bool:
    return (
        isinstance(tensor, DTensor) and tensor.device_mesh == mesh and all(p.is_replicate() for p in tensor.placements)
    )


def _chunks(size: int, ranks: int) -> tuple[int, ...]:
    """The planes of each rank, by the rule of ``torch.chunk``."""
    chunk = -(-size // ranks)
    return tuple(max(0, min(chunk, size - rank * chunk)) for rank in range(ranks))
