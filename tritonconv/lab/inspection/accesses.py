"""How well the loads and stores of a kernel are coalesced: 32-byte sectors per request of a warp, with no GPU.

The compiler says which lane of a warp holds which elements of a tile (the layouts in its TTGIR, for the target);
Triton's interpreter says at which addresses those elements are (``interpreted.py``). A request is
one instruction of one warp, of at most 16 bytes per lane. Fewest sectors: those that the bytes of its active lanes
would fill. The same ratio is "sectors per request" in NVIDIA's Nsight Compute.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

HEAD = ("variant", "layer", "layout", "access", "tile", "bytes/lane", "sectors/request", "efficiency")
SECTOR = 32  # bytes
MOST_LANE_BYTES = 16  # of one access of one lane
FEWEST = 64  # elements of a tile worth looking at
SAMPLE = 24  # patches of a tile, one warp's each

_OPERATION = re.compile(
    r"(tt\.store|tt\.load|ttg\.async_copy_global_to_local)\b.*?tensor<([\dx]+)x!tt\.ptr<\w+>, (#\w+)>"
)
_LAYOUT = re.compile(r"^(#\w+) = #ttg\.blocked<\{(.*)\}>", re.M)


@dataclass(frozen=True)
class Layout:
    """A blocked layout: elements of a thread, threads of a warp along each axis; ``order`` names the fastest first."""

    size_per_thread: tuple[int, ...]
    threads_per_warp: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, text: str) -> Layout:
        """From the text between the braces of ``#ttg.blocked<{...}>``."""

        def numbers(name: str) -> tuple[int, ...]:
            match = re.search(rf"{name} = \[([\d, ]+)\]", text)
            assert match is not None, text
            return tuple(int(each) for each in match[1].split(","))

        return cls(numbers("sizePerThread"), numbers("threadsPerWarp"), numbers("order"))


Layouts = dict[tuple[str, tuple[int, ...]], list[tuple[Layout, bool]]]  # by kind and tile; whether asynchronous


@dataclass(frozen=True)
class Access:
    """The loads or the stores of one tile of a launch; ``sectors`` and ``fewest`` are sums over ``requests``."""

    variant: str
    layer: str
    layout: str
    kind: str  # load or store
    tile: tuple[int, ...]
    asynchronous: bool
    lane_bytes: int
    requests: int
    sectors: int
    fewest: int

    @property
    def efficiency(self) -> float:
        return self.fewest / self.sectors

    def cells(self) -> list[str]:
        """Its row under HEAD."""
        kind = f"{self.kind}{' (async)' if self.asynchronous else ''}"
        figures = (str(self.lane_bytes), f"{self.sectors / self.requests:.1f}", f"{self.efficiency:.2f}")
        return [self.variant, self.layer, self.layout, kind, "x".join(map(str, self.tile)), *figures]


def layouts_of(ttgir: str) -> Layouts:
    """By (kind, tile): the distinct layouts of its accesses, and whether they are asynchronous copies."""
    texts = dict(_LAYOUT.findall(ttgir))
    layouts: Layouts = {}
    for operation, tile, name in _OPERATION.findall(ttgir):
        if name in texts:
            kind = "store" if operation == "tt.store" else "load"
            each = Layout.of(texts[name]), operation.startswith("ttg.async")
            same = layouts.setdefault((kind, tuple(int(size) for size in tile.split("x"))), [])
            if each not in same:
                same.append(each)
    return layouts


def sectors(addresses: np.ndarray, mask: np.ndarray, itemsize: int, layout: Layout) -> tuple[int, int, int, int]:
    """(fewest, touched, requests, bytes per lane) of a tile's addresses, in bytes, under a layout.

    A sample of the tile's patches, of one warp each, is counted.
    """
    rank, inner = addresses.ndim, layout.order[0]
    mask = np.broadcast_to(mask, addresses.shape)
    sizes = [min(each, size) for each, size in zip(layout.size_per_thread, addresses.shape, strict=True)]
    patch = [
        min(each * threads, size)
        for each, threads, size in zip(sizes, layout.threads_per_warp, addresses.shape, strict=True)
    ]
    places = list(np.ndindex(*(max(1, size // part) for size, part in zip(addresses.shape, patch, strict=True))))
    fewest = touched = requests = widest = 0
    for place in places[:: max(1, len(places) // SAMPLE)]:
        window = tuple(slice(p * part, (p + 1) * part) for p, part in zip(place, patch, strict=True))
        split = [count for part, size in zip(patch, sizes, strict=True) for count in (part // size, size)]
        lanes_first = [2 * axis for axis in range(rank)]
        registers = [2 * axis + 1 for axis in range(rank) if axis != inner] + [2 * inner + 1]
        shape = (math.prod(split[0::2]), -1, sizes[inner])
        at = addresses[window].astype(np.int64).reshape(split).transpose(lanes_first + registers).reshape(shape)
        active = mask[window].reshape(split).transpose(lanes_first + registers).reshape(shape)
        width = _width(at, active, itemsize)
        widest = max(widest, width)
        for register in range(at.shape[1]):
            for first in range(0, at.shape[2], width):
                wanted = active[:, register, first : first + width]
                if wanted.any():
                    bytes_at = at[:, register, first : first + width][wanted]
                    touched += np.unique(bytes_at // SECTOR).size
                    fewest += math.ceil(np.unique(bytes_at).size * itemsize / SECTOR)
                    requests += 1
    return fewest, touched, requests, widest * itemsize


def _width(at: np.ndarray, active: np.ndarray, itemsize: int) -> int:
    """How many neighbours of one lane go in one access: they are contiguous, aligned, and masked together."""
    width = min(at.shape[2], MOST_LANE_BYTES // itemsize)
    while width > 1:
        whole = at.reshape(*at.shape[:2], -1, width)
        together = active.reshape(whole.shape)
        steps = (np.diff(whole, axis=3) == itemsize) | ~together[..., 1:]
        aligned = (whole[..., 0] % (width * itemsize) == 0) | ~together[..., 0]
        if steps.all() and aligned.all() and (together == together[..., :1]).all():
            return width
        width //= 2
    return 1
