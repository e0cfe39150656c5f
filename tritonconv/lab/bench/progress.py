"""Progress on stderr: a bar of rich on a terminal, one plain line every few seconds elsewhere, nothing when quiet."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from typing import TextIO

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts the cells that are done; the end of its block ends the display. This class shows nothing."""

    def begin(self, cells: int) -> None:
        pass

    def step(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Lines(Progress):
    """``12/312 cells, 8 s, about 200 s left: NAME`` at most every few seconds."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic, unit: str = "cells") -> None:
        self._out, self._clock, self._unit = out, clock, unit
        self._start = self._last = clock()
        self._cells = self._done = 0

    def begin(self, cells: int) -> None:
        self._cells = cells
        if self._done:  # another round, as in a campaign
            self._done, self._start = 0, self._clock()

    def step(self, text: str) -> None:
        self._done += 1
        now = self._clock()
        if now - self._last >= SECONDS_BETWEEN_LINES or self._done == self._cells:
            self._last = now
            spent = now - self._start
            left = spent / self._done * (self._cells - self._done)
            rest = f", about {left:.0f} s left" if left > 0 else ""
            print(f"{self._done}/{self._cells} {self._unit}, {spent:.0f} s{rest}: {text}", file=self._out, flush=True)


class Bar(Progress):
    """rich's progress bar."""

    def __init__(self, out: TextIO, first: str = "measuring the roofs") -> None:
        from rich import progress as rich
        from rich.console import Console

        self._bar = rich.Progress(
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.description}"),
            console=Console(file=out),
            transient=True,
        )
        self._task = self._bar.add_task(first, total=None)
        self._bar.start()

    def begin(self, cells: int) -> None:
        self._bar.reset(self._task, total=cells)

    def step(self, text: str) -> None:
        self._bar.update(self._task, advance=1, description=text)

    def close(self) -> None:
        self._bar.stop()


def progress(
    quiet: bool, out: TextIO | None = None, unit: str = "cells", first: str = "measuring the roofs"
) -> Progress:
    """The display that fits the stream (stderr by default); without rich a terminal gets plain lines.

    ``unit`` is what is counted, ``first`` what goes on before the first of them.
    """
    stream = sys.stderr if out is None else out
    if quiet:
        return Progress()
    if stream.isatty() and importlib.util.find_spec("rich") is not None:
        return Bar(stream, first)
    return Lines(stream, unit=unit)
