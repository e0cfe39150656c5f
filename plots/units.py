"""Rates in the unit that a reader says: TFLOP/s and TB/s from 1,000 GFLOP/s and GB/s on."""

from __future__ import annotations

TERA, GIGA = 1e12, 1e9
ALMOST = 0.9995  # of a tera: three figures of less would read 1e+03 of the smaller unit


def unit(largest: float, name: str) -> tuple[float, str]:
    """(divisor, unit) for values up to ``largest``; ``name`` is "FLOP/s" or "B/s"."""
    return (TERA, f"T{name}") if largest >= ALMOST * TERA else (GIGA, f"G{name}")


def rate(value: float, name: str) -> str:
    """A rate with three figures and its unit."""
    divisor, text = unit(value, name)
    return f"{value / divisor:.3g} {text}"
