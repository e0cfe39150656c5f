"""Seen on a GPU alone: four precisions beside torch's own, graphs, streams. Each answer twice, bitwise the same.

A kernel takes a second or two to compile, so a test asks for few: see ``JUDGED`` and ``layers_of``.
"""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
from repeated import twice
from test_triton_kernels import NAMES
from test_triton_layers import GENERAL, TRAINED, in_force, served, triples
from variant_cases import DEVICE, form

import tritonconv
from tritonconv import Problem, dispatch
from tritonconv.autotune import store
from tritonconv.autotune.choose import Selection
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.store import Entry, Table
from tritonconv.kernels import torch_layout
from tritonconv.kernels.registry import variant
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.gpu import captured
from tritonconv.lab.bench.layer_sizes import resized
from tritonconv.lab.bench.workloads import workload
from tritonconv.lab.inspection.compiling import products_in
from tritonconv.lab.inspection.jobs import SAMPLE_LAYERS
from tritonconv.precision import PRECISIONS
from tritonconv.problem import LAYOUTS, PASSES

pytestmark = pytest.mark.gpu

MOST_VOXELS = 24  # of an axis of a real layer as it is judged
SIZE = (5, 6, 7)
# Of the real layers that a variant serves so many, and each in so many layouts.
FEW_CHANNELS = "unetr_32_16", "grnet_32_1"  # of float32 the fused backward and forward_overlap_planes serve no wider
NOT_SERVED = {("backward_data_fused", "ieee"), ("backward_weight_fused", "ieee")}
JUDGED = {"bfloat16": (2, 2), "float16": (1, 1), "tf32": (1, 1), "ieee": (1, 1)}
EVERY_LAYER = "EVERY_LAYER" in os.environ  # make test-gpu-all: each class in each layout in each precision


PRODUCTS = [f"{name}_torch_{idea}" for name in PASSES for idea in ("shuffle", "linear")]


def layers_judged(name: str, precision: str) -> list[Problem]:
    """Cut to what takes no time; precisions that are judged in one layout take turns."""
    most_layers, most_layouts = (
        (len(SAMPLE_LAYERS) + len(FEW_CHANNELS), len(LAYOUTS)) if EVERY_LAYER else JUDGED[precision]
    )
    layouts = sorted(LAYOUTS, reverse=list(JUDGED).index(precision) % 2 == 1)
    found: list[Problem] = []
    for layer in dict.fromkeys((*SAMPLE_LAYERS.values(), *FEW_CHANNELS)):
        whole = [workload(layer).problem(PRECISIONS[precision], layout) for layout in layouts]
        cut = [resized(each, tuple(min(size, MOST_VOXELS) for size in each.size), 1) for each in whole]
        served_ones = [each for each in cut if form(name).supports(each, DEVICE) is None][:most_layouts]
        found += served_ones
        most_layers -= bool(served_ones)
        if not most_layers:
            break
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_rounding_is_torchs_on_the_same_gpu(name, precision):
    """Real layers: against float64, and no further from it than torch's own in the same precision allows."""
    record = form(name)
    with products_in(precision):
        problems = layers_judged(name, precision)
        assert bool(problems) == ((name, precision) not in NOT_SERVED)
        for problem in problems:
            chosen = Selection(record, record.default(problem, DEVICE), "tested")
            plan = dispatch.plan_of(problem, DEVICE, **{record.pass_name: chosen})
            case = Case(problem, DEVICE)
            verdict = case.verdict(plan, record.pass_name)
            assert verdict.ok, f"{problem}: {verdict}"
            answer = case.call(plan, record.pass_name)
            twice(lambda answer=answer: list(answer()))


@pytest.mark.parametrize("of_matrices", ["ieee", "tf32"])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_formulations_in_matrix_products_obey_the_switch_of_the_convolutions(precision, of_matrices):
    """Whatever the switch of the matrices says, which nothing touches."""
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, of_matrices
    try:
        for name, layout in itertools.product(PRODUCTS, LAYOUTS):
            record = variant(name)
            size, taps = ((1, 1, 1), (4, 4, 4)) if "linear" in name else ((4, 5, 6), (2, 2, 2))
            out = tuple(s * k for s, k in zip(size, taps, strict=True))
            problem = Problem(2, 512, 64, size, taps, taps, (0, 0, 0), out, layout=layout, bias=True)
            case = Case(problem, DEVICE)
            plan = dispatch.plan_of(problem, DEVICE, **{record.pass_name: Selection(record, {}, "tested")})
            with products_in(precision):
                answer = case.call(plan, record.pass_name)()[0]
            (output, exact), *_ = case.exact(record.pass_name).items()
            error = (answer.double() - exact).abs().max() / exact.abs().max()
            # TF32 is off by some 3e-4, where cuDNN takes it.
            assert error < (1e-5 if precision == "ieee" else 1e-2), f"{name}: {output} is off by {error:.2g}"
        assert switch.fp32_precision == of_matrices
    finally:
        switch.fp32_precision = before


def layers_of(names):
    """(layer, x, grad_y, problem) of a class of layers that the variants serve, float16; in NDHWC where they can.

    Of the first such class, and of each for the general variants.
    """
    for c_in, c_out, k, s, p, q, groups in TRAINED.values():
        out = tuple((size - 1) * s - 2 * p + k + q for size in SIZE)
        problems = [
            Problem(2, c_in, c_out, SIZE, (k,) * 3, (s,) * 3, (p,) * 3, out, groups=groups, dtype=torch.float16,
                    layout=layout, bias=True) for layout in ("ndhwc", "ncdhw")
        ]  # fmt: skip
        problem = next((each for each in problems if served(names, each)), None)
        if problem is not None:
            layer = tritonconv.ConvTranspose3d(c_in, c_out, k, s, p, q, groups=groups).to(DEVICE, torch.float16)
            x, grad_y = (
                torch.randn(shape, device=DEVICE).to(torch.float16, memory_format=problem.memory_format)
                for shape in (problem.x_shape, problem.y_shape)
            )
            yield layer, x.requires_grad_(), grad_y, problem
            if names != GENERAL:
                return


def step(layer, x, grad_y) -> list[torch.Tensor]:
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), grad_y)]


# The two tests of the same variants run in one process, which compiles their kernels once.
TOGETHER = [
    pytest.param(names, id="+".join(names), marks=pytest.mark.xdist_group("+".join(names))) for names in triples()
]


@pytest.mark.parametrize("names", TOGETHER)
def test_a_training_step_in_a_cuda_graph(names):
    """Captured once, replayed with other values: bitwise what the eager call gives, and the same every time."""
    seen = 0
    for layer, x, grad_y, problem in layers_of(names):
        with in_force(names, problem):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step(layer, x, grad_y)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = step(layer, x, grad_y)
            with torch.no_grad():
                for tensor in (x, grad_y, *layer.parameters()):
                    tensor.normal_()
            want = twice(lambda each=(layer, x, grad_y): step(*each))
            for _ in range(2):
                for tensor in found:
                    tensor.fill_(math.nan)
                graph.replay()
                assert all(map(torch.equal, found, want))
            seen += 1
    assert seen


@pytest.mark.parametrize("names", TOGETHER)
def test_launches_follow_the_current_stream(names):
    """Behind work that fills the operands on a side stream, with nothing else to wait for."""
    seen = 0
    for layer, x, grad_y, problem in layers_of(names):
        with in_force(names, problem):
            want = twice(lambda each=(layer, x, grad_y): step(*each))
            late = torch.zeros_like(x, requires_grad=True)
            torch.cuda.synchronize()
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                torch.cuda._sleep(20_000_000)
                with torch.no_grad():
                    late.copy_(x)
                found = step(layer, late, grad_y)
            side.synchronize()
            assert all(map(torch.equal, found, want))
            seen += 1
    assert seen


def test_what_waits_for_the_gpu_is_not_captured_and_what_comes_after_is():
    x = torch.ones(3, device=DEVICE)
    for call in (lambda: x.sum().item(), lambda: x.cpu(), torch.cuda.synchronize):
        assert captured(call, DEVICE) is None
    names = "forward_shuffle", "backward_data_fused", "backward_weight_fused"
    with tritonconv.use(*names):
        layer, x, grad_y, _ = next(layers_of(names))
        seen = []
        replay = captured(lambda: seen.append(step(layer, x, grad_y)), DEVICE)
        assert replay is not None
        want = twice(lambda: step(layer, x, grad_y))
        for tensor in seen[-1]:
            tensor.fill_(math.nan)
        replay()
        assert all(map(torch.equal, seen[-1], want))


def test_the_second_call_goes_past_tritons_launcher(monkeypatch):
    from triton.runtime.jit import JITFunction

    with tritonconv.use("forward_shuffle", "backward_data_fused", "backward_weight_fused"):
        layer, x, grad_y, _ = next(layers_of(("forward_shuffle", "backward_data_fused", "backward_weight_fused")))
        first = twice(lambda: step(layer, x, grad_y))
        monkeypatch.setattr(JITFunction, "run", None)
        assert all(map(torch.equal, step(layer, x, grad_y), first))


def test_autocast_and_torch_compile_on_a_gpu():
    layer = tritonconv.ConvTranspose3d(16, 16, 2, stride=2).to(DEVICE)
    x = torch.randn(1, 16, 4, 4, 4, device=DEVICE, requires_grad=True)
    with tritonconv.use("forward_shuffle", "backward_data_fused", "backward_weight_fused"):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            (y,) = twice(lambda: [layer(x)])
        assert y.dtype is torch.bfloat16
        leaves = (x, *layer.parameters())
        eager = twice(lambda: list(torch.autograd.grad(y.float().square().sum(), leaves, retain_graph=True)))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            z = torch.compile(layer, fullgraph=True)(x)
        assert torch.equal(y, z)
        assert all(map(torch.equal, eager, torch.autograd.grad(z.float().square().sum(), (x, *layer.parameters()))))


def test_calls_run_torchs_own_until_the_kernels_are_compiled(tmp_path, monkeypatch):
    """A choice of the store, from a cold cache: no call waits for the compiler, and each answer is right."""
    from triton import knobs

    problem = Problem(2, 48, 40, SIZE, (2,) * 3, (2,) * 3, (0,) * 3, (10, 12, 14), dtype=torch.float16, layout="ndhwc")
    names = ("forward_phases", "backward_data_gemm", "backward_weight_splitk")
    monkeypatch.setenv("TRITONCONV_CACHE", str(tmp_path))
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "triton"))
    records = [variant(name) for name in names]
    entries = {
        str(Key.of(problem, record.pass_name)): Entry(
            record.name, dict(record.default(problem, DEVICE)), 1.0, 2.0, "", str(problem), record.pass_name, "2026"
        )
        for record in records
    }
    store.merge(Table(device_name(DEVICE), entries))
    dispatch.forget()
    try:
        layer = tritonconv.ConvTranspose3d(48, 40, 2, 2, bias=False).to(DEVICE, torch.float16)
        x, grad_y = (
            torch.randn(shape, device=DEVICE).to(torch.float16, memory_format=torch.channels_last_3d)
            for shape in (problem.x_shape, problem.y_shape)
        )
        x.requires_grad_()
        y = torch.nn.functional.conv_transpose3d(x, layer.weight, None, 2)
        want = [y.detach(), *torch.autograd.grad(y, (x, layer.weight), grad_y)]
        plan = dispatch.plan(problem, x.device)
        found = step(layer, x, grad_y)
        assert not any(kind.runs for replay in plan.replays.values() for kind in replay.kept.values())
        for got, right in zip(found, want, strict=True):
            torch.testing.assert_close(got, right, atol=0.02 * right.abs().max().item(), rtol=0)
        assert tritonconv.wait_until_compiled(300)
        found = step(layer, x, grad_y)
        assert all(kind.runs for replay in plan.replays.values() for kind in replay.kept.values())
        for got, right in zip(found, want, strict=True):
            torch.testing.assert_close(got, right, atol=0.02 * right.abs().max().item(), rtol=0)
        twice(lambda: step(layer, x, grad_y))
    finally:
        monkeypatch.undo()
        dispatch.forget()


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stage_copies_its_skip_bit_for_bit_by_wide_elements(monkeypatch, layout, skip_first):
    monkeypatch.setattr(torch_layout, "LEAST_WIDE", 0)
    order, kind = LAYOUTS[layout], {"device": DEVICE, "dtype": torch.float16}
    layer = tritonconv.ConvTranspose3d(8, 8, 2, stride=2, **kind)
    x = torch.randn(2, 8, 2, 3, 4, **kind).contiguous(memory_format=order).requires_grad_()
    skip = torch.randn(2, 24, 4, 6, 8, **kind).contiguous(memory_format=order).requires_grad_()
    with tritonconv.use("forward_shuffle"):
        found, y = tritonconv.up_concat(layer, x, skip, skip_first), layer(x)
    want = torch.cat((skip, y) if skip_first else (y, skip), 1)
    assert torch.equal(found, want) and found.stride() == want.stride()
    leaves, grad = (x, skip, layer.weight, layer.bias), torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(want, leaves, grad))
