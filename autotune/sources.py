"""The revision of a variant: a hash of the device code that it runs, without comments, docstrings and file names.

A measured choice keeps serving when its kernel is edited, and is marked as of an earlier revision. The hash follows
names: from the variant's launch to all that it uses, in its file and in others of ``kernels/``. For a Triton variant it
covers the compiler's input, ``@triton`` functions and the constants that they name. A variant of torch's operations has
no device code of its own: the hash covers everything that it uses.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from tritonconv.kernels.variant import Variant

PACKAGE = "tritonconv.kernels"
DIGITS = 16
# Modules without device code. (A name of the package itself is a module.)
APART = (PACKAGE, f"{PACKAGE}.registry", f"{PACKAGE}.variant", f"{PACKAGE}.work")


class Place(NamedTuple):
    """A top-level name of a module."""

    module: str
    name: str


@cache
def revision(record: Variant) -> str:
    """16 hexadecimal digits, the same for the same code on any machine and Python; "" where the sources are missing, as
    in a frozen application."""
    try:
        reached = places(record)
    except OSError:
        return ""
    device = [place for place in reached if _on_device(_node(place))]
    if device:
        reached = [place for place in _reached(device) if not _on_host(_node(place))]
    texts = sorted(_text(_node(place)) for place in reached)
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:DIGITS]


def places(record: Variant) -> list[Place]:
    """The definitions that a variant's launches use, in ``kernels/`` or in the variant's own file. Raises OSError where
    the sources are missing."""
    launches = [each for each in (record.launch, record.launches, record.joint) if each is not None]
    begin = [Place(each.__module__, each.__name__) for each in launches]
    if not all(place.name in _definitions(place.module) for place in begin):  # no function of the file's own
        begin = [Place(place.module, name) for place in begin for name in _definitions(place.module)]
    return _reached(begin)


def _reached(begin: list[Place]) -> list[Place]:
    """The definitions of these names and of all that they use, in ``kernels/`` or in the variant's own file."""
    reached: dict[Place, None] = {}
    waiting = list(begin)
    while waiting:
        place = waiting.pop()
        if place not in reached and place.name in _definitions(place.module):
            reached[place] = None
            waiting += _uses(place)
    return list(reached)


@cache
def _uses(place: Place) -> tuple[Place, ...]:
    definitions, imported = _definitions(place.module), _imports(place.module)
    used: dict[Place, None] = {}
    local = _local_names(_node(place))
    for node in ast.walk(_node(place)):
        if isinstance(node, ast.Name):
            if node.id in local:
                continue
            if node.id in definitions:
                used[Place(place.module, node.id)] = None
            elif node.id in imported:
                used[imported[node.id]] = None
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            package, name = imported[node.value.id]
            if package == PACKAGE:  # ``from tritonconv.kernels import forward_phases``
                used[Place(f"{PACKAGE}.{name}", node.attr)] = None
    return tuple(place for place in used if place.module not in APART and _is_ours(place.module))


def _local_names(node: ast.stmt) -> set[str]:
    """The arguments of a function and what it assigns, whatever else in the module has such a name."""
    if not isinstance(node, ast.FunctionDef):
        return set()
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return names | {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}


def _is_ours(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


@cache
def _tree(module: str) -> ast.Module:
    """Raises OSError where a module has no source."""
    if module in sys.modules:
        return ast.parse(inspect.getsource(sys.modules[module]))
    spec = importlib.util.find_spec(module)
    loader: Any = spec.loader if spec is not None else None
    source = loader.get_source(module) if hasattr(loader, "get_source") else None
    if source is None:
        raise OSError(f"{module} has no source")
    return ast.parse(source)


@cache
def _definitions(module: str) -> dict[str, ast.stmt]:
    """The top-level functions, classes and assignments of a module, by name."""
    definitions: dict[str, ast.stmt] = {}
    for node in _tree(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                definitions |= {part.id: node for part in ast.walk(target) if isinstance(part, ast.Name)}
    return definitions


@cache
def _imports(module: str) -> dict[str, Place]:
    """The names that a module imports from ``kernels/``, within functions too."""
    imported: dict[str, Place] = {}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module and (node.module + ".").startswith(f"{PACKAGE}."):
            imported |= {alias.asname or alias.name: Place(node.module, alias.name) for alias in node.names}
    return imported


def _node(place: Place) -> ast.stmt:
    return _definitions(place.module)[place.name]


def _on_device(definition: ast.stmt) -> bool:
    """A function that Triton compiles or evaluates while it does: its decorator is one of Triton's."""
    decorators = definition.decorator_list if isinstance(definition, ast.FunctionDef) else []
    return any(ast.unparse(decorator).startswith("triton.") for decorator in decorators)


def _on_host(definition: ast.stmt) -> bool:
    """Such as what a decorator names for a profiler."""
    return isinstance(definition, (ast.FunctionDef, ast.ClassDef)) and not _on_device(definition)


def _text(node: ast.AST) -> str:
    return " ".join(_canonical(node))


def _canonical(node: object) -> Iterator[str]:
    """The parts of ``ast.dump`` without docstrings and without empty fields, which differ between Python versions."""
    if isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                value = value[1:]
            if name == "returns" or (isinstance(node, ast.arg) and name == "annotation" and not _constexpr(value)):
                continue
            if value not in (None, [], "") and name != "type_comment":
                yield f"{name}:"
                yield from _canonical(value)
    elif isinstance(node, list):
        yield "["
        for part in node:
            yield from _canonical(part)
        yield "]"
    else:
        yield repr(node)


def _constexpr(annotation: object) -> bool:
    """The one annotation that the compiler reads."""
    return isinstance(annotation, ast.AST) and "constexpr" in ast.unparse(annotation)
