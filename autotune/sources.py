"""A hash of what a variant is made of: its own file and the files of ``kernels/`` that it imports, directly or not.

A stored choice is trusted while this hash is the same: an edit of one kernel forgets the choices of that kernel and no
others, and a new version of torch or Triton forgets none.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from functools import cache
from pathlib import Path

from tritonconv.kernels import registry
from tritonconv.kernels.registry import Variant

PACKAGE = "tritonconv.kernels"
DIGITS = 16


def source_hash(record: Variant) -> str:
    """16 hexadecimal digits; the same for the same sources on any machine."""
    own = Path(registry.__file__).parent / f"{record.name}.py"
    if not own.exists():  # a variant that lives outside the project
        own = Path(inspect.getsourcefile(sys.modules[record.launch.__module__]) or "")
    return _hash_of(own)


@cache
def _hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    for each in sorted(_with_imports(path), key=lambda found: found.name):
        digest.update(each.name.encode() + b"\0" + each.read_bytes() + b"\0")
    return digest.hexdigest()[:DIGITS]


def _with_imports(path: Path) -> set[Path]:
    found, waiting = set(), [path]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += _imports(current)
    return found


@cache
def _imports(path: Path) -> tuple[Path, ...]:
    """Files of the package that a file imports; the registry, which every variant imports, computes nothing."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
            names.add(node.module.removeprefix(f"{PACKAGE}."))
    folder = Path(registry.__file__).parent
    return tuple(folder / f"{name}.py" for name in sorted(names - {"registry", "work"}))
