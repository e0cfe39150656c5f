"""Fills a folder with the compiled kernels of launches, for a GPU that need not be here.

Processes compile into a cache of their own. The folder gets only the files of it that a launch needs, without a path of
this machine in them. A kernel's files appear together, and the line of a launch after its kernels. So a folder whose
filling was cut off holds whole kernels, and can be filled further.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError as Expired
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tritonconv.errors import ArgumentError
from tritonconv.kernels.registry import file_of
from tritonconv.kernels.triton_compiled import GROUP, KERNELS, LAUNCHES, MANIFEST, VARIABLE, CompiledFolder, Maker
from tritonconv.lab.bench.environment import git_state
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.inspection.launches import Launch, Launches
from tritonconv.lab.inspection.precompile import Precompiler, Request
from tritonconv.lab.inspection.workers import ENDED, GIVEN_UP
from tritonconv.precision import float32_precision

BINARIES = (".cubin", ".hsaco")
MODULE = ".so"  # the host side of a launch
WANTED = (*BINARIES, ".json", MODULE)
ROOT = Path(__file__).resolve().parent.parent.parent.parent


@dataclass
class Filled:
    """The result of one call: launches ``compiled`` now, ``known`` before, ``left`` when time was up,
    ``given_up`` because one compiler after the other crashed, and those that cannot be compiled, each with the reason;
    ``faults`` of them are no refusals of the compiler."""

    compiled: int = 0
    known: int = 0
    left: int = 0
    given_up: int = 0
    failed: list[tuple[Request, str]] = field(default_factory=list)
    faults: int = 0


def open_folder(path: Path, target: str) -> CompiledFolder:
    """The folder for the kernels of this Triton and of one more target, made where there is none.

    Raises ArgumentError where the folder is another Triton's or holds something else, and OSError where it cannot be
    written.
    """
    path.mkdir(parents=True, exist_ok=True)
    if (path / MANIFEST).exists():
        folder = CompiledFolder.read(path)
        if folder.difference is not None:
            raise ArgumentError(f"{path}: {folder.difference}: choose another folder")
    # A run that is cut off before there is a manifest leaves an unfinished one.
    elif any(not entry.name.startswith(f".{MANIFEST}.") for entry in path.iterdir()):
        raise ArgumentError(f"{path}: holds no {MANIFEST}, and is not empty: choose another folder")
    else:
        folder = CompiledFolder(path.absolute(), Maker.here(), ())
    folder = replace(folder, targets=tuple(dict.fromkeys((*folder.targets, target))))
    commit, changed = git_state(ROOT)
    unfinished = path / f".{MANIFEST}.{os.getpid()}"
    unfinished.write_text(folder.manifest(commit=commit, changed=changed), encoding="utf-8")
    unfinished.replace(path / MANIFEST)
    (path / KERNELS).mkdir(exist_ok=True)
    return folder


def compile_into(
    folder: CompiledFolder,
    jobs: Sequence[Request],
    target: str,
    processes: int,
    seconds: float | None,
    progress: Progress,
) -> Filled:
    """Compiles the launches that the folder lacks, for at most so many seconds; those that are done by then stay there.

    Raises OSError where the folder cannot be written any more.
    """
    launches, precision, filled = Launches(folder), float32_precision(), Filled()
    waiting = [job for job in jobs if not launches.has(*job, precision, target)]
    filled.known = len(jobs) - len(waiting)
    progress.begin(len(waiting))
    # A process that was killed may leave files behind while the cache is removed, which spoils nothing.
    scratch = tempfile.TemporaryDirectory(prefix="tritonconv-", ignore_cleanup_errors=True)
    with scratch as cache, _line_by_line(folder) as write:
        variables = {"TRITON_CACHE_DIR": cache, "TRITON_STORE_BINARY_ONLY": "1", VARIABLE: str(folder.path)}
        with Precompiler(target, processes, variables, quiet=True) as compiler, contextlib.suppress(Expired):
            running = dict(zip(compiler.start(waiting), waiting, strict=True))
            for done in as_completed(running, seconds):
                answer, job = done.result(), running[done]
                if answer.launch is not None:
                    _keep(folder, answer.launch, Path(cache))
                    write(answer.launch.line())
                    filled.compiled += 1
                elif answer.error == GIVEN_UP:
                    filled.given_up += 1
                elif answer.error != ENDED:
                    filled.failed.append((job, answer.error))
                    filled.faults += not answer.expected
                progress.step(f"{job[0]} on {job[1]}")
    filled.left = len(waiting) - filled.compiled - filled.given_up - len(filled.failed)
    return filled


@contextlib.contextmanager
def _line_by_line(folder: CompiledFolder) -> Iterator[Any]:
    """Appends to the list of launches, each line at once, behind a line that a killed run left half written."""
    path = folder.path / LAUNCHES
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8", buffering=1) as file:
        if not whole:
            file.write("\n")
        yield file.write


def _keep(folder: CompiledFolder, launch: Launch, cache: Path) -> None:
    """Copies the files of the launch out of Triton's cache."""
    import triton

    variant_file = file_of(launch.variant)
    roots = [ROOT, Path(triton.__file__).resolve().parent, *([variant_file.parent] if variant_file else [])]
    for key, name in launch.files:
        _copy(cache / key, folder, name, roots)


def _copy(place: Path, folder: CompiledFolder, name: str, roots: Sequence[Path]) -> None:
    """Of a folder of Triton's cache the files that a launch needs, with their lengths, at once.

    Nothing where they are there already; in the place of a folder that lacks some.
    """
    if folder.group(place.name, name) is not None:
        return
    to = folder.path / KERNELS / place.name
    unfinished = Path(tempfile.mkdtemp(dir=to.parent, prefix="."))
    try:
        for path in place.iterdir():
            if path.suffix in WANTED and not path.name.startswith(GROUP):
                (unfinished / path.name).write_bytes(_portable(path, roots))
        sizes = {file.name: file.stat().st_size for file in unfinished.iterdir()}
        (unfinished / f"{GROUP}{name}").write_text(json.dumps({"sizes": sizes}), encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp's is for one user
        if folder.group(place.name, name) is None:
            if to.is_dir() and not to.is_symlink():
                shutil.rmtree(to, ignore_errors=True)
            else:
                to.unlink(missing_ok=True)
            unfinished.rename(to)
    except OSError:
        if folder.group(place.name, name) is None:  # a run beside this one may have put it there
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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
        return {key: _names_alone(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_names_alone(part) for part in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
