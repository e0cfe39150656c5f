"""Device code for tiles whose lanes count (tap, channel) together, so that few channels fill a dot.

Which voxels a lane's tap stays inside of has two forms. Where neighbouring lanes have different taps, each voxel has a
word with one bit per tap and axis: the tap stays inside that axis. Each lane has a word with the three bits of its tap.
Whether a voxel's tap is inside is then one AND and one comparison per element. Where a few lanes meet many voxels in a
loop, each lane has a span of voxel indices along each axis: one subtraction and one unsigned comparison per axis.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonconv.kernels.triton_device import axis_phase, tap_period, tap_shift
from tritonconv.problem import Triple

MOST_BITS = 62  # of a word that stays positive as int64; int32 holds 30


def refusal(places: Triple) -> str | None:
    """Why so many taps (d, h, w) do not fit a word; None where they do."""
    if sum(places) > MOST_BITS:
        return f"the tap words hold {MOST_BITS} taps over the three axes, not {sum(places)}"
    return None


@triton.constexpr_function
def tap_steps(STRIDE, DILATION):
    """(d, h, w): from one tap of a phase to its next."""
    return tuple(tap_period(int(s), int(r)) for s, r in zip(STRIDE, DILATION, strict=True))


@triton.constexpr_function
def voxel_steps(STRIDE, DILATION):
    """(d, h, w): from the voxel of x that one tap of a phase reads back to that of its next."""
    return tuple(tap_shift(int(s), int(r)) for s, r in zip(STRIDE, DILATION, strict=True))


@triton.constexpr_function
def backward(steps):
    """The steps the other way: in Triton 3.6.0 those of a constant tuple are plain integers, of which a kernel makes no
    constants."""
    return tuple(-int(step) for step in steps)


@triton.jit
def volume_phase(
    phase, crop, out_size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr
):  # fmt: skip
    """first, outputs, tap, taps and start of a phase, w counted fastest, each (d, h, w): along each axis those of
    ``triton_device.axis_phase``, where start is the offset.
    """
    phi_w = phase % STRIDE[2]
    phi_h = phase // STRIDE[2] % STRIDE[1]
    phi_d = phase // (STRIDE[2] * STRIDE[1])
    first_d, outs_d, tap_d, taps_d, start_d = axis_phase(phi_d, crop[0], out_size[0], KERNEL[0], STRIDE[0], DILATION[0])
    first_h, outs_h, tap_h, taps_h, start_h = axis_phase(phi_h, crop[1], out_size[1], KERNEL[1], STRIDE[1], DILATION[1])
    first_w, outs_w, tap_w, taps_w, start_w = axis_phase(phi_w, crop[2], out_size[2], KERNEL[2], STRIDE[2], DILATION[2])
    first, outs, tap = (first_d, first_h, first_w), (outs_d, outs_h, outs_w), (tap_d, tap_h, tap_w)
    return first, outs, tap, (taps_d, taps_h, taps_w), (start_d, start_h, start_w)


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


@triton.jit
def span(step, crop, size, mask, STRIDE: tl.constexpr):
    """(first, count), like ``step``, of the indices i >= 0 with 0 <= i*STRIDE - crop + step < size; none unmasked."""
    first = (tl.maximum(crop - step, 0) + STRIDE - 1) // STRIDE
    end = (tl.maximum(size + crop - step, 0) + STRIDE - 1) // STRIDE
    return first, tl.where(mask, tl.maximum(end - first, 0), 0)


@triton.jit
def spans(steps, crop, size, mask, STRIDE: tl.constexpr):
    """The :func:`span` of each axis (d, h, w)."""
    along_d = span(steps[0], crop[0], size[0], mask, STRIDE[0])
    along_h = span(steps[1], crop[1], size[1], mask, STRIDE[1])
    return along_d, along_h, span(steps[2], crop[2], size[2], mask, STRIDE[2])


@triton.jit
def in_span(index, lanes, WIDE: tl.constexpr):
    """Whether the indices (columns) are in the lanes' spans (rows)."""
    UNSIGNED: tl.constexpr = tl.uint64 if WIDE else tl.uint32
    return (index[None, :] - lanes[0][:, None]).to(UNSIGNED) < lanes[1][:, None].to(UNSIGNED)


@triton.jit
def in_spans(d, h, w, lanes, WIDE: tl.constexpr):
    """Whether the voxels (columns) are in the lanes' :func:`spans` (rows) along every axis."""
    return in_span(d, lanes[0], WIDE) & in_span(h, lanes[1], WIDE) & in_span(w, lanes[2], WIDE)


@triton.jit
def lanes_inside(
    d, h, w, mask, lanes, words, cut, size,
    CHANNELS: tl.constexpr, STRIDE: tl.constexpr, KERNEL: tl.constexpr, DILATION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Whether the lanes' taps (rows) are inside of ``size`` for the voxels (columns) whose tap 0 is at i*STRIDE - cut.

    ``lanes`` are the :func:`spans` and ``words`` the words of the lanes, which count (tap, channel).
    """
    if CHANNELS % 8 == 0:  # the channels of one load have one tap: of comparisons alone the compiler sees it
        hit = in_spans(tl.where(mask, d, -1), h, w, lanes, WIDE)  # -1 is below every span
    else:
        od, oh, ow = d * STRIDE[0] - cut[0], h * STRIDE[1] - cut[1], w * STRIDE[2] - cut[2]
        of_voxel = voxel_words(od, oh, ow, mask, size=size, KERNEL=KERNEL, DILATION=DILATION)
        hit = (of_voxel[None, :] & words[:, None]) == words[:, None]
    return hit
