"""The clocks of a device, in milliseconds per call: one for each of :mod:`tritonconv.lab.bench.columns`."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from tritonconv.lab.bench.columns import GPU, WALL
from tritonconv.lab.bench.timing import Call, Spread

# Times of another number are not to be held against these: 1 had the host in them.
CLOCK = "2"
# More than any L2 cache of the GPUs of 2025 (an H200 has 50 MiB), written before each GPU call.
FLUSH_BYTES = 256 << 20

# Seconds for which a sleep kernel holds the GPU back, as a multiple of the host's time for the last calls.
HOLD, LEAST_HOLD_S, MOST_HOLD_S = 1.5, 50e-6, 10e-3
LEAD_S = 20e-6  # of a sleep before the one whose time is taken
# Every METER_EVERY-th sample is held back long enough to measure the frequency: the start and the end of a sleep kernel
# take some microseconds.
METER_EVERY, METER_S = 8, 400e-6
DECAY = 0.8  # of the hold from sample to sample: a slow call is followed by quick ones
TRIES = 3
CYCLES_PER_S = 1.7e9  # until the first sleep gives the frequency: about an H100's
# Wall time is that of so many calls, back to back, that the wait at their end is of no account.
WALL_BATCH_MS, MOST_WALL_CALLS = 2.0, 50


class GpuClock:
    """GPU time of one call in ms, with L2 overwritten before it and the host out of it.

    A sleep kernel holds the GPU back while the host enqueues the overwriting, the first event, the call and the second
    event; nothing waits in between. A sample whose first event was over before the call was enqueued has the host in
    it: it is taken again behind a longer sleep. ``late`` counts the samples that stayed so, as those of a call that
    itself waits for the GPU do. ``host_ms`` is the host's time for the last call, which it only enqueues. ``mhz`` holds
    the frequency of the multiprocessors before some of the samples: the cycles of a long sleep by its time.
    """

    def __init__(self, device: torch.device) -> None:
        self._l2 = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self._hold_s, self._cycles_per_s = LEAST_HOLD_S, CYCLES_PER_S
        self.samples = self.late = 0
        self.host_ms = 0.0
        self.mhz: list[float] = []

    def __call__(self, call: Call) -> float:
        for _ in range(TRIES):
            ms, host_s, in_time = self._sample(call)
            self.host_ms = host_s * 1e3
            if in_time:
                self._hold_s = max(LEAST_HOLD_S, HOLD * host_s, DECAY * self._hold_s)
                return ms
            if HOLD * host_s <= MOST_HOLD_S:  # else it compiled, or it waits
                self._hold_s = max(self._hold_s, HOLD * host_s)
        self.late += 1
        return ms

    def _sample(self, call: Call) -> tuple[float, float, bool]:
        """(ms, the host's seconds for the call, whether the host had enqueued it before the GPU began with it)."""
        asleep, awake, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(4))
        metered = self.samples % METER_EVERY == 0
        self.samples += 1
        cycles = int((max(self._hold_s, METER_S) if metered else self._hold_s) * self._cycles_per_s)
        torch.cuda._sleep(int(LEAD_S * self._cycles_per_s))  # else the launch of the sleep would count to its time
        asleep.record()
        torch.cuda._sleep(cycles)
        awake.record()
        self._l2.zero_()
        start.record()
        begin = time.perf_counter()
        call()
        host_s = time.perf_counter() - begin
        end.record()
        in_time = not start.query()
        end.synchronize()
        slept_ms = asleep.elapsed_time(awake)
        if metered and slept_ms > 0:
            self.mhz.append(cycles / slept_ms / 1e3)
            self._cycles_per_s = cycles / slept_ms * 1e3
        return start.elapsed_time(end), host_s, in_time

    def readings(self) -> dict[str, object]:
        """Fields of a row, from the samples since the last readings: ``sm_mhz`` (the median), ``sm_mhz_p20``, and
        ``late_samples``."""
        seen, late = self.mhz, self.late
        self.mhz, self.samples, self.late = [], 0, 0
        spread = Spread.of(seen) if seen else None
        clock = {"sm_mhz": round(spread.median), "sm_mhz_p20": round(spread.p20)} if spread else {}
        return {**clock, "late_samples": late}


class WallClock:
    """Wall time per eager call in ms: ``calls`` made back to back, from an idle device until it is idle again.

    The caches are as the call before left them; inputs are shared by the candidates.
    """

    def __init__(self, device: torch.device, calls: int = 1) -> None:
        self._wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
        self.calls = calls

    @classmethod
    def for_call(cls, device: torch.device, call: Call) -> WallClock:
        """The clock whose batches of this call take about WALL_BATCH_MS."""
        one = cls(device, 1)
        one(call)  # a capture empties the allocator's cache, which the first call after it has to fill again
        return cls(device, max(1, min(MOST_WALL_CALLS, int(WALL_BATCH_MS / max(one(call), 1e-3)))))

    def __call__(self, call: Call) -> float:
        self._wait()
        begin = time.perf_counter()
        for _ in range(self.calls):
            call()
        self._wait()
        return (time.perf_counter() - begin) / self.calls * 1e3


cpu_stopwatch = WallClock(torch.device("cpu"))


def gpu_clock(device: torch.device) -> GpuClock | None:
    """The clock of a GPU, None for a CPU."""
    return GpuClock(device) if device.type == "cuda" else None


def stopwatch_for(device: torch.device) -> Callable[[Call], float]:
    """The stopwatch of a device's first column: of GPU time on a GPU, of wall time on a CPU."""
    return gpu_clock(device) or cpu_stopwatch


def first_column(device: torch.device) -> str:
    return GPU if device.type == "cuda" else WALL


@contextlib.contextmanager
def garbage_waits() -> Iterator[None]:
    """Inside the block the garbage collector waits, for it would hit one of the candidates by chance."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def method(device: torch.device) -> str:
    """How times are taken on a device, in words for the results file."""
    if device.type == "cuda":
        return (
            "interleaved rounds, order rotated and reversed; gpu: events around an eager call that a sleep kernel "
            f"holds back until it is enqueued, {FLUSH_BYTES >> 20} MiB written before it to flush L2; graph: the same "
            "of the replay of its CUDA graph; wall: eager calls back to back, caches as the call before left them"
        )
    return "time.perf_counter around each call, caches as the previous call left them; interleaved"
