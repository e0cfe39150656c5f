"""The orders in which a kernel may read the weight, and when a packed copy pays."""

from __future__ import annotations

AS_GIVEN, OUT_INNERMOST, IN_INNERMOST = 0, 1, 2  # the values of the config key WEIGHT
# torch's order has the taps innermost: neighbours of a tile then lie taps*itemsize bytes apart, and a load of 32 lanes
# touches up to 32 sectors. A weight this small stays in a multiprocessor's L1 cache, and in a small problem a launch
# for its packing takes longer than that: at 4 TB/s the bytes of such a problem take 2 us.
CACHED_BYTES, SMALL_PROBLEM = 32 * 1024, 8 << 20
