"""Which variant serves a problem without a tuned choice: torch's own on a GPU; on a CPU by measurements.

Where CPUs of the vendor have rows, those decide (``nearby.py``). The ordered rules below are for Intel's CPUs, each
with the measurement that justifies it: the first that applies, and whose variant supports the problem, decides. A CPU
of another vendor has torch's own, for nothing was measured there. ``tritonconv.explain`` prints the reason.
The figures are medians of interleaved runs in float32 with torch 2.13.0 on 2 cores of an Intel Xeon (AVX-512, 2 MiB L2
per core), 2026-11-22, those of images of one voxel on 2 cores of an AMD EPYC (AVX-512, 1 MiB), 2026-11-25, as (torch's
own -> the variant); shapes are batch x channels, input size. They are ratios of two things measured together, not rates
to expect elsewhere; ``tritonconv bench`` measures them on your machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from tritonconv.device import cpu_vendor
from tritonconv.kernels.registry import variant
from tritonconv.kernels.variant import Variant
from tritonconv.problem import PASSES, Problem

# torch sends one small image with a kernel of at most 3 past oneDNN (ATen ConvParams::use_mkldnn, torch 2.13).
SMALL_IMAGE_ELEMENTS = 20480
# Below this the Python around a call costs more than any formulation saves (about 20 us against 3e11 FLOP/s).
LITTLE_WORK = 5_000_000
# Such a layer has fewer outputs too: k2 s2 1x8->8 12^3 (110,592) and the concatenation with a skip 0.20 -> 0.21 ms.
FEW_OUTPUTS = 1 << 17
# An overlap-add is one small operation per tap, about 20 us each: k3 s2 1x32->2 12^3 0.11 -> 0.57 ms, 24^3 (1.7e6 FLOP
# per tap) 0.79 -> 1.16 ms.
WORK_PER_TAP = 3_000_000
# From this many voxels a GEMM over them is worth its shuffle.
ENOUGH_VOXELS = 100
FEW_VOXELS = 256
MANY_TAPS = 512
# A weight with this many elements, and this many per voxel, costs more to reorder than the activations do.
LARGE_WEIGHT = 1_000_000
LARGE_WEIGHT_PER_VOXEL = 3000
HUGE_WEIGHT_PER_VOXEL = 20_000
# Activations (x and y, bytes) from which leaving NCDHW for the duration of the call pays for two copies.
LARGE_ACTIVATIONS = 6 << 20


class Rule(NamedTuple):
    variant: str
    applies: Callable[[Problem], bool]
    because: str


def _voxels(problem: Problem) -> int:
    return problem.n * math.prod(problem.size)


def _enough(problem: Problem, voxels: int = ENOUGH_VOXELS) -> bool:
    """The GEMM is large: many voxels, or very many taps."""
    return _voxels(problem) >= voxels or math.prod(problem.kernel) >= MANY_TAPS


def _activation_bytes(problem: Problem) -> int:
    return (math.prod(problem.x_shape) + math.prod(problem.y_shape)) * problem.dtype.itemsize


def _large_weight(problem: Problem, per_voxel: int = LARGE_WEIGHT_PER_VOXEL) -> bool:
    elements = math.prod(problem.weight_shape)
    return problem.groups == 1 and elements >= max(LARGE_WEIGHT, per_voxel * _voxels(problem))


def _huge_weight(problem: Problem) -> bool:
    return _large_weight(problem, HUGE_WEIGHT_PER_VOXEL) and _voxels(problem) >= 16


def _idle_outputs(problem: Problem) -> bool:
    # Taps step through the residues of the stride by the dilation and reach s/gcd(r, s) of them at most.
    return any(min(a.kernel, a.stride // math.gcd(a.dilation, a.stride)) < a.stride for a in problem.axes)


def _bias_not_fused(problem: Problem) -> bool:
    uneven = any(o % s for o, s in zip(problem.out_size, problem.stride, strict=True))
    return problem.bias and (uneven or not _undilated(problem))


def _small_image(problem: Problem) -> bool:
    elements = problem.n * problem.c_in * problem.size[0] * problem.size[1]
    narrow = problem.kernel[1] <= 3 or problem.kernel[2] <= 3
    small = problem.n == 1 and problem.groups == 1 and narrow and elements <= SMALL_IMAGE_ELEMENTS
    return small and not problem.tiles_exactly


def _undilated(problem: Problem) -> bool:
    return problem.dilation == (1, 1, 1)


def _dilated_stride(problem: Problem) -> bool:
    return not _undilated(problem) and problem.stride != (1, 1, 1)


def _one_voxel(problem: Problem) -> bool:
    return problem.size == (1, 1, 1)


def _gradients_apart(problem: Problem) -> bool:
    more_y = math.prod(problem.y_shape) >= math.prod(problem.weight_shape)
    return problem.depthwise or _small_image(problem) or (problem.bias and problem.layout == "ndhwc" and more_y)


FORWARD = (
    Rule(
        "forward_torch_linear",
        _one_voxel,
        "images of one voxel: k4 s2 32x200->512 16.5 -> 4.7 ms NCDHW, 18.3 -> 4.9 ms channels_last_3d, at stride 1 "
        "4.9 -> 4.3 ms; k4 1x100->64 0.20 -> 0.03 ms",
    ),
    Rule(
        "forward_torch_depthwise",
        lambda p: p.depthwise and not _one_voxel(p),  # there oneDNN multiplies the padding, as torch's own does not
        "torch has no fast depthwise transposed convolution: k5 s2 2x512 8^3 66 -> 9.7 ms NCDHW, 85 -> 6.7 ms "
        "channels_last_3d; k3 s2 2x128 16^3 61 -> 27 ms, 41 -> 9.1 ms",
    ),
    Rule(
        "forward_torch_shuffle",
        lambda p: p.tiles_exactly and p.layout == "ncdhw" and _enough(p, FEW_VOXELS),
        "kernel = stride in NCDHW: 2x64->32 16x16x32 26 -> 9.2 ms, 1x384->5 7x23x23 k2x4x4 12.3 -> 3.7 ms",
    ),
    Rule(
        "forward_torch_shuffle",
        lambda p: p.tiles_exactly and p.layout == "ndhwc" and p.c_in >= 192 and _enough(p),
        "kernel = stride with many input channels in channels_last_3d: 2x320->320 4^3 2.7 -> 1.9 ms, 2x768->128 "
        "3x6x6 2.7 -> 2.3 ms, 1x384->5 7x23x23 k2x4x4 7.5 -> 2.9 ms",
    ),
    Rule(
        "forward_torch_columns",
        lambda p: p.c_out <= 3 and p.c_in >= 8 and not p.tiles_exactly
        and p.flops >= WORK_PER_TAP * math.prod(p.kernel),
        "up to 3 output channels leave oneDNN's 16-wide block empty: k4 s2 2x64->1 32^3 47 -> 7.9 ms NCDHW, "
        "43 -> 9.4 ms channels_last_3d; k3 s2 2x32->2 24x48x48 46 -> 8.6 ms, 21 -> 11 ms",
    ),
    Rule(
        "forward_torch_phases",
        lambda p: p.groups == 1 and (_undilated(p) or p.layout == "ncdhw") and (_dilated_stride(p) or _idle_outputs(p)),
        "outputs that no tap reaches, or a dilation that oneDNN's strided path lacks: k1 s2 2x64->32 16x32x32 "
        "84 -> 10 ms NCDHW, 43 -> 4.5 ms channels_last_3d; k3 s2 dilation 2 2x32->64 8x16x16 10.5 -> 5.7 ms NCDHW",
    ),
    Rule(
        "forward_torch_onednn",
        _small_image,
        "one small image: torch does not call oneDNN for it; k3 s2 1x64->64 12x12x20 13 -> 5.6 ms NCDHW, "
        "18 -> 6.3 ms channels_last_3d",
    ),
    Rule(
        "forward_torch_onednn",
        _bias_not_fused,
        "oneDNN fuses a bias only where all phases have equally many outputs: k3 s2 p1 2x16->32 16x16x32 "
        "31 -> 9.4 ms NCDHW, 16 -> 4.0 ms channels_last_3d",
    ),
    Rule(
        "forward_torch_onednn",
        lambda p: p.layout == "ncdhw" and p.groups == 1 and _activation_bytes(p) >= LARGE_ACTIVATIONS
        and not _large_weight(p),
        "NCDHW reorders inside oneDNN are slower than two blocked copies: k3 s2 2x32->64 8x16x16 10.2 -> 5.7 ms",
    ),
    Rule(
        "forward_torch_other_layout",
        lambda p: p.layout == "ndhwc" and _huge_weight(p) and not p.tiles_exactly,
        "a large weight on few voxels: its reorder for channels_last_3d is slow; k4 s2 2x512->256 2x2x4 30 -> 18 ms",
    ),
    Rule("forward_torch_native", lambda p: True, "no formulation measured faster on this class"),
)  # fmt: skip

BACKWARD_DATA = (
    Rule(
        "backward_data_torch_linear",
        _one_voxel,
        "images of one voxel: k4 s2 32x200->512 9.7 -> 3.2 ms NCDHW, 18.1 -> 3.9 ms channels_last_3d, at stride 1 "
        "4.1 -> 3.3 ms; k4 1x100->64 0.16 -> 0.03 ms",
    ),
    Rule(
        "backward_data_torch_shuffle",
        lambda p: p.tiles_exactly and p.layout == "ncdhw" and _enough(p),
        "kernel = stride in NCDHW: one unshuffle of grad_y serves both gradients; whole backward 2x128->64 8x16x16 "
        "6.4 -> 4.9 ms, 1x32->32 28x28x36 19 -> 8.3 ms, 2x64->16 16x32x32 16.6 -> 7.2 ms",
    ),
    Rule(
        "backward_data_torch_other_layout",
        lambda p: p.layout == "ndhwc" and _large_weight(p),
        "a large weight on few voxels: its reorder for channels_last_3d is slow; k4 s2 2x512->256 2x2x4 26 -> 8.4 ms",
    ),
    Rule(
        "backward_data_torch_conv",
        _gradients_apart,
        "the ordinary convolution reaches oneDNN for small images, and goes with a bias gradient apart: k3 s2 "
        "1x64->64 12x12x20 9.9 -> 4.8 ms NCDHW, 12.3 -> 2.8 ms channels_last_3d",
    ),
    Rule("backward_data_torch_native", lambda p: True, "no formulation measured faster on this class"),
)

BACKWARD_WEIGHT = (
    Rule(
        "backward_weight_torch_linear",
        _one_voxel,
        "images of one voxel: k4 s2 32x200->512 19.8 -> 3.9 ms NCDHW, 49.5 -> 7.4 ms channels_last_3d, at stride 1 "
        "6.6 -> 4.4 ms; k4 1x100->64 0.25 -> 0.04 ms",
    ),
    Rule(
        "backward_weight_torch_depthwise",
        lambda p: p.depthwise,
        "oneDNN's depthwise weight gradient is fast in 2-D only: k3 s2 2x512 8^3 16.3 -> 6.0 ms NCDHW, 15.2 -> 5.5 ms "
        "channels_last_3d; k5 s2 2x64 16x16x32 228 -> 73 ms, 79 -> 55 ms",
    ),
    Rule(
        "backward_weight_torch_shuffle",
        lambda p: p.tiles_exactly and (_enough(p) if p.layout == "ncdhw" else p.c_in >= 128),
        "kernel = stride is one GEMM: 1x384->5 7x23x23 k2x4x4 7.6 -> 2.3 ms NCDHW, where it shares its unshuffle with "
        "the input gradient; with many input channels 2x320->256 4x4x8 4.1 -> 1.7 ms channels_last_3d",
    ),
    Rule(
        "backward_weight_torch_other_layout",
        lambda p: p.layout == "ndhwc" and _large_weight(p),
        "a large weight on few voxels: k4 s2 2x256->256 2x4x4 17 -> 9.0 ms",
    ),
    Rule(
        "backward_weight_torch_other_layout",
        lambda p: p.layout == "ncdhw" and 4 <= p.c_out // p.groups < 16 and not p.tiles_exactly,
        "few output channels, or few per group, in NCDHW: k3 s2 2x16->8 24x32x40 12 -> 5.5 ms, k3x5x7 s2 groups 4 "
        "2x32->32 12x12x24 13.8 -> 5.0 ms",
    ),
    Rule(
        "backward_weight_torch_phases",
        lambda p: _dilated_stride(p) or (_idle_outputs(p) and p.layout == "ncdhw"),
        "a dilation that oneDNN's strided path lacks, or outputs that no tap reaches: k3 s2 dilation 2 2x32->64 "
        "8x16x16 6.0 -> 2.6 ms; k1 s2 2x64->32 16x32x32 6.0 -> 4.5 ms",
    ),
    Rule(
        "backward_weight_torch_conv",
        _gradients_apart,
        "the bias gradient apart from oneDNN's weight gradient in channels_last_3d: k3 s2 2x32->64 8x16x16 6.6 -> 3.2 "
        "ms, k2 s2 1x32->32 28x28x36 19 -> 7.7 ms; a small image reaches oneDNN: k3 s2 1x64->64 12x12x20 11 -> 4.7 ms",
    ),
    Rule("backward_weight_torch_native", lambda p: True, "no formulation measured faster on this class"),
)

RULES = dict(zip(PASSES, (FORWARD, BACKWARD_DATA, BACKWARD_WEIGHT), strict=True))
OF_THE_RULES = "GenuineIntel"
FALLBACK = {name: f"{name}_torch_native" for name in PASSES}


def choose(problem: Problem, device: torch.device, pass_name: str) -> tuple[Variant, str]:
    """The variant for one pass of ``problem`` on ``device``, and the reason."""
    native = variant(FALLBACK[pass_name])
    unsafe = native.supports(problem, device)
    if unsafe is not None:
        return variant(f"{pass_name}_torch_conv"), unsafe
    if device.type != "cpu":
        return native, f"no rule for {device.type}: torch's own"
    if problem.n == 0 or problem.c_out == 0:
        return native, "an empty output: torch's own"
    from tritonconv.autotune import nearby  # its rows are read where a CPU's call needs them

    vendor = cpu_vendor()
    if nearby.measured(vendor):
        if _one_voxel(problem) and problem.dtype == torch.float32:
            return _by_rule(RULES[pass_name][:1], problem, device, native)
        return nearby.choose(problem, device, pass_name)
    if vendor != OF_THE_RULES:
        return native, f"nothing was measured on CPUs of vendor {vendor or 'unknown'}: torch's own"
    if problem.dtype != torch.float32:
        return native, f"the rules were measured for float32, the problem has {problem.dtype}: torch's own"
    small = problem.flops < LITTLE_WORK and math.prod(problem.y_shape) < FEW_OUTPUTS
    if small and not _one_voxel(problem):  # 41 us of torch's for 8x64->32 k2, 10 us as a product
        return native, f"{problem.flops / 1e6:.2g} MFLOP: the call itself costs more than any formulation saves"
    return _by_rule(RULES[pass_name], problem, device, native)


def _by_rule(rules: tuple[Rule, ...], problem: Problem, device: torch.device, native: Variant) -> tuple[Variant, str]:
    for rule in rules:
        if rule.applies(problem):
            record = variant(rule.variant)
            if record.supports(problem, device) is None:
                return record, rule.because
    return native, "no rule applies: torch's own"
