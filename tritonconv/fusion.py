"""``fuse(model)``: batch norm, residual and activation behind a transposed convolution in one call, for inference.

No layer, no parameter and no key of a state_dict changes. A module whose forward holds such a chain gets a ``forward``
of its own: its class's, as torch.fx records it, with each chain as one call. ``unfuse`` takes it away again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from tritonconv.chains import NOTHING, Chain, NotRecorded, chains, layer_refusal, recorded
from tritonconv.convert import listed
from tritonconv.folding import FusedChain, FusedForward, unfuse


@dataclass(frozen=True)
class FusionReport:
    """The result of :func:`fuse`; ``print(report)`` lists it.

    ``fused`` holds (qualified name of the transposed convolution, the operations that its call computes and the module
    whose forward has that call), ``left`` (qualified name, reason), in the order of ``model.named_modules()``.
    """

    model: nn.Module = field(repr=False)
    fused: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return listed(fused=self.fused, left=self.left)


@dataclass
class _Scope:
    """A module whose forward was recorded."""

    name: str
    module: nn.Module
    graph: fx.Graph
    arguments: list[str]
    inlined: list[nn.Module]
    chains: list[Chain]


def fuse(model: nn.Module) -> FusionReport:
    """Computes BatchNorm3d, a residual sum and an activation behind each transposed convolution in its call; in place.

    For inference: a model in ``eval()``. The batch norm's statistics are folded into weight and bias; the activations
    are those of :func:`tritonconv.conv_transpose3d`. torch's layers are taken as well as tritonconv's, in
    ``nn.Sequential`` and in every module whose forward torch.fx records: modules or functions, ``y + skip`` or
    ``y += skip``. Outputs differ from the unfused model's within the rounding of the dtype; in float32 on a CPU
    those of tritonconv's layers without a batch norm do not differ.

    The model keeps its class, its layers and its state_dict. Parameters may be loaded, moved or trained later. The
    forward of the class itself runs wherever the recorded one may not stand for it: in training mode, with other than
    tensors, with an optional argument, under ``torch.compile``, export and torch.func. With gradients enabled the
    batch norms with parameters that need one run by themselves. A copy and a pickle are not fused.

    As everywhere in torch.fx, the Python of such a forward runs once, here: it must not depend on the types of its
    tensors, nor on anything that changes later. :func:`tritonconv.unfuse` and :func:`tritonconv.restore` undo it.
    Fusing twice changes nothing.

    A layer is left, with a reason in the report, where its output is used twice, where it or the module behind it has
    hooks or is parametrized, trains or tracks no statistics, and where no scope around it can be recorded.

    Raises ArgumentTypeError if ``model`` is no module.
    """
    unfuse(model)
    layers = {module: name for name, module in model.named_modules() if isinstance(module, nn.ConvTranspose3d)}
    best: dict[nn.Module, tuple[Chain, _Scope]] = {}
    stops: dict[nn.Module, str] = {}
    refusals: dict[nn.Module, list[str]] = {layer: [] for layer in layers}
    for scope in _scopes(model, refusals):
        for chain in scope.chains:
            if chain.gain > (best[chain.layer][0].gain if chain.layer in best else 0):
                best[chain.layer] = chain, scope
            if chain.stop != stops.get(chain.layer, NOTHING):  # the outer scopes see more, up to the same stop
                stops.setdefault(chain.layer, chain.stop)
    for scope in {id(scope): scope for _, scope in best.values()}.values():
        _install(scope)
    rows = [(layer, name, best.get(layer)) for layer, name in layers.items()]
    fused = tuple((name, _said(*found)) for _, name, found in rows if found)
    left = tuple(
        (name, stops.get(layer) or "; ".join(dict.fromkeys(refusals[layer])) or layer_refusal(layer) or NOTHING)
        for layer, name, found in rows
        if not found
    )
    return FusionReport(model, fused, left)


def _scopes(model: nn.Module, refusals: dict[nn.Module, list[str]]) -> Iterator[_Scope]:
    """The modules around transposed convolutions whose forward is recorded, the innermost first."""
    modules = sorted(model.named_modules(), key=lambda entry: -entry[0].count(".") - bool(entry[0]))
    for name, module in modules:
        layers = [each for each in module.modules() if each in refusals and each is not module]
        if not layers or module in refusals or _without_forward(module):
            continue
        refusal = _refusal(module)
        if refusal is None:
            try:
                graph, recorder = recorded(module)
                found = chains(graph, dict(module.named_modules(remove_duplicate=False)))
                yield _Scope(name, module, graph, recorder.arguments, recorder.inlined, found)
                continue
            except NotRecorded as error:
                refusal = str(error)
        for layer in layers:
            refusals[layer].append(
                refusal if module.training else f"{type(module).__name__} {name}".rstrip() + f": {refusal}"
            )


def _without_forward(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward


def _refusal(module: nn.Module) -> str | None:
    if module.training:
        return "in training mode; call eval() first"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    own = vars(module).get("forward")
    # A copy of a fused module has its class's forward as an attribute.
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return "it has a forward of its own"
    return None


def _install(scope: _Scope) -> None:
    graph, recorded_modules = scope.graph, [scope.module, *scope.inlined]
    for index, chain in enumerate(chain for chain in scope.chains if chain.gain):
        call = FusedChain(f"fused_chain_{index}", chain.layer, chain.norm, chain.activation, chain.adds_in_place)
        last = chain.steps[-1]
        with graph.inserting_after(last):
            node = graph.call_function(call, chain.operands)
        last.replace_all_uses_with(node)
        for step in reversed(chain.steps):
            graph.erase_node(step)
        recorded_modules += chain.modules
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    forward = FusedForward(scope.module, namespace["forward"], len(scope.arguments), dict.fromkeys(recorded_modules))
    scope.module.forward = forward  # type: ignore[assignment]


def _said(chain: Chain, scope: _Scope) -> str:
    where = f"{type(scope.module).__name__} {scope.name}".rstrip()
    return f"with {', '.join(chain.names)}, in the forward of {where}"
