"""The host's time of a call, without a GPU: ``python tests/host_time.py`` measures it beside the stub driver.

The floor is an ``autograd.Function`` of the same operands that allocates its outputs alone. A row gives the time above
it in units of a bare ``Function.apply`` made behind such a call, which has pushed the code of others out of the CPU's
caches (on an Intel Xeon it takes 4.7 us in a loop of its own, and 9 us between steps): of a forward, of one that
autograd records, and of a training step. The time is the CPU's of this thread (on tensors of the CPU the backward runs
in it too), the least of many batches, so other programs disturb it little. Every launch ends in Triton's own launcher
in C.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import stub_driver
import torch

import tritonconv
from tritonconv import Problem, dispatch
from tritonconv.autotune.choose import Selection
from tritonconv.kernels.registry import variant
from tritonconv.problem import output_size

PER_CALL, PER_LAUNCH = 1.0, 0.5  # the most, in units of a bare Function.apply
BATCHES, CALLS = 25, 60
PASSES = ("forward", "recorded", "step")
CPU, GPU, DTYPE = torch.device("cpu"), torch.device("cuda", 0), torch.float16
# The variants, and (c_in, c_out, kernel, crop, groups, layout): one layer of each class.
CLASSES = {
    "k2 s2": ("forward_shuffle backward_data_shuffle backward_weight_splitk", (32, 16, 2, 0, 1, "ncdhw")),
    "k2 s2, as given": (
        "forward_shuffle_given backward_data_shuffle_given backward_weight_splitk", (32, 16, 2, 0, 1, "ndhwc"),
    ),
    "k2 s2, fused": (
        "forward_shuffle_resident backward_data_fused backward_weight_fused", (32, 16, 2, 0, 1, "ndhwc"),
    ),
    "k3 s2": ("forward_phases backward_data_gemm backward_weight_cells", (16, 16, 3, 1, 1, "ndhwc")),
    "k3 s2, packed": ("forward_phases_packed backward_data_packed backward_weight_splitk", (16, 4, 3, 1, 1, "ncdhw")),
    "k3 s2, gather": ("forward_gather backward_data_gemm backward_weight_splitk", (16, 16, 3, 1, 1, "ncdhw")),
    "k3 s2, together": (
        "forward_gather backward_data_together backward_weight_together", (16, 16, 3, 1, 1, "ncdhw"),
    ),
    "k4 s2, boxes": ("forward_boxes backward_data_boxes backward_weight_splitk", (16, 16, 4, 1, 1, "ndhwc")),
    "k4 s2 to 1": ("forward_overlap backward_data_packed backward_weight_splitk", (16, 1, 4, 1, 1, "ndhwc")),
    "depthwise k3 s2": (
        "forward_depthwise backward_data_depthwise backward_weight_depthwise", (16, 16, 3, 1, 16, "ndhwc"),
    ),
}  # fmt: skip
HEADER = ("class", "pass", "launches", "bare us", "floor us", "ours us", "above, in bare", "at most")


class Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y


class Floor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, shape, strides):
        ctx.save_for_backward(x, weight)
        ctx.bias_shape = bias.shape
        return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        made = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in (x, weight)]
        return *made, torch.empty(ctx.bias_shape, dtype=x.dtype, device=x.device), None, None


class Layer:
    """A layer of a class, whose plan holds the class's variants, and its operands."""

    def __init__(self, name: str) -> None:
        variants, (c_in, c_out, kernel, crop, groups, layout) = CLASSES[name]
        size, k, s, p, extra = (3, 4, 5), (kernel,) * 3, (2,) * 3, (crop,) * 3, (int(kernel == 3),) * 3
        out = output_size(size, k, s, p, p, extra, (1,) * 3)
        problem = Problem(1, c_in, c_out, size, k, s, p, out, (1,) * 3, groups, DTYPE, layout, bias=True)
        records = [variant(each) for each in variants.split()]
        assert [each.supports(problem, GPU) for each in records] == [None] * 3
        chosen = {each.pass_name: Selection(each, each.default(problem, GPU), "measured") for each in records}
        self.plan = dispatch.Plan(problem, CPU, None, chosen)
        dispatch.forget()  # another class may have the same layer
        dispatch._by_problem[problem, CPU, (), False, False] = self.plan
        x = torch.ones(problem.x_shape, dtype=DTYPE).contiguous(memory_format=problem.memory_format)
        self.operands = x, torch.ones(problem.weight_shape, dtype=DTYPE), torch.ones(c_out, dtype=DTYPE)
        self.leaves = tuple(t.clone().requires_grad_() for t in self.operands)
        self.arguments = s, p, extra, groups, (1, 1, 1)
        y = self.call(*self.operands)
        self.floor = partial(_floor, y.shape, y.stride())
        self.grad_y = torch.ones_like(y)

    def call(self, *operands: torch.Tensor) -> torch.Tensor:
        return tritonconv.conv_transpose3d(*operands, *self.arguments)

    def step(self, function: Callable[..., torch.Tensor]) -> None:
        torch.autograd.grad(function(*self.leaves), self.leaves, self.grad_y)

    def calls(self, pass_name: str) -> list[Callable[[], object]]:
        """Ours with a bare Function.apply behind it, the floor, and ours."""
        if pass_name == "step":
            floor, ours = partial(self.step, self.floor), partial(self.step, self.call)
        else:
            operands = self.operands if pass_name == "forward" else self.leaves
            floor, ours = partial(self.floor, *operands), partial(self.call, *operands)

        def both() -> None:
            ours()
            Bare.apply(self.leaves[0])

        return [both, floor, ours]

    def anew(self) -> int:
        """How many calls have worked their launches out."""
        return sum(replay.counts.anew for replay in self.plan.replays.values())


def _floor(shape, strides, *operands) -> torch.Tensor:
    return Floor.apply(*operands, shape, strides)


def seconds(call: Callable[[], object]) -> float:
    begin = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - begin) / CALLS


def measure(names: list[str]) -> int:
    """Prints a table; returns how many rows exceed the limits."""
    library = stub_driver.install()
    above_limit = 0
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for layer in names:
        made = Layer(layer)
        for pass_name in PASSES:
            calls = made.calls(pass_name)
            with torch.set_grad_enabled(pass_name != "forward"):
                calls[2]()
                before, anew = library.stub_launches(), made.anew()
                calls[2]()
                launches = library.stub_launches() - before
                assert made.anew() == anew, "the second call worked its launches out"
                gc.disable()
                rounds = [[seconds(call) for call in calls] for _ in range(BATCHES)]
                gc.enable()
            both, floor, ours = (min(times) * 1e6 for times in zip(*rounds, strict=True))
            bare = both - ours
            above, most = (ours - floor) / bare, PER_CALL + PER_LAUNCH * launches
            above_limit += above > most
            numbers = f"{bare:.1f} | {floor:.1f} | {ours:.1f} | {above:.2f} | {most:.1f}"
            print(f"| {layer} | {pass_name} | {launches} | {numbers} |", flush=True)
    return above_limit


if __name__ == "__main__":
    if stub_driver.VARIABLE in os.environ:
        sys.exit(measure(sys.argv[1:] or list(CLASSES)))
    sys.exit(stub_driver.run_beside(Path(__file__).absolute(), *sys.argv[1:]).returncode)
