"""Kernel = stride: each output voxel has one tap, so all passes are one GEMM and a (un)shuffle of phases.

A problem counts as such where nothing is cropped or appended (:attr:`tritonconv.problem.Problem.tiles_exactly`).
"""

from __future__ import annotations

import torch

from tritonconv.kernels.torch_layout import matrix_refusal
from tritonconv.problem import Problem


def supports(problem: Problem, device: torch.device) -> str | None:
    if not problem.tiles_exactly:
        return (
            f"needs kernel = stride with nothing cropped or appended, the problem has kernel {problem.kernel}, "
            f"stride {problem.stride}, crop {problem.crop}, output {problem.out_size}"
        )
    return matrix_refusal(problem)


def unshuffle(problem: Problem, grad_y: torch.Tensor) -> torch.Tensor:
    """grad_y with its phases beside the channels, as the GEMM's operand.

    NCDHW: (n, c_out*taps, voxels), rows ordered as the columns of :func:`taps_first`.
    channels_last_3d: (n*voxels, taps*c_out).
    """
    (d, h, w), (kd, kh, kw) = problem.size, problem.kernel
    n, c_out = problem.n, problem.c_out
    if problem.layout == "ndhwc":
        split = grad_y.permute(0, 2, 3, 4, 1).reshape(n, d, kd, h, kh, w, kw, c_out)
        return split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(n * d * h * w, kd * kh * kw * c_out)
    split = grad_y.reshape(n, c_out, d, kd, h, kh, w, kw)
    return split.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(n, c_out * kd * kh * kw, d * h * w)


def taps_last(weight: torch.Tensor) -> torch.Tensor:
    """(c_in, c_out, kd, kh, kw) -> (c_in, taps*c_out), the channels_last_3d column order."""
    return weight.permute(0, 2, 3, 4, 1).reshape(weight.shape[0], weight[0].numel())


def taps_first(weight: torch.Tensor) -> torch.Tensor:
    """(c_in, c_out, kd, kh, kw) -> (c_in, c_out*taps), the NCDHW column order; a view of a contiguous weight."""
    return weight.reshape(weight.shape[0], weight[0].numel())
