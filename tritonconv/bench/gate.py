"""The correctness gate: no candidate is timed before its outputs agree with float64, and with torch on the timed sizes.

1. On a reduced problem of the same kind (few voxels, the same kernel, stride, crop, dilation and groups; on a GPU one
   that the same compiled kernels serve) each output is held against a float64 reference made from the same rounded
   inputs, one tap at a time, straight from the definition:
   ``max error <= 2 x torch's own error in the same dtype + eps * sqrt(K) * scale``, where K is the number of terms of a
   sum, eps belongs to the type in which sums are kept and scale is the largest reference value. Where torch's switch
   permits TF32, torch's own error is at least what TF32 itself does to the operands: torch may have served the call
   without it.
2. On the tensors that are timed, the output is held against torch's, within ``4 x (torch's relative error from step 1
   + eps * sqrt(K)) * scale``: an index that goes wrong only at size is caught without a float64 convolution at size.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from tritonconv.bench import roofs
from tritonconv.bench.workloads import resized
from tritonconv.errors import ArgumentError
from tritonconv.problem import Axis, Problem

# Three sizes, so that two axes that were mixed up do not go unnoticed.
LARGEST_AXES = (4, 5, 6)
LARGEST_BATCH = 2
LARGEST_WEIGHT = 1 << 20
OUTPUTS = {
    "forward": ("y",),
    "backward_data": ("grad_x",),
    "backward_weight": ("grad_weight", "grad_bias"),
    "forward_backward": ("y", "grad_x", "grad_weight", "grad_bias"),
}

DIVISOR = 16  # of strides: what Triton specialises its kernels on
TF32_BITS = 13  # of a float32's mantissa that the matrix units do not read (PTX ISA, "Matrix fragments", .tf32)

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
    if device.type == "cuda":
        return _served_alike(problem)
    for axis in range(3):
        size = list(problem.size)
        size[axis] = min(size[axis], LARGEST_AXES[axis])
        try:
            problem = resized(problem, tuple(size), min(problem.n, LARGEST_BATCH))  # type: ignore[arg-type]
        except ArgumentError:
            continue
    while math.prod(problem.weight_shape) > LARGEST_WEIGHT and problem.groups == 1 and problem.c_in % 2 == 0:
        problem = replace(problem, c_in=problem.c_in // 2)
    return problem


def _served_alike(problem: Problem) -> Problem:
    """Fewer voxels, and what is compiled in is the same: what divides the strides of x and y, and the widths."""
    size, n = list(problem.size), min(problem.n, LARGEST_BATCH)
    found = resized(problem, problem.size, n)
    for axis in (2, 1, 0):  # the strides of an axis hold the sizes of those behind it
        whole = size[axis]
        for shorter in range(min(LARGEST_AXES[axis], whole), whole):
            size[axis] = shorter
            with contextlib.suppress(ArgumentError):
                small = resized(problem, tuple(size), n)  # type: ignore[arg-type]
                if shorter not in size[axis + 1 :] and _compiled_in(small, axis) == _compiled_in(problem, axis):
                    found = small
                    break
        else:
            size[axis] = whole
    return found


def _compiled_in(problem: Problem, axis: int) -> tuple:
    """What of an axis and of those behind it reaches the compiler: Triton's specialisation, and whole cells of y."""
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
    }[output]


def sum_eps(dtype: torch.dtype) -> float:
    """eps of the type in which sums of ``dtype`` are kept: float32 for the half types."""
    return torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).eps


def reference(problem: Problem, x, weight, bias, grad_y, outputs: Iterable[str]) -> dict[str, torch.Tensor]:
    """The outputs in float64, tap by tap from y[i*s + r*t - p] += x[i] weight[t]; inputs of any dtype on any device."""
    wanted = set(outputs)
    n, groups = problem.n, problem.groups
    c_in, c_out = problem.c_in // groups, problem.c_out // groups
    product = _depthwise_product if c_in == c_out == 1 else torch.einsum
    with _one_thread():
        x, weight, grad_y = (t.detach().to(torch.float64) for t in (x, weight, grad_y))
        # Voxels last but for the channels of a group: (n, d, h, w, groups, c), so that a tap is a batched GEMM.
        x = x.reshape(n, groups, c_in, *problem.size).permute(0, 3, 4, 5, 1, 2).contiguous()
        grad = grad_y.reshape(n, groups, c_out, *problem.out_size).permute(0, 3, 4, 5, 1, 2).contiguous()
        weight = weight.reshape(groups, c_in, c_out, *problem.kernel).permute(3, 4, 5, 0, 1, 2).contiguous()
        y, grad_x, grad_weight = torch.zeros_like(grad), torch.zeros_like(x), torch.zeros_like(weight)
        for tap in itertools.product(*(range(k) for k in problem.kernel)):
            pairs = [_overlap(axis, t) for axis, t in zip(problem.axes, tap, strict=True)]
            inputs, targets = ((slice(None), *(pair[side] for pair in pairs)) for side in (0, 1))
            if "y" in wanted:
                y[targets] += product("ndhwgi,gio->ndhwgo", x[inputs], weight[tap])
            if "grad_x" in wanted:
                grad_x[inputs] += product("ndhwgo,gio->ndhwgi", grad[targets], weight[tap])
            if "grad_weight" in wanted:
                grad_weight[tap] = product("ndhwgi,ndhwgo->gio", x[inputs], grad[targets])
        y, grad_x = (t.permute(0, 4, 5, 1, 2, 3) for t in (y, grad_x))
        if bias is not None:
            y = y + bias.detach().to(torch.float64).view(groups, c_out, 1, 1, 1)
        found = {
            "y": y.reshape(problem.y_shape),
            "grad_x": grad_x.reshape(problem.x_shape),
            "grad_weight": grad_weight.permute(3, 4, 5, 0, 1, 2).reshape(problem.weight_shape),
        }
        if bias is not None:
            found["grad_bias"] = grad_y.sum((0, 2, 3, 4))
    return {name: found[name] for name in found if name in wanted}


def reference_in_tf32(problem: Problem, x, weight, bias, grad_y, outputs: Iterable[str]) -> dict[str, torch.Tensor]:
    """The products of :func:`reference`, in float64, of float32 operands as the matrix units read them in TF32."""
    x, weight, grad_y = (
        (t.detach().view(torch.int32) >> TF32_BITS << TF32_BITS).view(torch.float32) for t in (x, weight, grad_y)
    )
    return reference(problem, x, weight, bias, grad_y, set(outputs) - {"grad_bias"})


def in_tf32(problem: Problem, device: torch.device) -> bool:
    """torch's switch permits TF32 for the products: on a GPU, of float32."""
    return device.type == "cuda" and problem.dtype is torch.float32 and roofs.tf32()


def _depthwise_product(formula: str, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The einsum of one channel per group without a tiny GEMM for each: (n, d, h, w, g, 1) with (g, 1, 1) or alike."""
    if right.dim() == 3:
        return left * right[:, 0]
    return (left * right).sum((0, 1, 2, 3)).unsqueeze(-1)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # Thousands of tiny operations: starting threads for each costs more than they save.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _overlap(axis: Axis, tap: int) -> tuple[slice, slice]:
    """The inputs that a tap sends inside the output, and where they go."""
    shift = axis.dilation * tap - axis.crop
    low = max(0, -(shift // axis.stride))
    high = max(low, min(axis.size, (axis.out - 1 - shift) // axis.stride + 1))
    first = low * axis.stride + shift
    if high == low:
        return slice(0, 0), slice(0, 0)
    return slice(low, high), slice(first, first + (high - low - 1) * axis.stride + 1, axis.stride)


def errors(torchs: Outputs, exact: Outputs, cut: Outputs) -> dict[str, float]:
    """torch's largest error in each output, against ``exact`` in float64.

    ``cut``: the outputs of :func:`reference_in_tf32`, or none where TF32 is not permitted.
    """
    found = {name: _distance(torchs[name], want) for name, want in exact.items()}
    return found | {name: max(found[name], _distance(cut[name], exact[name])) for name in found if name in cut}


def against_reference(problem: Problem, mine: Outputs, torchs: Errors, exact: Outputs) -> Verdict:
    """Step 1. ``mine`` and ``exact`` are the outputs of the candidate and in float64, ``torchs`` torch's errors."""
    verdicts = []
    for name, want in exact.items():
        tolerance = 2 * torchs[name] + sum_eps(problem.dtype) * math.sqrt(terms(problem, name)) * _largest(want)
        verdicts.append(_verdict(name, mine, want, torchs[name], tolerance))
    return worst(verdicts)


def against_torch(problem: Problem, mine: Outputs, torchs: Outputs, relative: float) -> Verdict:
    """Step 2. ``relative`` is torch's error from step 1 over the scale there."""
    verdicts = []
    for name, want in torchs.items():
        eps = sum_eps(problem.dtype) * math.sqrt(terms(problem, name))
        tolerance = 4 * (relative + eps) * _largest(want)
        verdicts.append(_verdict(name, mine, want, 0.0, tolerance))
    return worst(verdicts)


def relative_error(torchs: Errors, exact: Outputs) -> float:
    """The largest of torch's errors, each over the scale of its output."""
    return max(torchs[name] / max(_largest(want), 1e-30) for name, want in exact.items())


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
    return Verdict(name, _distance(got, want), torch_error, tolerance)


def _largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    if not want.numel():
        return 0.0
    precise = torch.float64 if want.dtype is torch.float64 else torch.float32
    return (got.detach().to(want.device, precise) - want.to(precise)).abs().max().item()
