"""Forward by torch's own operation in the other memory format: two copies, where torch is faster on that side."""

from __future__ import annotations

from tritonconv.kernels import torch_native
from tritonconv.kernels.torch_layout import other_layout, to_layout
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of


def supports(problem, device):
    return None


def launch(problem, config, x, weight, bias):
    y = torch_native.forward(problem, to_layout(x, other_layout(problem)), weight, bias)
    return to_layout(y, problem.memory_format)


VARIANT = Variant(
    name="forward_torch_other_layout",
    pass_name="forward",
    idea="torch's own conv_transpose3d in the other memory format",
    backend="torch",
    spreads_nonfinite=SPREADS_PADDING,
    launch=launch,
    supports=supports,
    deterministic=False,  # as forward_torch_native
    workspace_bytes=lambda problem: problem.bytes(),
    work=lambda problem, config: by_torch(problem, "forward", 2 * size_of(problem, "x", "y"), 3),
)
