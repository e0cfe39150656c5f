"""Transposed convolution of volumes that no single device holds: each rank of a process group has a slab.

``import tritonconv`` does not load this package.
"""

from tritonconv.distributed.call import conv_transpose3d
from tritonconv.distributed.sharded_layer import ShardedConvTranspose3d as ConvTranspose3d
from tritonconv.distributed.slabs import output_sizes

__all__ = ["ConvTranspose3d", "conv_transpose3d", "output_sizes"]
