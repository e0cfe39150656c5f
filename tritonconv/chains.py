"""Chains in a recorded forward: a transposed convolution and the operations behind it that one call can compute.

A chain is conv, then at most one BatchNorm3d (of fixed statistics), one added tensor and one activation, in this order;
identities and the dropouts of a model in eval() lie between them. Each operation reads the one before, and nobody else
does.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from tritonconv.epilogue import NAMES
from tritonconv.errors import ArgumentError
from tritonconv.layer import ConvTranspose3d

FORWARDS = (nn.ConvTranspose3d.forward, ConvTranspose3d.forward)
NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm)
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
SUMS_IN_PLACE = (operator.iadd, "add_")
ADDITIONS = (operator.add, torch.add, "add", *SUMS_IN_PLACE)
IN_PLACE = tuple(
    getattr(operator, f"i{name}")
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "pow",
        "mod",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
)
NOTHING = "nothing follows"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class NotRecorded(ArgumentError):
    """The forward of a module cannot be recorded; its text says why."""


@dataclass
class Chain:
    """``steps`` are its operations in the graph, the convolution first; ``stop`` says why it ends there."""

    layer: nn.ConvTranspose3d
    steps: list[fx.Node]
    norm: nn.Module | None = None
    addition: tuple[fx.Node, int] | None = None  # the sum, and the place of the residual among its arguments
    activation: Any = None  # as conv_transpose3d has it; a PReLU stands for itself
    modules: list[nn.Module] = field(default_factory=list)  # all in it
    names: list[str] = field(default_factory=list)
    stop: str = ""

    @property
    def operands(self) -> tuple[Any, Any, Any]:
        """(input, residual, output_size) in the graph as it is now."""
        call = self.steps[0]
        given = [call.args[place] if len(call.args) > place else call.kwargs.get(name)
                 for place, name in enumerate(("input", "output_size"))]  # fmt: skip
        return given[0], None if self.addition is None else self.addition[0].args[self.addition[1]], given[1]

    @property
    def adds_in_place(self) -> bool:
        """The sum is in the memory of the convolution's output, and of its dtype."""
        return self.addition is not None and self.addition[0].target in SUMS_IN_PLACE

    @property
    def gain(self) -> int:
        """The operations that a call of their own is saved."""
        return len(self.names)


class _Proxy(fx.Proxy):
    """With the operators that write in place: torch.fx records ``a += b`` as ``a = a + b``, and a stays as it was."""


def _in_place(operation: Any) -> Any:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return record


for _operation in IN_PLACE:
    setattr(_Proxy, f"__{_operation.__name__}__", _in_place(_operation))


class Recorder(fx.Tracer):
    """Records a module's forward with required arguments alone: an optional one has its default."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[str] = []
        self.inlined: list[nn.Module] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.ConvTranspose3d) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            if hooked(m):
                raise NotRecorded(f"{path} has hooks")
            self.inlined.append(m)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if any(parameter.kind is parameter.KEYWORD_ONLY for parameter in required):
            raise NotRecorded("its forward has keyword arguments without a default")
        self.arguments = [parameter.name for parameter in required]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self.arguments)]


def recorded(module: nn.Module) -> tuple[fx.Graph, Recorder]:
    """The graph of a module's forward. Raises NotRecorded where torch.fx cannot record it."""
    recorder, before = Recorder(), set(vars(module))
    try:
        graph = recorder.trace(module)
    except NotRecorded:
        raise
    except Exception as error:  # whatever the forward makes of torch.fx's proxies
        lines = str(error).strip().splitlines() or [""]
        raise NotRecorded(f"torch.fx does not record its forward ({type(error).__name__}: {lines[0]})") from None
    finally:
        constants = set(vars(module)) - before
        for name in constants:
            delattr(module, name)
    if constants:
        raise NotRecorded("its forward makes tensors of its own")
    return graph, recorder


def hooked(module: nn.Module) -> bool:
    """Somebody's function runs before or after the module."""
    return any(getattr(module, name, None) for name in HOOKS)


def layer_refusal(layer: nn.Module) -> str | None:
    """Why a transposed convolution cannot begin a chain; None where it can."""
    if type(layer).forward not in FORWARDS or "forward" in vars(layer):
        return f"{type(layer).__name__} has a forward of its own"
    return _changing(layer)


def _changing(module: nn.Module) -> str | None:
    if hooked(module):
        return "it has hooks"
    if is_parametrized(module):
        return "it is parametrized"
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        return "it is lazy and has seen no input"
    return None


def chains(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[Chain]:
    """One for each call of a transposed convolution, however short."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    found = []
    for node in graph.nodes:
        layer = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(layer, nn.ConvTranspose3d):
            found.append(_chain(node, layer, modules, order))
    return found


def _chain(node: fx.Node, layer: nn.ConvTranspose3d, modules, order) -> Chain:
    chain = Chain(layer, [node], modules=[layer])
    chain.stop = layer_refusal(layer) or ""
    last = node
    while not chain.stop:
        users = list(last.users)
        if len(users) != 1:
            chain.stop = f"its output is used {len(users)} times" if users else "its output is not used"
        elif users[0].op == "output":
            chain.stop = NOTHING
        else:
            chain.stop = _between(last, users[0], modules, order) or _append(chain, last, users[0], modules) or ""
            last = users[0]
    while chain.steps[-1] is not node and len(chain.steps) > 1 and _is_identity(chain.steps[-1], modules):
        chain.steps.pop()  # an identity at the end is no gain
    return chain


def _is_identity(node: fx.Node, modules) -> bool:
    return node.op == "call_module" and type(modules[node.target]) in IDENTITIES


def _append(chain: Chain, last: fx.Node, node: fx.Node, modules) -> str | None:
    """Puts an operation on the chain, or says why it ends before it."""
    module = modules.get(node.target) if node.op == "call_module" else None
    text = f"followed by {type(module).__name__} {node.target}" if module is not None else f"followed by {_name(node)}"
    if chain.activation is not None:
        return text
    if module is not None:
        changing = _changing(module)
        if changing is not None:
            return f"{text}: {changing}"
        if _is_identity(node, modules):
            if module.training:
                return f"{text}: it is in training mode"
        elif type(module) in NORMS:
            refusal = _norm_refusal(chain, module)
            if refusal is not None:
                return f"{text}: {refusal}"
            chain.norm = module
            chain.names.append(f"{type(module).__name__} {node.target}")
        else:
            activation = _of_module(module, chain.layer.out_channels)
            if activation is None:
                return text
            if isinstance(activation, str) and activation not in NAMES:
                return f"{text}: {activation}"
            chain.activation = activation
            chain.names.append(f"{type(module).__name__} {node.target}")
        chain.modules.append(module)
    elif node.target in ADDITIONS:
        place = _addend(last, node)
        if chain.addition is not None or place is None:
            return text
        chain.addition = node, place
        chain.names.append("residual")
    else:
        chain.activation = _of_call(node)
        if chain.activation is None:
            return text
        chain.names.append(_name(node))
    chain.steps.append(node)
    return None


def _norm_refusal(chain: Chain, norm: Any) -> str | None:
    if chain.norm is not None or chain.addition is not None:
        return "it does not stand right behind the convolution"
    if norm.training:
        return "it is in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "it tracks no statistics"
    if norm.num_features != chain.layer.out_channels:
        return f"it has {norm.num_features} channels, the convolution {chain.layer.out_channels}"
    return None


def _of_module(module: Any, channels: int) -> Any:
    """The activation that a module is; None or, in words, why it is none."""
    kind = type(module)
    if kind.__module__ != nn.ReLU.__module__:
        return None
    if kind is nn.PReLU:
        count = module.num_parameters
        return module if count in (1, channels) else f"it has {count} slopes, the convolution {channels} channels"
    if kind is nn.LeakyReLU:
        return "leaky_relu", module.negative_slope
    if kind is nn.GELU:
        return "gelu", module.approximate
    names = {nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.SiLU: "silu"}
    return names.get(kind, f"no activation of conv_transpose3d ({', '.join(NAMES)})")


CALLS = {
    "relu": (torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"),
    "sigmoid": (torch.sigmoid, torch.sigmoid_, F.sigmoid, "sigmoid", "sigmoid_"),
    "tanh": (torch.tanh, torch.tanh_, F.tanh, "tanh", "tanh_"),
    "silu": (F.silu,),
    "leaky_relu": (F.leaky_relu, F.leaky_relu_),
    "gelu": (F.gelu,),
}


def _of_call(node: fx.Node) -> Any:
    """The activation that a function or a method is, None where it is none."""
    name = next((name for name, calls in CALLS.items() if node.target in calls), None)
    rest = [*node.args[1:], *(value for key, value in node.kwargs.items() if key not in ("inplace", "input"))]
    if name == "leaky_relu":
        slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
        return (name, slope) if isinstance(slope, (int, float)) else None
    if name == "gelu":
        approximation = node.kwargs.get("approximate", "none")
        return (name, approximation) if isinstance(approximation, str) else None
    return name if all(isinstance(value, bool) for value in rest) else None  # inplace


def _addend(last: fx.Node, node: fx.Node) -> int | None:
    """The place of the tensor that is added to ``last``; None for a number, a multiple, and for a sum in the other's
    memory."""
    if len(node.args) != 2 or node.kwargs:
        return None
    place = 1 if node.args[0] is last else 0
    other = node.args[place]
    in_its_memory = place == 0 and node.target in SUMS_IN_PLACE
    return place if isinstance(other, fx.Node) and other is not last and not in_its_memory else None


def _between(last: fx.Node, node: fx.Node, modules, order) -> str | None:
    """Why an operation cannot wait until ``node``: something in between may write what it reads."""
    for other in list(order)[order[last] + 1 : order[node]]:
        if _writes(other, modules):
            return f"{_name(other)} in between writes in place"
    return None


def _writes(node: fx.Node, modules) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules.get(node.target), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if True in node.args or node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    return node.target in IN_PLACE or name in ("setitem", "__setitem__") or (name.endswith("_") and name[-2:] != "__")


def _name(node: fx.Node) -> str:
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))
