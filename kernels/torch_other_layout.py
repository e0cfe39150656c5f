"""torch's own operations in the other memory format: copies, where torch is faster on that side."""

from __future__ import annotations

from tritonconv.kernels import torch_native
from tritonconv.kernels.torch_layout import filled, other_layout, to_layout
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of


def forward(problem, config, x, weight, bias, out=None):
    y = torch_native.forward(problem, to_layout(x, other_layout(problem)), weight, bias)
    return to_layout(y, problem.memory_format) if out is None else filled(out, y)


def backward_data(problem, config, grad_y, weight):
    grad_x = torch_native.backward_data(problem, to_layout(grad_y, other_layout(problem)), weight)
    return to_layout(grad_x, problem.memory_format)


def backward_weight(problem, config, x, grad_y, need_bias):
    other = other_layout(problem)
    return torch_native.backward_weight_and_bias(problem, to_layout(x, other), to_layout(grad_y, other), need_bias)


def _variant(pass_name, idea, launch, **more):
    return Variant(
        f"{pass_name}_torch_other_layout", pass_name, idea, "torch", launch, spreads_nonfinite=SPREADS_PADDING,
        workspace_bytes=lambda problem: problem.bytes(pass_name),
        work=lambda problem, config: by_torch(problem, pass_name, 2 * size_of(problem, "x", "y"), 3),
        **more,
    )  # fmt: skip


VARIANTS = [
    _variant(
        "forward", "torch's own conv_transpose3d in the other memory format", forward,
        strided=True, deterministic=False,  # as forward_torch_native
    ),
    _variant("backward_data", "conv3d of grad_y in the other memory format", backward_data),
    _variant("backward_weight", "weight gradient of conv3d in the other memory format", backward_weight),
]  # fmt: skip
