"""The sum of a split reduction in its main launch: the last program to arrive at a tile adds up the tile's partials.

A program stores its float32 partial, then counts itself at the tile's counter. The one that finds all the others there
adds the partials in index order, its own from memory too, so who is last changes no bit, and sets the counter back to
zero for the next launch. It saves a launch, and one multiprocessor reads what a second launch spreads over all of them.

The release of a program's count follows a barrier of its threads, so it covers the stores of them all. The acquire of
the last one comes before its loads, and these pass by the L1 cache, which may hold what memory held earlier.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritonconv.kernels.triton_buffers import Buffer
from tritonconv.kernels.variant import Config
from tritonconv.private import raw_stream

ARRIVE = "ARRIVE"  # of a config, 0 where it is absent: 1 sums in the main launch
# Whether the tuner tries ARRIVE=1. It may once test_gpu_arrival.py has passed on a GPU.
TUNED = False
# Of partials that a last program reads at most in a config of the tuner's: a share of 1/132 of an H200's L2 rate
# (5.96 TB/s) moves them in 6 us, and a launch takes 7 us (both in autotune/tables/nvidia_h200.v2.json).
MOST_BYTES = 1 << 18
IN_FLIGHT = 4096  # values that a last program has in flight, where its tile is no larger
COUNTERS = 1 << 14  # of a stream's buffer
PER_THREAD = 2  # the handle of CUDA's per-thread default stream: one handle for many streams


@triton.jit
def last_to_arrive(arrivals_ptr, tile, splits):
    """Whether all other programs of the tile have stored their partials; counts this one, behind its own stores.

    ``arrivals``: int32, one for each tile, zeros before and after each launch.
    """
    tl.debug_barrier()
    last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(arrivals_ptr + tile, 0)
    return last


@triton.jit
def sum_in_order(partial_ptr, step, splits, offsets, mask, AHEAD: tl.constexpr):
    """The sums, float32, of the elements ``offsets`` of ``partial``, whose splits lie ``step`` apart."""
    acc, zeros = tl.zeros(offsets.shape, tl.float32), tl.zeros(offsets.shape, tl.int32)
    for first in range(0, splits, AHEAD):
        for more in tl.static_range(AHEAD):
            there = mask & (zeros + (first + more) < splits)  # interpreted, the comparison of a scalar masks nothing
            pointers = partial_ptr + (first + more) * step + offsets
            acc += tl.load(pointers, mask=there, other=0.0, cache_modifier=".cg")
    return acc


@triton.constexpr_function
def ahead(ELEMENTS):
    """AHEAD: the partials of a tile of so many elements that are loaded before the first is waited for."""
    return min(16, max(1, IN_FLIGHT // ELEMENTS))


def arrivals(count: int, beside: Buffer) -> Buffer:
    """``count`` counters of one launch, int32, on another buffer's device."""
    return Buffer(
        torch.empty(count, dtype=torch.int32, device="meta"), beside.device, lent=lambda device: counters(count, device)
    )


def counters(count: int, device: torch.device) -> torch.Tensor:
    """At least ``count`` zeros, int32, for one launch on the current stream, which leaves them at zero.

    The launches of a stream come one after another and share a buffer, which is zeroed once. A launch that is captured
    has its own, zeroed inside the graph: a replay may run beside anything else. So has one of more than COUNTERS tiles.
    ``device`` is the current one.
    """
    stream = 0 if device.index is None else raw_stream(device.index)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if count > COUNTERS or stream == PER_THREAD or capturing:
        return torch.zeros(count, dtype=torch.int32, device=device)
    if (device, stream) not in _buffers:
        _buffers[device, stream] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _buffers[device, stream]


_buffers: dict[tuple[torch.device, int], torch.Tensor] = {}


def arrives(config: Config) -> bool:
    """Whether a launch with the config sums in its main kernel: one of a single split has nothing to sum."""
    return bool(config.get(ARRIVE)) and config["SPLITS"] > 1


def with_arrivals(config: Config, tile_bytes: int) -> tuple[Config, ...]:
    """The config, and where the tuner tries it the one that sums in the main launch.

    ``tile_bytes``: of the partials of one tile and split, in bytes.
    """
    changed = {**config, ARRIVE: 1}
    short = arrives(changed) and config["SPLITS"] * tile_bytes <= MOST_BYTES
    return (config, changed) if TUNED and short else (config,)
