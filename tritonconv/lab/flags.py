"""Types of command-line flags: comma lists of names, seconds, seeds, counts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


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


def checked(convert: Callable[[str], T], fits: Callable[[T], bool], expected: str) -> Callable[[str], T]:
    """An argparse type: the converted text where ``convert`` raises no ValueError and the value fits."""

    def parse(text: str) -> T:
        try:
            value = convert(text)
        except ValueError:
            pass
        else:
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")

    return parse


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(text)
    return tuple(map(int, parts))


def _several(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(_sizes(part.strip()) for part in text.split(","))


def _ascending(text: str) -> tuple[int, ...]:
    return tuple(sorted(set(map(int, text.split(",")))))


seconds = checked(float, lambda value: 0 < value < math.inf, "a number of seconds above 0")
microseconds = checked(float, lambda value: 0 < value < math.inf, "a number of microseconds above 0")
share = checked(float, lambda value: 0 <= value < 10, "a share such as 0.05")
count = checked(int, lambda value: 1 <= value <= 2**20, "an integer from 1 to 2^20")
counts = checked(_ascending, lambda each: each[0] > 0 and each[-1] <= 2**20, "integers from 1 to 2^20, with commas")
seed = checked(int, lambda value: 0 <= value < 2**63, "an integer from 0 to 2^63 - 1")
processes = checked(int, lambda value: 1 <= value <= 1024, "an integer from 1 to 1024")
shape = checked(_sizes, lambda _: True, "integers joined by x, such as 1x64x16x16x16")
shapes = checked(_several, lambda each: all(map(min, each)), "shapes such as 1x1x96x96x96, with commas")
