"""Rounding errors of every variant next to torch's own, and strided operands of every kind. Runs on the CPU.

The rule: ``max_err <= 2 * torch's error in the same dtype + eps * sqrt(K) * scale`` with K terms in the longest sum
and the scale of the result, both errors against a float64 reference made from the same rounded inputs. The same limit
for every variant, dtype and pass.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import tritonconv
from tritonconv import Problem, dispatch
from tritonconv.arguments import geometry, problem_of
from tritonconv.kernels.registry import variant
from tritonconv.problem import LAYOUTS, PASSES

CPU = torch.device("cpu")
TORCH_NAMES = [record.name for record in tritonconv.variants() if record.backend == "torch"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Layer(NamedTuple):
    """A layer of a class that real models have, small; the tuple after the kernel is stride, padding, ..., dilation."""

    n: int
    c_in: int
    c_out: int
    size: tuple
    kernel: tuple | int
    stride: tuple | int = 2
    padding: int = 0
    output_padding: int = 0
    groups: int = 1
    dilation: int = 1

    @property
    def hyper(self):
        return self[5:]

    @property
    def shapes(self):
        kernel = (self.kernel,) * 3 if isinstance(self.kernel, int) else self.kernel
        weight = (self.c_in, self.c_out // self.groups, *kernel)
        return (self.n, self.c_in, *self.size), weight, (self.c_out,)

    def problem(self, dtype, layout="ncdhw") -> Problem:
        meta = [torch.empty(shape, dtype=dtype, device="meta") for shape in self.shapes]
        meta[0] = meta[0].to(memory_format=LAYOUTS[layout])
        return problem_of(*meta, geometry(*self.hyper))


LAYERS = {
    "k2 s2": Layer(2, 32, 16, (6, 6, 6), 2),
    "k2 s2 wide": Layer(1, 160, 32, (3, 3, 3), 2),
    "k3 s2 p1 q1": Layer(2, 16, 8, (5, 6, 7), 3, 2, 1, 1),
    "k4 s2 p1": Layer(1, 16, 16, (4, 5, 6), 4, 2, 1),
    "k4 s2 p3": Layer(1, 16, 16, (6, 5, 6), 4, 2, 3),
    "k1 s2 q1": Layer(2, 32, 16, (4, 6, 6), 1, 2, 0, 1),
    "depthwise k3": Layer(2, 16, 16, (4, 5, 6), 3, 2, 1, 1, 16),
    "depthwise k5": Layer(1, 12, 12, (4, 4, 4), 5, 2, 2, 1, 12),
    "1 channel out": Layer(2, 32, 1, (5, 5, 5), 4, 2, 1),
    "2 channels out": Layer(2, 24, 2, (6, 6, 6), 3, 2, 1, 1),
    "3 channels in": Layer(1, 3, 16, (6, 6, 6), 3, 2, 1),
    "anisotropic": Layer(2, 24, 12, (4, 6, 6), (1, 2, 2), (1, 2, 2)),
    "s1": Layer(1, 24, 16, (6, 6, 6), 3, 1, 1),
    "dilated": Layer(2, 12, 8, (5, 5, 5), 3, 2, 2, 1, 1, 2),
    "groups 4": Layer(2, 16, 16, (5, 5, 5), 3, 2, 1, 1, 4),
}


class Wanted(NamedTuple):
    """One result: float64 reference, and torch's own largest and RMS error in the dtype."""

    exact: torch.Tensor
    torch_max: float
    torch_rms: float
    terms: int


def errors(got, exact) -> tuple[float, float]:
    difference = (got.double() - exact).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def torch_itself(x, weight, bias, stride, padding, *rest):
    """torch's operation, cropped afterwards: its CPU weight gradient is unsafe with much padding (torch 2.13)."""
    y = F.conv_transpose3d(x, weight, bias, stride, 0, *rest)
    return y[(..., *[slice(padding, size - padding) for size in y.shape[2:]])]


def results(inputs, grad_y, hyper):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = torch_itself(*leaves, *hyper)
    return y.detach(), *torch.autograd.grad(y, leaves, grad_y)


@functools.cache
def references(name, dtype):
    """(x, weight, bias), grad_y in the dtype; what is wanted of y and the three gradients."""
    layer, problem = LAYERS[name], LAYERS[name].problem(dtype)
    torch.manual_seed(1)
    inputs = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in layer.shapes]
    inputs[1] /= math.sqrt(problem.c_in * math.prod(problem.kernel) / problem.groups)
    grad_y = torch.randn(problem.y_shape, dtype=torch.float64).to(dtype)
    exact = results([t.double() for t in inputs], grad_y.double(), layer.hyper)
    own = results(inputs, grad_y, layer.hyper)
    taps, per_group = math.prod(problem.kernel), problem.c_in // problem.groups
    terms = (per_group * taps, problem.c_out // problem.groups * taps,
             problem.n * math.prod(problem.size), problem.n * math.prod(problem.out_size))  # fmt: skip
    wanted = [Wanted(e, *errors(o, e), k) for e, o, k in zip(exact, own, terms, strict=True)]
    return inputs, grad_y, wanted


def check(what, got, wanted: Wanted, dtype) -> None:
    assert got.dtype == dtype, what
    assert got.shape == wanted.exact.shape, what
    largest, rms = errors(got, wanted.exact)
    unit = torch.finfo(dtype).eps * math.sqrt(wanted.terms)
    limit = 2 * wanted.torch_max + unit * wanted.exact.abs().max().item()
    assert largest <= limit, f"{what}: max error {largest:.3g}, torch's {wanted.torch_max:.3g}, limit {limit:.3g}"
    limit = 2 * wanted.torch_rms + unit * wanted.exact.square().mean().sqrt().item()
    assert rms <= limit, f"{what}: RMS error {rms:.3g}, torch's {wanted.torch_rms:.3g}, limit {limit:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_operation_as_it_is_called(name, dtype):
    inputs, grad_y, wanted = references(name, dtype)
    for layout in LAYOUTS.values():
        x = inputs[0].to(memory_format=layout)
        leaves = [t.detach().clone().requires_grad_() for t in (x, *inputs[1:])]
        y = tritonconv.conv_transpose3d(*leaves, *LAYERS[name].hyper)
        found = y.detach(), *torch.autograd.grad(y, leaves, grad_y)
        for what, got, want in zip(("y", "grad_x", "grad_weight", "grad_bias"), found, wanted, strict=True):
            check(f"{name}, {what}", got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_are_torchs_whichever_operand_is_in_channels_last(dtype):
    wrong = []
    for name, layer in LAYERS.items():
        (x, weight, bias), *_ = references(name, dtype)
        last = [t.to(memory_format=torch.channels_last_3d) for t in (x, weight)]
        for which, operands in {
            "x": (last[0], weight),
            "weight": (x, last[1]),
            "both": last,
            "none": (x, weight),
        }.items():
            y = tritonconv.conv_transpose3d(*operands, bias, *layer.hyper)
            wanted = torch.conv_transpose3d(*operands, bias, *layer.hyper)
            if y.stride() != wanted.stride():
                wrong.append(f"{name}, {which}")
    assert wrong == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_every_variant_that_serves_the_layer(name, dtype):
    (x, weight, bias), grad_y, (y, grad_x, grad_weight, grad_bias) = references(name, dtype)
    served = dict.fromkeys(PASSES, 0)
    for layout, memory_format in LAYOUTS.items():
        problem = LAYERS[name].problem(dtype, layout)
        assert problem.layout == layout
        dense_x, dense_grad = (t.contiguous(memory_format=memory_format) for t in (x, grad_y))
        for record in map(variant, TORCH_NAMES):
            if record.supports(problem, CPU) is not None:
                continue
            served[record.pass_name] += 1
            with tritonconv.use(record.name):
                plan = dispatch.plan(problem, CPU)
            assert plan.choice(record.pass_name).variant is record
            what = f"{name}, {layout}, {record.name}"
            if record.pass_name == "forward":
                got = plan.forward(dense_x, weight, bias)
                check(what, got, y, dtype)
                assert got.is_contiguous(memory_format=memory_format), what
            elif record.pass_name == "backward_data":
                got = plan.backward_data(dense_grad, weight)
                check(what, got, grad_x, dtype)
                assert got.is_contiguous(memory_format=memory_format), what
            else:
                got = plan.backward_weight(dense_x, dense_grad, True)
                check(what, got[0], grad_weight, dtype)
                check(f"{what}, bias", got[1], grad_bias, dtype)
    assert min(served.values()) >= 4  # two variants or more of each pass, both layouts


def gapped(t):
    """The same values, every second element of storage full of NaN along every axis."""
    storage = t.new_full([2 * size + 1 for size in t.shape], math.nan)
    view = storage[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def reversed_axes(t):
    """The same values, strides ascending instead of descending."""
    return t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])


def channels_last_slice(t):
    """A slice of a channels_last_3d buffer, as a decoder's concatenation makes one; NaN beside it."""
    if t.dim() != 5:
        return gapped(t)
    buffer = t.new_full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), math.nan).to(memory_format=torch.channels_last_3d)
    buffer[:, 2:-1] = t
    return buffer[:, 2:-1]


def interior(t):
    """The inside of a larger dense tensor; NaN all around."""
    storage = t.new_full([size + 2 for size in t.shape], math.nan)
    view = storage[tuple(slice(1, -1) for _ in t.shape)]
    return view.copy_(t)


STRIDED = [gapped, reversed_axes, channels_last_slice, interior]
SMALL = [
    Layer(2, 4, 6, (3, 4, 5), 3, 2, 1, 1), Layer(2, 4, 6, (3, 4, 5), 2), Layer(2, 4, 2, (3, 4, 5), 3, 1, 1),
    Layer(2, 4, 4, (3, 4, 5), 3, 2, 1, 0, 4), Layer(1, 4, 6, (3, 4, 5), 1), Layer(2, 4, 4, (2, 3, 2), 2, 2, 0, 0, 2),
    Layer(2, 4, 6, (1, 1, 1), 4),
]  # fmt: skip


def integer_results(layer, inputs, grad_y):
    exact = results([t.double() for t in inputs], grad_y.double(), layer.hyper)
    return [t.to(inputs[0].dtype) for t in exact]


def integers(shape):
    return torch.randint(-3, 4, shape).float()


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_strided_operands(name):
    """Exact on integers; a read outside a view would bring a NaN in."""
    served = 0
    for layer in SMALL:
        if variant(name).supports(layer.problem(torch.float32), CPU) is not None:
            continue
        served += 1
        dense, grad_y = [integers(shape) for shape in layer.shapes], integers(layer.problem(torch.float32).y_shape)
        wanted = integer_results(layer, dense, grad_y)
        for strided in STRIDED:
            leaves = [strided(t).requires_grad_() for t in dense]
            assert not all(t.is_contiguous() for t in leaves)
            assert all(map(torch.equal, leaves, dense))
            with tritonconv.use(name):
                y = tritonconv.conv_transpose3d(*leaves, *layer.hyper)
            found = torch.autograd.grad(y, leaves, strided(grad_y))
            assert torch.equal(y, wanted[0]), f"{layer} {strided.__name__}"
            assert all(map(torch.equal, found, wanted[1:])), f"{layer} {strided.__name__}"
    assert served


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_expanded_operands(name):
    """Zero strides: a batch, channels, taps or a bias that is one value seen many times, and the gradient of a sum."""
    for layer in SMALL:
        if variant(name).supports(layer.problem(torch.float32), CPU) is not None:
            continue
        x_shape, weight_shape, bias_shape = layer.shapes
        for axis in range(5):
            narrow = [1 if i == axis else size for i, size in enumerate(x_shape)]
            x = integers(narrow).expand(x_shape)
            weight = integers([1 if i == axis else size for i, size in enumerate(weight_shape)]).expand(weight_shape)
            bias = integers(()).expand(bias_shape)
            wanted = integer_results(layer, [x, weight, bias], torch.ones(layer.problem(torch.float32).y_shape))
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            with tritonconv.use(name):
                y = tritonconv.conv_transpose3d(*leaves, *layer.hyper)
            found = torch.autograd.grad(y.sum(), leaves)
            assert torch.equal(y, wanted[0]), f"{layer} axis {axis}"
            assert all(map(torch.equal, found, wanted[1:])), f"{layer} axis {axis}"


@pytest.mark.parametrize("of_weight", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last_3d])
def test_one_voxel_in_every_pair_of_memory_formats(of_x, of_weight):
    """One matrix product, whichever of taps and channels are innermost in the weight and in grad_y."""
    names = [f"{pass_name}_torch_linear" for pass_name in PASSES]
    x, weight, bias = integers((3, 4, 1, 1, 1)), integers((4, 5, 2, 3, 4)), integers((5,))
    leaves = [x.to(memory_format=of_x), weight.to(memory_format=of_weight), bias]
    wanted = torch.conv_transpose3d(x, weight, bias, 2)
    grad_y = integers(wanted.shape)
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with tritonconv.use(*names):
            y = tritonconv.conv_transpose3d(*leaves, stride=2)
        found = torch.autograd.grad(y, leaves, grad_y.to(memory_format=memory_format))
        exact = [leaf.detach().clone().requires_grad_() for leaf in (x, weight, bias)]
        assert torch.equal(y, wanted)
        assert all(map(torch.equal, found, torch.autograd.grad(torch.conv_transpose3d(*exact, 2), exact, grad_y)))
