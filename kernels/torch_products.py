"""The matrix products of the formulations in torch's operations: by MKL, or by oneDNN where MKL is slow.

On a GPU float32 products are convolutions of one tap: torch's switch for convolutions then decides whether they take
TF32, as for the layer that they stand for, and not its switch for matrices, which may say otherwise.

MKL, which ``torch.mm`` calls, takes AVX2 on AMD's CPUs that have AVX-512: 204 GFLOP/s in float32 where oneDNN reaches
465 (1024x256 by 256x512; 195 and 466 in 512x128 by 128x2048; 2 cores of an AMD EPYC, torch 2.13).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from tritonconv.device import cpu_vendor
from tritonconv.private import addmm, bmm

# MKL's product of fewer FLOPs takes no longer than oneDNN's: 14 and 19 us for 2.0e6, 24 and 26 for 4.2e6 (as above).
ENOUGH_FLOPS = 5_000_000
# Elements of a product from which on those of several images are added as they are made, and not held side by side:
# 0.37 -> 0.22 ms for one (256, 64) by (64, 1024), 1.90 -> 1.46 ms for two (320, 64) by (64, 2560), 0.33 -> 0.35 ms for
# four (32, 512) by (512, 256) (float32, one core of an Intel Xeon, torch 2.13).
ENOUGH_SUMS = 1 << 16


def product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``left`` (m, k) times ``right`` (k, n), plus ``bias`` (n,) in each row -> (m, n)."""
    if _by_onednn(left, right):
        return _onednn(left, right, bias)
    if _by_convolution(left, right):
        return _product_by_convolution(left, right, bias)
    return left @ right if bias is None else addmm(bias, left, right)


def products(matrix: torch.Tensor, images: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
    """``matrix`` (m, k) times each of ``images`` (n, k, voxels) -> (n, m, voxels), dense in one order or the other.

    It is ``place``, of that shape, where there is one, which :func:`writes` must allow.

    ``torch.matmul`` would fold the batch into the rows where an operand requires a gradient, at the price of
    transposing copies of images and result.
    """
    if place is not None:
        return bmm(matrix.expand(images.shape[0], *matrix.shape), images, out=place)
    if images.shape[0] and _by_onednn(matrix, images[0]):
        n, _, voxels = images.shape
        if not matrix.is_contiguous() and images[0].numel() < matrix.numel():  # of the two oneDNN's left one is copied
            rows = images.transpose(1, 2).flatten(0, 1)
            return _onednn(rows, matrix.t()).view(n, voxels, matrix.shape[0]).transpose(1, 2)
        matrix = matrix.contiguous()
        if n == 1:
            return _onednn(matrix, images[0]).unsqueeze(0)
        found = images.new_empty((n, matrix.shape[0], voxels))
        for image, place in zip(images, found, strict=True):
            place.copy_(_onednn(matrix, image))
        return found
    if _by_convolution(matrix, images):
        return F.conv1d(images, matrix.unsqueeze(2))
    return bmm(matrix.expand(images.shape[0], *matrix.shape), images)


def writes(images: torch.Tensor) -> bool:
    """:func:`products` can write into a given place in no more time: oneDNN's are new tensors."""
    return images.device.type == "cpu" and not (images.dtype is torch.float32 and mkl_is_slow())


def sum_of_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The sum over images of ``left`` (n, m, voxels) times ``right`` (n, k, voxels) transposed -> (m, k)."""
    n, m, _ = left.shape
    if n and _by_onednn(left[0], right[0].t()):
        found = _onednn(left[0], right[0].t())
        for one, other in zip(left[1:], right[1:], strict=True):
            found += _onednn(one, other.t())
        return found
    if _by_convolution(left, right):
        return _sum_by_convolution(left, right)
    if left.device.type == "cpu" and n and (n == 1 or m * right.shape[1] >= ENOUGH_SUMS):
        found = left[0] @ right[0].t()
        for one, other in zip(left[1:], right[1:], strict=True):
            addmm(found, one, other.t(), out=found)
        return found
    return bmm(left, right.transpose(1, 2)).sum(0)


def _by_convolution(left: torch.Tensor, right: torch.Tensor) -> bool:
    on_gpu = left.device.type == "cuda" and left.dtype is torch.float32
    return on_gpu and left.numel() > 0 and right.numel() > 0


def _product_by_convolution(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The rows are the voxels of one image in channels_last, so that the result lies as the product's."""
    image = left.t()[None, :, None]  # (1, k, 1, m)
    found = F.conv2d(image.contiguous(memory_format=torch.channels_last), right.t()[..., None, None], bias)
    return found.permute(0, 2, 3, 1).reshape(left.shape[0], right.shape[1])


def _sum_by_convolution(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The weight gradient of the convolution from ``right`` to ``left``."""
    like_weight = left.new_empty(left.shape[1], right.shape[1], 1)  # only its shape is read
    return torch.ops.aten.convolution_backward(
        left, right, like_weight, None, [1], [0], [1], False, [0], 1, (False, True, False)
    )[1].squeeze(2)


def _onednn(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # The operation behind torch.compile's CPU backend; the last three arguments name no fused activation.
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")


def _by_onednn(left: torch.Tensor, right: torch.Tensor) -> bool:
    flops = 2 * left.numel() * right.shape[1]
    plain = left.device.type == "cpu" and left.dtype is torch.float32 and right.numel() > 0
    return plain and flops >= ENOUGH_FLOPS and mkl_is_slow()


@cache
def mkl_is_slow() -> bool:
    """This is an AMD CPU with AVX-512, and torch has both MKL and oneDNN."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not both or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return cpu_vendor() == "AuthenticAMD" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
