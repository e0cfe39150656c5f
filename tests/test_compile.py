"""torch.compile around the operation: graphs, gradients, new sizes, transforms and autocast inside. Runs on the CPU.

``aot_eager`` traces and partitions as the default backend does, and needs no C++ compiler. Variants are forced where
ours could run, because tiny problems go to torch itself by default.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from beside_torch import HYPER, OURS, PHASES, TORCH, close, f64, operands, ours, theirs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import tritonconv
from tritonconv import dispatch, operators
from tritonconv.problem import PASSES


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def targets(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def compiled(function, dynamic=None, backend="aot_eager"):
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


def gradients(function, args):
    leaves = [t.detach().clone().requires_grad_() for t in args]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)


@pytest.mark.parametrize("shape", ["batched", "unbatched", "channels_last"])
def test_a_compiled_call_and_its_gradients(variants, launches, shape):
    x, weight, bias = operands()
    x = x[0] if shape == "unbatched" else x
    x = x.to(memory_format=torch.channels_last_3d) if shape == "channels_last" else x
    for got, want in zip(
        gradients(compiled(ours), (x, weight, bias)), gradients(theirs, (x, weight, bias)), strict=True
    ):
        close(got, want)
    batched = x[None] if shape == "unbatched" else x
    arguments = (*(HYPER[name] for name in ("stride", "padding", "output_padding")), 1, 1)
    plan = dispatch.plan_for(batched, weight, bias, arguments)
    eager = [] if plan.torch_alone is not None else sorted(plan.choice(name).variant.name for name in PASSES)
    assert sorted(launches) == eager, "the variants of an eager call"


def compiled_graphs(function, args):
    """The forward and the backward graph of a compiled call, each with the real arguments it ran on."""
    ran = []

    def keep(module, inputs):
        def run(*real):
            ran.append((module, real))
            return module(*real)

        return run

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep, bw_compiler=keep)
    gradients(compiled(function, backend=backend), args)
    return ran


def test_the_compiled_graph_holds_what_runs_and_counts_torchs_flops(variants):
    args = operands()
    flops = []
    name = "tritonconv.conv_transpose3d" if variants else "aten.convolution"
    for (module, real), suffix in zip(compiled_graphs(ours, args), ("", "_backward"), strict=True):
        assert [t for t in targets(module.graph) if "conv" in t] == [f"{name}{suffix}.default"]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*real)
        flops.append(counter.get_total_flops())
    leaves = [t.requires_grad_() for t in args]
    with FlopCounterMode(display=False) as forward:
        y = theirs(*leaves)
    with FlopCounterMode(display=False) as backward:
        y.square().sum().backward()
    assert flops == [forward.get_total_flops(), backward.get_total_flops()]
    assert min(flops) > 0


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)])
def test_new_sizes_do_not_recompile_without_end(variants, dynamic, graphs):
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(ours, dynamic=dynamic, backend=counter)
    _, weight, bias = operands()
    sizes = [
        (9, (5, 6, 7)),
        (3, (4, 5, 6)),
        (5, (3, 3, 3)),
        (4, (7, 2, 5)),
        (2, (6, 8, 2)),
        (9, (2, 2, 8)),
    ]  # first all different
    for n, size in sizes:
        x = torch.randn(n, 3, *size, dtype=f64)
        for got, want in zip(gradients(function, (x, weight, bias)), gradients(theirs, (x, weight, bias)), strict=True):
            close(got, want)
    assert counter.frame_count == graphs, f"{counter.frame_count} graphs for {len(sizes)} sizes"


class Decoder(torch.nn.Module):
    """Down and up again to the size of the input, whatever that is."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.down = torch.nn.Conv3d(1, 2, 3, stride=3, padding=1)
        self.up = kind(2, 1, 3, stride=3, padding=1)

    def forward(self, x):
        return self.up(self.down(x), output_size=x.shape[2:])


def test_output_size_needs_no_more_graphs_than_torchs_layer(variants):
    graphs, answers = [], []
    for kind in (torch.nn.ConvTranspose3d, tritonconv.ConvTranspose3d):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        call = torch.compile(Decoder(kind), backend=counter, fullgraph=True, dynamic=True)
        with torch.no_grad():
            answers.append([call(torch.ones(1, 1, *size)) for size in itertools.product((9, 10, 11), repeat=3)])
        graphs.append(counter.frame_count)
    for got, want in zip(*answers, strict=True):
        assert got.shape == want.shape
        close(got, want)
    assert graphs[1] <= graphs[0]


def test_hyper_parameters_may_be_symbolic(variants):
    """Integers that change from call to call are inputs of the graph, as they are for torch's operation."""

    def call(function):
        return lambda x, weight, stride, padding: function(x, weight, None, stride, padding)

    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(call(OURS), dynamic=True, backend=counter)
    x, weight, _ = operands(size=(5, 4, 6))
    for stride, padding in ((2, 1), (3, 2), (5, 3), (4, 1), (6, 2), (7, 3), (3, 1), (4, 2), (5, 1), (6, 1), (8, 3)):
        close(function(x, weight, stride, padding), call(TORCH)(x, weight, stride, padding))
    assert counter.frame_count <= 3


def test_front_and_back_crops_compile(variants):
    args, crops = operands(), ((1, 0), (0, 2), (3, 1))
    got = gradients(compiled(lambda *t: OURS(*t, 2, crops)), args)
    for found, want in zip(got, gradients(lambda *t: TORCH(*t, 2)[:, :, 1:, :-2, 3:-1], args), strict=True):
        close(found, want)


def test_each_part_of_a_compiled_graph_takes_the_variants_in_force_where_it_runs(launches):
    leaves = [t.requires_grad_() for t in operands()]
    forward = [name for name in PHASES if name.startswith("forward")]
    with tritonconv.use(*PHASES):
        y = compiled(ours)(*leaves)
    assert list(launches) == forward
    y.sum().backward()
    assert not set(launches[1:]) & set(PHASES)


@pytest.mark.parametrize("name", ["vmap", "jvp", "grad", "forward_ad"])
def test_transforms_inside_a_compiled_function(variants, name):
    x, weight, bias = operands()

    def by_forward_ad(f):
        def tangent(t):
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(f(forward_ad.make_dual(t, torch.ones_like(t)), weight, bias)).tangent

        return tangent

    transforms = {
        "vmap": lambda f: lambda t: vmap(lambda one: f(one[None], weight, bias))(t),
        "jvp": lambda f: lambda t: jvp(lambda one: f(one, weight, bias), (t,), (torch.ones_like(t),))[1],
        "grad": lambda f: lambda t: grad(lambda one: f(one, weight, bias).pow(2).sum())(t),
        "forward_ad": by_forward_ad,
    }
    close(compiled(transforms[name](ours))(x), transforms[name](theirs)(x))


def test_autocast_inside_and_around_a_compiled_function(variants):
    args = operands(dtype=torch.float32)

    def inside(*t):
        with torch.autocast("cpu", torch.bfloat16):
            return ours(*t)

    got = compiled(inside)(*args)
    with torch.autocast("cpu", torch.bfloat16):
        around, want = compiled(ours)(*args), theirs(*args)
        assert compiled(ours)(*[t.double() for t in args]).dtype == f64
    assert got.dtype == around.dtype == torch.bfloat16
    limit = torch.finfo(torch.bfloat16).eps * 108**0.5 * want.abs().max()
    assert (got - want).abs().max() <= limit
    assert (around - want).abs().max() <= limit
    leaves = [t.requires_grad_() for t in args]
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(compiled(inside)(*leaves).float().sum(), leaves))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_reduce_overhead(variants, device):
    """CUDA graphs on a GPU; the compiler's default elsewhere. Three steps: the first compile, later ones replay."""
    args = [t.to(device) for t in operands(dtype=torch.float32)]
    call = torch.compile(ours, fullgraph=True, mode="reduce-overhead")
    want = gradients(theirs, args)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        for got, other in zip(gradients(call, args), want, strict=True):
            torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(call(*args), want[0], rtol=1e-4, atol=1e-3)


def test_a_wrong_call_is_refused_while_compiling():
    x, weight, bias = operands()
    with pytest.raises(Exception, match="weight expects 3 input channels"):
        compiled(ours)(x[:, :2], weight, bias)


@pytest.mark.parametrize("appended", [0, 1])
@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
def test_opcheck(variants, layout, appended):
    x, weight, bias = (t.requires_grad_() for t in operands(dtype=f64))
    if layout == "ndhwc":
        x = x.detach().to(memory_format=torch.channels_last_3d).requires_grad_()
    geometry = ([2, 3, 2], [4, 7 + appended, 4], [3, 4, 3], [2, 2, 2], [1, 1, 1], [1, 1, 1], 1)
    grad_y = torch.randn(2, 4, *geometry[1], dtype=f64, requires_grad=True)
    torch.library.opcheck(operators.forward.default, (x, weight, bias, *geometry))
    torch.library.opcheck(operators.forward.default, (x, weight, None, *geometry))
    for wanted in ((True, True, True), (True, False, False), (False, True, True)):
        given = x if wanted[1] else None, weight if wanted[0] else None
        arguments = grad_y, *given, *geometry, layout, wanted[2], wanted
        torch.library.opcheck(operators.backward.default, arguments)
