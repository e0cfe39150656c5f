"""Device code for tiles whose lanes count (tap, channel) together, so that few channels fill a dot.

Each voxel of such a tile has a word with one bit per tap and axis: the tap stays inside that axis. Each lane has a word
with the three bits of its tap. Whether a voxel's tap is inside is then one AND and one comparison per element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonconv.problem import Triple

MOST_BITS = 62  # of a word that stays positive as int64; int32 holds 30


def refusal(places: Triple) -> str | None:
    """Why so many taps (d, h, w) do not fit a word; None where they do."""
    if sum(places) > MOST_BITS:
        return f"the tap words hold {MOST_BITS} taps over the three axes, not {sum(places)}"
    return None


@triton.constexpr_function
def word_type(kernel):
    return tl.int32 if sum(int(k) for k in kernel) <= 30 else tl.int64


@triton.jit
def axis_word(start, size, KERNEL: tl.constexpr, DILATION: tl.constexpr, WORD: tl.constexpr):
    """A word whose bit t says whether 0 <= start + DILATION*t < size."""
    first = tl.minimum((tl.maximum(-start, 0) + DILATION - 1) // DILATION, KERNEL).to(WORD)
    end = tl.minimum((tl.maximum(size - start, 0) + DILATION - 1) // DILATION, KERNEL).to(WORD)
    one = first * 0 + 1
    return (one << end) - (one << first)


@triton.jit
def voxel_words(d, h, w, mask, size, KERNEL: tl.constexpr, DILATION: tl.constexpr):
    """The words of the voxels whose tap 0 is at (d, h, w), each (BLOCK,); 0 where the mask is False."""
    WORD: tl.constexpr = word_type(KERNEL)
    word = axis_word(d, size[0], KERNEL[0], DILATION[0], WORD)
    word |= axis_word(h, size[1], KERNEL[1], DILATION[1], WORD) << KERNEL[0]
    word |= axis_word(w, size[2], KERNEL[2], DILATION[2], WORD) << (KERNEL[0] + KERNEL[1])
    return tl.where(mask, word, 0)


@triton.jit
def tap_lanes(lane, CHANNELS: tl.constexpr, KERNEL: tl.constexpr):
    """tap, its place along d, h and w, channel and word of lanes that count (tap, channel), channels innermost.

    The word of a lane beyond the last tap has bits that no voxel has.
    """
    WORD: tl.constexpr = word_type(KERNEL)
    tap = lane // CHANNELS
    td, th, tw = tap // (KERNEL[1] * KERNEL[2]), tap // KERNEL[2] % KERNEL[1], tap % KERNEL[2]
    one = tap.to(WORD) * 0 + 1
    word = (one << td) | (one << (KERNEL[0] + th)) | (one << (KERNEL[0] + KERNEL[1] + tw))
    return tap, td, th, tw, lane % CHANNELS, tl.where(td < KERNEL[0], word, -1)
