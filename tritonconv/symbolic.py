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

    Those are recorded where torch's layer is no leaf, where the layer is the root, where it has hooks (a tracer runs
    them, and around a node they would run again), and for torch's quantization, which knows the operation and torch's
    layer. Raises ArgumentTypeError for an ``output_size`` in the last two cases, where torch's layer records it.
    """
    tracer = input.tracer
    if not isinstance(tracer, Tracer) or layer is tracer.root:
        return None
    path = tracer.path_of_module(layer)
    if not tracer.is_leaf_module(_TORCHS, path):
        return None
    quantizes = type(tracer).__module__.startswith("torch.ao.")
    if quantizes or layer._forward_pre_hooks or layer._forward_hooks:
        if any(argument is not None for argument in arguments):
            why = f"{type(tracer).__name__} knows torch's layer alone" if quantizes else "the layer has hooks"
            raise ArgumentTypeError(
                f"{type(layer).__name__}: torch.fx cannot record output_size in {path!r}, for {why}; call "
                "tritonconv.restore(model) first"
            )
        return None
    return tracer.create_proxy("call_module", path, (input, *arguments), {})
