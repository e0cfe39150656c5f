"""The guards of a compiled graph: it holds torch's operation where that runs, and follows ``use`` and tuning. CPU."""

from __future__ import annotations

import contextvars
import itertools
import threading

import pytest
import torch
from beside_torch import PHASES
from plan_calls import watch_pass
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import GraphModule

import tritonconv
from tritonconv import dispatch, guards, operators
from tritonconv.autotune import store
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.sources import revision
from tritonconv.autotune.store import Entry, Table
from tritonconv.kernels.registry import have_triton, variant
from tritonconv.problem import PASSES, Problem

NATIVE = tuple(f"{name}_torch_native" for name in PASSES)
FUSED = ("forward_shuffle", "backward_data_fused", "backward_weight_fused")
GEOMETRY = (2, 2, 2), (4, 5, 4), (2, 3, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), 1
LAST = torch.channels_last_3d


@pytest.fixture(autouse=True)
def _fresh(own_store):
    torch._dynamo.reset()


def layers(bias=True, **more):
    """Two of our layers and two of torch's, the same parameters."""
    models = []
    for kind in (tritonconv.ConvTranspose3d, nn.ConvTranspose3d):
        torch.manual_seed(0)
        one, two = (kind(4, 4, 3, stride=2, bias=bias, **more) for _ in range(2))
        models.append(nn.Sequential(one, nn.ReLU(), two))
    return models


class Graphs:
    """A backend that keeps the graphs it is given, forward and backward."""

    def __init__(self):
        self.found: list[GraphModule] = []
        keep = self.keep
        self.backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)

    def keep(self, module, inputs):
        self.found.append(module)
        return module

    def targets(self):
        return [[str(node.target) for node in each.graph.nodes if node.op == "call_function"] for each in self.found]


def tune(bias, **variants):
    """The user's store as a tuner leaves it: these variants won for the small layer of this file."""
    problem = Problem(1, 4, 4, (3, 3, 3), (3, 3, 3), (2, 2, 2), (0, 0, 0), (7, 7, 7), bias=bias)
    entries = {}
    for pass_name, name in variants.items():
        record = variant(name)
        entries[str(Key.of(problem, pass_name))] = Entry(
            name, {}, 1.0, 2.0, revision(record), str(problem), "forward_backward", "2026-01-01T00:00:00"
        )
    store.merge(Table(device_name(torch.device("cpu")), entries))
    dispatch.forget()


def small(bias=True):
    torch.manual_seed(0)
    return tritonconv.ConvTranspose3d(4, 4, 3, stride=2, bias=bias), torch.randn(1, 4, 3, 3, 3, requires_grad=True)


# ------------------------------------------------------------------ torch's own operation in the graph


@pytest.mark.parametrize("mode", ["training", "no_grad", "channels_last", "unbatched"])
def test_where_torch_runs_the_graph_is_the_one_of_torchs_layer(mode):
    graphs = []
    for model in layers(padding=1, output_padding=1):
        kept = Graphs()
        x = torch.randn(2, 4, 3, 2, 3)
        x = x.to(memory_format=LAST) if mode == "channels_last" else x[0] if mode == "unbatched" else x
        with torch.set_grad_enabled(mode != "no_grad"):
            y = torch.compile(model, backend=kept.backend, fullgraph=True)(x)
        if mode != "no_grad":
            y.sum().backward()
        graphs.append([[t for t in each if t != "aten.clone.default"] for each in kept.targets()])
        torch._dynamo.reset()
    assert graphs[0] == graphs[1]
    assert sum("conv" in target for target in graphs[0][0]) == 2


def test_a_call_without_gradients_asks_for_its_forward_alone():
    tune(True, backward_weight=PHASES[2])
    layer, x = small()
    kept = Graphs()
    call = torch.compile(layer, backend=kept.backend, fullgraph=True)
    with torch.no_grad():
        call(x)
    call(x).sum().backward()
    found = [[t for t in each if "conv" in t] for each in kept.targets()]
    assert found == [
        ["aten.convolution.default"],
        ["tritonconv.conv_transpose3d.default"],
        ["tritonconv.conv_transpose3d_backward.default"],
    ]


def test_symbolic_sizes_keep_the_operator():
    layer, x = small()
    kept = Graphs()
    with torch.no_grad():
        torch.compile(layer, backend=kept.backend, fullgraph=True, dynamic=True)(x)
    assert [t for t in kept.targets()[0] if "conv" in t] == ["tritonconv.conv_transpose3d.default"]


# ------------------------------------------------------------------ the guards


def test_a_graph_follows_what_is_in_force(launches):
    layer, x = small()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(layer, backend=counter, fullgraph=True)

    def ran():
        launches.clear()
        with torch.no_grad():
            call(x)
        return list(launches), counter.frame_count

    assert ran() == ([], 1)
    with tritonconv.use(PHASES[0]):
        context = contextvars.copy_context()
        assert ran() == ([PHASES[0]], 2)
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(ran()))
        thread.start()
        thread.join()
        assert elsewhere == [([], 2)], "a block of this thread does not reach another"
        with tritonconv.use("forward_torch_columns"):
            assert ran()[0] == ["forward_torch_columns"]
    graphs = counter.frame_count
    assert ran() == ([], graphs)
    assert context.run(ran) == ([PHASES[0]], graphs), "a context that outlives its block"
    with tritonconv.use(PHASES[0]):
        assert ran() == ([PHASES[0]], graphs), "nothing is compiled a second time"


def test_a_forced_variant_that_does_not_serve_is_refused_in_a_compiled_call_too():
    layer, x = small()
    with torch.no_grad():
        call = torch.compile(layer, backend="aot_eager", fullgraph=True)
        call(x)
        with (
            tritonconv.use("forward_torch_shuffle"),
            pytest.raises(tritonconv.VariantNotApplicable, match="forward_torch_shuffle was forced"),
        ):
            call(x)


def test_a_graph_follows_what_is_tuned_after_it_was_compiled(launches):
    layer, x = small()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(layer, backend=counter, fullgraph=True)
    call(x).sum().backward()
    assert (launches, counter.frame_count) == ([], 1)
    dispatch.forget()
    tune(False, forward=PHASES[0])  # another layer's
    call(x).sum().backward()
    assert (launches, counter.frame_count) == ([], 1), "the choice for this call is what it was"
    tune(True, **dict(zip(PASSES, PHASES, strict=True)))
    call(x).sum().backward()
    assert (launches, counter.frame_count) == (list(PHASES), 2)
    store.path_of(device_name(torch.device("cpu"))).unlink()
    dispatch.forget()
    launches.clear()
    call(x).sum().backward()
    assert (launches, counter.frame_count) == ([], 2), "and back"


def test_a_tuner_sees_the_calls_of_a_compiled_model():
    layer, x = small()
    call = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        call(x)
        for _ in range(2):
            with dispatch.watch() as seen:
                call(x)
            assert [str(problem) for problem, _ in seen] == ["n1 4->4 3x3x3 k3 s2 float32 ncdhw bias"]


def test_an_unknown_attribute_is_an_attribute_error():
    assert not hasattr(guards, "call_of_nobody")


def test_a_graph_that_is_recorded_holds_no_standby(monkeypatch, launches, standing_by):
    """The first run waits for the kernels: a CUDA graph is recorded at the second one."""
    waits, capturing = [], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(dispatch, "wait_until_compiled", lambda: waits.append(list(launches)))
    layer, x = small()
    with tritonconv.use(*PHASES):
        call = torch.compile(layer, backend="aot_eager", fullgraph=True)
        capturing.append(True)  # nothing may be waited for
        call(x).sum().backward()
        assert (launches, waits) == (list(PHASES), [])
        capturing.clear()
        launches.clear()
        call(x).sum().backward()
        assert waits == [[PHASES[0]], [PHASES[0], *PHASES]]
        assert launches == [PHASES[0], *PHASES, *PHASES[1:]]
        launches.clear()
        call(x).sum().backward()
    assert launches == list(PHASES) and len(waits) == 2


# ------------------------------------------------------------------ eager and compiled choose alike


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_with_a_filled_store_eager_and_compiled_run_the_same_variants(launches, bias, dynamic):
    tune(bias, **dict(zip(PASSES, (NATIVE[0], PHASES[1], PHASES[2]), strict=True)))
    layer, x = small(bias)
    layer(x).sum().backward()
    eager = list(launches)
    want = [t.grad.clone() for t in (x, *layer.parameters())]
    layer.zero_grad()
    x.grad = None
    launches.clear()
    torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)(x).sum().backward()
    assert launches == eager == [NATIVE[0], PHASES[1], PHASES[2]]
    for got, other in zip((x, *layer.parameters()), want, strict=True):
        torch.testing.assert_close(got.grad, other)


@pytest.mark.skipif(not have_triton(), reason="the fused backward is a Triton kernel")
def test_the_joint_backward_runs_in_a_compiled_graph_too(monkeypatch):
    ran = []

    for name in (*PASSES, "forward_and_pack", "backward"):
        watch_pass(monkeypatch, name, lambda plan, *operands, name=name: ran.append(name))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer, x = tritonconv.ConvTranspose3d(4, 4, 2, stride=2).to(device), torch.randn(1, 4, 2, 2, 2, device=device)
    with tritonconv.use(*FUSED):
        for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            call(x.requires_grad_()).sum().backward()
    assert ran == ["forward", "backward"] * 2


@pytest.mark.parametrize("needs", [n for n in itertools.product((False, True), repeat=3) if any(n)], ids=str)
def test_a_compiled_backward_computes_only_what_is_needed(launches, monkeypatch, needs):
    asked = []
    watch_pass(monkeypatch, "backward_weight", lambda plan, x, grad_y, need_bias, *more: asked.append(need_bias))
    shapes = (1, 4, 3, 3, 3), (4, 4, 3, 3, 3), (4,)
    leaves = [torch.randn(shape, requires_grad=need) for shape, need in zip(shapes, needs, strict=True)]
    call = torch.compile(tritonconv.conv_transpose3d, backend="aot_eager", fullgraph=True)
    with tritonconv.use(*PHASES):
        call(*leaves, stride=2).square().sum().backward()
    assert launches == [name for name, need in zip(PHASES, (True, *needs[:2]), strict=True) if need]
    assert asked == ([needs[2]] if needs[1] else [])
    twins = [t.detach().clone().requires_grad_(t.requires_grad) for t in leaves]
    torch.nn.functional.conv_transpose3d(*twins, stride=2).square().sum().backward()
    for got, want in zip(leaves, twins, strict=True):
        assert (got.grad is None) is (want.grad is None)
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-4)


def test_derivatives_of_an_operator_share_the_plan_of_its_call(monkeypatch):
    """Also where an operand of the derivative has another layout, or there is no bias any more."""
    planned = []
    real = dispatch.plan
    monkeypatch.setattr(dispatch, "plan", lambda problem, *more: planned.append(problem) or real(problem, *more))
    x = torch.randn(1, 2, 2, 2, 2, dtype=torch.float64).to(memory_format=LAST).requires_grad_()
    weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 2, 3, 2), (3,)))
    with tritonconv.use(*PHASES):
        operators._planned.cache_clear()
        y = operators.forward(x, weight, bias, *GEOMETRY)
        direction = torch.randn(y.shape, dtype=torch.float64, requires_grad=True)  # in NCDHW
        first = torch.autograd.grad(y, (x, weight, bias), direction, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, direction))
        assert len(planned) == 1 and (planned[0].layout, planned[0].bias) == ("ndhwc", True)
        operands = x, weight, bias
        assert torch.autograd.gradcheck(lambda *t: operators.forward(*t, *GEOMETRY), operands, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *t: operators.forward(*t, *GEOMETRY), operands, fast_mode=True)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, True)], ids=str)
def test_batched_gradients_of_the_operators(wanted):
    """``is_grads_batched`` runs the backward operator under vmap."""
    leaves = [torch.randn(s, dtype=torch.float64) for s in ((1, 2, 2, 2, 2), (2, 3, 2, 3, 2), (3,))]
    needed = [t.requires_grad_() for t, need in zip(leaves, wanted, strict=True) if need]
    directions = torch.randn(3, 1, 3, 4, 5, 4, dtype=torch.float64)
    found = []
    for y in (operators.forward(*leaves, *GEOMETRY), torch.conv_transpose3d(*leaves, 2)):
        found.append(torch.autograd.grad(y, needed, directions, is_grads_batched=True))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
