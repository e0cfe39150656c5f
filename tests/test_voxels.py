"""Numbers of voxels near their limits: 32 bits hold them where offsets alone have 64, and 64 bits beyond."""

from __future__ import annotations

import math

import pytest
import torch
from variant_cases import DEVICE

from tritonconv.kernels import registry

if not registry.have_triton():
    pytest.skip("needs Triton", allow_module_level=True)

import triton
import triton.language as tl

from tritonconv.kernels.triton_device import FAR, dividers, voxel_tiles, voxels
from tritonconv.kernels.triton_launch import COUNTED_FROM, WIDE_FROM, wide

BLOCK = 64
LONGEST = FAR // 2 - 1


@triton.jit(do_not_specialize=["first", "n", "d_in", "h_in", "w_in"])
def places_kernel(out_ptr, tiles_ptr, first, n, d_in, h_in, w_in, BLOCK_W: tl.constexpr, DIVIDERS: tl.constexpr,
                  WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    size, lane, by = (d_in, h_in, w_in), tl.arange(0, BLOCK), None
    if DIVIDERS:
        by = dividers(size, BLOCK_W)
    image, d, h, w, mask = voxels(first + tl.program_id(0), n, size, BLOCK, BLOCK_W, WIDE, by=by)
    out_ptr += tl.program_id(0) * (5 * BLOCK)
    tl.store(out_ptr + lane, image.to(tl.int64))
    tl.store(out_ptr + BLOCK + lane, d.to(tl.int64))
    tl.store(out_ptr + 2 * BLOCK + lane, h.to(tl.int64))
    tl.store(out_ptr + 3 * BLOCK + lane, w.to(tl.int64))
    tl.store(out_ptr + 4 * BLOCK + lane, mask.to(tl.int64))
    tl.store(tiles_ptr + tl.program_id(0), voxel_tiles(n, size, BLOCK, BLOCK_W, WIDE).to(tl.int64))


def expected(tile: int, n: int, size: tuple, block_w: int) -> list[tuple]:
    d, h, w = size
    found = []
    for lane in range(BLOCK):
        if block_w:
            across = -(-w // block_w)
            row = tile // across * (BLOCK // block_w) + lane // block_w
            column = tile % across * block_w + lane % block_w
        else:
            row, column = divmod(tile * BLOCK + lane, w)
        plane, image = row // h, row // h // d
        found.append((image, plane % d, row % h, column, int(image < n and column < w)))
    return found


# The cells of y are up to twice its voxels (COUNTED_FROM), so a tile's are counted up to 2^30 in 32 bits.
CASES = {
    "many images": (1, (1 << 24) - 1, (4, 4, 4)),
    "a large volume": (1, 1, (1023, 1021, 1027)),
    "long rows": (1, 1, (181, 181, LONGEST)),
    "many voxels": (2, 5, (1290, 1290, 1290)),
    "one long axis": (2, 1, (3, 1 << 16, 1 << 15)),
}


@pytest.mark.parametrize("block_w", [0, 16])
@pytest.mark.parametrize("label", CASES)
def test_the_last_tiles_are_where_they_should_be(label, block_w):
    width, n, size = CASES[label]
    across = -(-size[2] // block_w) if block_w else 0
    rows = n * size[0] * size[1]
    tiles = -(-rows // (BLOCK // block_w)) * across if block_w else -(-rows * size[2] // BLOCK)
    first = tiles - 3
    for by in (False, True) if width == 1 else (False,):
        out = torch.empty(4, 5, BLOCK, dtype=torch.int64, device=DEVICE)
        counted = torch.empty(4, dtype=torch.int64, device=DEVICE)
        places_kernel[(4,)](out, counted, first, n, *size, BLOCK_W=block_w, DIVIDERS=by, WIDE=width, BLOCK=BLOCK)
        assert counted.unique().tolist() == [tiles]
        for turn in range(4):  # one tile beyond the last, as the loops that look ahead have it
            assert [tuple(each) for each in out[turn].T.tolist()] == expected(first + turn, n, size, block_w), turn


def test_what_needs_64_bits():
    """0, offsets alone, numbers of voxels too: by elements, voxels and the length of an axis."""

    def of(*shape):
        return wide(torch.empty(shape, device="meta"))

    assert of(2, 32, 256, 256, 256) == 0 and of(2, 33, 256, 256, 256) == 1 and of(4, 32, 256, 256, 256) == 1
    assert math.prod((2, 32, 256, 256, 256)) == WIDE_FROM
    assert of(1, 1, 812, 812, 812) == 0 and of(1, 1, 813, 813, 813) == 2 and COUNTED_FROM < 813**3
    assert of(1, 1, 1, 1, LONGEST) == 0 and of(1, 1, 1, 1, LONGEST + 1) == 2
