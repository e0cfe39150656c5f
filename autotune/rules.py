"""Which variant serves a problem without a tuned choice: torch's own on a GPU; on a CPU by measurements.

Where CPUs of the vendor have rows, those decide (``nearby.py``); a CPU of another vendor has torch's own, for nothing
was measured there. Later a program's first calls decide (``online.py``). ``tritonconv.explain`` prints the reason.
"""

from __future__ import annotations

import torch

from tritonconv.device import cpu_vendor
from tritonconv.kernels.registry import variant
from tritonconv.kernels.variant import Variant
from tritonconv.problem import PASSES, Problem

FALLBACK = {name: f"{name}_torch_native" for name in PASSES}
# Images of one voxel are a product, which no row of larger images tells. Medians of interleaved runs in float32 with
# torch 2.13.0 on 2 cores of an Intel Xeon and of an AMD EPYC, as torch's own -> the product; shapes are batch x
# channels. They are ratios of two things measured together, not rates to expect elsewhere.
ONE_VOXEL = {
    "forward": "k4 s2 32x200->512 16.5 -> 4.7 ms NCDHW, 18.3 -> 4.9 ms channels_last_3d, at stride 1 4.9 -> 4.3 ms; k4 "
    "1x100->64 0.20 -> 0.03 ms",
    "backward_data": "k4 s2 32x200->512 9.7 -> 3.2 ms NCDHW, 18.1 -> 3.9 ms channels_last_3d, at stride 1 4.1 -> 3.3 "
    "ms; k4 1x100->64 0.16 -> 0.03 ms",
    "backward_weight": "k4 s2 32x200->512 19.8 -> 3.9 ms NCDHW, 49.5 -> 7.4 ms channels_last_3d, at stride 1 6.6 -> "
    "4.4 ms; k4 1x100->64 0.25 -> 0.04 ms",
}


def torchs_own(problem: Problem, device: torch.device, pass_name: str) -> tuple[Variant, str | None]:
    """torch's own variant of a pass; where that is not safe, the convolution that stands for it, and the reason."""
    native = variant(FALLBACK[pass_name])
    unsafe = native.supports(problem, device)
    return (native, None) if unsafe is None else (variant(f"{pass_name}_torch_conv"), unsafe)


def choose(problem: Problem, device: torch.device, pass_name: str) -> tuple[Variant, str]:
    """The variant for one pass of ``problem`` on ``device``, and the reason."""
    native, unsafe = torchs_own(problem, device, pass_name)
    if unsafe is not None:
        return native, unsafe
    if device.type != "cpu":
        return native, f"no rule for {device.type}: torch's own"
    if problem.n == 0 or problem.c_out == 0:
        return native, "an empty output: torch's own"
    product = variant(f"{pass_name}_torch_linear")
    if problem.dtype == torch.float32 and product.supports(problem, device) is None:
        return product, f"images of one voxel: {ONE_VOXEL[pass_name]}"
    from tritonconv.autotune import nearby  # its rows are read where a CPU's call needs them

    vendor = cpu_vendor()
    if nearby.measured(vendor):
        return nearby.choose(problem, pass_name)
    return native, f"nothing was measured on CPUs of vendor {vendor or 'unknown'}: torch's own"
