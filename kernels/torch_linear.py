"""Images of one voxel: each is a row of a matrix, and all three passes are one product with the weight as it lies.

The first layer of a GAN is of this kind: 4x4x4 taps spread one voxel over a whole output.
"""

from __future__ import annotations

import torch

from tritonconv.kernels.torch_layout import matrix_refusal
from tritonconv.problem import Problem


def supports(problem: Problem, device: torch.device) -> str | None:
    if problem.size != (1, 1, 1):
        return f"needs images of one voxel, the problem has {problem.size}"
    if problem.out_size != problem.kernel or any(problem.crop):
        return (
            f"needs one tap per output with nothing cropped or appended, the problem has kernel {problem.kernel}, "
            f"dilation {problem.dilation}, crop {problem.crop}, output {problem.out_size}"
        )
    return matrix_refusal(problem)


def channels_inside(tensor: torch.Tensor) -> bool:
    """The channels of a weight or of y are innermost (channels_last_3d), not the taps."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last_3d)


def flat(tensor: torch.Tensor, inside: bool) -> torch.Tensor:
    """(k, c_out, kd, kh, kw) -> (k, c_out*taps), or (k, taps*c_out) where ``inside``; a view of one that lies so."""
    return tensor.permute(0, 2, 3, 4, 1).flatten(1) if inside else tensor.flatten(1)


def spread(rows: torch.Tensor, problem: Problem, inside: bool) -> torch.Tensor:
    """The inverse of :func:`flat`; always a view."""
    if not inside:
        return rows.view(len(rows), problem.c_out, *problem.kernel)
    return rows.view(len(rows), *problem.kernel, problem.c_out).permute(0, 4, 1, 2, 3)
