"""The times of a CPU's first calls, and what they decide."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tritonconv.autotune import online
from tritonconv.autotune.online import FORWARD, GRADIENTS, FirstCalls
from tritonconv.problem import PASSES, Problem

OWN = tuple(f"{name}_torch_native" for name in PASSES)
FASTER = "forward_torch_phases", "backward_data_torch_phases", "backward_weight_torch_phases"
PROBLEM = Problem(2, 6, 4, (5, 6, 7), (3, 3, 3), (2, 2, 2), (1, 1, 1), (9, 11, 13), bias=True)


STAGE = Problem(1, 8, 4, (4, 4, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), (8, 8, 8))


def of_a_stage(problem: Problem, channels: int, seconds: tuple[float, ...], *others: str) -> FirstCalls:
    """A finished trial of stages with a skip of so many channels; each run of a contestant took its ``seconds``."""
    trial = FirstCalls(FORWARD, (OWN[:1], *((name,) for name in others)))
    assert trial.is_of(problem, channels)
    while not trial.closed:
        trial.record(index := trial.turn(), seconds[index])
    return trial


def closed(kind: str, own_s: float, other_s: float, other: tuple[str, ...] = FASTER) -> FirstCalls:
    """A finished trial of torch's own and another, each of whose runs took so long."""
    names = (OWN[:1], other[:1]) if kind == FORWARD else (OWN[1:], other[1:])
    trial = FirstCalls(kind, names)
    while not trial.closed:
        index = trial.turn()
        trial.record(index, *((own_s,) if index == 0 else [other_s / len(names[1])] * len(names[1])))
    return trial


@pytest.fixture
def own_trials(monkeypatch):
    """A dict of problems' trials by kind, which is all that the process knows; nothing of it is left behind."""
    found: dict[Problem, dict[str, FirstCalls]] = {}
    monkeypatch.delenv(online.VARIABLE, raising=False)
    monkeypatch.setattr(online, "_trials", {})
    monkeypatch.setattr(online, "_opened", lambda problem: found[problem])
    return found


def test_a_slow_contestant_leaves():
    trial = FirstCalls(FORWARD, ((OWN[0],), ("slow",), ("far slower",), ("faster",)))
    assert trial.turn() == 0
    for index, seconds in enumerate((0.10, 0.14, 0.30, 0.09)):
        trial.record(index, seconds)
    assert trial.running == [0, 1, 3]  # the third took a fifth of a second longer than torch's own
    for index, seconds in ((0, 0.10), (1, 0.14), (3, 0.09)):
        assert trial.turn() == index
        trial.record(index, seconds)
    assert trial.running == [0, 3]  # 0.14 is more than SLOW times 0.09
    while not trial.closed:
        trial.record(index := trial.turn(), (0.10, 0, 0, 0.09)[index])
    assert trial.fastest() == (("faster",), pytest.approx(0.10 / 0.09), pytest.approx(0.01))


def test_a_hiccup_in_one_run_does_not_end_a_contestant():
    trial = FirstCalls(FORWARD, ((OWN[0],), ("faster",)))
    for index, seconds in ((0, 0.10), (1, 0.08), (0, 0.10), (1, 0.20)):
        trial.record(index, seconds)
    assert trial.running == [0, 1]
    while not trial.closed:
        trial.record(index := trial.turn(), (0.10, 0.08)[index])
    assert trial.fastest().names == ("faster",)


def test_the_host_time_of_a_formulation_counts():
    for kind, names in ((FORWARD, OWN[:1]), (GRADIENTS, OWN[1:])):
        assert closed(kind, 100e-6, 80e-6).fastest().names == names  # 20 us are less than its own host time


@pytest.mark.parametrize(
    ("forward", "gradients", "ours"),
    [
        ((1.0e-3, 0.8e-3), (1.2e-3, 1.1e-3), True),  # the forward has paid the road through our autograd
        ((1.0e-3, 1.0e-3), (1.2e-3, 1.1e-3), False),
        ((1.0e-3, 0.9e-3), (1.2e-3, 1.1e-3), True),  # they save 100 us each, and pay it together
        ((1.0e-3, 0.95e-3), (1.2e-3, 1.1e-3), False),
        ((1.0e-3, 0.8e-3), (1.2e-3, 1.16e-3), False),  # less than the margin
        (None, (1.2e-3, 1.1e-3), False),
        (None, (1.2e-3, 1.0e-3), True),
    ],
)
def test_gradients_pay_what_the_forward_has_not_paid(own_trials, forward, gradients, ours):
    own_trials[PROBLEM] = {GRADIENTS: closed(GRADIENTS, *gradients)}
    if forward is not None:
        own_trials[PROBLEM][FORWARD] = closed(FORWARD, *forward)
    online.trials(PROBLEM)
    names = [online.decided(PROBLEM, name)[0] for name in PASSES[1:]]
    assert names == list((FASTER if ours else OWN)[1:])


@pytest.mark.parametrize(
    ("name", "seconds", "ours"),
    [
        ("forward_torch_shuffle", 0.99e-3, True),  # takes less memory
        ("forward_torch_shuffle", 1.01e-3, False),
        ("forward_torch_onednn", 0.99e-3, False),  # makes a whole y beside the result
        ("forward_torch_onednn", 0.94e-3, True),  # the times of stages hold the host time
    ],
)
def test_of_a_stage_less_memory_needs_no_margin(name, seconds, ours):
    trial = of_a_stage(STAGE, 8, (1.0e-3, seconds), name)
    assert trial.fastest().names == ((name,) if ours else OWN[:1])


@pytest.mark.parametrize(
    ("layout", "n", "channels", "spared"),
    [("ncdhw", 1, 8, True), ("ncdhw", 1, 3, False), ("ncdhw", 2, 8, False), ("ndhwc", 1, 8, False)],
)
def test_of_a_stage_whose_skip_has_no_room_the_margin_holds(layout, n, channels, spared):
    trial = of_a_stage(replace(STAGE, n=n, layout=layout), channels, (1.0e-3, 0.99e-3), "forward_torch_shuffle")
    assert trial.spare == ({"forward_torch_shuffle"} if spared else set())
    assert trial.fastest().names == (("forward_torch_shuffle",) if spared else OWN[:1])


def test_a_stages_lower_peak_is_worth_a_little_of_a_training_step(own_trials):
    """A forward that saves less than the road through our autograd leaves torch's own gradients to torch."""
    trial = {
        "forward_torch_shuffle": (
            of_a_stage(STAGE, 8, (1.0e-3, 0.9e-3), "forward_torch_shuffle"),
            online.MEMORY_SHARE * 1e-3,
        ),
        "forward_torch_onednn": (of_a_stage(STAGE, 8, (1.0e-3, 0.9e-3), "forward_torch_onednn"), 0.0),
        "faster": (closed(FORWARD, 1.0e-3, 0.9e-3, ("faster",)), 0.0),  # of plain calls
    }
    for name, (each, more) in trial.items():
        online.forget()
        own_trials[STAGE] = {FORWARD: each}
        online.trials(STAGE)
        assert online.decided(STAGE, "forward")[::2] == (name, pytest.approx(100e-6 + more))


def test_a_trial_has_the_times_of_plain_calls_alone_or_of_stages_alone():
    trial = FirstCalls(FORWARD, (OWN[:1], ("forward_torch_shuffle",)))
    for first, other in ((None, 8), (8, None)):
        assert trial.is_of(STAGE, first) and trial.of_stages == (first is not None)
        trial.record(0, 1.0)
        assert not any(trial.is_of(STAGE, other) for _ in range(online.MOST_ROUNDS)) and trial.is_of(STAGE, first)
        assert not any(trial.is_of(STAGE, other) for _ in range(online.MOST_ROUNDS)) and trial.seconds[0]
        assert trial.is_of(STAGE, other) and not trial.seconds[0], "those of its kind have ended"


def test_of_a_stage_one_that_lacks_the_margin_hides_none_with_less_memory():
    shuffle, onednn = "forward_torch_shuffle", "forward_torch_onednn"
    assert of_a_stage(STAGE, 8, (1.0e-3, 0.985e-3, 0.98e-3), shuffle, onednn).fastest().names == (shuffle,)
