"""Choices that were written out and are pinned: a run repeats bit for bit, on another machine of the same kind too.

The file is JSON: for each problem on a kind of device, in words, by pass, the variant and its config. It is pinned by
:func:`pin_choices` or by the variable TRITONCONV_CHOICES, which names it. A pinned kernel runs from the first call on,
which waits for the compiler. A problem outside the file is chosen as usual.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tritonconv.errors import StoreError
from tritonconv.kernels.registry import renamed
from tritonconv.kernels.variant import Config
from tritonconv.problem import PASSES, Problem

VARIABLE = "TRITONCONV_CHOICES"
FORMAT = 1
# (variant, config) by pass, by the text of the problem and its kind of device.
Choices = Mapping[str, Mapping[str, tuple[str, Config]]]

_pinned: Path | None = None


def pin(path: Path | None) -> None:
    """Pins the file of this name for the process; None for none. Raises StoreError for a file that is not one."""
    global _pinned
    if path is not None:
        _load.cache_clear()
        _load(path)
    _pinned = path


def text(problem: Problem, device: torch.device, graphs: bool = False) -> str:
    """The file's key for a problem on a kind of device: of eager calls, or of those in CUDA graphs."""
    return f"{problem} on {device.type}{' in CUDA graphs' if graphs else ''}"


def find(problem: Problem, device: torch.device, pass_name: str, graphs: bool = False) -> tuple[str, Config] | None:
    """The pinned variant and config; in a CUDA graph those of eager calls where the file has no others.

    Raises StoreError where TRITONCONV_CHOICES names a file that is not one.
    """
    named = os.environ.get(VARIABLE)
    path = _pinned if _pinned is not None else Path(os.path.expanduser(named)) if named else None
    if path is None:
        return None
    choices = _load(path)
    own = choices.get(text(problem, device, graphs), {}).get(pass_name)
    return own if own is not None or not graphs else choices.get(text(problem, device), {}).get(pass_name)


def write(choices: Choices, path: Path) -> None:
    """Raises StoreError where the file cannot be written."""
    entries = {
        key: {name: {"variant": variant, "config": dict(config)} for name, (variant, config) in passes.items()}
        for key, passes in sorted(choices.items())
    }
    try:
        path.write_text(json.dumps({"format": FORMAT, "choices": entries}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}") from None


@cache
def _load(path: Path) -> Choices:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"pinned choices: {path}: {error}") from None
    try:
        if data["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, found {data['format']!r}")
        return {key: _passes(passes) for key, passes in data["choices"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"pinned choices: {path} is not a file of choices: {type(error).__name__}: {error}") from None


def _passes(passes: Mapping[str, Any]) -> dict[str, tuple[str, Config]]:
    choices: dict[str, tuple[str, Config]] = {}
    for name, each in passes.items():
        variant, config = each["variant"], each["config"]
        sound = name in PASSES and type(variant) is str and all(type(value) is int for value in config.values())
        if not sound:
            raise ValueError(f"{name!r}: {each!r}")
        choices[name] = renamed(variant, config)
    return choices
