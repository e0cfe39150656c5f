"""Forward where every channel is its own group: the phases as depthwise ``conv3d`` in channels_last_3d.

torch sends a depthwise transposed convolution to a generic path of about 4 GFLOP/s on 2 cores; oneDNN has a fast
depthwise *ordinary* convolution in channels_last_3d, and inside a phase that is what the operation is.
"""

from __future__ import annotations

from tritonconv.kernels import forward_torch_conv, forward_torch_phases
from tritonconv.kernels.torch_layout import CHANNELS_LAST, to_layout
from tritonconv.kernels.variant import SPREADS_PADDING, Variant
from tritonconv.kernels.work import by_torch, size_of


def supports(problem, device):
    if not problem.depthwise:
        return f"needs groups = channels, the problem has groups {problem.groups}, {problem.c_in}->{problem.c_out}"
    return None


def launch(problem, config, x, weight, bias):
    inner = forward_torch_conv if problem.stride == (1, 1, 1) else forward_torch_phases
    return inner.launch(problem, config, to_layout(x, CHANNELS_LAST), weight, bias)


VARIANT = Variant(
    name="forward_torch_depthwise",
    pass_name="forward",
    idea="groups = channels: depthwise conv3d per phase, in channels_last_3d",
    backend="torch",
    spreads_nonfinite=SPREADS_PADDING,
    launch=launch,
    supports=supports,
    workspace_bytes=lambda problem: 2 * problem.bytes(),
    work=lambda problem, config: by_torch(
        problem, "forward", 2 * size_of(problem, "x", "y"), 1 + 3 * len(problem.phases)
    ),
)
