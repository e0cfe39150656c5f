"""Types of command-line flags: comma lists of names, seconds, seeds, counts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable


def names(allowed: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: a comma list of names, each once, all of them allowed."""
    every = tuple(allowed)

    def parse(text: str) -> tuple[str, ...]:
        given = any_names(text)
        for name in given:
            if name not in every:
                raise argparse.ArgumentTypeError(f"got {name!r}, expected a comma list of {', '.join(every)}")
        return given

    return parse


def any_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def once(given: list[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """The names that a repeated flag collected, each once."""
    return default if given is None else tuple(dict.fromkeys(given))


def seconds(text: str) -> float:
    return _above_zero(text, "seconds")


def microseconds(text: str) -> float:
    return _above_zero(text, "microseconds")


def share(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 10:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a share such as 0.05")
    return value


def _above_zero(text: str, unit: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of {unit} above 0")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def shape(text: str) -> tuple[int, ...]:
    """``1x64x16x16x16`` as integers; 0 is one."""
    parts = text.split("x")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected integers joined by x, such as 1x64x16x16x16")
    return tuple(int(part) for part in parts)


def counts(text: str) -> tuple[int, ...]:
    """A comma list of integers above 0, each once, ascending."""
    return tuple(
        sorted({_integer(part.strip(), 1, 2**20, "1 to 2^20, or a comma list of them") for part in text.split(",")})
    )


def count(text: str) -> int:
    return _integer(text, 1, 2**20, "1 to 2^20")


def seed(text: str) -> int:
    return _integer(text, 0, 2**63 - 1, "0 to 2^63 - 1")


def processes(text: str) -> int:
    return _integer(text, 1, 1024, "1 to 1024")


def _integer(text: str, low: int, high: int, allowed: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer from {allowed}")
    return value
