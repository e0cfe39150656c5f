"""Sections of Markdown files, between two markers, each replaced on its own by the command that makes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tritonconv.errors import ArgumentError

HEADING = "### "


def markers(command: str) -> tuple[str, str]:
    """The lines between which a command writes."""
    return f"<!-- tritonconv {command}: begin -->", f"<!-- tritonconv {command}: end -->"


def parts(path: Path, command: str, flag: str = "--markdown") -> tuple[str, str, str]:
    """The file before, between and after the markers. Raises ArgumentError, about ``flag``, where it has none."""
    begin_line, end_line = markers(command)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"argument {flag}: cannot read {path}: {error.strerror}") from None
    begin, end = text.find(begin_line), text.find(end_line)
    if not 0 <= begin < end:
        raise ArgumentError(f"argument {flag}: {path} needs the lines {begin_line!r} and {end_line!r}, in this order")
    begin += len(begin_line)
    return text[:begin], text[begin:end], text[end:]


def update(path: Path, command: str, title: str, body: str, order: Callable[[str], Any], newest_first: bool) -> None:
    """Puts the section ``### title`` between the markers, in the place of the one of this title; others stay.

    ``order`` gives a title's place among them.
    """
    before, middle, after = parts(path, command)
    sections = {part.split("\n", 1)[0].strip(): f"{HEADING}{part}" for part in f"\n{middle}".split(f"\n{HEADING}")[1:]}
    sections[title] = f"{HEADING}{title}\n\n{body}"
    text = "\n\n".join(sections[name].strip() for name in sorted(sections, key=order, reverse=newest_first))
    path.write_text(f"{before}\n\n{text}\n\n{after}", encoding="utf-8")
