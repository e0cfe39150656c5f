"""A layer under ``torch.fx``: one ``call_module`` node, where a tracer makes one of torch's own layer.

torch's tracers know such a leaf by its module's name, ``torch.nn...``. A layer of ours is traced into, and then asks
the tracer about torch's layer.
"""

from __future__ import annotations

from torch import nn
from torch.fx import Proxy, Tracer

from tritonconv.errors import ArgumentTypeError

_TORCHS = nn.ConvTranspose3d.__new__(nn.ConvTranspose3d)  # the tracers look at its type alone


def node_of(layer: nn.Module, input: Proxy, *arguments) -> Proxy | None:
    """The call of ``layer`` as one node of the tracer; None where its operations are to be recorded.

    Those are recorded where torch's layer is no leaf, where the layer is the root, and where it has hooks: a tracer
    runs them, and around a node they would run again. Raises ArgumentTypeError for hooks and an ``output_size``, which
    torch's layer records, and for torch's quantization, which quantizes and fuses layers of exactly torch's class.
    """
    tracer = input.tracer
    if not isinstance(tracer, Tracer) or layer is tracer.root:
        return None
    path = tracer.path_of_module(layer)
    if not tracer.is_leaf_module(_TORCHS, path):
        return None
    if type(tracer).__module__.startswith("torch.ao."):
        raise _refusal(layer, path, f"{type(tracer).__name__} knows torch's layer alone")
    if layer._forward_pre_hooks or layer._forward_hooks:
        if any(argument is not None for argument in arguments):
            raise _refusal(layer, path, "with hooks torch.fx cannot record output_size")
        return None
    return tracer.create_proxy("call_module", path, (input, *arguments), {})


def _refusal(layer: nn.Module, path: str, why: str) -> ArgumentTypeError:
    return ArgumentTypeError(f"{type(layer).__name__} {path!r}: {why}; call tritonconv.restore(model) first")
