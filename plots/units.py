"""Numbers as a reader says them: TFLOP/s and TB/s from 1,000 GFLOP/s and GB/s on; ratios whose losses show."""

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


def ratio(value: float) -> str:
    """Two decimals; three where a loss would read 1.00."""
    return f"{min(value, 0.999):.3f}" if 0.995 <= value < 1 else f"{value:.2f}"
