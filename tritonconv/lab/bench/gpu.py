"""For a GPU alone: cuDNN's switch, and the CUDA graph and the memory of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from tritonconv.lab.bench.timing import Call

WARM_CALLS = 3  # before a capture: autotuning and lazy allocations do not belong into it


@contextlib.contextmanager
def cudnn_benchmark(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Inside the block cuDNN chooses its algorithms by trying them: the baseline on a GPU is torch at its best.

    Where ``wanted`` is false, it takes the first that its rules name, which is enough where nothing is timed.
    """
    if device.type != "cuda":
        yield
        return
    global _blocks
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        torch.backends.cudnn.benchmark = before


_blocks = 0  # of cudnn_benchmark() that run now


def switch_is_ours() -> bool:
    """cuDNN's switch was set by :func:`cudnn_benchmark`, not by the user."""
    return _blocks > 0


def captured(call: Call, device: torch.device) -> Callable[[], None] | None:
    """The replay of a CUDA graph of one call, None where the call cannot be captured. Outputs stay in the graph."""
    try:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_CALLS):
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The outer block puts the stream back also where ending a failed capture raises before torch's own does.
        with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph):
            outputs = call()
    except RuntimeError:  # a synchronisation or a host-side branch inside the call
        torch.cuda.synchronize(device)
        return None

    def replay(outputs=outputs) -> None:  # keeps the outputs' memory alive
        graph.replay()

    return replay


def peak_bytes(call: Call, device: torch.device) -> int:
    """Memory that one call takes at most besides what is allocated before it; its outputs count."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
