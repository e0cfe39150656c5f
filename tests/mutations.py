"""Breaks the Triton kernels one operator at a time and says which breaks the tests notice.

``python tests/mutations.py --count 20 --seed 1`` draws so many single breaks of the device code: an index that is added
and not subtracted, a bound that is off by one, a mask that is joined otherwise, a product in the place of a quotient.
Each is made in a copy of the project, where the exact tests of the variants that run the broken function, and those of
its own file, must fail. A break that they do not notice *survives*: a case is missing, or the break changes nothing.
The same seed draws the same breaks while the kernels stay as they are, so two states of the project can be compared. It
takes a minute for each break, and is no part of ``make test``; the exit code is 1 where a break survives.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tritonconv.autotune import sources
from tritonconv.kernels.registry import variants

ROOT = Path(__file__).resolve().parent.parent

SECONDS = 600  # a break may make a loop endless
TESTS = (
    "tests/test_triton_kernels.py",
    "tests/test_fused_backward.py",
    "tests/test_skipped_taps.py",
    "tests/test_triton_reduce.py",
    "tests/test_channel_counts.py",
    "tests/test_triton_epilogue.py",
)
# Further tests of a file's device code, whose ids name no variant.
FURTHER = {
    "backward_fused": ("test_fused_backward", "test_arrival"),
    "forward_phases_packed": ("test_triton_apart",),
    "triton_gemm": ("test_skipped_taps",),
    "triton_transpose": ("test_transpose",),
    "triton_depthwise_cells": ("test_depthwise_cells",),
    "forward_depthwise_cells": ("test_depthwise_cells",),
    "backward_data_depthwise_cells": ("test_depthwise_cells",),
    "backward_weight_depthwise_cells": ("test_depthwise_cells", "test_arrival"),
    "backward_weight_depthwise": ("test_arrival",),
}
# The operator that each becomes, as it is written.
OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.FloorDiv: ("//", "%"), ast.Mod: ("%", "//"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
}  # fmt: skip


class Break(NamedTuple):
    """One operator of a device function, by its place in the file (an offset in bytes), and what it becomes."""

    module: str
    function: str
    line: int
    begin: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]}.py:{self.line} {self.function}: {self.old} becomes {self.new}"


def breaks_of(module: str, text: bytes) -> Iterator[Break]:
    """All single breaks of the functions of a module that Triton compiles."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for function in ast.parse(text).body:
        if isinstance(function, ast.FunctionDef) and sources._on_device(function):
            for node in (each for part in function.body for each in ast.walk(part)):
                for left, operator, right in _operations(node):
                    begin = starts[left.end_lineno - 1] + left.end_col_offset
                    end = starts[right.lineno - 1] + right.col_offset
                    old, new = OPERATORS[type(operator)]
                    place = text.find(old.encode(), begin, end)
                    if place >= 0:
                        yield Break(module, function.name, left.end_lineno, place, place + len(old), old, new)


def _operations(node: ast.AST) -> Iterator[tuple]:
    """(left operand, operator, right operand) of arithmetic and of comparisons of two."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield node.left, node.op, node.right
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OPERATORS:
        yield node.left, node.ops[0], node.comparators[0]


def users() -> dict[sources.Place, list[str]]:
    """The variants that run each device function."""
    found: dict[sources.Place, list[str]] = {}
    for record in variants():
        if record.backend == "triton":
            for place in sources.places(record):
                if sources._on_device(sources._node(place)):
                    found.setdefault(place, []).append(record.name)
    return found


def noticed(broken: Break, names: list[str], folder: Path) -> bool:
    """The tests of the variants fail in a copy of the project with the break; it is taken back afterwards."""
    stem = broken.module.rpartition(".")[2]
    path = folder / "kernels" / f"{stem}.py"
    whole = path.read_bytes()
    path.write_bytes(whole[: broken.begin] + broken.new.encode() + whole[broken.end :])
    files = dict.fromkeys((f"test_{stem}", *FURTHER.get(stem, ()), *(f"test_{name}" for name in names)))
    asked = " or ".join((*files, *(f"[{name}" for name in names)))
    own = [name for name in (f"tests/{file}.py" for file in files) if (folder / name).exists() and name not in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *own, *TESTS, "-k", asked]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=SECONDS, check=False)
        if done.returncode in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise RuntimeError(f"no test of {asked} ran:\n{done.stdout.decode()}")
        return done.returncode != pytest.ExitCode.OK  # an address outside of everything ends the process
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_bytes(whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="how many breaks (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="only say which")
    options = parser.parse_args()
    run_by = users()
    modules = sorted({place.module for place in run_by})
    every = [
        each
        for module in modules
        for each in breaks_of(module, (ROOT / "kernels" / f"{module.rpartition('.')[2]}.py").read_bytes())
        if sources.Place(module, each.function) in run_by
    ]
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    print(f"{len(chosen)} of {len(every)} breaks, seed {options.seed}")
    if options.list:
        print(*chosen, sep="\n")
        return 0
    survivors = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        shutil.copytree(
            ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv*", "results", "plots")
        )
        shutil.copytree(ROOT / "plots", folder / "plots", ignore=shutil.ignore_patterns("examples"))
        for each in chosen:
            names = run_by[sources.Place(each.module, each.function)]
            seen = noticed(each, names, folder)
            survivors += [] if seen else [each]
            print("noticed " if seen else "SURVIVES", each, f"({len(names)} variants)", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} breaks are noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
