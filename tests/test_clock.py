"""The clocks of a GPU beside a simulated one, which has a queue: host and GPU each have a time of their own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tritonconv.lab.bench import clock, gpu
from tritonconv.lab.bench.clock import GpuClock, WallClock
from tritonconv.lab.bench.columns import GPU, GRAPH, WALL, columns_of, median, ratio, spread
from tritonconv.lab.bench.measure import measure

CUDA = torch.device("cuda")
HERTZ = 1.98e9
LAUNCH_S, FLUSH_S = 5e-6, 60e-6


class Simulated:
    """A GPU that works off a queue. ``host`` and ``free`` are the seconds until which the host and the GPU are busy."""

    def __init__(self) -> None:
        self.host = self.free = 0.0
        self.hertz = HERTZ

    def kernel(self, seconds: float, host: float = LAUNCH_S) -> None:
        self.host += host
        self.free = max(self.free, self.host) + seconds

    def synchronize(self, device=None) -> None:
        self.host = max(self.host, self.free)

    def sleep(self, cycles: int) -> None:
        self.kernel(cycles / self.hertz)

    def call(self, *kernels: float, host: float = LAUNCH_S):
        """A call that launches kernels of so many seconds, each after so many seconds of the host."""

        def run() -> None:
            for seconds in kernels:
                self.kernel(seconds, host)

        return run


class Event:
    def __init__(self, machine: Simulated) -> None:
        self.machine = machine

    def record(self) -> None:
        self.machine.host += 1e-6
        self.at = max(self.machine.free, self.machine.host)

    def query(self) -> bool:
        return self.at <= self.machine.host

    def synchronize(self) -> None:
        self.machine.host = max(self.machine.host, self.at)

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def machine(monkeypatch) -> Simulated:
    made = Simulated()
    cuda = SimpleNamespace(
        Event=lambda enable_timing: Event(made), _sleep=lambda cycles: made.sleep(cycles), synchronize=made.synchronize
    )
    buffer = SimpleNamespace(zero_=lambda: made.kernel(FLUSH_S))
    monkeypatch.setattr(clock, "torch", SimpleNamespace(cuda=cuda, int8=None, empty=lambda *args, **more: buffer))
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: made.host))
    return made


def test_the_gpus_time_is_that_of_the_kernels_however_slow_the_host_is(machine):
    """Also that nothing waits between the clearing of L2 and the first event: the host's gaps would be timed."""
    watch = GpuClock(CUDA)
    call = machine.call(10e-6, 20e-6, 30e-6, host=150e-6)
    assert watch(call) == pytest.approx(0.060)
    assert watch.readings()["late_samples"] == 0
    assert watch.host_ms == pytest.approx(0.450)
    assert watch(machine.call(2e-6)) == pytest.approx(0.002)
    assert watch.host_ms == pytest.approx(0.005)


def test_a_wait_between_clearing_and_start_is_noticed_and_would_be_timed(machine, monkeypatch):
    """The simulated machine shows what it is there for."""
    watch = GpuClock(CUDA)
    flush = watch._l2.zero_
    monkeypatch.setattr(watch._l2, "zero_", lambda: (flush(), machine.synchronize()))
    ms = watch(machine.call(10e-6, 20e-6, 30e-6, host=150e-6))
    assert ms > 0.3  # the host's gaps
    assert watch.readings()["late_samples"] == 1


def test_a_call_that_waits_for_the_gpu_is_told_as_late(machine):
    watch = GpuClock(CUDA)

    def waits() -> None:
        machine.kernel(10e-6)
        machine.synchronize()

    watch(waits)
    assert watch.readings()["late_samples"] == 1


def test_a_first_call_that_compiles_does_not_lengthen_the_sleep_for_good(machine):
    watch = GpuClock(CUDA)
    hosts = iter([2.0])
    assert watch(lambda: machine.kernel(10e-6, next(hosts, 20e-6))) == pytest.approx(0.010)
    begin = machine.host
    watch(machine.call(10e-6))
    assert machine.host - begin < 1e-3


@pytest.mark.parametrize("mhz", [1200, 1980])
def test_the_frequency_is_the_sleeps_cycles_by_its_time(machine, mhz):
    machine.hertz = mhz * 1e6
    watch = GpuClock(CUDA)
    for _ in range(20):
        watch(machine.call(5e-6))
    assert len(watch.mhz) == 3  # each takes a longer sleep
    assert watch.readings() == {"sm_mhz": mhz, "sm_mhz_p20": mhz, "late_samples": 0}
    assert watch.readings() == {"late_samples": 0}


def test_wall_time_has_the_host_in_it_and_the_wait_shared_by_the_calls(machine):
    call = machine.call(10e-6, host=100e-6)
    watch = WallClock.for_call(CUDA, call)
    assert 10 < watch.calls <= clock.MOST_WALL_CALLS
    assert watch(call) == pytest.approx(0.100, rel=0.02)
    assert watch(machine.call(500e-6, host=100e-6)) == pytest.approx(0.5, rel=0.02)
    assert WallClock.for_call(CUDA, machine.call(5e-3)).calls == 1


def test_what_the_first_eager_call_pays_for_is_no_part_of_the_wall_time(machine):
    """A capture empties the allocator's cache; the call after it takes 0.2 s, and is neither timed nor the measure."""
    hosts = iter([0.2])
    call = lambda: machine.kernel(10e-6, next(hosts, 100e-6))  # noqa: E731
    watch = WallClock.for_call(CUDA, call)
    assert watch.calls > 10 and watch(call) == pytest.approx(0.100, rel=0.02)


def test_the_columns_of_a_cell_are_each_of_their_own_clock(machine, monkeypatch):
    """Ours has half of torch's GPU time and twice its host time; a graph has one launch and no gaps."""
    calls = {"torch": machine.call(40e-6, host=50e-6), "ours": machine.call(20e-6, host=100e-6)}
    graphs = {calls["torch"]: machine.call(39e-6), calls["ours"]: machine.call(19e-6)}
    monkeypatch.setattr(gpu, "captured", lambda call, device: graphs.get(call))
    measured = measure(calls, "torch", CUDA, GpuClock(CUDA), 0.02)
    row = {"timing": measured.first, **measured.fields("ours", "torch")}
    assert columns_of([row]) == [GPU, GRAPH, WALL]
    assert [median(row, name) for name in (GPU, GRAPH, WALL)] == pytest.approx([0.020, 0.019, 0.100], rel=0.02)
    assert [ratio(row, name).median for name in (GPU, GRAPH, WALL)] == pytest.approx([2, 39 / 19, 0.5], rel=0.03)
    assert (
        spread(row, WALL).runs >= 3 and row["sm_mhz"] == 1980 and row["late_samples"] == row["graph_late_samples"] == 0
    )

    del graphs[calls["torch"]]  # what is left has nothing to be held against
    assert columns_of([measure(calls, "torch", CUDA, GpuClock(CUDA), 0.02).fields("ours", "torch")]) == [GPU, WALL]


def test_a_column_that_an_older_row_lacks_is_not_another_one():
    graph = {"timing": "graph", "median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1, "n_runs": 5, "wall_ms": 3.0,
             "speedup": 2.0, "speedup_p20": 1.9, "speedup_p80": 2.1}  # fmt: skip
    assert median(graph, GPU) is None and ratio(graph, GPU) is None and spread(graph, GPU) is None
    assert spread(graph, GRAPH) == (1.0, 0.9, 1.1, 5) and ratio(graph, GRAPH) == (2.0, 1.9, 2.1, 5)
    assert median(graph, WALL) == 3.0 and spread(graph, WALL) is None and ratio(graph, WALL) is None
    assert columns_of([{**graph, "timing": "events", "wall_ms": None}]) == []
