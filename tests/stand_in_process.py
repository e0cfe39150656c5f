"""Processes beside the stand-in for a GPU, for the tests that need one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import stand_in_gpu

TESTS = Path(__file__).resolve().parent


def python_beside(folder: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs Python with arguments, in the folder, in a process that may have the stand-in."""
    own = {
        **os.environ,
        "STAND_IN_GPU": str(stand_in_gpu.build(folder)),
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        "TRITONCONV_CACHE": str(folder / "cache"),
    }

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=own, cwd=folder, capture_output=True, text=True, timeout=1200, check=False)

    return run


def script(code: str, head: str = "") -> tuple[str, str]:
    """The arguments of Python for a piece of code that has the stand-in."""
    return "-c", f"import stand_in_gpu\nstand_in_gpu.install()\n{head}{textwrap.dedent(code)}"
