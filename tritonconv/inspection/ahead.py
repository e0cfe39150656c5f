"""Fills a folder with the compiled kernels of launches, for a GPU that need not be here.

Processes compile into a cache of their own; of that only what a launch needs is put into the folder, without a path of
this machine in it. A kernel's files appear together, and the line of a launch after its kernels, so that a folder whose
filling was cut off holds whole kernels and can be filled further.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from tritonconv.bench.environment import git_state
from tritonconv.errors import ArgumentError
from tritonconv.inspection.launches import Launch, Launches, precision
from tritonconv.inspection.precompile import ENDED, Answer, Job, Precompiler
from tritonconv.kernels.registry import file_of
from tritonconv.kernels.triton_compiled import (
    GROUP,
    KERNELS,
    LAUNCHES,
    MANIFEST,
    VARIABLE,
    CompiledFolder,
    Maker,
)

BINARIES = (".cubin", ".hsaco")
WANTED = (*BINARIES, ".json", ".so")  # .so: the host side of a launch
ROOT = Path(__file__).resolve().parent.parent.parent


class Progress(Protocol):
    def begin(self, cells: int) -> None: ...
    def step(self, text: str) -> None: ...


@dataclass
class Filled:
    """What one call put into the folder: launches ``compiled`` now, ``known`` before, ``left`` when time was up, and
    those that cannot be compiled, each with the reason; ``faults`` of them are no refusals of the compiler."""

    compiled: int = 0
    known: int = 0
    left: int = 0
    failed: list[tuple[Job, str]] = field(default_factory=list)
    faults: int = 0


def opened(path: Path, target: str) -> CompiledFolder:
    """The folder for the kernels of this Triton and of one more target, made where there is none.

    Raises ArgumentError where the folder is another Triton's or holds something else, and OSError where it cannot be
    written.
    """
    if (path / MANIFEST).exists():
        folder = CompiledFolder.read(path)
        if folder.difference is not None:
            raise ArgumentError(f"{path}: {folder.difference}: choose another folder")
    elif path.is_dir() and any(path.iterdir()):
        raise ArgumentError(f"{path}: holds no {MANIFEST}, and is not empty: choose another folder")
    else:
        folder = CompiledFolder(path.absolute(), Maker.here(), ())
    (path / KERNELS).mkdir(parents=True, exist_ok=True)
    folder = replace(folder, targets=tuple(dict.fromkeys((*folder.targets, target))))
    commit, changed = git_state(ROOT)
    _write(path / MANIFEST, folder.manifest(commit=commit, changed=changed))
    return folder


def compile_into(
    folder: CompiledFolder, jobs: Iterable[Job], target: str, processes: int, seconds: float | None, progress: Progress
) -> Filled:
    """Compiles the launches that the folder lacks, for at most so many seconds; what is done by then stays there."""
    launches, said, filled = Launches(folder), precision(), Filled()
    waiting = [job for job in jobs if not launches.has(*job, said, target)]
    filled.known = len(list(jobs)) - len(waiting)
    progress.begin(len(waiting))
    deadline = None if seconds is None else perf_counter() + seconds
    with tempfile.TemporaryDirectory(prefix="tritonconv-") as cache, _line_by_line(folder) as write:
        variables = {"TRITON_CACHE_DIR": cache, "TRITON_STORE_BINARY_ONLY": "1", VARIABLE: str(folder.path)}
        with Precompiler(target, processes, variables, ahead=None, quiet=True) as compiler:
            running = dict(zip(compiler.start(waiting), waiting, strict=True))
            for done, job in _as_done(running, deadline):
                answer = done.result()
                if answer.ok:
                    _keep(folder, answer, file_of(job[0]))
                    write(Launch(*job, said, target, tuple(kernel for kernel, _ in answer.kernels)).line())
                    filled.compiled += 1
                elif answer.error != ENDED:
                    filled.failed.append((job, answer.error))
                    filled.faults += not answer.expected
                progress.step(f"{job[0]} on {job[1]}")
    filled.left = len(waiting) - filled.compiled - len(filled.failed)
    return filled


def _as_done(running: dict[Future[Answer], Job], deadline: float | None) -> Iterator[tuple[Future[Answer], Job]]:
    waiting = set(running)
    while waiting:
        left = None if deadline is None else max(0.0, deadline - perf_counter())
        done, waiting = wait(waiting, timeout=left, return_when=FIRST_COMPLETED)
        if not done:
            return
        yield from ((each, running[each]) for each in done)


@contextlib.contextmanager
def _line_by_line(folder: CompiledFolder) -> Iterator[Any]:
    """Appends to the list of launches, each line at once, behind a line that a killed run left half written."""
    path = folder.path / LAUNCHES
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8", buffering=1) as file:
        if not whole:
            file.write("\n")
        yield file.write


def _keep(folder: CompiledFolder, answer: Answer, variant_file: Path | None) -> None:
    import triton

    roots = [ROOT, Path(triton.__file__).resolve().parent, *([variant_file.parent] if variant_file else [])]
    for place in dict.fromkeys([place for _, place in answer.kernels] + [file.parent for file in answer.files]):
        _copy(place, folder.path / KERNELS / place.name, roots)


def _copy(place: Path, to: Path, roots: Sequence[Path]) -> None:
    """Of a folder of Triton's cache what a launch needs, at once; nothing where it is there already."""
    if to.exists():
        return
    unfinished = Path(tempfile.mkdtemp(dir=to.parent, prefix="."))
    try:
        for path in sorted(place.iterdir(), key=lambda each: each.name.startswith(GROUP)):  # the lengths come last
            if path.name.startswith(GROUP):
                (unfinished / path.name).write_text(_lengths(path, unfinished), encoding="utf-8")
            elif path.suffix in WANTED:
                (unfinished / path.name).write_bytes(_portable(path, roots))
        unfinished.chmod(0o755)  # mkdtemp's is for one user
        unfinished.rename(to)
    except OSError:
        if not to.exists():  # a run beside this one may have put it there
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _lengths(group: Path, folder: Path) -> str:
    """Triton's list of a kernel's files, of which a launch needs some, with their lengths in the folder."""
    names = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
    wanted = [name for name in names if Path(name).suffix in WANTED]
    return json.dumps({"sizes": {name: (folder / name).stat().st_size for name in wanted}})


def _portable(path: Path, roots: Sequence[Path]) -> bytes:
    """The bytes of a file without a path of this machine."""
    if path.suffix == ".json":
        return json.dumps(_names_alone(json.loads(path.read_text(encoding="utf-8")))).encode()
    content = path.read_bytes()
    if path.suffix in BINARIES:  # the folders of the sources, for a debugger; their lengths stand in the file
        for root in roots:
            whole = f"{root}/".encode()
            content = content.replace(whole, b"./" + b"/" * (len(whole) - 2))
    return content


def _names_alone(value: Any) -> Any:
    """Nothing reads the paths in Triton's facts of a kernel, such as that of a library it was linked with."""
    if isinstance(value, dict):
        return {key: _names_alone(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_names_alone(each) for each in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
