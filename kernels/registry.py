"""Finds the variants: the records of the modules beside this one, ``VARIANT`` or several in ``VARIANTS``.

Tests, tuner, benchmark, plots, ``explain`` and dispatch loop over this registry, so a new variant is one new record.
A module ``torch_<idea>`` holds the formulations ``<pass>_torch_<idea>``: it needs torch alone, and is imported when it
is first asked for. ``<pass>_<idea>`` holds the Triton kernel of that name, ``backward_<idea>`` that of both gradients.
These are imported together, when one of them or the whole list is first asked for, and where one cannot be none of them
is there. :func:`triton_fault` says why, and a call that would have had them warns of it once: a variant never goes
missing in silence.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from tritonconv.errors import ArgumentError, KernelWarning
from tritonconv.kernels.safety import without_hazards
from tritonconv.kernels.variant import COPY, Variant
from tritonconv.problem import PASSES, Problem

PACKAGE = "tritonconv.kernels"
OLDEST_TRITON = (3, 6)  # as pyproject.toml
# Variants that were merged into another, and variants whose configs have a new key: the name today and the keys that an
# older config lacks.
RENAMED: dict[str, tuple[str, dict[str, int]]] = {
    name + old: (name, {COPY: copies})
    for name in ("forward_phases", "backward_data_gemm", "backward_weight_splitk", "backward_weight_cells")
    for old, copies in (("", 0), ("_last", 1))
} | {name: (name, {COPY: 0}) for name in ("forward_overlap", "forward_overlap_planes", "forward_phases_packed")}
# Triton's modules that the kernels import.
TRITON_MODULES = ("language", "knobs", "backends.compiler", "compiler.compiler", "tools.tensor_descriptor")


def renamed(name: str, config: Mapping[str, int]) -> tuple[str, dict[str, int]]:
    """The variant and config that a stored name and config stand for today."""
    new, more = RENAMED.get(name, (name, {}))
    return new, {**config, **{key: value for key, value in more.items() if new != name or key not in config}}


def have_triton() -> bool:
    """Whether the Triton variants are there."""
    return triton_fault() is None


@cache
def triton_fault() -> str | None:
    """Why no Triton variant is there, in words; None where they are. Imports Triton and the variants, once."""
    fault = _of_triton() or _without_sources()
    if fault is None:
        for name in sorted(set(_kernels().values())):
            try:
                _imported(name)
            except (Exception, SystemExit) as error:
                return f"tritonconv's {name} cannot be imported with Triton {_version()}: {_text(error)}"
    return fault


def _of_triton() -> str | None:
    """A fault of Triton itself, whatever its import raises; a script of that name raises SystemExit."""
    try:
        triton = importlib.import_module("triton")
    except ModuleNotFoundError as error:
        return "Triton is not installed" if error.name == "triton" else f"Triton cannot be imported: {_text(error)}"
    except (Exception, SystemExit) as error:
        return f"Triton cannot be imported: {_text(error)}"
    version, oldest = re.match(r"(\d+)\.(\d+)", _version()), ".".join(map(str, OLDEST_TRITON))
    if version is None or not hasattr(triton, "jit"):
        places = getattr(triton, "__file__", None) or ", ".join(getattr(triton, "__path__", ())) or "an unknown place"
        return f"the module triton that is imported is not the compiler Triton, but {places}"
    if tuple(map(int, version.groups())) < OLDEST_TRITON:
        return f"Triton {_version()} is installed, and the kernels need {oldest} or later"
    for name in TRITON_MODULES:
        try:
            importlib.import_module(f"triton.{name}")
        except (Exception, SystemExit) as error:
            return f"Triton {_version()} cannot be imported: triton.{name}: {_text(error)}"
    return None


def _version() -> str:
    return str(getattr(sys.modules.get("triton"), "__version__", "of no version"))


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _without_sources() -> str | None:
    """Triton compiles a kernel from its source, which a frozen or compiled package leaves out."""
    for name in sorted(_kernels())[:1]:
        spec = importlib.util.find_spec(f"{PACKAGE}.{name}")
        source = getattr(spec and spec.loader, "get_source", None)
        if source is None or source(f"{PACKAGE}.{name}") is None:
            return f"tritonconv is here without its sources, such as {name}.py, which Triton compiles"
    return None


@cache
def warn_without_triton() -> None:
    """For a call on a GPU: warns, once in a process, where no Triton variant can serve it, and why."""
    fault = triton_fault()
    if fault is None:
        from tritonconv.kernels.triton_target import driver_fault  # needs Triton

        fault = driver_fault()
    if fault is not None:
        message = f"{fault}: no kernel of tritonconv runs, torch's own operations serve instead"
        warnings.warn(message, KernelWarning, stacklevel=2)


@cache
def _modules(*begins: str) -> tuple[str, ...]:
    """The project's own modules whose names begin so. The importers list them: a package may lie in a zip file or hold
    no ``.py`` file."""
    return tuple(sorted(name for _, name, _ in pkgutil.iter_modules(_folders()) if name.startswith(begins)))


def _folders() -> list[str]:
    return list(sys.modules[PACKAGE].__path__)


@cache
def _kernels() -> dict[str, str]:
    """By the names of the project's own Triton variants their modules, none of which is imported for it."""
    modules = {name: name for name in _modules(*PASSES)}
    for name in set(_modules(*(f"{each.partition('_')[0]}_" for each in PASSES))) - set(modules):
        modules |= {f"{each}_{name.partition('_')[2]}": name for each in PASSES[1:]}
    return modules


@cache
def _torchs() -> tuple[str, ...]:
    """The names of the project's own variants in torch's operations."""
    return tuple(record.name for module in _modules("torch_") for record in _held(_imported(module)))


def _here() -> tuple[str, ...]:
    """The names of all variants that are there: sorted, and then those from outside the project."""
    own = sorted((*_torchs(), *(_kernels() if have_triton() else ())))
    return (*own, *(name for name in _records() if name not in own))


@cache
def _records() -> dict[str, Variant]:
    """By name the variants of the calls so far, and those from outside the project."""
    return {}


def _record(name: str) -> Variant | None:
    """The variant of this name; None where there is none."""
    record = _records().get(name)
    _, torchs, idea = name.partition("_torch_")
    module = _kernels().get(name) if not torchs else f"torch_{idea}" if f"torch_{idea}" in _modules("torch_") else None
    if record is None and module is not None and (torchs or have_triton()):
        by_name = {each.name: each for each in _held(_imported(module))}
        if name in by_name:
            record = _records().setdefault(name, without_hazards(_without_overlap(by_name[name])))
        elif not torchs:
            raise ArgumentError(f"{module}.py: expected a variant {name!r}, found {', '.join(by_name) or 'none'}")
    return record


def _imported(module: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{module}")


def _held(module: ModuleType) -> tuple[Variant, ...]:
    """The records of a module, of which some are helpers and hold none."""
    one = getattr(module, "VARIANT", None)
    return tuple(getattr(module, "VARIANTS", () if one is None else (one,)))


def _without_overlap(record: Variant) -> Variant:
    """Wraps a Triton variant so that all its functions receive ``problem.without_overlap``.

    torch's own operations get the stride that was given: which of its algorithms serve it may depend on that.
    """
    if record.backend != "triton":
        return record
    names = "launch", "launches", "joint", "supports", "space", "default", "copied", "workspace_bytes", "work", "hazard"
    functions: dict[str, Any] = {
        name: _called_without_overlap(each) for name in names if (each := getattr(record, name)) is not None
    }
    return replace(record, **functions)


@cache  # two variants that name one function still do
def _called_without_overlap(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def called(problem: Problem, *more: Any, **named: Any) -> Any:
        return function(problem.without_overlap, *more, **named)

    return called


def variants(pass_name: str | None = None) -> tuple[Variant, ...]:
    """The variants of one pass, or of all passes, in the order of the passes and then by name.

    Raises ArgumentError for an unknown pass.
    """
    if pass_name is not None and pass_name not in PASSES:
        raise ArgumentError(f"variants: pass_name expects one of {', '.join(PASSES)}, got {pass_name!r}")
    passes = PASSES if pass_name is None else (pass_name,)
    records = [record for name in _here() if (record := _record(name)) is not None]
    return tuple(record for each in passes for record in records if record.pass_name == each)


def variant(name: str) -> Variant:
    """The variant of this name; raises ArgumentError that lists the names there are, or says why it is not there."""
    record = _record(name)
    if record is not None:
        return record
    if name in _kernels():
        raise ArgumentError(f"variant {name!r} is not there: {triton_fault()}")
    if name in RENAMED:
        new, more = RENAMED[name]
        keys = ", ".join(f"{key}={value}" for key, value in more.items())
        raise ArgumentError(f"variant {name!r} is {new!r} with {keys} in its config now, which the tuner tries")
    raise ArgumentError(f"unknown variant {name!r}; there are: {', '.join(_here())}")


_files: dict[str, Path] = {}  # of the variants outside the project, by name


def load(path: Path) -> tuple[Variant, ...]:
    """Registers the ``VARIANT``, or the ``VARIANTS``, of a file outside the project, for this process; their names need
    not be the file's.

    Raises ArgumentError for a file that cannot be read or run, that holds none, or that holds one whose name is taken.
    """
    own = f"tritonconv_variant_{path.stem}"
    spec = importlib.util.spec_from_file_location(own, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ArgumentError(f"variant file {path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[own] = module  # where Triton and inspect look for the source
    try:
        spec.loader.exec_module(module)
        records = _held(module)
    except Exception as error:
        del sys.modules[own]
        raise ArgumentError(f"variant file {path}: {type(error).__name__}: {error}") from error
    wrong = [each for each in records if not isinstance(each, Variant)]
    if wrong or not records:
        found = repr(wrong[0]) if wrong else "None"
        raise ArgumentError(f"variant file {path}: VARIANT expects a tritonconv.Variant, VARIANTS several; got {found}")
    names = {*_torchs(), *_kernels(), *_records()}
    for each in records:
        if each.name in names:
            raise ArgumentError(f"variant file {path}: the name {each.name!r} is taken (tritonconv list shows all)")
        names.add(each.name)
    _files.update({each.name: path.resolve() for each in records})
    _records().update({each.name: without_hazards(_without_overlap(each)) for each in records})
    return tuple(_records()[each.name] for each in records)


def file_of(name: str) -> Path | None:
    """The file that :func:`load` had the variant of this name from; None for the project's own and for no variant's."""
    return _files.get(name)
