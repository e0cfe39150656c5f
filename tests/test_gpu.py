"""What only a GPU shows: four precisions beside torch's own, graphs, streams, tensors beyond 2**31 elements.

The exact tests of test_triton_kernels.py and test_triton_layers.py run on a GPU too. With pytest-xdist:
``pytest -n 8 --dist loadgroup tests/test_gpu.py``.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_triton_kernels import NAMES
from test_triton_layers import TRAINED, served, triples
from variant_cases import DEVICE

import tritonconv
from tritonconv import Problem, dispatch
from tritonconv.autotune.choose import Selection
from tritonconv.bench.workloads import resized, workload
from tritonconv.inspection.compiling import PRECISIONS, products_in
from tritonconv.inspection.jobs import CLASSES
from tritonconv.kernels.registry import variant, variants
from tritonconv.problem import LAYOUTS
from tritonconv.tuning.case import Case

pytestmark = pytest.mark.gpu

MOST_VOXELS = 24  # of an axis of a real layer as it is judged
SIZE = (5, 6, 7)


def judged(name: str, problem: Problem):
    record = variant(name)
    chosen = Selection(record, record.default(problem, DEVICE), "tested")
    plan = dispatch.plan_of(problem, DEVICE, **{record.pass_name: chosen})
    return Case(problem, DEVICE).judge(plan, record.pass_name)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_rounding_is_torchs_on_the_same_gpu(name, precision):
    """Real layers, cut: against float64, and no further from it than torch's own in the same precision allows."""
    checked = 0
    with products_in(precision):
        for layer in dict.fromkeys(CLASSES.values()):
            for layout in LAYOUTS:
                problem = workload(layer).problem(PRECISIONS[precision][0], layout)
                problem = resized(problem, tuple(min(each, MOST_VOXELS) for each in problem.size), 1)
                if variant(name).supports(problem, DEVICE) is None:
                    checked += 1
                    verdict = judged(name, problem)
                    assert verdict.ok, f"{problem}: {verdict}"
    assert checked


def layers_of(names):
    """(layer, x, grad_y) of each class of layers that the variants serve, in float16; NDHWC where they serve that."""
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
            yield layer, x.requires_grad_(), grad_y


def step(layer, x, grad_y) -> list[torch.Tensor]:
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), grad_y)]


@pytest.mark.parametrize("names", triples(), ids="+".join)
def test_a_training_step_in_a_cuda_graph(names):
    """Captured once, replayed with other values: bitwise what the eager call gives, and the same every time."""
    captured = 0
    with tritonconv.use(*names):
        for layer, x, grad_y in layers_of(names):
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
            graph.replay()
            first = [each.clone() for each in found]
            graph.replay()
            assert all(map(torch.equal, found, first))
            assert all(map(torch.equal, found, step(layer, x, grad_y)))
            captured += 1
    assert captured


@pytest.mark.parametrize("names", triples(), ids="+".join)
def test_launches_follow_the_current_stream(names):
    """Behind work that fills the operands on a side stream, with nothing else to wait for."""
    seen = 0
    with tritonconv.use(*names):
        for layer, x, grad_y in layers_of(names):
            want = step(layer, x, grad_y)
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


def test_the_second_call_goes_past_tritons_launcher(monkeypatch):
    from triton.runtime.jit import JITFunction

    with tritonconv.use("forward_shuffle", "backward_data_fused", "backward_weight_fused"):
        layer, x, grad_y = next(layers_of(("forward_shuffle", "backward_data_fused", "backward_weight_fused")))
        first = step(layer, x, grad_y)
        monkeypatch.setattr(JITFunction, "run", None)
        assert all(map(torch.equal, step(layer, x, grad_y), first))


# ------------------------------------------------------------------ more than 2**31 elements

GIANT = {
    "k2 s2": Problem(1, 8, 8, (256, 1024, 130), (2, 2, 2), (2, 2, 2), (0, 0, 0), (512, 2048, 260)),
    "k3 s2": Problem(1, 16, 16, (130, 1024, 128), (3, 3, 3), (2, 2, 2), (1, 1, 1), (260, 2048, 256)),
    "depthwise": Problem(1, 16, 16, (130, 1024, 128), (3, 3, 3), (2, 2, 2), (1, 1, 1), (260, 2048, 256), groups=16),
}
TAIL = 8  # planes of x at the end that are compared


def giant(label: str, layout: str) -> Problem:
    problem = GIANT[label]
    assert math.prod(problem.y_shape) > 2**31
    return Problem(problem.n, problem.c_in, problem.c_out, problem.size, problem.kernel, problem.stride, problem.crop,
                   problem.out_size, problem.dilation, problem.groups, torch.float16, layout)  # fmt: skip


def integers(shape, layout: str) -> torch.Tensor:
    empty = torch.empty(shape, dtype=torch.float16, device=DEVICE, memory_format=LAYOUTS[layout])
    return empty.random_(-2, 3)


@pytest.mark.xdist_group("giant")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("label", GIANT)
def test_tensors_beyond_2_to_31_elements(label, layout):
    """The planes at the far end are those of a small problem of the same values."""
    problem = giant(label, layout)
    weight = torch.randint(-2, 3, problem.weight_shape, device=DEVICE).half()
    x, grad_y = integers(problem.x_shape, layout), integers(problem.y_shape, layout)
    with torch.no_grad():
        x[:, :, : 1 - TAIL] = 0  # so that grad_weight is that of the tail, and of no grad_y before it
    tail = x[:, :, -TAIL:].double().requires_grad_()
    wide = weight.double().requires_grad_()
    last = torch.conv_transpose3d(tail, wide, None, problem.stride, problem.crop, 1 if problem.kernel[0] == 3 else 0,
                                  problem.groups)  # fmt: skip
    planes = last.shape[2] - 2  # the first ones read what is before the tail
    of_tail = torch.autograd.grad(last, (tail, wide), grad_y[:, :, -last.shape[2] :].double())
    served = 0
    for record in variants():
        if record.backend != "triton" or record.supports(problem, DEVICE) is not None:
            continue
        served += 1
        config = record.default(problem, DEVICE)
        if record.pass_name == "forward":
            y = record.launch(problem, config, x, weight, None)
            assert torch.equal(y[:, :, -planes:], last[:, :, -planes:].half()), record.name
        elif record.pass_name == "backward_data":
            grad_x = record.launch(problem, config, grad_y, weight)
            assert torch.equal(grad_x[:, :, 2 - TAIL :], of_tail[0][:, :, 2:].half()), record.name
        else:
            grad_weight, _ = record.launch(problem, config, x, grad_y, False)
            assert torch.equal(grad_weight, of_tail[1].half()), record.name
    assert served >= 3


def test_autocast_and_torch_compile_on_a_gpu():
    layer = tritonconv.ConvTranspose3d(16, 16, 2, stride=2).to(DEVICE)
    x = torch.randn(1, 16, 4, 4, 4, device=DEVICE, requires_grad=True)
    with tritonconv.use("forward_shuffle", "backward_data_fused", "backward_weight_fused"):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype is torch.bfloat16
        eager = torch.autograd.grad(y.float().square().sum(), (x, *layer.parameters()))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            z = torch.compile(layer, fullgraph=True)(x)
        assert torch.equal(y, z)
        assert all(map(torch.equal, eager, torch.autograd.grad(z.float().square().sum(), (x, *layer.parameters()))))
