"""Device code that the Triton kernels share: voxels of a tile, taps of a phase, offsets, program order, the store.

Words: a *tile* is BLOCK_M voxels; ``size`` and its kin are (d, h, w); strides are in elements, (n, c, d, h, w). Ids
are widened to 64 bits before they are multiplied, and only where WIDE says that an offset needs it. Of WIDE 0 nothing
needs 64 bits, of 1 offsets do, of 2 numbers of voxels too (``triton_launch.wide``).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

# Beyond every divisor of a loop: :func:`divider` serves those below. From half of it on an axis has 64-bit offsets,
# which are divided plainly.
FAR = 1 << 16

# Whether the lanes of a warp run along the last axis of a tile of addresses, where the compiler sees no neighbours
# along either: in Triton 3.6 they run along the first. Seen in the layouts that 3.6.0 and 3.7.0 to 3.9.0 give the
# same kernels.
_TIES_LAST = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)


@triton.constexpr_function
def ties_last():
    """A function and no ``tl.constexpr``: of such a global Triton 3.6.0 makes a part of a kernel's key, or not, by the
    order in which a process asks for the keys, and one process does not find what another has compiled.
    """
    return _TIES_LAST


@triton.constexpr_function
def gcd(first, second):
    return math.gcd(first, second)


@triton.constexpr_function
def constant(value):
    """A number out of a constexpr tuple as ``tl.static_range`` wants it: in Triton 3.6.0 indexing gives a plain int."""
    return int(value)


@triton.constexpr_function
def ceil_div(value, divisor):
    """``tl.cdiv`` as a compile-time constant: in Triton 3.6.0 that of two constants is none."""
    return -(-int(value) // int(divisor))


@triton.constexpr_function
def product(values):
    return math.prod(int(value) for value in values)


@triton.constexpr_function
def tap_period(stride, dilation):
    """Taps of one phase follow each other in steps of stride / gcd(dilation, stride)."""
    return stride // math.gcd(dilation, stride)


@triton.constexpr_function
def tap_shift(stride, dilation):
    """From one tap of a phase to its next the input index falls by dilation / gcd(dilation, stride)."""
    return dilation // math.gcd(dilation, stride)


@triton.jit
def widened(value, WIDE: tl.constexpr):
    """The integer in 64 bits where WIDE."""
    if WIDE:
        value = value + tl.full((), 0, tl.int64)
    return value


@triton.jit
def multiple(value, STEP: tl.constexpr):
    """``value``, which STEP divides, so that the compiler knows it: a mask then holds for STEP neighbours at once."""
    return value // STEP * STEP


@triton.constexpr_function
def one():
    """1 as a constant: what Triton 3.6.0 makes of a constant in a tuple is a plain int, which no function returns."""
    return 1


@triton.jit
def aligned(strides, UNITS: tl.constexpr):
    """The strides of each operand with what divides them, UNITS, in sight of the compiler."""
    found = ()
    for place in tl.static_range(len(UNITS)):
        found = found + (in_units(strides[place], UNITS, place),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def in_units(strides, UNITS: tl.constexpr, PLACE: tl.constexpr):
    """The strides of one operand with what divides them, UNITS[PLACE] of ``triton_launch.units``."""
    OWN: tl.constexpr = UNITS[PLACE]
    found = ()
    for axis in tl.static_range(len(OWN)):
        if OWN[axis] == 0:
            found = found + (one(),)  # type: ignore[assignment]  # noqa: RUF005
        elif OWN[axis] == 1:
            found = found + (strides[axis],)  # type: ignore[assignment]  # noqa: RUF005
        else:
            found = found + (multiple(strides[axis], OWN[axis]),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def divider(divisor):
    """(multiplier, shift) that :func:`divided` takes for a division in a loop, by 1 <= divisor < FAR.

    floor(n / d) = (high(n * m) + n) >> l with l = ceil(log2 d), m = floor(2^32 * (2^l - d) / d) + 1: Granlund and
    Montgomery, "Division by invariant integers using multiplication", PLDI 1994, figure 4.1, here for n < 2^31. The
    quotient of 48 bits is made of two of 32: a division of 64 bits is a call, with a stack.
    """
    divisor = divisor.to(tl.uint32)
    one = divisor * 0 + 1
    shift = divisor * 0
    for bit in tl.static_range(16):
        shift += (divisor > (1 << bit)).to(tl.uint32)
    rest = ((one << shift) - divisor) << 16
    high = rest // divisor
    low = ((rest - high * divisor) << 16) // divisor
    return (high << 16) + low + 1, shift


@triton.jit
def dividers(size, BLOCK_W: tl.constexpr):
    """The dividers of :func:`voxels` along (d, h, w), for loops over tiles and where the channels are contiguous.

    Not where tiles are rows along w: of a division the compiler knows that neighbours along w have one quotient, of a
    multiplication it does not, and loads would be narrow. Nor where numbers of voxels need 64 bits.
    """
    across = tl.cdiv(size[2], BLOCK_W) if BLOCK_W > 0 else size[2]
    return divider(size[0]), divider(size[1]), divider(across)


@triton.jit
def given_dividers(by_d, by_h, by_w, shift_d, shift_h, shift_w):
    """:func:`dividers` out of the arguments that the host worked out (``triton_launch.division``)."""
    along_d = by_d.to(tl.uint32, bitcast=True), shift_d.to(tl.uint32)
    along_h = by_h.to(tl.uint32, bitcast=True), shift_h.to(tl.uint32)
    return along_d, along_h, (by_w.to(tl.uint32, bitcast=True), shift_w.to(tl.uint32))


@triton.jit
def divided(value, divisor, WIDE: tl.constexpr, by=None):
    """Quotient and remainder of numbers of voxels, not negative: unsigned, which takes half the instructions.

    Of 64 bits a division is a call, so they have 32 unless numbers of voxels need more (WIDE = 2). ``by`` is the
    :func:`divider` of the divisor: three instructions instead of about fifteen.
    """
    SIGNED: tl.constexpr = tl.int64 if WIDE > 1 else tl.int32
    UNSIGNED: tl.constexpr = tl.uint64 if WIDE > 1 else tl.uint32
    divisor = tl.full((), 0, UNSIGNED) + divisor
    value = value.to(UNSIGNED)
    if by is None:  # noqa: SIM108
        quotient = value // divisor
    else:
        quotient = (tl.umulhi(value, by[0] + tl.zeros_like(value)) + value) >> by[1]
    return quotient.to(SIGNED), (value - quotient * divisor).to(SIGNED)


@triton.jit
def voxel_tiles(n, size, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, WIDE: tl.constexpr):
    """How many tiles cover n images of ``size``; see :func:`voxels`."""
    rows = widened(n, WIDE > 1) * size[0] * size[1]
    if BLOCK_W > 0:
        return tl.cdiv(rows, BLOCK_M // BLOCK_W) * tl.cdiv(size[2], BLOCK_W)
    return tl.cdiv(rows * size[2], BLOCK_M)


@triton.jit
def voxels(tile, n, size, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, WIDE: tl.constexpr, by=None):
    """image, d, h, w and mask, each (BLOCK_M,), of the voxels of a tile; ``by``: the :func:`dividers` of ``size``.

    BLOCK_W = 0: the voxels of all images in one row. Else BLOCK_M / BLOCK_W rows of BLOCK_W voxels along w, which the
    compiler knows to be neighbours: wide loads and stores where w is the contiguous axis.
    """
    lane = tl.arange(0, BLOCK_M)
    tile = widened(tile, WIDE > 1)
    by_d, by_h, by_w = None, None, None
    if by is not None:
        by_d, by_h, by_w = by
    if BLOCK_W > 0:
        tiles_w = tl.cdiv(size[2], BLOCK_W)
        tile, tile_w = divided(tile, tiles_w, WIDE, by_w)
        row = tile * (BLOCK_M // BLOCK_W) + lane // BLOCK_W
        w = tile_w * BLOCK_W + lane % BLOCK_W
    else:
        voxel = tile * BLOCK_M + lane
        row, w = divided(voxel, size[2], WIDE, by_w)
    plane, h = divided(row, size[1], WIDE, by_h)
    image, d = divided(plane, size[0], WIDE, by_d)
    mask = (image < n) & (w < size[2])
    return widened(image, WIDE), widened(d, WIDE), widened(h, WIDE), widened(w, WIDE), mask


@triton.jit
def inside(index, size):
    """Whether 0 <= index < size."""
    return (index >= 0) & (index < size)


@triton.jit
def ranked_phase(rank, ORDER: tl.constexpr):
    """The phase at this place of ORDER (heaviest first)."""
    phase = rank
    for place in tl.static_range(len(ORDER)):
        phase = tl.where(rank == place, ORDER[place], phase)
    return phase


@triton.jit
def axis_phase(phi, crop, out, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """Along one axis, for the outputs o with (o + crop) mod stride = phi: first, outputs, tap, taps, offset.

    Output ``first + stride*j`` (j < outputs) reads ``x[j + offset - m*tap_shift] * weight[tap + m*tap_period]`` for
    m < taps.
    """
    PERIOD: tl.constexpr = tap_period(STRIDE, DILATION)
    first = (phi + STRIDE - crop % STRIDE) % STRIDE
    outputs = tl.maximum((out - first + STRIDE - 1) // STRIDE, 0)
    tap = phi * 0 + KERNEL  # no tap, unless one of the first period hits
    for candidate in tl.static_range(KERNEL if KERNEL < PERIOD else PERIOD):
        tap = tl.where(phi == (DILATION * candidate) % STRIDE, candidate, tap)
    taps = (KERNEL - tap + PERIOD - 1) // PERIOD
    return first, outputs, tap, taps, (first + crop - DILATION * tap) // STRIDE


@triton.jit
def next_step(k, md, mh, mw, taps, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The place after (channels k, tap m) in the flat loop over taps and channel blocks, channels innermost."""
    k += BLOCK_K
    carry = k >= K
    k = tl.where(carry, 0, k)
    mw += carry.to(tl.int32)
    carry = mw >= taps[2]
    mw = tl.where(carry, 0, mw)
    mh += carry.to(tl.int32)
    carry = mh >= taps[1]
    mh = tl.where(carry, 0, mh)
    return k, md + carry.to(tl.int32), mh, mw


@triton.jit
def chunk(split, splits, count):
    """Of ``count`` tiles or steps the first of a chunk and the one after its last; two chunks differ by at most one."""
    share, rest = count // splits, count % splits
    first = split * share + tl.minimum(split, rest)
    return first, first + share + (split < rest).to(tl.int32)


@triton.jit
def entered(first, last, ENTER: tl.constexpr):
    """``last``; with ENTER (``triton_target.zeros_behind_loops``), where no step is left, the one behind ``first``.

    For a loop whose steps mask what is not there: one that is always entered needs no zeros on a way around it.
    """
    if ENTER:
        last = tl.maximum(last, first + 1)
        tl.assume(last > first)
    return last


@triton.jit
def grouped_order(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile_m, tile_n): GROUP_M tiles of rows share each column before the next, so both operands stay in L2."""
    width = GROUP_M * tiles_n
    group = pid // width
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + (pid % width) % height, (pid % width) // height


@triton.jit
def load_along(pointers, mask, AXIS: tl.constexpr):
    """A tile (A, B); the lanes of a warp run along AXIS where the compiler sees no neighbours along either."""
    if (AXIS == 1) == ties_last():
        return tl.load(pointers, mask=mask, other=0.0)
    return tl.trans(tl.load(tl.trans(pointers), mask=tl.trans(mask), other=0.0))


@triton.jit
def load_voxels(pointers, mask, VOXELS_INNER: tl.constexpr):
    """A tile (voxels, channels). VOXELS_INNER: in NCDHW, whose rows are too short to show the compiler neighbours."""
    if VOXELS_INNER:
        return load_along(pointers, mask, 0)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_lanes(pointers, mask, VOXELS_INNER: tl.constexpr):
    """A tile (channels, voxels), the other way round of :func:`load_voxels`."""
    if VOXELS_INNER:
        return load_along(pointers, mask, 1)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(out_ptr, rows, columns, tile, mask_m, mask_n, VOXELS_INNER: tl.constexpr):
    """Stores a tile (BLOCK_M voxels, BLOCK_N channels) at ``rows + columns``, rounded once.

    VOXELS_INNER: lanes run along the voxels, although the compiler cannot see which voxels are neighbours. Along the
    channels each lane would write 2 bytes of a sector of its own in NCDHW.
    """
    tile = tile.to(out_ptr.dtype.element_ty)
    if VOXELS_INNER and ties_last():
        mask = mask_n[:, None] & mask_m[None, :]
        tl.store(out_ptr + columns[:, None] + rows[None, :], tl.trans(tile), mask=mask)
    else:
        tl.store(out_ptr + rows[:, None] + columns[None, :], tile, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def settled(acc, WAIT: tl.constexpr):
    """The sums once no product reads its operands any more, where WAIT (``triton_target.registers_in_flight``).

    Text of no instruction that takes the sums: the compiler waits for them in front of it.
    """
    if WAIT:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def offset(strides, image, channel, d, h, w):
    """Element offset of (image, channel, d, h, w)."""
    return image * strides[0] + channel * strides[1] + d * strides[2] + h * strides[3] + w * strides[4]
