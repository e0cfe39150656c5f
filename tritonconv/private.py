"""torch's private names that a call asks, each with a stand-in for a release of torch that lacks it.

The private ones answer in a tenth of a microsecond. A stand-in is torch's public way; where there is none, an answer
that sends the call to torch itself, which is right everywhere.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import forward_ad


def private(path: str, stand_in: Any) -> Any:
    """The function ``torch.<path>``, or ``stand_in`` where there is none."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if callable(found) else stand_in


# An active torch.func transform; None without one.
transforms = private("_C._functorch.peek_interpreter_stack", lambda: "unknown")
dispatch_modes = private("_C._len_torch_dispatch_stack", lambda: 1)
tracing = private("_C._get_tracing_state", lambda: torch.jit.is_tracing() or None)
# A tensor of torch's old vmap, that of batched gradients (is_grads_batched=True).
old_vmap = private("_C._functorch.is_legacy_batchedtensor", lambda tensor: False)
# A tensor that was kept beyond the torch.func transform that wrapped it, and the tensor inside.
dead_wrapper = private("_C._functorch.is_dead_tensor_wrapper", lambda tensor: False)
unwrap_if_dead = private("_C._functorch.unwrap_if_dead", lambda tensor: tensor)
deterministic = private("_C._get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled)
any_autocast = private(
    "_C._is_any_autocast_enabled", lambda: torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")
)
# The backward pass that this thread runs; -1 outside one.
backward_pass = private("_C._current_graph_task_id", lambda: -1)
# The class in C below torch.autograd.Function, whose ``apply`` it calls; None where it is missing.
function_base = private("_C._FunctionBase", None)
# The convolution that torch's own call would run, by its operands and hyper-parameters; None where it does not say.
convolution = private("_C._select_conv_backend", lambda *call: None)
# The index of the current GPU, in a process that has a tensor on one; the public way also looks whether CUDA is there.
current_gpu = private("_C._cuda_getDevice", lambda: torch.cuda.current_device())
# The handle of a GPU's current stream, by the GPU's index.
raw_stream = private("_C._cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream)
# (backend, operation) -> what torch.backends.<backend>.<operation>.fp32_precision reads, in a fortieth of its time.
fp32_precision = private(
    "_C._get_fp32_precision_getter",
    lambda backend, operation: torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
)
# torch.bmm and torch.addmm themselves: a counter of layers (ptflops) replaces those while it counts, and would count
# the products of a layer besides the layer.
bmm = private("_C._VariableFunctions.bmm", torch.bmm)
addmm = private("_C._VariableFunctions.addmm", torch.addmm)
# torch.empty_strided of (size, stride, dtype) on the current device, as torch.compile's code calls it; None where it is
# missing.
empty_on = {kind: private(f"_C._dynamo.guards._empty_strided_{kind}", None) for kind in ("cpu", "cuda")}
# torch.compiler.disable, which torch.compile comes with only where it is called, not where it is written.
without_compiler = private("_compile._disable_dynamo", torch.compiler.disable)
# ``forward_mode._current_level``: the level of forward-mode differentiation, below 0 outside it.
forward_mode: Any = forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=0)
# Made of tensors, it holds others against their classes, sizes, strides, dtypes, devices, requires_grad and dispatch
# keys; None where it is missing.
operands_check = private("_C._dynamo.guards.TensorGuards", None)
