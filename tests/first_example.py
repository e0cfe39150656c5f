"""The README's examples: without a home, from a read-only checkout, from a zip file, without Triton.

``python tests/first_example.py [PYTHON ...]`` runs it in each surrounding with each Python (default: this one), which
has torch and numpy, and says what happened; the exit code is 1 where one failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300.0
AFTER = "\nimport sys\nassert tritonconv.__file__.startswith({place!r}), tritonconv.__file__\nprint(tuple(y.shape))\n"


class Surrounding(NamedTuple):
    place: Path  # the folder, or the zip file, that holds the package
    environment: dict[str, str]  # a variable that is "" is not set
    before: tuple[str, ...] = ()  # of the command line


def example() -> str:
    """The blocks of Python in README.md."""
    text = (ROOT / "README.md").read_text("utf-8")
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def package(folder: Path) -> Path:
    """A copy of the package, as an installation has it, in the folder."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tritonconv", folder / "tritonconv", ignore=ignored, dirs_exist_ok=True)
    return folder


def plain(folder: Path) -> Surrounding:
    return Surrounding(package(folder), {"HOME": str(folder)})


def without_home(folder: Path) -> Surrounding:
    missing = str(folder / "no" / "such" / "home")
    return Surrounding(package(folder), {"HOME": missing, "XDG_CACHE_HOME": "", "TRITONCONV_CACHE": ""})


def read_only(folder: Path) -> Surrounding:
    """Nothing in the folder may be written; root gives up its right to write all the same."""
    package(folder)
    for path in (*folder.rglob("*"), folder):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    before = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override") if root else ()
    return Surrounding(folder, {"HOME": str(folder)}, before)


def zipped(folder: Path) -> Surrounding:
    archive = shutil.make_archive(str(folder / "package"), "zip", package(folder / "whole"), "tritonconv")
    return Surrounding(Path(archive), {"HOME": str(folder)})


def without_triton(folder: Path) -> Surrounding:
    """A module of that name raises what Python raises where there is none."""
    (package(folder) / "triton.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')\n"
    )
    return Surrounding(folder, {"HOME": str(folder)})


SURROUNDINGS: dict[str, Callable[[Path], Surrounding]] = {
    "plain": plain,
    "without a home": without_home,
    "read-only": read_only,
    "zipped": zipped,
    "without Triton": without_triton,
}


def run(python: str, name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The example in a process of this Python, in one of :data:`SURROUNDINGS` that is made in an empty folder."""
    made = SURROUNDINGS[name](folder)
    own = {**os.environ, "PYTHONPATH": str(made.place), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": ""}
    environment = {key: value for key, value in {**own, **made.environment}.items() if value}
    code = example() + AFTER.format(place=str(made.place))
    command = [*made.before, python, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS,
                          check=False)  # fmt: skip


def runs(pythons: list[str]) -> Iterator[tuple[str, str, subprocess.CompletedProcess[str]]]:
    for python in pythons:
        for name in SURROUNDINGS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    yield python, name, run(python, name, Path(folder))
                finally:
                    os.chmod(folder, 0o755)
                    for path in Path(folder).rglob("*"):
                        path.chmod(0o755)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="*", default=[sys.executable])
    failed = 0
    for python, name, done in runs(parser.parse_args().python):
        failed += done.returncode != 0
        version = subprocess.run([python, "-V"], capture_output=True, text=True, check=False).stdout.strip()
        last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
        print(f"{version}, {name}: {'ok' if done.returncode == 0 else 'FAILED'} {' '.join(last)}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
