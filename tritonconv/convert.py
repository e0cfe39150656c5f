"""Switches the transposed convolutions of a finished model to tritonconv, in place, and back.

Only the *class* of a layer changes. tritonconv's layer adds a ``forward`` and no state to torch's, so the object stays
itself: parameters and their ties, ``requires_grad``, hooks, the training flag, device and dtype, references held by
an optimizer or by a second parent, and the root of the model all stay as they were, and ``state_dict``, pickle and
``deepcopy`` work as before. Rebuilding the layers and hanging them in again would lose each of these somewhere.

Direct calls of ``torch.nn.functional.conv_transpose3d`` in a model's code are not layers, so they are not switched.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tritonconv.errors import ArgumentTypeError
from tritonconv.layer import ConvTranspose3d, LazyConvTranspose3d

Class = type[nn.Module]

OURS: dict[Class, Class] = {nn.ConvTranspose3d: ConvTranspose3d, nn.LazyConvTranspose3d: LazyConvTranspose3d}
TORCHS: dict[Class, Class] = {ours: torchs for torchs, ours in OURS.items()}
_SUBCLASSES: dict[Class, Class] = {}


@dataclass(frozen=True)
class ConversionReport:
    """The result of :func:`convert` or :func:`restore`; ``print(report)`` lists it.

    ``model`` is the model that was passed in. ``replaced`` holds (qualified name, description) and ``left`` (qualified
    name, reason), in the order of ``model.named_modules()``; the model itself has the empty name. A module that is
    reached by several names is listed once, under the first.
    """

    model: nn.Module = field(repr=False)
    replaced: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return listed(replaced=self.replaced, left=self.left)


def listed(**columns: tuple[tuple[str, str], ...]) -> str:
    """The rows (qualified name, text) of a report under their titles, with a line of counts above."""
    lines = [", ".join(f"{len(rows)} {title}" for title, rows in columns.items())]
    width = max(map(len, columns)) + 1
    for title, rows in columns.items():
        lines += [f"  {title:<{width}} {name or '(the model itself)'}: {text}" for name, text in rows]
    return "\n".join(lines)


def convert(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None, decoder: bool = False
) -> ConversionReport:
    """Makes the ``torch.nn.ConvTranspose3d`` layers of ``model``, itself included, tritonconv's; in place.

    Without ``filter_fn``, layers of exactly torch's class are taken, parametrized ones and the lazy form included.
    ``filter_fn(module, qualified_name)`` is asked about every layer of torch's class or a subclass that is not
    tritonconv's yet, and may so choose layers and admit subclasses. An admitted subclass keeps its own methods. A
    layer is left in any case if it has a forward of its own or if torch.distributed has sharded it already.
    Converting twice changes nothing. :func:`restore` undoes it.

    With ``decoder`` the blocks of MONAI and nnU-Net that concatenate a layer's output with a skip (``UnetUpBlock``,
    ``UnetrUpBlock``, ``UpCat``, ``UNetDecoder``, ``UNetResDecoder``) do so by :func:`tritonconv.up_concat`; the report
    lists them too. A block is left where its version has a forward that is not known here, where its layer was left, or
    where something stands between the layer and the concatenation. ``filter_fn`` is not asked about blocks.

    Raises ArgumentTypeError if ``model`` is no module or ``filter_fn`` cannot be called.
    """
    _require_module("convert", model)
    if filter_fn is not None and not callable(filter_fn):
        raise ArgumentTypeError(f"convert: filter_fn expects a function of (module, name), got {filter_fn!r}")

    def plan(name: str, module: nn.Module, base: Class) -> Class | str:
        if issubclass(base, (ConvTranspose3d, LazyConvTranspose3d)):
            return "already tritonconv's"
        if filter_fn is not None and not filter_fn(module, name):
            return "filter_fn declined it"
        if _sharded(base):
            return "sharded by torch.distributed; convert before that"
        if base.forward is not nn.ConvTranspose3d.forward:
            return f"{_path(base)} has a forward of its own"
        if "forward" in vars(module):
            return "its forward was replaced on the object"
        if base in OURS:
            return OURS[base]
        if issubclass(base, nn.LazyConvTranspose3d):
            return f"{_path(base)} is a subclass of the lazy class, which changes its class by itself"
        if filter_fn is None:
            return f"{_path(base)} is a subclass of torch's; a filter_fn can admit it"
        return _subclass_with_our_forward(base)

    report = _swap(model, plan)
    return _with_blocks(report, _to_up_concat) if decoder else report


def restore(model: nn.Module) -> ConversionReport:
    """Undoes :func:`convert` and :func:`tritonconv.fuse`: layers and blocks get back the class that they had, and
    fused modules the forward of their class; in place.

    Layers that were built as tritonconv's become torch's too, so that a model saved whole loads without tritonconv.
    Subclasses of tritonconv's layers, and layers without a twin in torch, stay. Restoring twice changes nothing.
    Raises ArgumentTypeError if ``model`` is no module.
    """
    _require_module("restore", model)

    def plan(name: str, module: nn.Module, base: Class) -> Class | str:
        if not issubclass(base, (ConvTranspose3d, LazyConvTranspose3d)):
            return "not tritonconv's"
        if _sharded(base):
            return "sharded by torch.distributed"
        return TORCHS.get(base) or _converted_from(base) or f"{_path(base)} is a subclass of tritonconv's"

    report = _swap(model, plan)
    return _with_blocks(replace(report, replaced=report.replaced + _unfused(model)), _from_up_concat)


def _unfused(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """The rows of the modules whose forward :func:`tritonconv.fuse` had replaced, which are undone."""
    from tritonconv.folding import unfuse  # the import of a converter alone does without

    names = unfuse(model)
    return tuple((name, f"{type(model.get_submodule(name)).__name__}, its own forward again") for name in names)


def _with_blocks(report: ConversionReport, plan: Callable[[nn.Module], Class | str | None]) -> ConversionReport:
    """The report with the blocks that ``plan`` gave another class, and those that it left for a reason."""
    rows: dict[str, tuple[bool, str]] = {name: (True, text) for name, text in report.replaced}
    rows |= {name: (False, text) for name, text in report.left}
    order = []
    for name, module in report.model.named_modules():
        order.append(name)
        target = plan(module)
        if isinstance(target, str):
            rows[name] = False, target
        elif target is not None:
            module.__class__ = target
            rows[name] = True, f"{target.__name__}, " + ("by up_concat" if _converted_from(target) else "as it was")
    replaced, left = (
        tuple((name, rows[name][1]) for name in order if name in rows and rows[name][0] is wanted)
        for wanted in (True, False)
    )
    return ConversionReport(report.model, replaced, left)


def _to_up_concat(module: nn.Module) -> Class | str | None:
    from tritonconv import decoders

    cls: Any = type(module)
    if decoders.known(cls) is None:
        around = next((base for base in cls.__mro__[1:] if decoders.known(base)), None)
        return None if around is None else f"{_path(cls)} is a subclass of {_path(around)}"
    if _converted_from(cls):
        return "already tritonconv's"
    return decoders.why_left(module) or _block_by_up_concat(cls)


def _from_up_concat(module: nn.Module) -> Class | None:
    cls: Any = type(module)
    return None if issubclass(cls, ConvTranspose3d) else _converted_from(cls)


def _converted_from(cls: Class) -> Class | None:
    """The class that :func:`convert` made this one of; None for a class that it did not make."""
    return vars(cls).get("_converted_from")


def _swap(model: nn.Module, plan: Callable[[str, nn.Module, Class], Class | str]) -> ConversionReport:
    """Gives each transposed convolution the class that ``plan`` returns, or notes the reason that it returns."""
    targets: list[tuple[str, nn.Module, Class]] = []
    left: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        base = _class_below_parametrizations(module)
        if not issubclass(base, nn.ConvTranspose3d):
            # TorchScript and quantized models hold classes of the same name that are no torch.nn.ConvTranspose3d.
            if getattr(module, "original_name", base.__name__) == nn.ConvTranspose3d.__name__:
                left.append((name, f"{_path(type(module))} is not torch.nn.ConvTranspose3d"))
            continue
        target = plan(name, module, base)
        if isinstance(target, str):
            left.append((name, target))
        else:
            targets.append((name, module, target if base is type(module) else _parametrized(type(module), target)))
    # Only now, when no filter_fn can fail any more: the model changes as a whole or not at all.
    for _, module, target in targets:
        module.__class__ = target
    replaced = tuple((name, f"{target.__name__}({module.extra_repr()})") for name, module, target in targets)
    return ConversionReport(model, replaced, tuple(left))


def _class_below_parametrizations(module: nn.Module) -> Class:
    """The class of a module, without the one that ``torch.nn.utils.parametrize`` puts over it for its properties."""
    cls: Any = type(module)
    if is_parametrized(module) and len(cls.__bases__) == 1:
        names: Any = module.parametrizations
        if all(isinstance(vars(cls).get(name), property) for name in names):
            return cls.__bases__[0]
    return cls


def _parametrized(cls: Class, base: Class) -> Class:
    # A new class, as torch makes one per module: deep copies share theirs, and they must not be converted along.
    namespace = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), namespace)


def _subclass_with_our_forward(base: Any) -> Class:
    """``base`` with tritonconv's layer slipped in behind it: its own methods stay, the inherited forward is ours."""
    return _in_place_of(base, (base, ConvTranspose3d), _rebuild, {})


def _block_by_up_concat(base: Any) -> Class:
    """``base``, a class of decoder blocks, with a forward that calls ``up_concat``."""
    from tritonconv import decoders

    def prepared(block: Any) -> nn.Module:
        twin = base.__new__(base)  # torch.jit.script compiles the block's own forward
        twin.__dict__ = block.__dict__
        return twin

    methods = {"forward": decoders.forward_of(base), "__prepare_scriptable__": prepared}
    return _in_place_of(base, (base,), _rebuild_block, methods)


def _in_place_of(base: Any, bases: tuple[Class, ...], rebuild: Callable[[Class], nn.Module], methods: dict) -> Class:
    """A subclass of ``base`` under its name, of which modules are pickled by ``rebuild``; one for each base."""
    if base in _SUBCLASSES:
        return _SUBCLASSES[base]

    def reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
        # Pickle finds a class by its name, and that name means ``base``.
        recipe: Any = base.__reduce_ex__(module, max(protocol, 2))
        default = recipe[0] is copyreg.__newobj__  # type: ignore[attr-defined]
        return (rebuild, (base,), *recipe[2:]) if default else recipe

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "_converted_from": base,
        **methods,
    }
    return _SUBCLASSES.setdefault(base, type(base.__name__, bases, namespace))


def _rebuild(base: Class) -> nn.Module:
    cls = _subclass_with_our_forward(base)
    return cls.__new__(cls)


def _rebuild_block(base: Class) -> nn.Module:
    cls = _block_by_up_concat(base)
    return cls.__new__(cls)


def _sharded(base: Class) -> bool:
    return any(cls.__module__.startswith("torch.distributed.") for cls in base.__mro__)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _require_module(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"{op}: model expects a torch.nn.Module, got {type(model).__name__}")
