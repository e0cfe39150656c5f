"""The host side of launches that Triton up to 3.6 has a C compiler build: a small module for each signature.

A process that launches a kernel of a new signature waits for it, 0.16 s (gcc 12, a core of an AMD EPYC). The key
of such a module is its source, so it can be built on a machine that has no GPU, and no ``libcuda`` either: it is linked
with an empty library of that name. Later Tritons have one module for all launches, and nothing is built here.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LIBRARY = "libcuda.so.1"
DRIVER_CALL = re.compile(r"\bcu[A-Z]\w+(?=\s*\()")


def compile_launchers(kernels: Iterable[Any]) -> tuple[Path, ...]:
    """The modules of NVIDIA kernels, in Triton's cache on disk; none where Triton needs none or nothing builds them.

    For a process that compiles and launches nothing: meanwhile Triton loads no module.
    """
    from triton.backends.nvidia import driver
    from triton.runtime import build

    kernels = [kernel for kernel in kernels if kernel.metadata.target.backend == "cuda"]
    if not kernels or not hasattr(driver, "make_launcher") or not hasattr(build, "_load_module_from_path"):
        return ()
    try:
        _find_library(driver)
        with _unloaded(build) as files:
            for kernel in kernels:
                driver.CudaLauncher(kernel.src, kernel.metadata)
    except Exception:  # no C compiler or no header of Python's: the launch itself will say so
        return ()
    return tuple(dict.fromkeys(files))


@contextlib.contextmanager
def _unloaded(build: Any) -> Iterator[list[Path]]:
    """Inside the block modules are built and not loaded, for which a driver is needed; yields their files."""
    files: list[Path] = []

    def keep(name: str, path: str) -> SimpleNamespace:
        files.append(Path(path))
        return SimpleNamespace(launch=None)

    before = build._load_module_from_path
    build._load_module_from_path = keep
    try:
        yield files
    finally:
        build._load_module_from_path = before


def _find_library(driver: Any) -> None:
    """Has Triton link with the system's ``libcuda``, or where there is none with one that only has its names."""
    from triton import knobs

    try:
        driver.library_dirs()
        return
    except (AssertionError, OSError, subprocess.CalledProcessError):
        pass
    folder = Path(knobs.cache.dir) / "libcuda"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / LIBRARY).exists():
        names = sorted(set(DRIVER_CALL.findall(driver.make_launcher({}, {}, None))))
        source, library = folder / f"{os.getpid()}.c", folder / f"{os.getpid()}.so"
        source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
        compiler = os.environ.get("CC", "gcc")
        subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", source, "-o", library], check=True)
        library.replace(folder / LIBRARY)
    knobs.nvidia.libcuda_path = str(folder)
