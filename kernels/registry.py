"""Finds the variants: every ``<pass>_<idea>.py`` beside this file, each with one ``VARIANT`` record.

Tests, tuner, benchmark, plots, ``explain`` and dispatch loop over this registry, so a new variant is one new file.
An error while a variant file is imported propagates: a variant never goes missing in silence. Files whose idea
starts with ``torch_`` need torch alone; the others need Triton and are listed only where Triton is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tritonconv.errors import ArgumentError
from tritonconv.kernels.work import Work
from tritonconv.problem import PASSES, Problem

Config = Mapping[str, int]
NO_CONFIG: Config = MappingProxyType({})
BACKENDS = ("triton", "torch")


def _one_config(problem: Problem, device: torch.device) -> tuple[Config, ...]:
    return (NO_CONFIG,)


def _no_config(problem: Problem, device: torch.device) -> Config:
    return NO_CONFIG


def _no_workspace(problem: Problem) -> int:
    return 0


@dataclass(frozen=True)
class Variant:
    """One way to compute one pass.

    ``launch`` takes (problem, config) and then

    * forward: ``x, weight, bias`` -> ``y``
    * backward_data: ``grad_y, weight`` -> ``grad_x``
    * backward_weight: ``x, grad_y, need_bias`` -> ``(grad_weight, grad_bias or None)``

    and returns new tensors. ``supports`` returns None, or the reason why the variant cannot serve the problem on the
    device. ``workspace_bytes`` bounds the temporary memory besides inputs and outputs.

    ``prepare`` (problem, grad_y) -> tensor is work on grad_y that a backward_data and a backward_weight variant share
    where both name the same function: it is done once, and each takes its result as the keyword ``prepared``.

    ``joint`` (problem, config, x, weight, grad_y, need_bias) -> (grad_x, grad_weight, grad_bias or None) is the whole
    backward at once, used instead of the two launches where the chosen backward_data and backward_weight variants
    name the same function. The config is the backward_weight variant's.

    ``work`` (problem, config) -> :class:`~tritonconv.kernels.work.Work` is what the launch executes, for the cost
    model; None stands for the useful FLOPs and the compulsory bytes.
    """

    name: str
    pass_name: str
    idea: str
    backend: str
    launch: Callable[..., Any]
    supports: Callable[[Problem, torch.device], str | None]
    space: Callable[[Problem, torch.device], tuple[Config, ...]] = field(default=_one_config)
    default: Callable[[Problem, torch.device], Config] = field(default=_no_config)
    prepare: Callable[[Problem, torch.Tensor], torch.Tensor] | None = None
    joint: Callable[..., Any] | None = None
    deterministic: bool = True
    workspace_bytes: Callable[[Problem], int] = field(default=_no_workspace)
    work: Callable[[Problem, Config], Work] | None = None

    def __post_init__(self) -> None:
        if self.pass_name not in PASSES:
            raise ArgumentError(f"variant {self.name}: pass_name expects one of {PASSES}, got {self.pass_name!r}")
        if not self.name.startswith(f"{self.pass_name}_"):
            raise ArgumentError(f"variant {self.name}: the name must start with its pass, {self.pass_name!r}")
        if self.backend not in BACKENDS:
            raise ArgumentError(f"variant {self.name}: backend expects one of {BACKENDS}, got {self.backend!r}")


def have_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _records() -> dict[str, Variant]:
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        pass_name = next((name for name in PASSES if path.stem.startswith(f"{name}_")), None)
        if pass_name is None:
            continue
        idea = path.stem.removeprefix(f"{pass_name}_")
        if not idea.startswith("torch_") and not have_triton():
            continue
        record = importlib.import_module(f"tritonconv.kernels.{path.stem}").VARIANT
        if record.name != path.stem:
            raise ArgumentError(
                f"{path.name}: VARIANT.name expects {path.stem!r} (the file's stem), got {record.name!r}"
            )
        found[record.name] = _spread(record)
    return found


def _spread(record: Variant) -> Variant:
    """A Triton kernel is asked about, and launched for, the :attr:`~tritonconv.problem.Problem.spread` problem.

    torch's own operations get the stride that was given: which of its algorithms serve it may depend on that.
    """
    if record.backend != "triton":
        return record
    names = ("launch", "supports", "space", "default", "joint", "workspace_bytes", "work")
    asked: dict[str, Any] = {name: _of_spread(each) for name in names if (each := getattr(record, name)) is not None}
    return replace(record, **asked)


@cache  # two variants that name one function still do
def _of_spread(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def asked(problem: Problem, *more: Any, **named: Any) -> Any:
        return function(problem.spread, *more, **named)

    return asked


def variants(pass_name: str | None = None) -> tuple[Variant, ...]:
    """The variants of one pass, or of all passes, in the order of the passes and then by name.

    Raises ArgumentError for an unknown pass.
    """
    if pass_name is not None and pass_name not in PASSES:
        raise ArgumentError(f"variants: pass_name expects one of {', '.join(PASSES)}, got {pass_name!r}")
    wanted = PASSES if pass_name is None else (pass_name,)
    return tuple(record for name in wanted for record in _records().values() if record.pass_name == name)


def variant(name: str) -> Variant:
    """The variant of this name; raises ArgumentError that lists the names there are."""
    try:
        return _records()[name]
    except KeyError:
        raise ArgumentError(f"unknown variant {name!r}; there are: {', '.join(_records())}") from None


_files: dict[str, Path] = {}  # of the variants outside the project, by name


def load(path: Path) -> Variant:
    """Registers the ``VARIANT`` of a file outside the project, for this process; its name need not be the file's.

    Raises ArgumentError for a file that cannot be read or run, that holds no VARIANT, or whose name is taken.
    """
    own = f"tritonconv_variant_{path.stem}"
    spec = importlib.util.spec_from_file_location(own, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ArgumentError(f"variant file {path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[own] = module  # where Triton and inspect look for the source
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[own]
        raise ArgumentError(f"variant file {path}: {type(error).__name__}: {error}") from error
    record = getattr(module, "VARIANT", None)
    if not isinstance(record, Variant):
        raise ArgumentError(f"variant file {path}: VARIANT expects a tritonconv.Variant, got {record!r}")
    if record.name in _records():
        raise ArgumentError(f"variant file {path}: the name {record.name!r} is taken (tritonconv list shows all)")
    _records()[record.name] = _spread(record)
    _files[record.name] = path.resolve()
    return _records()[record.name]


def file_of(name: str) -> Path | None:
    """The file that :func:`load` had the variant of this name from; None for the project's own and for no variant's."""
    return _files.get(name)
