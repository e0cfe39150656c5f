"""Lengths in parts that are powers of two, for a tile has no others: 160 columns as 128 and 32, not as 256."""

from __future__ import annotations

import triton

LEAST = 16  # of a product
FILLED = 7 / 8  # of a power of two: so many are one part, for each further part is a product and a store of its own


@triton.constexpr_function
def part_sizes(LENGTH):
    """The parts of a length, the widest first: powers of two from LEAST on. The last one may reach beyond it."""
    sizes, rest = [], -(-int(LENGTH) // LEAST) * LEAST
    while rest > 0:
        around = 1 << (rest - 1).bit_length()
        sizes.append(around if rest >= FILLED * around else around // 2)
        rest -= sizes[-1]
    return tuple(sizes)


@triton.constexpr_function
def part_start(SIZES, PART):
    """Where a part begins; its size divides it."""
    return sum(int(size) for size in SIZES[: int(PART)])
