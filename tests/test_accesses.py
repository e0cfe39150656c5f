"""Coalescing read off the compiler's layouts and the interpreter's addresses. No GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from tritonconv.kernels.registry import have_triton
from tritonconv.lab.inspection.accesses import Access, Layout, layouts_of, sectors
from tritonconv.lab.inspection.interpreted import named

Pair = namedtuple("Pair", ("first", "second"))
ROOT = Path(__file__).resolve().parent.parent
ROWS = Layout((1, 8), (4, 8), (1, 0))  # 8 neighbours of a row per lane, 8 lanes along the row
SINGLE = Layout((1, 1), (1, 32), (1, 0))
HALF = 2  # bytes


def grid(row_stride: int, column_stride: int, shape=(16, 64)) -> np.ndarray:
    """Addresses of 2-byte elements with these strides in elements, from a 32-byte boundary on."""
    rows, columns = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")
    return (4096 + HALF * (rows * row_stride + columns * column_stride)).astype(np.uint64)


def per_request(addresses, layout, mask=True) -> tuple[float, float, int]:
    fewest, touched, requests, lane_bytes = sectors(addresses, np.asarray(mask), HALF, layout)
    return touched / requests, fewest / touched, lane_bytes


def test_neighbours_of_a_lane_go_in_one_access():
    assert per_request(grid(64, 1), ROWS) == (16.0, 1.0, 16)  # 32 lanes of 16 bytes
    assert per_request(grid(64, 1), SINGLE) == (2.0, 1.0, 2)


def test_an_access_is_as_wide_as_alignment_and_masks_permit():
    assert per_request(grid(64, 1) + 4, ROWS)[2] == 4
    even = np.arange(64)[None, :] % 2 == 0
    assert per_request(grid(64, 1), ROWS, even)[2] == 2
    wide = np.arange(64)[None, :] < 32
    assert per_request(grid(64, 1), ROWS, wide) == (8.0, 1.0, 16)


def test_strides_cost_sectors():
    assert per_request(grid(64, 2), SINGLE) == (4.0, 0.5, 2)
    spread, share, _ = per_request(grid(1, 512), SINGLE)
    assert spread == 32 and share == pytest.approx(2 / 32)
    assert per_request(grid(1, 512), Layout((1, 1), (32, 1), (0, 1)), True)[0] == 1  # 16 lanes, along the other axis


def test_lanes_that_share_an_address_need_it_once():
    assert per_request(grid(0, 0), SINGLE) == (1.0, 1.0, 2)


def test_nothing_active_is_no_request():
    assert sectors(grid(64, 1), np.zeros((16, 64), bool), HALF, ROWS)[:3] == (0, 0, 0)


def test_the_layouts_of_a_kernel():
    rows = "sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]"
    ttgir = f"""#blocked = #ttg.blocked<{{{rows}}}>
#mma = #ttg.nvidia_mma<{{versionMajor = 3}}>
  %1 = ttg.async_copy_global_to_local %0, %2 mask %3 : tensor<64x64x!tt.ptr<f16>, #blocked> -> <64x64xf16>
  %4 = tt.load %0, %3 : tensor<64x64x!tt.ptr<f16>, #blocked>
  tt.store %5, %6 : tensor<64x64x!tt.ptr<f16>, #blocked>
  tt.store %5, %6 : tensor<64x64x!tt.ptr<f16>, #mma>
"""
    assert layouts_of(ttgir) == {
        ("load", (64, 64)): [(ROWS, True), (ROWS, False)],
        ("store", (64, 64)): [(ROWS, False)],
    }
    row = Access("v", "l", "ndhwc", "store", (64, 64), False, 16, 10, 320, 160)
    assert row.efficiency == 0.5


def test_a_named_tuple_keeps_its_names_and_their_values_are_taken_out():
    """Of Triton 3.6 too, whose function makes a plain tuple of it."""
    values = {"one": 1, "more": (2, 3)}
    kept = named(lambda value: values.get(value, value))
    inner = Pair("one", "more")
    assert kept(Pair(inner, "more")) == Pair(Pair(1, (2, 3)), (2, 3)) and kept(Pair(inner, 0)).first.second == (2, 3)


def run(*arguments: str) -> list[list[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tritonconv", "inspect", "--accesses", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.replace(" (async)", "_async").splitlines()]


@pytest.mark.skipif(not have_triton(), reason="needs Triton's compiler")
def test_the_kernels_load_and_store_whole_sectors():
    rows = run("forward_shuffle", "forward_phases", "--layers", "k2s2,k3s2", "--layout", "ndhwc,ncdhw", "--all")
    found = {(row[0], row[1], row[2], row[3].removesuffix("_async"), row[4]): row[5:] for row in rows if len(row) == 8}
    k2s2, k3s2 = "nnunet_resenc_160x192_up4", "psmnet_train_64_32"
    for layout in ("ndhwc", "ncdhw"):
        mine = [row for key, row in found.items() if key[:3] == ("forward_shuffle", k2s2, layout) and "x" in key[4]]
        assert len(mine) >= 5 and all(row == ["16", "16.0", "1.00"] for row in mine)  # those of the packing among them
    stored = {"ndhwc": set(), "ncdhw": set()}
    for key, row in found.items():
        if key[:2] == ("forward_phases", k3s2) and key[3] == "store":
            stored[key[2]].add(tuple(row))
    assert stored["ndhwc"] == {("16", "16.0", "1.00")}
    # One phase writes every other element of a row: half of each sector, and the lanes run along the row. Beside it, a
    # copy of x to channels-last.
    assert stored["ncdhw"] == {("2", "4.0", "0.50"), ("16", "16.0", "1.00")}
    assert rows[-1][1:4] == ["accesses", "of", "7"]
