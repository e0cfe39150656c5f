"""graphed on a GPU: captured steps are bitwise the eager ones, of a layer and of a model, and two streams at once."""

from __future__ import annotations

import copy

import pytest
import torch
from repeated import twice
from test_gpu import TOGETHER, layers_of, step
from test_triton_layers import in_force
from torch import nn
from variant_cases import DEVICE

import tritonconv

pytestmark = [
    pytest.mark.gpu,
    # Beside the stand-in numpy warns: torch captures a backward with memory that nothing was written to.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

ROUNDS = 4
BUSY = 20_000_000  # cycles for which a stream is held back while the host enqueues the work of both


def captured(layer, x):
    return tritonconv.graphed(layer, torch.zeros_like(x, requires_grad=True))


@pytest.mark.parametrize("names", TOGETHER)
def test_a_captured_layer_is_bitwise_the_eager_one(names):
    """Also where nothing is forced any more: the graphs keep their kernels. A gradient that is accumulated is a sum."""
    seen = 0
    for layer, x, grad_y, problem in layers_of(names):
        with in_force(names, problem):
            want = twice(lambda each=(layer, x, grad_y): step(*each))
            captured(layer, x)
        found = twice(lambda each=(layer, x, grad_y): [one.clone() for one in step(*each)])
        assert all(map(torch.equal, found, want))
        for times in (1, 2, 3):
            layer(x).backward(grad_y)
            for leaf, one in zip((x, *layer.parameters()), want[1:], strict=True):
                total = sum([one] * (times - 1), one)  # rounded as the accumulation is
                assert torch.equal(leaf.grad, total)
        seen += 1
    assert seen


def test_a_captured_model_trains_bitwise_as_the_eager_one(monkeypatch):
    torch.manual_seed(0)
    theirs = nn.Sequential(
        nn.Conv3d(8, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.ConvTranspose3d(16, 16, 2, 2), nn.ReLU(),
        nn.Conv3d(16, 4, 1),
    )  # fmt: skip
    tritonconv.convert(theirs)
    mine = copy.deepcopy(theirs).to(DEVICE, torch.float16)
    theirs = theirs.to(DEVICE, torch.float16)
    x, grad_y = torch.randn(2, 8, 6, 6, 6), torch.randn(2, 4, 12, 12, 12)
    x, grad_y = (each.to(DEVICE, torch.float16, memory_format=torch.channels_last_3d) for each in (x, grad_y))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    tritonconv.graphed(mine, torch.zeros_like(x))  # which waits for the kernels, for the eager model too
    optimizers = [torch.optim.SGD(each.parameters(), 0.01, momentum=0.9) for each in (theirs, mine)]
    for number in range(4):
        answers = []
        for model, optimizer in zip((theirs, mine), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            y = model(x + number)
            y.backward(grad_y)
            optimizer.step()
            answers.append(y)
        assert torch.equal(*answers), number
        assert all(map(torch.equal, theirs.parameters(), mine.parameters())), number
        assert all(map(torch.equal, theirs.buffers(), mine.buffers())), number


def test_a_captured_model_answers_in_inference_mode():
    model = tritonconv.ConvTranspose3d(16, 16, 2, 2).to(DEVICE).eval()
    x = torch.randn(1, 16, 4, 4, 4, device=DEVICE)
    with torch.inference_mode(), tritonconv.use("forward_shuffle"):
        want = model(x)
        tritonconv.graphed(model, torch.zeros_like(x))
        assert torch.equal(model(x), want)
    with torch.no_grad():
        assert torch.equal(model(x.clone()), want)


def at_once(pair) -> list:
    """Rounds of the steps of two layers, each on a stream of its own that waits for nothing."""
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in pair]
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(BUSY)
    rounds: list[list] = [[] for _ in range(ROUNDS)]
    for found in rounds:
        for stream, (layer, x, grad_y, _) in zip(streams, pair, strict=True):
            with torch.cuda.stream(stream):
                found.append([each.clone() for each in step(layer, x, grad_y)])
    torch.cuda.synchronize()
    return rounds


@pytest.mark.parametrize("names", TOGETHER)
def test_two_streams_at_once(names):
    """Eager steps of two layers with one plan, then replays of both."""
    seen = 0
    for pair in zip(layers_of(names), layers_of(names), strict=True):
        with in_force(names, pair[0][3]):
            want = [twice(lambda each=each: step(*each[:3])) for each in pair]
            eager = at_once(pair)
            for layer, x, *_ in pair:
                captured(layer, x)
        for found in (*eager, *at_once(pair)):
            for mine, right in zip(found, want, strict=True):
                assert all(map(torch.equal, mine, right))
        seen += 1
    assert seen
