"""Interleaving, spreads and speed-ups with a clock that the tests move; the roofs and what they allow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritonconv.errors import ArgumentError
from tritonconv.lab.bench import environment, roofs
from tritonconv.lab.bench.clock import cpu_stopwatch
from tritonconv.lab.bench.timing import Spread, Times, interleave, quantile, warm_up

CPU = torch.device("cpu")


class Machine:
    """Runs calls that take as many seconds as they return, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def call(self, name: str, *seconds: float):
        pending = list(seconds)

        def run() -> float:
            self.log.append(name)
            return pending.pop(0) if len(pending) > 1 else pending[0]

        return run

    def stopwatch(self, call) -> float:
        seconds = call()
        self.now += seconds
        return seconds * 1e3

    def clock(self) -> float:
        return self.now


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_quantile_is_numpys(values, share):
    assert quantile(values, share) == pytest.approx(np.quantile(values, share))


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
def test_quantile_refuses(values, share):
    with pytest.raises(ArgumentError, match="quantile"):
        quantile(values, share)


def test_rounds_run_every_candidate_turn_around_and_rotate():
    machine = Machine()
    calls = {name: machine.call(name, 0.1) for name in "abc"}
    interleave(calls, machine.stopwatch, 1.85, clock=machine.clock)
    assert "".join(machine.log) == "abccbabcaacbcabbac"
    machine.log.clear()
    times = interleave(calls, machine.stopwatch, 0.0, clock=machine.clock)
    assert "".join(machine.log) == "abccbabca"
    assert times.spread("b") == Spread(pytest.approx(100), pytest.approx(100), pytest.approx(100), 3)


def test_no_round_is_started_that_would_end_after_the_budget():
    machine = Machine()
    interleave({"a": machine.call("a", 0.3)}, machine.stopwatch, 2.0, clock=machine.clock)
    assert machine.now == pytest.approx(1.8)


def test_the_fewest_rounds_run_whatever_they_take_and_the_most_are_a_limit():
    machine = Machine()
    interleave({"a": machine.call("a", 5.0)}, machine.stopwatch, 1.0, few_rounds=4, clock=machine.clock)
    assert len(machine.log) == 4
    interleave({"c": machine.call("c", 0.3)}, machine.stopwatch, 1.0, min_rounds=5, clock=machine.clock)
    assert machine.log.count("c") == 5, "five rounds end within twice the budget"
    interleave({"d": machine.call("d", 0.5)}, machine.stopwatch, 1.0, min_rounds=5, clock=machine.clock)
    assert machine.log.count("d") == 4, "a fifth round would end after twice the budget"
    interleave({"b": machine.call("b", 0.0)}, machine.stopwatch, 1.0, max_rounds=7, clock=machine.clock)
    assert machine.log.count("b") == 7


def test_the_warm_up_ends_when_every_candidate_is_steady_or_its_time_is_over():
    machine = Machine()
    calls = {"a": machine.call("a", 1.0, 0.5, 0.4, 0.39), "b": machine.call("b", 0.2)}
    assert warm_up(calls, machine.stopwatch, 100.0, clock=machine.clock) == 4
    assert "".join(machine.log) == "abababab"
    falling = machine.call("c", *(0.5**power for power in range(50)))
    assert warm_up({"c": falling}, machine.stopwatch, 100.0, clock=machine.clock) == 10
    falling = machine.call("c", *(0.5**power for power in range(50)))
    assert warm_up({"c": falling}, machine.stopwatch, 1.6, clock=machine.clock) == 3


def test_interleave_refuses_nothing_to_run():
    with pytest.raises(ArgumentError, match="0 candidates"):
        interleave({}, cpu_stopwatch, 1.0)
    with pytest.raises(ArgumentError, match="min_rounds=9"):
        interleave({"a": lambda: None}, cpu_stopwatch, 1.0, min_rounds=9, max_rounds=8)


def test_a_speedup_pairs_the_calls_of_a_round():
    """A machine that slows down tenfold halfway changes no ratio, though it changes every median."""
    times = Times({"torch": [4, 4, 4, 40, 40, 40, 40], "ours": [2, 2, 2, 20, 20, 20, 20]})
    assert times.speedup("ours", "torch")[:3] == (2, 2, 2)
    uneven = Times({"torch": [10.0, 20.0, 30.0, 40.0, 50.0], "ours": [10.0] * 5})
    assert uneven.speedup("ours", "torch")[:3] == (3, pytest.approx(1.8), pytest.approx(4.2))


def test_an_eager_calls_time_is_the_mean_of_the_devices_and_of_the_longer_of_the_devices_and_the_hosts():
    hosts = iter([5.0, 1.0, 1.0, 5.0])
    calls = {"a": lambda: 2.0, "b": lambda: 3.0}
    times = interleave(calls, lambda call: call(), 9.0, few_rounds=2, min_rounds=2, max_rounds=2, host=hosts.__next__)
    assert times.rounds == {"a": [2.0, 2.0], "b": [3.0, 3.0]}
    assert times.hosts == {"a": [5.0, 5.0], "b": [1.0, 1.0]}  # the second round goes the other way round
    assert times.eager().rounds == {"a": [3.5, 3.5], "b": [3.0, 3.0]}
    assert times.speedup("a", "b").median == 1.5 and times.eager().speedup("b", "a").median == pytest.approx(3.5 / 3)
    alone = Times({"a": [2.0]})
    assert alone.host_ms("a") is None and alone.eager().rounds == {"a": [2.0]} and times.host_ms("b") == 1.0


def test_the_cpu_stopwatch_counts_milliseconds():
    assert 0 <= cpu_stopwatch(lambda: None) < 50
    assert cpu_stopwatch(lambda: torch.ones(1000, 1000).cumsum(0)) > 0


@pytest.fixture
def small_roofs(monkeypatch):
    monkeypatch.setattr(roofs, "MEMORY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(roofs, "CACHE_BYTES", 1 << 16)
    monkeypatch.setattr(roofs, "LARGE_MATRIX", {"cpu": 128})


def test_roofs_are_rates_of_known_work(small_roofs):
    rows = list(roofs.measure(CPU, [torch.float32, torch.float64], seconds=0.0))
    assert [row["name"] for row in rows] == ["copy_cache", "copy_memory", "launch", "matmul", "matmul"]
    assert [row["dtype"] for row in rows] == [None, None, None, "float32", "float64"]
    assert [row["unit"] for row in rows] == ["byte/s", "byte/s", "us", "FLOP/s", "FLOP/s"]
    launch = rows.pop(2)
    assert 0 < launch["value"] <= launch["median"] < 1e3
    assert all(row["value"] >= row["median"] > 0 for row in rows)
    assert rows[1]["working_set_bytes"] == 1 << 20


@pytest.mark.skipif(environment.OtherPrograms().since_last() is None, reason="no comparable counts of busy ticks here")
def test_our_own_work_is_not_another_programs(monkeypatch):
    looks = iter([(0.0, 10.0, 3.0), (2.0, 13.0, 5.0), (2.0, 13.0, 5.0)])
    monkeypatch.setattr(environment.OtherPrograms, "_look", lambda self: next(looks))
    others = environment.OtherPrograms()
    assert others.since_last() == 0.5  # 3 busy seconds, 2 of them ours, in 2 s
    assert others.since_last() is None  # no time has passed


def test_git_state_outside_a_repository_is_unknown(tmp_path):
    assert environment.git_state(tmp_path) == (None, None)


ROOFS = [
    {"name": "copy_cache", "dtype": None, "value": 100.0, "working_set_bytes": 1000},
    {"name": "copy_memory", "dtype": None, "value": 10.0, "working_set_bytes": 100_000},
    {"name": "copy_memory", "dtype": None, "value": 12.0, "working_set_bytes": 100_000},
    {"name": "matmul", "dtype": "float32", "value": 500.0},
]


@pytest.mark.parametrize(
    ("flops", "moved", "working_set", "expected"),
    [
        (30, 10, 900, 300),  # memory-bound in cache: 3 FLOP/byte x 100
        (30, 10, 90_000, 36),  # memory-bound in memory, the better of the two measurements
        (1000, 10, 900, 500),  # compute-bound
        (30, 10, 9_000, 300),  # nearer to the cache's working set by ratio
        (30, 10, 11_000, 36),
    ],
)
def test_attainable_is_the_lower_roof_of_the_right_working_set(flops, moved, working_set, expected):
    assert roofs.attainable(ROOFS, "float32", flops, moved, working_set) == pytest.approx(expected)


def test_attainable_is_unknown_without_the_roofs():
    assert roofs.attainable(ROOFS, "float16", 1, 1, 1) is None
    assert roofs.attainable(ROOFS[3:], "float32", 1, 1, 1) is None
