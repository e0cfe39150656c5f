"""All contestants of a whole model answer, and are timed, from one state, however many first calls each made."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from tritonconv.lab import cli
from tritonconv.lab.bench import results
from tritonconv.lab.models import factories, twins, whole_model
from tritonconv.lab.models.first_state import FirstState

MODULE = """
import collections, random
import torch
from torch import nn

class Base(nn.Module):  # its forward depends on how often it was called
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose3d(2, 2, 2, stride=2)
    def forward(self, x):
        return self.up(x) * self.factor(x)

class Codebook(Base):  # in place by .data, of a parameter without a gradient, as MONAI's quantizer has it
    def __init__(self):
        super().__init__()
        self.book = nn.Embedding(4, 1).requires_grad_(False)
    def factor(self, x):
        found = self.book.weight.data.sum()
        self.book.weight.data.mul_(0.5).add_(0.5 * x.mean() + 1)
        return found

class Rebound(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()), persistent=False)
    def factor(self, x):
        self.mean = 0.5 * self.mean + x.square().mean()
        return self.mean

class CounterBuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    def factor(self, x):
        self.calls += 1
        return self.calls

class Statistics(Base):  # read where they were just written
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm3d(2)
    def factor(self, x):
        self.norm(x)
        return self.norm.running_var.sum()

class Counter(Base):
    calls = 0
    def factor(self, x):
        self.calls += 1
        return self.calls

class Queue(Base):
    def __init__(self):
        super().__init__()
        self.seen, self.last = collections.deque([1.0], maxlen=20), torch.ones(2)
    def factor(self, x):
        self.seen.append(self.seen[-1] + 1)
        self.last = self.last + 1
        return sum(self.seen) * self.last.sum()

class OwnGenerator(Base):
    def __init__(self):
        super().__init__()
        self.draw = torch.Generator().manual_seed(3)
    def factor(self, x):
        return torch.rand((), generator=self.draw)

class FunctionalDropout(Base):
    def factor(self, x):
        return nn.functional.dropout(torch.ones(64), training=self.training).mean()

class PythonsDraws(Base):
    def factor(self, x):
        return random.random()
"""
KINDS = ("Codebook", "Rebound", "CounterBuffer", "Statistics", "Counter", "Queue", "OwnGenerator",
         "FunctionalDropout", "PythonsDraws")  # fmt: skip
SHAPE = (2, 2, 2, 2, 2)


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """The name of a module with models in the current folder; each contestant makes one first call more."""
    made = 0

    def first_calls(step):
        nonlocal made
        made += 1
        for _ in range(made):
            answers = step()
        return answers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(whole_model, "let_choose", first_calls)
    (tmp_path / "changing_models_of_a_test.py").write_text(MODULE)
    yield "changing_models_of_a_test"
    sys.modules.pop("changing_models_of_a_test", None)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_of_the_same_state_for_every_contestant(module, monkeypatch, kind):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(whole_model, "perf_counter", lambda: 0.0)  # the budget lasts
    shape = "x".join(map(str, SHAPE))
    code = cli.main(["bench", "--quiet", "--seconds", "1", "--output", "out", "--compile", "--model",
                     f"{module}:{kind}", "--input", shape])  # fmt: skip
    run = results.load(results.latest(results.Path("out")))
    assert code == 0, run.errors
    assert [row["variant"] for row in run.steps] == [
        "torch", "torch_again", "tritonconv", "torch_compile", "tritonconv_compile"]  # fmt: skip
    assert all(row["output_error"] < 1e-5 and row["gradient_error"] < 1e-5 for row in run.steps)


@pytest.mark.parametrize("kind", KINDS)
def test_times_are_taken_from_the_first_state(module, monkeypatch, kind):
    def timed(calls, watch, clock, seconds, **how):
        found = {}
        for name, call in calls.items():
            whole_model.seed_all(0)
            found[name] = call().outputs[0]
        seen.append(found)
        return rounds(calls, watch, clock, seconds, **how)

    seen: list[dict[str, torch.Tensor]] = []
    rounds = whole_model.rounds
    monkeypatch.setattr(whole_model, "rounds", timed)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    network = factories.network(f"{module}:{kind}", [SHAPE], "cpu")
    wanted = twins.Wanted(torch.device("cpu"), torch.float32, "ncdhw", 1.0, compiled=True)
    made = twins.twins(network, wanted)
    inputs = [each.double() for each in made.inputs]
    step, first = whole_model.steps.training_step(made.exact, made.exact, inputs, torch.float64), FirstState(made.exact)
    whole_model.seed_all(0)
    truth = step().outputs[0]
    first.put_back()
    with results.Writer(results.Path("out")) as writer:
        whole_model.measured(network, wanted, writer, made)
    assert [set(each) for each in seen] == [
        {"torch", "torch_again", "tritonconv"}, {"torch", "torch_compile", "tritonconv_compile"}]  # fmt: skip
    for each in seen:
        for name, found in each.items():
            torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6, msg=f"{kind} {name}")


def test_tensors_keep_their_places_and_a_dropout_stays_switched_off():
    model = torch.nn.Sequential(torch.nn.BatchNorm3d(2), torch.nn.Dropout())
    first, mean = FirstState(model), model[0].running_mean
    model[1].eval()
    model(torch.randn(SHAPE) + 1)
    assert mean.abs().sum() > 0
    first.put_back()
    assert model[0].running_mean is mean and mean.abs().sum() == 0 and model[0].num_batches_tracked == 0
    assert not model[1].training


def test_tensors_that_a_twin_has_too_are_kept_once():
    model = torch.nn.Linear(2, 2)
    twin = copy.deepcopy(model)
    twin.bias.data += 1
    first = FirstState(model)
    both = FirstState(twin, first)
    kept = [both._tensors["", key].data_ptr() == first._tensors["", key].data_ptr() for key in ("weight", "bias")]
    assert kept == [True, False]
    bias = twin.bias.detach().clone()
    twin.bias.data += 1
    both.put_back()
    assert torch.equal(twin.bias, bias)
