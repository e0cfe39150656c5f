"""The measurements of ``tritonconv bench``, one module each: a new file beside this one joins in by itself.

The name of a module is its flag: ``roofs.py`` runs for ``--roofs``. A module has

- ``FLAG``, the arguments of that flag; None for the layers, which are measured where no other is asked for;
- ``SAID``, its paragraph of the help; ``add(parser)``, its own flags;
- ``OWN``, the flags (by their attribute) that go with it, and ``TOO``, those of others that it takes as well;
- ``run(options, device) -> exit code``.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from functools import cache
from types import ModuleType

from tritonconv.errors import ArgumentError

FIRST = ("overhead", "roofs", "layers")  # in the help


@cache
def measurements() -> dict[str, ModuleType]:
    """The modules by name, in the order of the help."""
    found = sorted(name for _, name, _ in pkgutil.iter_modules(__path__))
    names = (*FIRST, *(name for name in found if name not in FIRST))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def add_measurements(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of all: those of the layers, which others take too, then the one that asks for each other."""
    of = measurements()
    own = [of[name] for name in sorted(of, key=lambda name: (of[name].FLAG is not None, name))]
    own[0].add(parser)
    instead = parser.add_mutually_exclusive_group()
    for name, each in of.items():
        if each.FLAG is not None:
            instead.add_argument(f"--{name}", **each.FLAG)
    for each in own[1:]:
        each.add(parser)


def asked_for(options: argparse.Namespace) -> ModuleType:
    """The measurement that the flags ask for. Raises ArgumentError for a flag of another one."""
    of = measurements()
    chosen = next((name for name, each in of.items() if each.FLAG and getattr(options, name)), "layers")
    for name, each in of.items():
        for flag in each.OWN:
            given = getattr(options, flag) not in (None, "", False, [])
            if given and name != chosen and flag not in of[chosen].TOO:
                shown = flag.replace("_files", "-file").replace("_", "-")
                raise ArgumentError(f"argument --{shown}: goes with {_said(name)}, not with {_said(chosen)}")
    return of[chosen]


def _said(name: str) -> str:
    return f"--{name}" if measurements()[name].FLAG else f"the {name}"
