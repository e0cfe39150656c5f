"""Every registered variant against a reference computed without this package: exact, on small integers. CPU.

The inputs are small integers, so every sum is representable and ``torch.equal`` needs no tolerance. All memory from
torch.empty is filled with NaN, so an element that is never written shows.
"""

from __future__ import annotations

import functools
import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import tritonconv
from tritonconv import Problem, VariantNotApplicable, dispatch
from tritonconv.kernels.registry import variant
from tritonconv.problem import LAYOUTS, PASSES, output_size

CPU = torch.device("cpu")
NAMES = [record.name for record in tritonconv.variants()]
TORCH_NAMES = [record.name for record in tritonconv.variants() if record.backend == "torch"]
AT_LEAST = 6  # problems of the grid that every torch formulation serves, in each layout and dtype


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

    def call(self, x, weight, bias):
        return tritonconv.conv_transpose3d(x, weight, bias, *self.arguments)

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
    "one voxel": Case(n=1, size=1, stride=2, front=1, back=1, extra=1),
    "one long axis": Case(channels=(2, 2), size=(1, 1, 7), kernel=(1, 1, 11), stride=(1, 1, 4)),
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


@pytest.fixture
def poisoned():
    """torch fills new memory with NaN while it is asked for deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        fresh = [torch.empty(9), torch.ones(1).new_empty(9), torch.empty_like(torch.ones(9)), torch.ones(1).resize_(9)]
        assert all(t[1:].isnan().all() for t in fresh)
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def same(got, want) -> bool:
    return got.shape == want.shape and torch.equal(got.double(), want)


def run(record, problem, config, inputs, grad_y, need_bias):
    """What the variant returns, by the contract of its pass, in a list."""
    x, weight, bias = inputs
    if record.pass_name == "forward":
        return [record.launch(problem, config, x, weight, bias)]
    if record.pass_name == "backward_data":
        return [record.launch(problem, config, grad_y, weight)]
    return list(record.launch(problem, config, x, grad_y, need_bias))


def complaints(record, case, dtype, layout, bias) -> list[str] | None:
    """What is wrong with the variant's answers to the case; None where it does not serve it."""
    problem = case.problem(dtype, layout, bias)
    if record.supports(problem, CPU) is not None:
        return None
    inputs, grad_y, y, (grad_x, grad_weight, grad_bias) = expected(case, bias)
    wanted = {"forward": [y], "backward_data": [grad_x], "backward_weight": [grad_weight, grad_bias]}
    dense = {"dtype": dtype, "memory_format": LAYOUTS[layout]}
    args = [inputs[0].to(**dense), inputs[1].to(dtype), None if inputs[2] is None else inputs[2].to(dtype)]
    grad = grad_y.to(**dense)
    tensors = [t for t in (*args, grad) if t is not None]
    before, storages = [t.clone() for t in tensors], {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
    found = []
    assert record.default(problem, CPU) in record.space(problem, CPU)
    for config in record.space(problem, CPU):
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


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_launch_is_exact(name, layout, dtype):
    record = variant(name)
    answers = [complaints(record, case, dtype, layout, bias) for case in CASES.values() for bias in (True, False)]
    served = [found for found in answers if found is not None]
    assert [complaint for found in served for complaint in found] == []
    if name in TORCH_NAMES and not (name == "forward_torch_onednn" and dtype is torch.float64):
        assert len(served) >= 2 * AT_LEAST


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


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(8))
def test_random_problems(seed):
    rng = random.Random(seed)
    for _ in range(20):
        case, layout, bias = random_case(rng), rng.choice(list(LAYOUTS)), rng.random() < 0.5
        answers = [complaints(record, case, torch.float32, layout, bias) for record in tritonconv.variants()]
        served = [found for found in answers if found is not None]
        assert [complaint for found in served for complaint in found] == []
        assert len(served) >= len(PASSES)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_forced_through_the_public_operation(name, layout, launches):
    """Values, gradients, memory format, and that the forced variant is the one that ran."""
    record, served = variant(name), 0
    dense = {"dtype": torch.float32, "memory_format": LAYOUTS[layout]}
    for case_name, case in CASES.items():
        inputs, grad_y, y, gradients = expected(case, True)
        x, weight, bias = inputs[0].to(**dense), inputs[1].float(), inputs[2].float()
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        why_not = record.supports(case.problem(layout=layout), CPU)
        if why_not is not None:
            with tritonconv.use(name), pytest.raises(VariantNotApplicable) as caught:
                case.call(*leaves)
            assert name in str(caught.value)
            continue
        served += 1
        launches.clear()
        with tritonconv.use(name):
            alone = dispatch.plan_for(*leaves, *case.arguments).torch_alone
            got = case.call(*leaves)
        found = torch.autograd.grad(got, leaves, grad_y.float())  # outside the block: the call keeps its variants
        # With all three passes torch's own, torch's own autograd runs them, and no launch is ours to see.
        assert launches.count(name) == (0 if alone else 1), f"{case_name}: {launches}"
        assert same(got, y), case_name
        assert all(map(same, found, gradients)), case_name
        if case.n and case.channels[0] > 1:  # one channel is laid out both ways at once
            assert alone or got.is_contiguous(memory_format=LAYOUTS[layout]), case_name
            assert alone or found[0].is_contiguous(memory_format=LAYOUTS[layout]), case_name
    if name in TORCH_NAMES:
        assert served >= AT_LEAST


@pytest.mark.parametrize("name", NAMES)
def test_what_is_out_of_reach_has_a_reason_that_the_error_repeats(name):
    record, refused = variant(name), 0
    for case in CASES.values():
        problem = case.problem()
        why_not = record.supports(problem, CPU)
        if why_not is None:
            continue
        refused += 1
        assert isinstance(why_not, str)
        assert len(why_not) > 10
        inputs, *_ = expected(case, True)
        arguments = [t.float() for t in inputs]
        with tritonconv.use(name), pytest.raises(VariantNotApplicable) as caught:
            case.call(*arguments)
        assert why_not in str(caught.value)
        assert name in str(caught.value)
        assert str(problem).split(" float32")[0] in str(caught.value), "the problem is named too"
    general = name.removeprefix(f"{record.pass_name}_") in ("torch_native", "torch_other_layout")
    assert refused or general or name in ("backward_data_torch_conv", "backward_weight_torch_conv")
