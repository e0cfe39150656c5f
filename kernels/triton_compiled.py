"""Kernels that were compiled on another machine, in a folder that ``tritonconv compile`` filled.

Triton finds a compiled kernel by a key of its own build, the kernel's sources and arguments, and the target; where the
key is the same on two machines, so is the compiled kernel. :func:`install` has Triton look into the folder before its
own cache. The folder is only read, and may lie anywhere:

    compiled.json        the maker: see :class:`Maker`; and the targets
    launches.jsonl       one line per launch that was compiled (tritonconv/lab/inspection/launches.py)
    kernels/KEY/         of a kernel the binary and Triton's facts of it, or the module that is the host side of
                         launches (up to Triton 3.6); and the lengths of these files

``TRITONCONV_COMPILED`` names the folder that calls and compiling processes take.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import warnings
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tritonconv.errors import ArgumentError

VARIABLE = "TRITONCONV_COMPILED"
MANIFEST, LAUNCHES, KERNELS = "compiled.json", "launches.jsonl", "kernels"
FORMAT = 2
GROUP = "__grp__"  # Triton's prefix of the file that lists a kernel's files; here also of the one that lists a module


class CompiledWarning(UserWarning):
    """A folder of compiled kernels cannot be used here; calls compile for themselves."""


@dataclass(frozen=True)
class Maker:
    """The facts that a key of Triton's depends on besides kernel and target.

    ``build`` is a hash of Triton's own files, among them the library of one Python version; ``environment`` holds the
    variables that Triton puts into a key.
    """

    triton: str
    python: str
    machine: str
    build: str
    environment: dict[str, str]

    @classmethod
    def here(cls) -> Maker:
        """Of this process; it takes a third of a second, which Triton's first look into its cache is then spared."""
        import triton
        from triton._C.libtriton import get_cache_invalidating_env_vars  # type: ignore[attr-defined]
        from triton.runtime.cache import triton_key

        python = "{}.{}".format(*sys.version_info)
        build = hashlib.sha256(triton_key().encode()).hexdigest()
        variables = {name: str(value) for name, value in get_cache_invalidating_env_vars().items()}
        return cls(triton.__version__, python, platform.machine(), build, variables)

    def __str__(self) -> str:
        return f"Triton {self.triton}, Python {self.python} on {self.machine}"

    def difference(self, other: Maker) -> str | None:
        """Why ``other`` has other keys, in words; None where it has the same."""
        if str(self) != str(other):
            return f"compiled by {self}; here is {other}"
        if self.build != other.build:
            return f"compiled by another build of {self}, whose files are not those that are here"
        mine, others = self.environment, other.environment
        names = sorted(name for name in {*mine, *others} if mine.get(name) != others.get(name))
        if names:
            values = [f"{name}={mine.get(name)}, here {others.get(name)}" for name in names]
            return f"compiled in another environment: {'; '.join(values)}"
        return None


@dataclass(frozen=True, eq=False)
class CompiledFolder:
    """A folder of compiled kernels for ``targets``, such as ``sm_90``. It is never written to here."""

    path: Path
    maker: Maker
    targets: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> CompiledFolder:
        """Raises ArgumentError for a folder that ``tritonconv compile`` has not filled."""
        file = path / MANIFEST
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArgumentError(f"{path}: not a folder of compiled kernels, for it holds no {MANIFEST}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ArgumentError(f"{file}: cannot be read: {getattr(error, 'strerror', error)}") from None
        version = data.get("format") if isinstance(data, dict) else None
        if version != FORMAT:
            raise ArgumentError(f"{file}: format {version!r}, expected {FORMAT}")
        try:
            maker = Maker(**{each.name: data[each.name] for each in fields(Maker)})
            targets = tuple(data["targets"])
            "".join((*maker.environment.keys(), *maker.environment.values(), *targets))  # raises for other than texts
        except (KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(f"{file}: damaged ({error!r}): fill the folder anew") from None
        return cls(path.absolute(), maker, targets)

    def manifest(self, **more: Any) -> str:
        """The text of compiled.json."""
        return json.dumps({"format": FORMAT, **asdict(self.maker), "targets": self.targets, **more}, indent=1) + "\n"

    @cached_property
    def difference(self) -> str | None:
        """Why no kernel of the folder fits this process, whatever it launches; None where they may."""
        return self.maker.difference(Maker.here())

    @property
    def misfit(self) -> str | None:
        """Also why none fits the GPU that launches go to now."""
        from tritonconv.kernels.triton_target import target_name

        name = target_name()
        if self.difference is not None or name is None or name in self.targets:
            return self.difference
        return f"compiled for {', '.join(self.targets)}; this GPU is {name}"

    def group(self, key: str, name: str) -> dict[str, str] | None:
        """The files that belong to ``name`` under this key, by their names, as Triton's cache answers.

        None where one lacks or has another length than it was written with: a copy that was cut off is no error.
        """
        folder = self.path / KERNELS / key
        try:
            sizes = json.loads((folder / f"{GROUP}{name}").read_text(encoding="utf-8"))["sizes"]
            if name not in sizes or any(os.path.getsize(folder / each) != size for each, size in sizes.items()):
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return {each: str(folder / each) for each in sizes}

    def file(self, key: str, name: str) -> str | None:
        """A file by itself: the compiled host side of a launch. None as :meth:`group`'s."""
        return (self.group(key, name) or {}).get(name)


_active: list[CompiledFolder] = []


def active() -> CompiledFolder | None:
    """The folder that Triton looks into in this process."""
    return _active[0] if _active else None


def install(folder: CompiledFolder) -> None:
    """Has Triton look into the folder first, in this process, instead of into one that was installed before.

    Nothing changes under Triton's interpreter, which compiles nothing.
    """
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    if knobs.runtime.interpret:
        return
    own = knobs.cache.manager_class or FileCacheManager
    if not hasattr(own, "tritonconv_folder_first"):
        knobs.cache.manager_class = _looking_there_first(own)
    _active[:] = [folder]


def remove() -> None:
    """Triton looks into its own cache alone again; so do the processes that this one starts."""
    _active.clear()
    os.environ.pop(VARIABLE, None)


def from_environment() -> None:
    """Installs the folder that TRITONCONV_COMPILED names, where it does; warns where that is no such folder."""
    path = os.environ.get(VARIABLE)
    try:
        if path:
            install(CompiledFolder.read(Path(path)))
    except ArgumentError as error:
        warn(f"{VARIABLE}: {error}")


def _looking_there_first(own: type) -> Any:
    """A cache of Triton's that looks into the folder, and then into ``own``."""

    class FolderFirst(own):  # type: ignore[misc, valid-type]
        tritonconv_folder_first = True

        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            super().__init__(key, override=override, dump=dump)
            self.compiled_key = None if override or dump else key

        def get_group(self, filename: str):
            files = None
            if self.compiled_key is not None and _active and _fits(_active[0].misfit):
                files = _active[0].group(self.compiled_key, filename)
            return super().get_group(filename) if files is None else files

        def get_file(self, filename: str):
            file = None
            # Triton's driver is made of such files, so it cannot be asked for the target here.
            if self.compiled_key is not None and _active and _fits(_active[0].difference):
                file = _active[0].file(self.compiled_key, filename)
            return super().get_file(filename) if file is None else file

    return FolderFirst


def _fits(why_not: str | None) -> bool:
    """Whether the folder may hold what Triton looks for; says the difference once where it cannot."""
    if why_not is not None:
        warn(f"{_active[0].path}: {why_not}: none of its kernels is used")
    return why_not is None


@cache
def warn(text: str) -> None:
    """Says once that a folder, or part of it, is of no use here."""
    warnings.warn(f"compiled kernels: {text}", CompiledWarning, stacklevel=3)
