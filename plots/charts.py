"""The charts there are: every module beside this one that says with ``MADE_BY`` which command writes the rows it draws.

A chart has ``draw(run) -> figure``, which raises ResultsError where the results hold nothing for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from tritonconv.errors import ResultsError
from tritonconv.lab.bench.results import Run
from tritonconv.plots import style

PACKAGE = "tritonconv.plots"
FIRST = ("headline", "best", "roofline", "speedup")


@cache
def names() -> tuple[str, ...]:
    """The charts' names, the common ones first; nothing is imported."""
    charts = sorted(name for _, name, _ in pkgutil.iter_modules(sys.modules[PACKAGE].__path__) if _is_chart(name))
    return (*FIRST, *(name for name in charts if name not in FIRST))


def _is_chart(name: str) -> bool:
    """By the names of the module's code, which a package without sources has too."""
    spec = importlib.util.find_spec(f"{PACKAGE}.{name}")
    code_of = getattr(spec and spec.loader, "get_code", None)
    return code_of is not None and "MADE_BY" in code_of(f"{PACKAGE}.{name}").co_names


def chart(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}")


def draw(run: Run, folder: Path, wanted: tuple[str, ...] = ()) -> dict[str, list[Path]]:
    """Draws the wanted charts, else all that the results have rows for; the paths of PNG and SVG by chart.

    Raises ResultsError for a wanted chart without rows, and names the command that writes these. Raises OSError where
    the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, list[Path]] = {}
    for name in wanted or names():
        try:
            with style.style():
                drawn[name] = style.save(chart(name).draw(run), run, folder, name)
        except ResultsError as error:
            if wanted:
                raise ResultsError(f"{error} (written by {chart(name).MADE_BY})") from None
    return drawn
