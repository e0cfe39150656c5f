"""Models that no CUDA graph can be made of, and calls that a captured model refuses: each error says why."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from captured_block import beside_stand_in  # noqa: F401
from torch import nn

import tritonconv
from tritonconv import ArgumentError, ArgumentTypeError
from tritonconv.graphed import CapturedForward

X = torch.randn(1, 2, 2, 2, 2)

# ------------------------------------------------------------------ without a GPU


@pytest.mark.parametrize(
    ("model", "sample", "error", "words"),
    [
        (lambda x: x, (X,), ArgumentTypeError, "model expects a torch.nn.Module, got function"),
        (nn.ReLU(), (), ArgumentError, "sample expects the tensors of a call, got none"),
        (nn.ReLU(), (X, 3), ArgumentTypeError, r"sample\[1\] expects a tensor, got 3 \(int\)"),
        (nn.ReLU(), (X.to_sparse(),), ArgumentTypeError, r"sample\[0\] has layout torch.sparse_coo"),
        (nn.ReLU(), (X,), ArgumentError, r"sample\[0\] is on cpu, but a CUDA graph needs all of it on a GPU"),
        (nn.Sequential(nn.LazyLinear(2)), (X.to("meta"),), ArgumentError, r"sample\[0\] is on meta"),
        (nn.DataParallel(nn.ReLU()), (X,), ArgumentError, "model is a DataParallel; capture the module inside it"),
    ],
)
def test_what_cannot_be_captured_is_named(model, sample, error, words):
    with pytest.raises(error, match=f"^graphed: {words}"):
        tritonconv.graphed(model, *sample)


def test_a_model_with_hooks_of_its_own_is_refused():
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                     "register_full_backward_pre_hook"):  # fmt: skip
        model = nn.ReLU()
        hook = getattr(model, register)(lambda *given: None)
        with pytest.raises(ArgumentError, match="model has hooks of its own"):
            tritonconv.graphed(model, X)
        hook.remove()
        with pytest.raises(ArgumentError, match="on cpu"):
            tritonconv.graphed(model, X)


def test_a_compiled_model_is_refused_wherever_it_is():
    inside = nn.Sequential(nn.ReLU())
    inside[0].compile(backend="eager")
    for model, name in ((torch.compile(nn.ReLU(), backend="eager"), "model"), (inside, "model.0")):
        with pytest.raises(ArgumentError, match=f"{name} is under torch.compile, whose mode='reduce-overhead'"):
            tritonconv.graphed(model, X)


def test_a_copy_of_a_captured_model_is_eager_and_its_own():
    """torch's replay would run the graphs of the first model, on the first model's parameters."""
    model = nn.Linear(2, 2)
    model.forward = lambda x: x * 0
    model.forward = CapturedForward(model, (X,), True, ())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.weight.fill_(2)
        assert torch.equal(other(X), nn.functional.linear(X, other.weight, other.bias))
    assert torch.equal(model(X), X * 0)


# ------------------------------------------------------------------ beside the stand-in for a GPU


def test_a_call_that_the_capture_does_not_serve_is_an_error(beside):
    """Of most of these torch's own replay says nothing, and answers something else."""
    out = beside(
        """
        theirs, mine = blocks()
        x, skip = data()
        tritonconv.graphed(mine, x, skip)
        one = torch.ones(()).cuda()
        for call in (
            lambda: mine(x[:, :, :1], skip),
            lambda: mine(x, one),  # torch: broadcasts
            lambda: mine(x.double(), skip),  # torch: casts
            lambda: mine(x.cpu(), skip),
            lambda: mine(x.to(memory_format=torch.channels_last_3d), skip),
            lambda: mine(x, skip.clone().requires_grad_()),  # torch: no gradient
            lambda: mine(x),
            lambda: mine(x, skip, x),
            lambda: mine(x, skip=skip),
            lambda: mine(x, 3),
        ):
            said(call)
        with torch.autocast("cuda", torch.bfloat16):
            said(lambda: mine(x, skip))
        mine.up.weight.requires_grad_(False)
        said(lambda: mine(x, skip))
        mine.up.weight.requires_grad_()
        mine.norm.eval()
        said(lambda: mine(x, skip))
        mine.norm.train()
        kept, mine.norm.running_mean = mine.norm.running_mean, torch.zeros(9).cuda()
        said(lambda: mine(x, skip))
        mine.norm.running_mean = kept
        strided = torch.cat([x, x], 2)[:, :, ::2], skip.transpose(3, 4).contiguous().transpose(3, 4)
        assert torch.equal(mine(*strided), theirs(*strided))
        said(lambda: tritonconv.graphed(mine, x, skip))
        """
    )
    lines = out.splitlines()
    had = "but the capture had (1, 4, 2, 3, 2) torch.float32 on cuda:0, ncdhw"
    skip = "but the capture had (1, 3, 4, 6, 4) torch.float32 on cuda:0, ncdhw"
    wanted = [
        f"argument 0 is (1, 4, 1, 3, 2) torch.float32 on cuda:0, ncdhw, {had}",
        f"argument 1 is () torch.float32 on cuda:0, torch.strided, {skip}",
        f"argument 0 is (1, 4, 2, 3, 2) torch.float64 on cuda:0, ncdhw, {had}",
        f"argument 0 is (1, 4, 2, 3, 2) torch.float32 on cpu, ncdhw, {had}",
        f"argument 0 is (1, 4, 2, 3, 2) torch.float32 on cuda:0, ndhwc, {had}",
        "argument 1 requires a gradient, and sample[1] of the capture did not",
        "was captured with 2 tensors, got 1",
        "was captured with 2 tensors, got 3",
        "takes tensors by position, got skip by name",
        "argument 1 expects a tensor, got int",
        "autocast is torch.bfloat16, and was off in the capture",
        "changed since the capture, in up: its mode, or a parameter or a buffer of it was replaced",
        "changed since the capture, in norm: its mode",
        "changed since the capture, in norm: its mode",
    ]
    assert len(lines) == len(wanted) + 1
    for line, words in zip(lines, wanted, strict=False):
        kind, _, text = line.partition(" ")
        assert kind in ("ArgumentError", "ArgumentTypeError") and text.startswith(f"graphed model: {words}"), line
    assert "graphed: model is captured already; `del model.forward` makes it eager again" in lines[-1]


def test_a_backward_that_is_too_late_or_runs_again_is_an_error(beside):
    """The activations of the second call have overwritten those of the first, the backward's own those of its call."""
    out = beside(
        """
        _, mine = blocks()
        x, skip = data()
        tritonconv.graphed(mine, x, skip)
        first = mine(x, skip)
        with torch.no_grad():
            mine(x, skip)
        said(first.sum().backward)
        second = mine(x, skip)
        second.sum().backward()
        said(second.sum().backward)
        y = mine(x, skip)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        said(grad.sum().backward)
        """
    )
    late, again, double = out.splitlines()
    assert late == again and late.startswith("RuntimeError graphed model: a backward runs once, before the next call")
    assert "once_differentiable" in double


def test_a_model_that_waits_for_the_gpu_says_so_and_stays_eager(beside):
    out = beside(
        """
        from types import SimpleNamespace

        class Looks(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("calls", torch.zeros(1))

            def forward(self, x):
                self.calls += 1
                return x * 2 if x.sum().item() > 0 else x

        class Lists(nn.Module):
            def forward(self, x):
                return [x, {"size": 3}]

        class Pair(nn.Module):
            def forward(self, x):
                return [x * 2, {"three": x * 3}]

        x = torch.ones(3).cuda()
        model = Looks().cuda()
        said(lambda: tritonconv.graphed(model, x))
        assert "forward" not in vars(model) and model.calls == 0
        assert torch.equal(model(x), x * 2)
        said(lambda: tritonconv.graphed(Lists(), x))
        said(lambda: tritonconv.graphed(nn.Linear(3, 2), x))
        pair = tritonconv.graphed(Pair(), x)
        twice, named = pair(x + 1)
        assert torch.equal(twice, x * 4) and torch.equal(named["three"], x * 6)
        # torch's stream of captures belongs to the GPU of the first one
        torch.cuda.graph.default_capture_stream = SimpleNamespace(device=torch.device("cuda", 7))
        tritonconv.graphed(Pair(), x)
        assert torch.cuda.graph.default_capture_stream is None
        """
    )
    waits, lists, cpu = out.splitlines()
    assert waits.startswith("ArgumentError graphed: model cannot be captured (CUDA error: operation not permitted")
    assert lists == "ArgumentTypeError graphed: model returns 3 (int) among its outputs"
    assert cpu == "ArgumentError graphed: model.weight is on cpu, but a CUDA graph needs all of it on a GPU"
