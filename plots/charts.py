"""The charts there are: every file beside this one that says with ``MADE_BY`` which command writes the rows it draws.

A chart has ``draw(run, folder, pass_name=None, layout=None, dtype=None) -> paths``, which raises ResultsError where the
results hold nothing for it.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

from tritonconv.bench.results import Run
from tritonconv.errors import ResultsError

FIRST = ("roofline", "speedup")


@cache
def names() -> tuple[str, ...]:
    """The charts' names, the common ones first; nothing is imported."""
    found = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if _is_chart(path))
    return (*FIRST, *(name for name in found if name not in FIRST))


def _is_chart(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return any(isinstance(target, ast.Name) and target.id == "MADE_BY" for target in targets)


def chart(name: str) -> ModuleType:
    return importlib.import_module(f"tritonconv.plots.{name}")


def draw(run: Run, folder: Path, wanted: tuple[str, ...] = (), **chosen: str | None) -> dict[str, list[Path]]:
    """Draws the wanted charts, else all that the results have rows for; the paths by chart.

    Raises ResultsError, naming the command that writes what is missing, for a wanted chart without rows or where none
    can be drawn.
    """
    drawn: dict[str, list[Path]] = {}
    missing = []
    for name in wanted or names():
        made = chart(name)
        try:
            drawn[name] = made.draw(run, folder, **chosen)
        except ResultsError as error:
            missing.append(f"{error} (written by {made.MADE_BY})")
            if wanted:
                raise ResultsError(missing[-1]) from None
    if not drawn:
        raise ResultsError("; ".join(missing))
    return drawn
