"""A model as a CUDA graph: what is refused, and, beside the stand-in for a GPU, that graphs do what eager calls do.

The stand-in captures and replays by torch's own ``make_graphed_callables``; test_gpu.py asks a GPU the same.
"""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import tritonconv
from tritonconv import ArgumentError, ArgumentTypeError
from tritonconv.graphed import CapturedForward

TESTS = Path(__file__).resolve().parent
X = torch.randn(1, 2, 2, 2, 2)

# Before each piece of code that has the stand-in: a block of a U-Net's decoder, in integers, for which sums are exact.
HEAD = """
import copy, torch, tritonconv
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose3d(4, 6, 2, 2)
        self.norm = nn.BatchNorm3d(9)
        self.unused = nn.Linear(2, 2)
        self.conv = nn.Conv3d(9, 4, 3, padding=1)

    def forward(self, x, skip):
        return torch.relu(self.conv(self.norm(torch.cat([self.up(x), skip], 1))))

KERNELS = "forward_phases", "backward_data_gemm", "backward_weight_splitk"

def data(requires_grad=True):
    x, skip = torch.randn(1, 4, 2, 3, 2).cuda(), torch.randn(1, 3, 4, 6, 4).cuda()
    return x.requires_grad_(requires_grad), skip

def blocks():
    torch.manual_seed(0)
    mine = Block()
    assert len(tritonconv.convert(mine).replaced) == 1
    return copy.deepcopy(mine).cuda(), mine.cuda()

def said(call):
    try:
        call()
    except (RuntimeError, TypeError) as error:
        print(type(error).__name__, error)
    else:
        print("no error")
"""


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """The standard output of a piece of code in a process that has the stand-in."""
    pytest.importorskip("triton")
    import stand_in_gpu

    if torch.cuda.is_available() or shutil.which(stand_in_gpu.COMPILER) is None:
        pytest.skip(f"needs {stand_in_gpu.COMPILER}, and no GPU: test_gpu.py asks that")
    folder = tmp_path_factory.mktemp("stand_in_gpu")
    library = str(stand_in_gpu.build(folder))
    own = {**os.environ, "STAND_IN_GPU": library, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}

    def run(code: str) -> str:
        whole = f"import stand_in_gpu\nstand_in_gpu.install()\n{HEAD}\n{textwrap.dedent(code)}"
        command = [sys.executable, "-c", whole]
        done = subprocess.run(command, env=own, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


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


# ------------------------------------------------------------------ beside the stand-in


def test_a_block_of_a_converted_unet_trains_as_eagerly(beside):
    """Outputs, gradients, accumulated ones too, buffers and trained weights; the sample is only a sample."""
    out = beside(
        """
        theirs, mine = blocks()
        sample = data()
        before = [each.clone() for each in (*sample, *mine.buffers())]
        with tritonconv.use(*KERNELS):
            model = tritonconv.graphed(mine, *sample)
        assert model is mine and all(each.grad is None for each in (sample[0], *mine.parameters()))
        first = mine.forward
        optimizers = [torch.optim.SGD(each.parameters(), 0.1, momentum=0.9) for each in (theirs, mine)]
        for step in range(6):
            if step < 4:  # gradients are accumulated, then made zero, then dropped
                for optimizer in optimizers:
                    optimizer.step()
                    if step > 1:
                        optimizer.zero_grad(set_to_none=step == 3)
            x, skip = data()
            ours = x.detach().clone().requires_grad_()
            grad_y = torch.randn(1, 4, 4, 6, 4).cuda()
            with tritonconv.use(*KERNELS):
                y = theirs(x, skip)
                y.backward(grad_y)
            z = mine(ours, skip)
            z.backward(grad_y)
            assert torch.equal(y, z) and torch.equal(x.grad, ours.grad)
            for (name, one), other in zip(theirs.named_parameters(), mine.parameters(), strict=True):
                assert torch.equal(one, other), name
                assert (one.grad is other.grad is None) == name.startswith("unused"), name
                assert one.grad is None or torch.equal(one.grad, other.grad), (step, name)
            assert all(map(torch.equal, theirs.buffers(), mine.buffers()))
        assert all(map(torch.equal, before[:2], sample))
        assert mine.forward is first
        assert not torch.equal(before[2], list(mine.buffers())[0])  # the norm saw six calls, not those of the capture
        assert list(mine.buffers())[2] == 6

        for each in (theirs, mine):  # the other mode is eager
            each.eval()
        x, skip = data()
        with tritonconv.use(*KERNELS):
            assert torch.equal(theirs(x[:, :, :1], skip[:, :, :2]), mine(x[:, :, :1], skip[:, :, :2]))
        mine.train()
        del mine.forward
        assert mine(x[:, :, :1], skip=skip[:, :, :2]).shape == (1, 4, 2, 6, 4)
        """
    )
    assert out == ""


def test_the_kernels_are_compiled_first(beside):
    """A capture keeps what runs then for good: the kernels, and not what stands in for them until they are compiled."""
    out = beside(
        """
        import threading, time
        from tritonconv.kernels import triton_background

        class Late(nn.Module):
            # Twice x by a kernel whose first calls ask for it and run something else; the second kernel after the first
            def __init__(self):
                super().__init__()
                self.asked, self.ready, self.runs = [], set(), []

            def compile_one(self, name):
                time.sleep(0.2)
                self.ready.add(name)

            def forward(self, x):
                for name in ("first", "second"):
                    if name not in self.ready:
                        if name not in self.asked:
                            self.asked.append(name)
                            triton_background.submit(lambda: self.compile_one(name))
                        self.runs.append(f"without the {name}")
                        return x * 3
                self.runs.append("compiled")
                return x * 2

        model = Late()
        x = torch.ones(3).cuda()
        model(x)  # asked for, and still compiling when the capture is
        tritonconv.graphed(model, x)
        assert threading.active_count() == 1
        print(*dict.fromkeys(model.runs), sep=", ")
        seen = len(model.runs)
        print(model(torch.full((3,), 5.0).cuda()).cpu().tolist(), len(model.runs) - seen)

        class Never(nn.Module):
            def forward(self, x):
                triton_background.submit(lambda: None)
                return x * 2

        said(lambda: tritonconv.graphed(Never(), x))
        """
    )
    assert out.splitlines() == [
        "without the first, without the second, compiled",
        "[10.0, 10.0, 10.0] 0",
        "ArgumentError graphed: model asks for new kernels in each of 8 runs of one sample",
    ]


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


def test_a_capture_without_gradients_and_one_under_autocast(beside):
    out = beside(
        """
        theirs, mine = blocks()
        x, skip = data(requires_grad=False)
        said(lambda: [torch.autocast("cuda", torch.float16).__enter__(), tritonconv.graphed(mine, x, skip)])
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)

        with torch.inference_mode():
            tritonconv.graphed(mine.eval(), x, skip)
            want = theirs.eval()(x, skip)
        with torch.no_grad():  # the stand-in's tensors cannot be detached in inference mode, as a replay's outputs are
            assert torch.equal(mine(x, skip), want)
        said(lambda: mine(x, skip))

        up = tritonconv.ConvTranspose3d(4, 6, 2, 2).cuda()
        with torch.autocast("cuda", torch.float16):
            want = up(x)
        with torch.autocast("cuda", torch.float16, cache_enabled=False):
            tritonconv.graphed(up, x)
        with torch.autocast("cuda", torch.float16):
            assert up(x).dtype is torch.float16 and torch.equal(up(x), want)
        said(lambda: up(x))

        class Frozen(nn.Linear):  # records nothing by itself
            @torch.no_grad()
            def forward(self, x):
                return super().forward(x)

        frozen = Frozen(2, 2).cuda()
        want = frozen(x)
        assert torch.equal(tritonconv.graphed(frozen, x)(x), want) and not frozen(x).requires_grad
        """
    )
    cached, recorded, autocast = out.splitlines()
    assert "capture inside torch.autocast('cuda', cache_enabled=False)" in cached
    assert recorded.startswith("ArgumentError graphed model: was captured under torch.no_grad()")
    assert autocast.endswith("autocast is off, and was torch.float16 in the capture")


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
