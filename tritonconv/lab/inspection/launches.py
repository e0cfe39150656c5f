"""The launches in a folder of compiled kernels: which there are, and whether this machine would find them."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from tritonconv.epilogue import Epilogue
from tritonconv.errors import ArgumentError
from tritonconv.kernels import triton_compiled
from tritonconv.kernels.registry import renamed, variant
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.triton_compiled import LAUNCHES, CompiledFolder
from tritonconv.kernels.variant import Config
from tritonconv.lab.inspection.compiling import compile_launch, compiling_for, products_in
from tritonconv.problem import Problem


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its name, Triton's key of it, and the function (``module:name``) with the hash of its source
    and of all that it calls."""

    name: str
    key: str
    function: str
    source: str

    @classmethod
    def of(cls, compiled: Any) -> Kernel:
        """Of a kernel of Triton's, which knows its files in Triton's cache."""
        function, file = compiled.src.fn, next(iter(compiled.metadata_group.values()))
        key = Path(file).parent.name
        return cls(compiled.name, key, f"{function.__module__}:{function.__name__}", function.cache_key)

    def edited(self) -> bool:
        """Whether this process has another source of the function, or none."""
        module, _, name = self.function.partition(":")
        if module not in sys.modules and module.startswith("tritonconv."):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        return getattr(getattr(sys.modules.get(module), name, None), "cache_key", None) != self.source


@dataclass(frozen=True)
class Launch:
    """One launch that was compiled. ``precision`` is that of float32 products: ``tf32`` or ``ieee``."""

    variant: str
    problem: Problem
    config: Config
    precision: str
    target: str
    kernels: tuple[Kernel, ...]
    modules: tuple[tuple[str, str], ...] = ()  # Triton's key and the name of each compiled host side

    def line(self) -> str:
        """As a line of the folder's list."""
        problem = {**asdict(self.problem), "dtype": str(self.problem.dtype).removeprefix("torch.")}
        if self.problem.epilogue is None:
            del problem["epilogue"]
        return json.dumps({**asdict(self), "problem": problem, "config": dict(self.config)}) + "\n"

    @classmethod
    def of(cls, line: str) -> Launch:
        """Of such a line. Raises ValueError, KeyError or TypeError for another text."""
        row = json.loads(line)
        fields: dict[str, Any] = {
            key: tuple(each) if isinstance(each, list) else each for key, each in row["problem"].items()
        }
        if "epilogue" in fields:
            fields["epilogue"] = Epilogue(**fields["epilogue"])
        row["problem"] = Problem(**fields | {"dtype": getattr(torch, fields["dtype"])})
        row["kernels"] = tuple(Kernel(**kernel) for kernel in row["kernels"])
        row["modules"] = tuple((key, name) for key, name in row["modules"])
        row["variant"], row["config"] = renamed(row["variant"], row["config"])
        texts = [row["variant"], row["precision"], row["target"], *row["config"]]
        for part in (*(astuple(kernel) for kernel in row["kernels"]), *row["modules"]):
            texts += part
        "".join(texts).encode()  # raises for other than texts, and for those that cannot be shown
        return cls(**row)

    @property
    def files(self) -> tuple[tuple[str, str], ...]:
        """Triton's key and the name of each group of its files."""
        return (*((kernel.key, f"{kernel.name}.json") for kernel in self.kernels), *self.modules)

    @property
    def label(self) -> str:
        config = " ".join(f"{key}={value}" for key, value in self.config.items())
        return f"{self.variant} {config} on {self.problem} for {self.target}"


class Launches:
    """The launches in a folder. A line that a killed run left half written, or that was damaged, is passed over.

    Raises ArgumentError, which names the list of the folder, where that cannot be read.
    """

    def __init__(self, folder: CompiledFolder) -> None:
        self.folder = folder
        self._by_identity: dict[tuple, Launch] = {}
        self.edited = cache(Kernel.edited)
        self._has_files = cache(lambda key, name: folder.group(key, name) is not None)
        for line in _lines(folder.path / LAUNCHES):
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                launch = Launch.of(line.decode())
                identity = _identity(launch.variant, launch.problem, launch.config, launch.precision, launch.target)
                self._by_identity[identity] = launch  # in the place of one from other sources

    def __iter__(self) -> Iterator[Launch]:
        return iter(self._by_identity.values())

    def __len__(self) -> int:
        return len(self._by_identity)

    def has(self, name: str, problem: Problem, config: Config, precision: str, target: str) -> bool:
        """Whether a launch is there with all its files, compiled by this Triton from the sources that are here.

        ``precision`` is that of float32 products: ``tf32`` or ``ieee``.
        """
        if self.folder.difference is not None:
            return False
        launch = self._by_identity.get(_identity(name, problem, config, precision, target))
        return launch is not None and self.whole(launch) and not any(map(self.edited, launch.kernels))

    def whole(self, launch: Launch) -> bool:
        """Whether the folder has each file of the launch, as long as it was written; looked up once."""
        return all(self._has_files(*each) for each in launch.files)


def _identity(name: str, problem: Problem, config: Config, precision: str, target: str) -> tuple:
    only_of_float32 = precision if problem.dtype is torch.float32 else ""
    return name, str(problem), tuple(sorted(config.items())), only_of_float32, target


def _lines(path: Path) -> list[bytes]:
    """The lines of the list; none where it is not there, for nothing was compiled yet."""
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read: {error.strerror}") from None


@lru_cache(maxsize=1)
def launches_of(folder: CompiledFolder) -> Launches:
    """Those of the folder that is taken, whose list is read once. Raises ArgumentError where it cannot be read."""
    return Launches(folder)


def read_active() -> Launches | None:
    """The launches of the folder that Triton looks into in this process; None without one.

    Also where its list cannot be read: a call goes on with a warning.
    """
    folder = triton_compiled.active()
    try:
        return None if folder is None else launches_of(folder)
    except ArgumentError as error:
        triton_compiled.warn(f"{error}: the tuner does not know which launches were compiled ahead")
        return None


class _NotFound(Exception):
    """The folder does not hold a kernel, named here, under the key that Triton works out."""


def why_not_found(launches: Launches, launch: Launch) -> str | None:
    """Why this machine's Triton does not find the launch in the folder; None where it does.

    Triton works out the key, and compiles nothing.
    """
    if launches.folder.difference is not None:
        return launches.folder.difference
    try:
        record = variant(launch.variant)
    except ArgumentError:
        return f"there is no variant {launch.variant} here; see --variant-file"
    if launch.target not in TARGETS:
        return f"target {launch.target} is unknown here"
    try:
        with _the_folder_alone(launches.folder), compiling_for(TARGETS[launch.target]), products_in(launch.precision):
            compile_launch(record, launch.problem, launch.config)
    except _NotFound as error:
        sources = sorted({kernel.name for kernel in launch.kernels if launches.edited(kernel)})
        if sources:
            return f"the source of {', '.join(sources)} is not the one that was compiled"
        if str(error) not in {kernel.name for kernel in launch.kernels}:
            return f"the launch is of {error} here"
        if any(launches.folder.group(kernel.key, f"{kernel.name}.json") is None for kernel in launch.kernels):
            return f"files of {error} are gone from the folder"
        return f"{error} has other arguments, options or another assembler here"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None if launches.whole(launch) else "the compiled host side of its launch is gone from the folder"


@contextlib.contextmanager
def _the_folder_alone(folder: CompiledFolder) -> Iterator[None]:
    """Inside the block Triton finds kernels in the folder and nowhere else, and raises instead of compiling."""
    from triton import knobs
    from triton.runtime.cache import CacheManager

    class FolderAlone(CacheManager):
        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            self.key = key

        def get_group(self, filename: str) -> Mapping[str, str]:
            files = folder.group(self.key, filename)
            if files is None:
                raise _NotFound(filename.removesuffix(".json"))
            return files

        def get_file(self, filename: str) -> str | None:
            return folder.file(self.key, filename)

        def put(self, data: Any, filename: str, binary: bool = True) -> str:
            raise _NotFound(filename)

        def put_group(self, filename: str, group: Mapping[str, str]) -> str:
            raise _NotFound(filename)

    with knobs.cache.scope():
        knobs.cache.manager_class = FolderAlone
        yield
