"""Slabs of one axis: which planes each rank owns, which planes of x its planes of y need, and who sends them.

With the axis of :mod:`tritonconv.problem` (``size`` N, ``kernel`` k, ``stride`` s, ``crop`` p, ``dilation`` r, ``out``
M) plane i of x and tap t add to plane ``s*i + r*t - p`` of y. Rank j owns planes ``[a_j, a_j+1)`` of x.

*The rule of ownership.* Rank j owns planes ``[s*a_j, s*a_j+1)`` of y, as far as y has them; the last rank that owns
planes of x also owns those of y behind ``s*N``. A rank without planes of x has none of y. Where y is s times as large
as x (k2 s2, k3 s1 p1, k4 s2 p1, k3 s2 p1 with an output padding of 1) the slabs of y are those of x, s times as large:
they fit the skip of a decoder.

*The halo.* Planes ``[b, e)`` of y need of tap t the planes ``ceil((b + p - r*t)/s)`` to ``floor((e - 1 + p - r*t)/s)``
of x. A rank reads the smallest run of planes that holds those of all taps: from its own slab, and from each other rank
that owns a part. The gradient of x goes the same way back.

*The local call.* Planes ``[lo, hi)`` by themselves are a transposed convolution whose plane 0 lies ``s*lo - p`` in y,
so y's planes are cut out by two crops, ``b - (s*lo - p)`` at the front, and what is behind e at the back (fewer than
``max(s, r)`` planes may be missing there, as with an output padding). Where ``s*lo - p`` exceeds b, the planes of y
from b on have no tap, and a plane of zeros before lo makes them; they hold the bias.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from tritonconv.problem import Axis

MOST_EXCHANGES = 1024
Span = tuple[int, int]  # [begin, end)


class Share(NamedTuple):
    """One rank's part of an axis; spans are planes of the whole x or y."""

    x: Span  # owned
    y: Span  # owned
    reads: Span  # of x, for its planes of y: (0, 0) where none is needed
    zeros: int  # planes of zeros before those it reads, 0 or 1
    front: int  # crops of the local call
    back: int  # negative: planes appended, fewer than max(stride, dilation)


class Transfer(NamedTuple):
    """Planes ``[begin, end)`` of x that ``source`` owns and ``target`` reads."""

    source: int
    target: int
    begin: int
    end: int

    @property
    def planes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Exchange:
    """The shares of all ranks, and what goes between them: by target, then by the planes."""

    shares: tuple[Share, ...]
    transfers: tuple[Transfer, ...]

    def planes(self, rank: int | None = None) -> int:
        """Planes of x that ``rank`` receives in the forward, and whose gradients it sends in the backward; of all."""
        return sum(each.planes for each in self.transfers if rank in (None, each.target))


def output_sizes(sizes: tuple[int, ...], stride: int, out: int) -> tuple[int, ...]:
    """Planes of y that each rank owns by the rule of this module, of ``out`` in all, from its planes of x."""
    ends = [min(stride * end, out) for end in accumulate(sizes)]
    last = max((rank for rank, size in enumerate(sizes) if size), default=0)
    ends[last:] = [out] * (len(ends) - last)
    return tuple(end - begin for begin, end in pairwise((0, *ends)))


@lru_cache(MOST_EXCHANGES)
def exchange(axis: Axis, sizes: tuple[int, ...], out_sizes: tuple[int, ...]) -> Exchange:
    """The plan of one axis whose planes of x and y are owned as ``sizes`` and ``out_sizes`` say."""
    owned = tuple(_spans(sizes))
    shares = tuple(share_of(axis, x, y) for x, y in zip(owned, _spans(out_sizes), strict=True))
    ends, transfers = [x[1] for x in owned], []
    for target, share in enumerate(shares):
        for source in range(bisect_right(ends, share.reads[0]), len(owned)):
            begin, end = max(owned[source][0], share.reads[0]), min(owned[source][1], share.reads[1])
            if owned[source][0] >= share.reads[1]:
                break
            if source != target and begin < end:
                transfers.append(Transfer(source, target, begin, end))
    return Exchange(shares, tuple(transfers))


def _spans(sizes: tuple[int, ...]):
    return pairwise((0, *accumulate(sizes)))


def inner(axis: Axis, share: Share) -> Span:
    """The planes of y that need no plane of another rank, of a share that has planes of y."""
    (begin, end), (low, high), (first, last) = share.x, share.reads, share.y
    if low < begin:  # behind the last tap of the plane before
        first = axis.stride * (begin - 1) - axis.crop + axis.dilation * (axis.kernel - 1) + 1
    if high > end:  # before the first tap of the next plane
        last = axis.stride * end - axis.crop
    first, last = max(first, share.y[0]), min(last, share.y[1])
    return first, max(first, last)


def share_of(axis: Axis, x: Span, y: Span) -> Share:
    """The share of a rank that owns planes ``x``, for the planes ``y``."""
    begin, end = y
    reach = axis.dilation * (axis.kernel - 1) + 1
    if begin == end:  # one plane of zeros, of whose answer nothing is kept
        return Share(x, y, (0, 0), 1, 0, 0)
    lows, highs = [], []
    for tap in range(axis.kernel):
        shift = axis.crop - axis.dilation * tap
        low = max(0, -((-begin - shift) // axis.stride))
        high = min(axis.size, (end - 1 + shift) // axis.stride + 1)
        if low < high:
            lows.append(low)
            highs.append(high)
    if lows:
        low, high = min(lows), max(highs)
        zeros = int(axis.stride * low - axis.crop > begin)
        reads, first = (low, high), low - zeros
    else:  # no tap reaches these planes, nor does plane ``first``
        first = min((begin + axis.crop) // axis.stride, axis.size - 1)
        high, zeros, reads = first + 1, 1, (0, 0)
    front = begin + axis.crop - axis.stride * first
    back = axis.stride * (high - 1) - axis.crop + reach - end
    return Share(x, y, reads, zeros, front, back)
