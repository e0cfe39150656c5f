"""The correctness gate: no candidate is timed before its outputs agree with float64, and with torch on the timed sizes.

1. On a reduced problem of the same kind (few voxels, the same kernel, stride, crop, dilation and groups; on a GPU one
   that the same compiled kernels serve) each output is held against a float64 reference made from the same rounded
   inputs, one tap at a time, straight from the definition:
   ``max error <= 2 x torch's own error in the same dtype + eps * sqrt(K) * scale``, where K is the number of terms of a
   sum, eps belongs to the type in which sums are kept and scale is the largest reference value. Where torch's switch
   permits TF32, torch's own error is at least what TF32 itself does to the operands: torch may have served the call
   without it.
   An error that no order of summation explains earns no credit: then torch's is at least what rounding makes it.
2. On the tensors that are timed, each output is held against torch's, within ``4 x (torch's relative error in this
   output from step 1 + eps * sqrt(K)) * scale``: an index that goes wrong only at size is caught without a float64
   convolution at size. Where the two disagree, float64 decides for that output, within the same limit of each. The
   operands have other values than in the calls before, and the call's conduct is watched (``conduct.py``).

The procedure is :class:`tritonconv.lab.bench.case.Judge`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from tritonconv.errors import ArgumentError
from tritonconv.lab.bench.layer_sizes import resized
from tritonconv.precision import TF32, float32_precision
from tritonconv.problem import Problem

# Three sizes, so that two axes that were mixed up do not go unnoticed.
LARGEST_AXES = (4, 5, 6)
LARGEST_BATCH = 2
LARGEST_WEIGHT = 1 << 20
OUTPUTS = {
    "forward": ("y",),
    "backward_data": ("grad_x",),
    "backward_weight": ("grad_weight", "grad_bias"),
    "forward_backward": ("y", "grad_x", "grad_weight", "grad_bias", "grad_beside", "grad_slopes"),
}

DIVISOR = 16  # of strides: what Triton specialises its kernels on
# An error of torch's own beyond so many times eps * sqrt(K) of the dtype, or this share of the scale, is no rounding.
CREDIBLE, CREDIBLE_SHARE = 16, 0.25

Outputs = Mapping[str, torch.Tensor]
Errors = Mapping[str, float]  # by output


@dataclass(frozen=True)
class Verdict:
    """The worst output of a candidate: its largest absolute error, torch's own, and what was allowed."""

    output: str
    max_error: float
    torch_error: float
    tolerance: float
    message: str = ""

    @property
    def ok(self) -> bool:
        """False for NaN too."""
        return not self.message and self.max_error <= self.tolerance

    def __str__(self) -> str:
        if self.message:
            return f"{self.output}: {self.message}"
        allowed = f"allowed {self.tolerance:.3g}, torch's {self.torch_error:.3g}"
        return f"{self.output}: max error {self.max_error:.3g}, {allowed}"


def reduced(problem: Problem, device: torch.device) -> Problem:
    """The problem of step 1: axes at most 4, 5, 6, batch at most 2, c_in halved while the weight has over 1 M elements.

    An axis that would leave an empty output keeps its size; so does c_in with groups. On a GPU, where it costs nothing,
    c_in stays, and an axis is as much longer as it takes for the kernels that are compiled for the problem to be those
    of the reduced one too.
    """
    on_gpu = device.type == "cuda"
    size, n = list(problem.size), min(problem.n, LARGEST_BATCH)
    best = resized(problem, problem.size, n)
    for axis in (2, 1, 0):  # the strides of an axis hold the sizes of those behind it
        whole = size[axis]
        least = min(LARGEST_AXES[axis], whole)
        for size[axis] in range(least, whole) if on_gpu else (least,):
            with contextlib.suppress(ArgumentError):
                small = resized(problem, tuple(size), n)  # type: ignore[arg-type]
                alike = size[axis] not in size[axis + 1 :] and _compiled_in(small, axis) == _compiled_in(problem, axis)
                if alike or not on_gpu:
                    best = small
                    break
        else:
            size[axis] = whole
    halves = not on_gpu and problem.groups == 1
    while halves and math.prod(best.weight_shape) > LARGEST_WEIGHT and best.c_in % 2 == 0:
        best = replace(best, c_in=best.c_in // 2)
    return best


def _compiled_in(problem: Problem, axis: int) -> tuple:
    """The facts of an axis and of those behind it that the compiler sees: Triton's specialisation, whole cells of y."""
    volumes = math.prod(problem.size[axis:]), math.prod(problem.out_size[axis:])
    strides = tuple((math.gcd(DIVISOR, volume), volume == 1) for volume in volumes)
    return strides, problem.out_size[axis] % problem.stride[axis] == 0


def terms(problem: Problem, output: str) -> int:
    """K: how many products (or values) are summed into one element of an output, at most."""
    taps = math.prod(problem.kernel)
    return {
        "y": problem.c_in // problem.groups * max(phase.taps for phase in problem.phases),
        "grad_x": problem.c_out // problem.groups * taps,
        "grad_weight": problem.n * math.prod(problem.size),
        "grad_bias": problem.n * math.prod(problem.out_size),
        "grad_beside": 1,
        "grad_slopes": problem.n * math.prod(problem.out_size),
    }[output]


def sum_eps(dtype: torch.dtype) -> float:
    """eps of the type in which sums of ``dtype`` are kept: float32 for the half types."""
    return torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).eps


def in_tf32(problem: Problem, device: torch.device) -> bool:
    """torch's switch permits TF32 for the products: on a GPU, of float32."""
    return device.type == "cuda" and problem.dtype is torch.float32 and float32_precision() == TF32


def errors(problem: Problem, torchs: Outputs, exact: Outputs, cut: Outputs) -> dict[str, float]:
    """torch's largest error in each output against ``exact``, which is in float64: what a candidate has credit for.

    ``cut``: the outputs of :func:`float64.reference_in_tf32`, or none where TF32 is not permitted. An
    error too large for a sum that was rounded in any way counts as that of the exact output in the dtype.
    """
    credit = {}
    for name, want in exact.items():
        least = max(distance(rounded, want) for rounded in (want.to(problem.dtype), cut.get(name, want)))
        rounding = CREDIBLE * torch.finfo(problem.dtype).eps * math.sqrt(terms(problem, name))
        largest = 2 * least + min(rounding, CREDIBLE_SHARE) * _largest(want)
        error = distance(torchs[name], want)
        credit[name] = max(error, least) if error <= largest else least
    return credit


def against_reference(problem: Problem, mine: Outputs, torchs: Errors, exact: Outputs) -> Verdict:
    """Step 1. ``mine`` and ``exact`` are the outputs of the candidate and in float64, ``torchs`` torch's errors."""
    verdicts = []
    for name, want in exact.items():
        tolerance = 2 * torchs[name] + sum_eps(problem.dtype) * math.sqrt(terms(problem, name)) * _largest(want)
        verdicts.append(_verdict(name, mine, want, torchs[name], tolerance))
    return worst(verdicts)


def against_torch(problem: Problem, name: str, mine: Outputs, want: torch.Tensor, relative: float) -> Verdict:
    """Step 2 for one output; ``want`` is torch's, ``relative`` torch's relative error in it from step 1."""
    return _verdict(name, mine, want, 0.0, limit(problem, name, relative, _largest(want)))


def limit(problem: Problem, name: str, relative: float, scale: float) -> float:
    """How far an output may be from the other at full size, whose largest value is ``scale``."""
    return 4 * (relative + sum_eps(problem.dtype) * math.sqrt(terms(problem, name))) * scale


def relative_errors(torchs: Errors, exact: Outputs) -> dict[str, float]:
    """torch's error in each output, over the scale of that output."""
    return {name: torchs[name] / max(_largest(want), 1e-30) for name, want in exact.items()}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """A red verdict if there is one, else the one nearest to its limit."""
    return max(verdicts, key=lambda v: (not v.ok, v.max_error / v.tolerance if v.tolerance > 0 else v.max_error))


def _verdict(name: str, mine: Outputs, want: torch.Tensor, torch_error: float, tolerance: float) -> Verdict:
    got = mine.get(name)
    if got is None:
        return Verdict(name, math.inf, torch_error, tolerance, "the output is missing")
    if got.shape != want.shape:
        message = f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        return Verdict(name, math.inf, torch_error, tolerance, message)
    return Verdict(name, distance(got, want), torch_error, tolerance)


def _largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest error of ``got``; NaN where it is not finite."""
    if not want.numel():
        return 0.0
    precise = torch.float64 if want.dtype is torch.float64 else torch.float32
    return (got.detach().to(want.device, precise) - want.to(precise)).abs().max().item()
