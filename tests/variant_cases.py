"""Problems of every kind, their exact answers, and what is wrong with a variant's: for the tests of the variants.

The inputs are small integers, so every sum is representable and ``torch.equal`` needs no tolerance.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

import tritonconv
from tritonconv import Problem, Variant
from tritonconv.autotune.ceilings import COPIES
from tritonconv.kernels.registry import RENAMED, variant
from tritonconv.problem import LAYOUTS, output_size

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU


class Case(NamedTuple):
    """A call; an integer stands for three. ``front`` and ``back`` are cropped, ``extra`` planes appended."""

    n: int = 2
    channels: tuple[int, int] = (3, 5)
    size: int | tuple = (3, 4, 5)
    kernel: int | tuple = 3
    stride: int | tuple = 1
    front: int | tuple = 0
    back: int | tuple = 0
    extra: int | tuple = 0
    dilation: int | tuple = 1
    groups: int = 1

    @property
    def triples(self):
        return [(v,) * 3 if isinstance(v, int) else v for v in self[2:9]]

    def problem(self, dtype=torch.float32, layout="ncdhw", bias=True) -> Problem:
        size, kernel, stride, front, back, extra, dilation = self.triples
        out = output_size(size, kernel, stride, front, back, extra, dilation)
        sizes = (size, kernel, stride, front, out, dilation)
        return Problem(self.n, *self.channels, *sizes, self.groups, dtype, layout, bias)

    def call(self, x, weight, bias, **more):
        return tritonconv.conv_transpose3d(x, weight, bias, *self.arguments, **more)

    @property
    def arguments(self):
        """stride, padding, output_padding, groups, dilation of the public operation."""
        _, _, stride, front, back, extra, dilation = self.triples
        return stride, tuple(zip(front, back, strict=True)), extra, self.groups, dilation

    def reference(self, x, weight, bias):
        """The whole transposed convolution, extended by planes of zeros, then cropped."""
        _, _, stride, front, back, extra, dilation = self.triples
        y = F.conv_transpose3d(x, weight, None, stride, groups=self.groups, dilation=dilation)
        y = F.pad(y, [planes for q in extra[::-1] for planes in (0, q)])
        for axis, (first, last) in enumerate(zip(front, back, strict=True), start=2):
            y = y.narrow(axis, first, y.shape[axis] - first - last)
        return y if bias is None else y + bias.view(1, -1, 1, 1, 1)


CASES = {
    "tile": Case(channels=(16, 5), kernel=2, stride=2),
    "tile anisotropic": Case(channels=(5, 16), kernel=(1, 2, 2), stride=(1, 2, 2)),
    "tile 1 channel": Case(n=1, channels=(1, 1), size=(2, 1, 3), kernel=(4, 2, 3), stride=(4, 2, 3)),
    "tile 28 channels": Case(channels=(28, 3), size=2, kernel=3, stride=3),
    "tile k1 s1": Case(channels=(3, 28), kernel=1),
    "tile grouped": Case(channels=(4, 6), kernel=2, stride=2, groups=2),
    "tile depthwise": Case(channels=(5, 5), kernel=2, stride=2, groups=5),
    "tile batch 0": Case(n=0, kernel=2, stride=2),
    "k3 s2": Case(channels=(16, 28), size=(2, 3, 2), stride=2),
    "k3 s2 p1 q1": Case(channels=(5, 16), stride=2, front=1, back=1, extra=1),
    "k3 s2 p1": Case(channels=(3, 1), stride=2, front=1, back=1),
    "k4 s2 p1": Case(channels=(28, 3), size=(2, 3, 4), kernel=4, stride=2, front=1, back=1),
    "k4 s2 p3": Case(channels=(1, 16), kernel=4, stride=2, front=3, back=3),
    "front crop": Case(channels=(8, 2), stride=2, front=1),
    "back crop": Case(channels=(8, 2), stride=2, back=1),
    "more than half the kernel": Case(stride=2, front=3, back=2),
    "more than the kernel": Case(kernel=2, stride=2, front=(5, 0, 3), back=(0, 4, 3)),
    "k1 s2": Case(channels=(16, 5), size=(2, 3, 4), kernel=1, stride=2),
    "k1 s2 q1": Case(kernel=1, stride=2, extra=1),
    "k2 s3 q2": Case(n=1, kernel=2, stride=3, extra=2),
    "k2 s5 cropped": Case(kernel=2, stride=5, front=(3, 1, 6), back=(4, 2, 0)),
    "mixed strides": Case(kernel=(3, 2, 4), stride=(2, 1, 3), front=(1, 0, 2), back=(1, 0, 0), extra=(0, 0, 2)),
    "s1": Case(channels=(16, 5)),
    "s1 p1": Case(channels=(5, 28), front=1, back=1),
    "s1 k5 p4": Case(kernel=5, front=4, back=4, size=5),
    "s1 asymmetric": Case(kernel=(2, 3, 4), front=(0, 2, 1), back=(1, 0, 3)),
    "s1 dilation": Case(dilation=(1, 2, 3), front=(1, 2, 3), back=(1, 0, 3), extra=(0, 1, 0)),
    "s1 only bias": Case(size=1, kernel=1, front=1, back=1, extra=2, dilation=3),
    "s1 only bias, more": Case(size=2, kernel=1, front=2, extra=2, dilation=3),
    "s1 batch 0": Case(n=0),
    "s1 grouped": Case(channels=(8, 4), groups=4),
    "s2 dilation 2": Case(stride=2, dilation=2, size=(2, 3, 4), extra=1),
    "s2 dilation 3 q2": Case(channels=(16, 3), kernel=2, stride=2, dilation=3, extra=2),
    "s4 dilation 2": Case(size=2, stride=4, dilation=2, front=(1, 2, 0), back=(0, 2, 3)),
    "s3 dilation 2": Case(kernel=4, size=(2, 3, 2), stride=3, dilation=2, front=2, back=1),
    "grouped": Case(channels=(6, 9), kernel=4, stride=2, front=1, back=1, groups=3),
    "grouped k1": Case(channels=(6, 3), kernel=1, stride=2, groups=3),
    "two outputs per channel": Case(channels=(4, 8), stride=2, front=1, back=1, groups=4),
    "depthwise k3 s2": Case(channels=(16, 16), stride=2, front=1, back=1, extra=1, groups=16),
    "depthwise k5 s2": Case(channels=(5, 5), kernel=5, stride=2, front=2, back=2, groups=5),
    "depthwise s1": Case(channels=(28, 28), size=2, front=1, back=1, groups=28),
    "depthwise dilated": Case(channels=(3, 3), stride=2, dilation=2, front=(1, 0, 2), groups=3),
    "depthwise cropped": Case(channels=(3, 3), kernel=(2, 3, 1), stride=3, front=(5, 1, 0), back=(2, 0, 6), groups=3),
    "depthwise batch 0": Case(n=0, channels=(3, 3), stride=2, groups=3),
    "one voxel k4": Case(channels=(5, 8), size=1, kernel=4, stride=2),
    "one voxel k4 s1, no overlap": Case(channels=(16, 5), size=1, kernel=4),
    "one voxel k2": Case(n=1, channels=(1, 3), size=1, kernel=2, stride=2),
    "one voxel anisotropic": Case(channels=(3, 1), size=1, kernel=(1, 4, 2), stride=3),
    "one voxel k1": Case(channels=(8, 6), size=1, kernel=1, stride=2),
    "one voxel k5": Case(n=3, channels=(2, 2), size=1, kernel=5),
    "one voxel": Case(n=1, size=1, stride=2, front=1, back=1, extra=1),
    "one long axis": Case(channels=(2, 2), size=(1, 1, 7), kernel=(1, 1, 11), stride=(1, 1, 4)),
}

# For the Triton kernels in the interpreter, some tens of milliseconds per program: few voxels, the same kinds.
TINY = {
    "k2 s2": Case(channels=(48, 16), size=(2, 1, 3), kernel=2, stride=2),
    "k2 s2, 90 voxels": Case(channels=(16, 4), size=(3, 3, 5), kernel=2, stride=2),
    "k2 s2 anisotropic": Case(channels=(5, 28), size=(1, 2, 3), kernel=(1, 2, 2), stride=(1, 2, 2)),
    "k3 s3": Case(n=1, channels=(28, 3), size=(2, 1, 2), kernel=3, stride=3),
    "k4x2x3 = stride": Case(n=1, channels=(1, 1), size=(2, 1, 3), kernel=(4, 2, 3), stride=(4, 2, 3)),
    "k2 s2 cropped by more": Case(
        n=1, channels=(5, 16), size=(3, 2, 3), kernel=2, stride=2, front=(2, 3, 1), back=(1, 0, 3)
    ),
    "k2 s2 in 2 groups": Case(n=1, channels=(6, 16), size=2, kernel=2, stride=2, groups=2),
    "k2 s2 to 24": Case(n=1, channels=(20, 24), size=(2, 2, 3), kernel=2, stride=2),
    "k1x2x2 to 12": Case(n=1, channels=(16, 12), size=(1, 2, 9), kernel=(1, 2, 2), stride=(1, 2, 2), front=(0, 1, 1)),
    "k1x4x4 s4": Case(n=1, channels=(3, 8), size=(1, 2, 3), kernel=(1, 4, 4), stride=(1, 4, 4)),
    "k4 s4": Case(n=1, channels=(4, 2), size=(1, 1, 17), kernel=4, stride=4),
    "k2x2x1 s2": Case(n=1, channels=(3, 8), size=(1, 2, 9), kernel=(2, 2, 1), stride=(2, 2, 1)),
    "k1 s1": Case(n=1, channels=(3, 28), size=(1, 2, 9), kernel=1),
    "k2 s2 grouped": Case(n=1, channels=(4, 6), size=2, kernel=2, stride=2, groups=2),
    "k2 s2 24": Case(n=1, channels=(24, 16), size=(1, 3, 2), kernel=2, stride=2),
    "k2 s2 cropped": Case(n=1, channels=(16, 5), size=(3, 2, 3), kernel=2, stride=2, front=1, back=1),
    "k3 s2": Case(n=1, channels=(16, 48), size=(2, 1, 3), stride=2),
    "k3 s2 p1 q1": Case(channels=(16, 28), size=(2, 3, 2), stride=2, front=1, back=1, extra=1),
    "k3 s2 p1": Case(n=1, channels=(3, 1), size=(3, 2, 2), stride=2, front=1, back=1),
    "k3 s2 24": Case(channels=(24, 16), size=(2, 1, 3), stride=2, front=1, back=1),
    "k4 s2 p1": Case(n=1, channels=(28, 3), size=(2, 1, 3), kernel=4, stride=2, front=1, back=1),
    "k4 s2 p3": Case(n=1, channels=(1, 16), size=3, kernel=4, stride=2, front=3, back=3),
    "k4 s2 16": Case(n=1, channels=(16, 24), size=(2, 1, 2), kernel=4, stride=2, front=(1, 0, 3), back=(3, 1, 0)),
    "asymmetric crop": Case(n=1, channels=(5, 3), size=(2, 3, 2), stride=2, front=(0, 1, 2), back=(1, 0, 0)),
    "more than half the kernel": Case(n=1, size=(3, 3, 2), stride=2, front=(3, 2, 0), back=(2, 3, 2)),
    "more than the kernel": Case(n=1, size=(4, 3, 4), kernel=2, stride=2, front=(5, 0, 3), back=(0, 4, 3)),
    "one voxel k4 s1": Case(channels=(5, 8), size=1, kernel=4, stride=2),
    "one voxel cropped": Case(
        n=3,
        channels=(8, 3),
        size=(1, 2, 1),
        kernel=(4, 2, 2),
        stride=(2, 2, 1),
        front=(1, 0, 0),
        back=(0, 1, 1),
        extra=(1, 0, 0),
    ),
    "k1 s2": Case(channels=(16, 5), size=(2, 1, 3), kernel=1, stride=2),
    "k1 s2 q1": Case(n=1, channels=(16, 16), size=(2, 1, 3), kernel=1, stride=2, extra=1),
    "k2 s3 q2": Case(n=1, size=(1, 2, 2), kernel=2, stride=3, extra=2),
    "k2 s5 cropped": Case(n=1, size=2, kernel=2, stride=5, front=(3, 1, 6), back=(3, 2, 0)),
    "mixed strides": Case(
        n=1, size=(2, 3, 2), kernel=(3, 2, 4), stride=(2, 1, 3), front=(1, 0, 2), back=(1, 0, 0), extra=(0, 0, 2)
    ),
    "s1 p1": Case(n=1, channels=(16, 16), size=(2, 3, 3), front=1, back=1),
    "s1 dilation": Case(n=1, size=(2, 1, 3), dilation=(1, 2, 3), front=(1, 2, 3), back=(1, 0, 3), extra=(0, 1, 0)),
    "s1 only bias": Case(n=1, size=1, kernel=1, front=1, back=1, extra=2, dilation=3),
    "s2 dilation 2": Case(n=1, channels=(16, 16), size=(1, 2, 2), stride=2, dilation=2, extra=1),
    "s2 dilation 3": Case(n=1, channels=(16, 3), size=(1, 2, 2), kernel=2, stride=2, dilation=3, extra=2),
    "s4 dilation 2": Case(n=1, size=(2, 1, 2), kernel=2, stride=4, dilation=2, front=(1, 2, 0), back=(0, 0, 3)),
    "grouped": Case(n=1, channels=(6, 9), size=(2, 1, 2), kernel=4, stride=2, front=1, groups=3),
    "grouped k1": Case(n=1, channels=(6, 3), size=(1, 2, 2), kernel=1, stride=2, groups=3),
    "grouped 16": Case(n=1, channels=(32, 32), size=(1, 2, 2), stride=2, front=1, back=1, groups=2),
    "two outputs per channel": Case(n=1, channels=(4, 8), size=(2, 1, 2), stride=2, front=1, back=1, groups=4),
    "depthwise k3 s2": Case(channels=(16, 16), size=(2, 1, 3), stride=2, front=1, back=1, extra=1, groups=16),
    "depthwise k5 s2": Case(n=1, channels=(5, 5), size=(2, 3, 2), kernel=5, stride=2, front=2, back=2, groups=5),
    "depthwise s1": Case(n=1, channels=(28, 28), size=2, front=1, back=1, groups=28),
    "depthwise s3": Case(
        n=1, channels=(3, 3), size=3, kernel=(2, 3, 1), stride=3, front=(5, 1, 0), back=(2, 0, 6), groups=3
    ),
    "depthwise dilated": Case(
        n=1, channels=(3, 3), size=(2, 3, 3), stride=2, dilation=(3, 2, 3), front=(1, 0, 2), back=(0, 1, 1), groups=3
    ),
    "batch 0": Case(n=0, channels=(16, 16), size=2, stride=2),
    "depthwise batch 0": Case(n=0, channels=(3, 3), size=2, kernel=2, stride=2, groups=3),
    "one voxel": Case(n=1, size=1, stride=2, front=1, back=1, extra=1),
    "one long axis": Case(n=1, channels=(2, 2), size=(1, 1, 19), kernel=(1, 1, 11), stride=(1, 1, 4)),
    "k2x1x2 s1 to 8": Case(n=1, channels=(3, 8), size=(3, 4, 3), kernel=(2, 1, 2), front=(1, 2, 1), back=(0, 1, 1)),
    "k3 s2 20 to 2": Case(n=1, channels=(20, 2), size=(2, 1, 3), stride=2, front=1, back=1),
    "k4 s2 48 to 1": Case(n=1, channels=(48, 1), size=(1, 2, 3), kernel=4, stride=2, front=1, back=1),
    "k3x1x2 s2x1x2 16": Case(n=1, channels=(16, 16), size=(1, 2, 2), kernel=(3, 1, 2), stride=(2, 1, 2)),
    "k1x1x4 s1x1x2 to 1": Case(n=1, channels=(3, 1), size=(2, 1, 3), kernel=(1, 1, 4), stride=(1, 1, 2)),
}


def integers(shape, seed) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).double()


@functools.cache
def expected(case: Case, bias: bool):
    """(x, weight, bias), grad_y, y and the gradients of the three inputs, in float64."""
    problem = case.problem()
    shapes = (problem.x_shape, problem.weight_shape, (problem.c_out,))
    inputs = [integers(shape, seed).requires_grad_() for seed, shape in enumerate(shapes)]
    if not bias:
        inputs[2] = None
    y, grad_y = case.reference(*inputs), integers(problem.y_shape, 3)
    assert y.shape == grad_y.shape
    gradients = torch.autograd.grad(y, [t for t in inputs if t is not None], grad_y)
    return [None if t is None else t.detach() for t in inputs], grad_y, y.detach(), (*gradients, None)[:3]


def same(got, want) -> bool:
    """Equal to the float64 ``want``, rounded once to the dtype of ``got``."""
    return got.shape == want.shape and torch.equal(got.cpu(), want.to(got.dtype))


def run(record, problem, config, inputs, grad_y, need_bias):
    """The results of the variant, by the contract of its pass, in a list."""
    x, weight, bias = inputs
    if record.pass_name == "forward":
        return [record.compute(problem, config, x, weight, bias)]
    if record.pass_name == "backward_data":
        return [record.compute(problem, config, grad_y, weight)]
    return list(record.compute(problem, config, x, grad_y, need_bias))


def complaints(record, case, dtype, layout, bias, device=CPU, configs=None) -> list[str] | None:
    """The faults of the variant's answers to the case; None where it does not serve it.

    ``configs`` (problem) -> the configs to run; without it the variant's whole space.
    """
    problem = case.problem(dtype, layout, bias)
    if record.supports(problem, device) is not None:
        return None
    inputs, grad_y, y, (grad_x, grad_weight, grad_bias) = expected(case, bias)
    wanted = {"forward": [y], "backward_data": [grad_x], "backward_weight": [grad_weight, grad_bias]}
    dense = {"device": device, "dtype": dtype, "memory_format": LAYOUTS[layout]}
    args = [None if t is None else t.to(device, dtype) for t in inputs]
    args[0], grad = inputs[0].to(**dense), grad_y.to(**dense)
    tensors = [t for t in (*args, grad) if t is not None]
    before, storages = [t.clone() for t in tensors], {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
    found = []
    assert record.default(problem, device) in record.space(problem, device)
    for config in record.space(problem, device) if configs is None else configs(problem):
        try:
            results = run(record, problem, config, args, grad, bias)
        except Exception as error:  # what it claims to serve it must serve
            return [f"{record.name}: {case}, bias {bias}: {error!r}"]
        for got, want in zip(results, wanted[record.pass_name], strict=True):
            if want is None or got is None:
                found += [] if got is want else ["a result that nobody asked for, or none"]
                continue
            found += [] if same(got, want) else ["wrong numbers"]
            found += [] if got.dtype == dtype else [f"dtype {got.dtype}"]
            # A variant returns new tensors: torch's autograd takes a result that shares memory for a view.
            shared = got.numel() and got.untyped_storage().data_ptr() in storages
            found += ["shares memory with an input"] if shared else []
    found += [] if all(map(torch.equal, before, tensors)) else ["an input was changed"]
    return [f"{record.name}: {case}, bias {bias}: {what}" for what in found]


def form_names(records: Iterable[Variant]) -> list[str]:
    """The names of the variants, and again, with COPIES behind, of those that have configs that copy operands."""
    names = [record.name for record in records]
    return names + [name + COPIES for name in names if name in RENAMED]


@functools.cache
def form(name: str) -> Variant:
    """The variant of this name; with COPIES behind it that variant with the configs alone that copy operands first."""
    record = variant(name.removesuffix(COPIES))
    if record.name == name:
        return record

    def space(problem, device):
        return tuple(config for config in record.space(problem, device) if config["COPY"])

    def supports(problem, device):
        return record.supports(problem, device) or (None if space(problem, device) else f"{name}: no config copies")

    def default(problem, device):
        return space(problem, device)[0]

    return replace(record, name=name, space=space, supports=supports, default=default)


def random_case(rng: random.Random) -> Case:
    axes = []
    for _ in range(3):
        size, kernel, stride, dilation = (rng.choice(range(1, most)) for most in (5, 6, 5, 4))
        full = (size - 1) * stride + dilation * (kernel - 1) + 1
        extra = rng.choice((0, rng.randrange(max(stride, dilation))))
        front = rng.choice((0, rng.randrange(full + extra)))
        back = rng.choice((0, rng.randrange(full - front + extra)))
        axes.append((size, kernel, stride, front, back, extra, dilation))
    groups = rng.choice((1, 1, 1, 2, 3))
    channels = (3, 3) if groups == 3 else (groups * rng.choice((1, 2, 5)), groups * rng.choice((1, 2, 5)))
    return Case(rng.choice((1, 2)), channels, *zip(*axes, strict=True), groups)


def inputs_of(case, layout, dtype):
    """x, weight, bias, grad_y in a layout and a dtype, and the exact (grad_x, grad_weight, grad_bias)."""
    inputs, grad_y, _, gradients = expected(case, True)
    dense = {"dtype": dtype, "device": DEVICE, "memory_format": LAYOUTS[layout]}
    weight, bias = (t.to(DEVICE, dtype) for t in inputs[1:])
    return inputs[0].to(**dense), weight, bias, grad_y.to(**dense), gradients


def ran_in_backward(names, case, layout, launches) -> list[str]:
    """The variants that ran in the backward of a call with those of these names, whose gradients are exact."""
    x, weight, bias, grad_y, wanted = inputs_of(case, layout, torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with tritonconv.use(*names):
        y = case.call(*leaves)
    launches.clear()
    assert all(map(same, torch.autograd.grad(y, leaves, grad_y), wanted))
    return list(launches)
