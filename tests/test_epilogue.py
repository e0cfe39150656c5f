"""``conv_transpose3d(..., activation=, residual=, rounding=)`` beside torch's separate operations. Runs on the CPU."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from beside_torch import PHASES
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import tritonconv
from tritonconv import ArgumentError, ArgumentTypeError, Variant, dispatch
from tritonconv.autotune.choose import Selection
from tritonconv.epilogue import NAMES, Epilogue, activated_, finish, parsed

SLOPES = torch.tensor([0.3, -0.2, 1.5, 0.1, 0.0, 2.0])
# The argument, and torch's operation of (z, slopes).
ACTIVATIONS = {
    None: lambda z, s: z,
    "relu": lambda z, s: torch.relu(z),
    "leaky_relu": lambda z, s: F.leaky_relu(z),
    ("leaky_relu", 0.3): lambda z, s: F.leaky_relu(z, 0.3),
    ("leaky_relu", -0.3): lambda z, s: F.leaky_relu(z, -0.3),
    "prelu": lambda z, s: torch.where(z > 0, z, z * s.view(-1, 1, 1, 1)),
    "sigmoid": lambda z, s: torch.sigmoid(z),
    "tanh": lambda z, s: torch.tanh(z),
    "silu": lambda z, s: F.silu(z),
    "gelu": lambda z, s: F.gelu(z),
    ("gelu", "tanh"): lambda z, s: F.gelu(z, approximate="tanh"),
}
# Shapes of x and the weight, and torch's other arguments: one that is torch's own, and a formulation of ours.
CASES = (((2, 4, 1, 2, 2), (4, 6, 3, 3, 3), (2, 1)), ((1, 4, 2, 1, 2), (4, 3, 2, 2, 2), (2, 0, 0, 2)))
FORMATS = (torch.contiguous_format, torch.channels_last_3d)


def given(activation, slopes=None):
    return ("prelu", SLOPES if slopes is None else slopes) if activation == "prelu" else activation


def operands(case, dtype=torch.float32, memory_format=torch.contiguous_format):
    """x, weight, bias, residual, slopes, and torch's other arguments."""
    x_shape, weight_shape, arguments = case
    x = torch.randn(x_shape, dtype=dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(weight_shape, dtype=dtype) / 4, torch.randn(6, dtype=dtype)
    y = torch.conv_transpose3d(x, weight, bias, *arguments)
    return x, weight, bias, torch.randn(y.shape, dtype=dtype), SLOPES.to(dtype, copy=True), arguments


def ours(x, weight, bias, residual, slopes, arguments, activation, **more):
    return tritonconv.conv_transpose3d(
        x, weight, bias, *arguments, activation=given(activation, slopes), residual=residual, **more
    )


def separate(x, weight, bias, residual, slopes, arguments, activation, convolve=torch.conv_transpose3d):
    y = convolve(x, weight, bias, *arguments)
    return ACTIVATIONS[activation](y if residual is None else y + residual, slopes)


@pytest.fixture(autouse=True)
def _one_thread():
    """A second one only waits where tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_combination_has_torchs_values(dtype):
    """Bit for bit those of torch's separate operations behind our convolution, and near those of float64."""
    tolerance = 8 * torch.finfo(dtype).eps
    for case, memory_format in product(CASES, FORMATS):
        x, weight, bias, residual, slopes, arguments = operands(case, dtype, memory_format)
        exact_slopes, exact_residual = slopes.double(), residual.double()
        for b in (bias, None):
            plain = tritonconv.conv_transpose3d(x, weight, b, *arguments)
            exact = torch.conv_transpose3d(x.double(), weight.double(), None if b is None else b.double(), *arguments)
            for r, (activation, apply) in product((residual, None), ACTIVATIONS.items()):
                y = ours(x, weight, b, r, slopes, arguments, activation)
                z, exact_z = (plain, exact) if r is None else (plain + r, exact + exact_residual)
                want = F.prelu(z, slopes) if activation == "prelu" else apply(z, slopes)
                assert torch.equal(y, want), activation
                assert y.stride() == plain.stride()
                error = (y.double() - apply(exact_z, exact_slopes)).abs()
                assert error.max() <= tolerance * (1 + exact_z.abs().max()), activation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_as_torch_rounds_after_each_step(dtype):
    x, weight, bias, residual, slopes, arguments = operands(CASES[0], dtype)
    differs = 0
    for activation, r in product(ACTIVATIONS, (residual, None)):
        call = x, weight, bias, r, slopes, arguments, activation
        with tritonconv.use("forward_torch_phases"):
            y = tritonconv.conv_transpose3d(x, weight, None, *arguments)
            y = y + bias.view(-1, 1, 1, 1)
            z = y if r is None else y + r
            want = F.prelu(z, slopes) if activation == "prelu" else ACTIVATIONS[activation](z, slopes)
            found = ours(*call, rounding="torch")
            assert torch.equal(found, want)
            differs += not torch.equal(found, ours(*call))
        assert torch.equal(ours(*call, rounding="torch"), separate(*call)), "the bias of torch's own is torch's to add"
    assert differs > 0


def test_the_kernels_round_as_torch_does():
    """In Triton's interpreter, whose half-precision products are right; the functions are torch's operations."""
    pytest.importorskip("triton")
    x, weight, bias, residual, slopes, arguments = operands(CASES[0], torch.float16)
    exact, functions = ("relu", ("leaky_relu", 0.3)), ("sigmoid", "tanh", "silu", "gelu", ("gelu", "tanh"))
    cases = [*product(("forward_phases", "forward_gather"), exact), *product(("forward_gather",), functions)]
    for name, activation in cases:
        with tritonconv.use(name):
            y = tritonconv.conv_transpose3d(x, weight, None, *arguments) + bias.view(-1, 1, 1, 1)
            want = ACTIVATIONS[activation](y + residual, slopes)
            call = x, weight, bias, residual, slopes, arguments, activation
            assert torch.equal(ours(*call, rounding="torch"), want)
            near = separate(*(t.double() for t in call[:5]), *call[5:])
            torch.testing.assert_close(ours(*call).double(), near, rtol=2e-3, atol=2e-3)


def test_nan_stays_nan_and_one_image_needs_no_batch():
    x, weight, bias, residual, slopes, arguments = operands(CASES[0])
    residual[0, 0, 0, 0, 0] = math.nan
    for activation in ACTIVATIONS:
        call = x[0], weight, bias, residual[0], slopes, arguments, activation
        y = ours(*call)
        assert y[0, 0, 0, 0].isnan() and y.isnan().sum() == 1
        torch.testing.assert_close(y, separate(*call), equal_nan=True)


def test_the_epilogue_takes_no_memory_of_its_own():
    y = torch.randn(1, 6, 2, 2, 2)
    for activation in ACTIVATIONS:
        epilogue, slopes = parsed(given(activation), y, None)
        kept = finish(y, epilogue, SLOPES, y.clone(), slopes).data_ptr() == y.data_ptr()
        assert kept is (activation != "prelu")
        recorded = finish(y, epilogue, None, None, slopes, recorded=True).data_ptr() == y.data_ptr()
        assert recorded is epilogue.from_output


# ------------------------------------------------------------------ gradients


def leaves_of(call):
    x, weight, bias, residual, slopes, _, activation = call
    wanted = (x, weight, bias, residual, slopes if activation == "prelu" else None)
    return [t.requires_grad_() for t in wanted if t is not None]


@pytest.mark.parametrize("forced", [(), PHASES], ids=["chosen", "phases"])
def test_gradients_are_those_of_torchs_separate_operations(forced):
    for turn, activation in enumerate(ACTIVATIONS):
        x, weight, bias, residual, slopes, arguments = operands(CASES[0], torch.float64, FORMATS[turn % 2])
        for b, r in ((bias, residual), (bias, None), (None, residual)):
            call = x, weight, b, r, slopes, arguments, activation
            leaves, grad_y = leaves_of(call), torch.randn_like(residual)
            with tritonconv.use(*forced):
                y = ours(*call)
                with torch.no_grad():
                    assert torch.equal(ours(*call), y)
            want = torch.autograd.grad(separate(*call), leaves, grad_y)
            for mine, own in zip(torch.autograd.grad(y, leaves, grad_y), want, strict=True):
                torch.testing.assert_close(mine, own)


def test_a_gradient_of_one_operand_alone():
    x, weight, bias, residual, slopes, arguments = operands(CASES[0], torch.float64)
    for forced, place in product(((), PHASES), range(4)):
        call = [x, weight, bias, residual, slopes, arguments, "sigmoid"]
        call[place] = leaf = call[place].clone().requires_grad_()
        with tritonconv.use(*forced):
            (mine,) = torch.autograd.grad(ours(*call).sum(), leaf)
        torch.testing.assert_close(mine, torch.autograd.grad(separate(*call).sum(), leaf)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradcheck_of_both_orders(activation):
    make = partial(torch.randn, dtype=torch.float64, requires_grad=True)
    x, weight, bias, residual, slopes = make(1, 2, 2, 1, 2), make(2, 2, 2, 2, 2), make(2), make(1, 2, 4, 2, 4), make(2)
    for forced in ((), PHASES):
        with tritonconv.use(*forced):

            def call(*operands):
                return ours(*operands, (2,), activation)

            assert gradcheck(call, (x, weight, bias, residual, slopes), fast_mode=True)
            assert gradgradcheck(call, (x, weight, bias, residual, slopes), fast_mode=True)


# ------------------------------------------------------------------ a variant that takes the epilogue


def test_a_variant_gets_the_epilogue_that_it_takes():
    """The contract of tritonconv/epilogue.py, by a formulation that computes all of it."""
    asked = []

    def launch(problem, config, x, weight, bias, epilogue=None, residual=None, slopes=None):
        asked.append((epilogue, residual is not None, slopes is not None))
        y = torch.conv_transpose3d(x, weight, bias, *problem.torch_arguments)
        return finish(y, Epilogue() if epilogue is None else epilogue, None, residual, slopes)

    stub = Variant("forward_stub", "forward", "a stub", "torch", launch=launch,
                   epilogue=lambda problem, config, epilogue: epilogue.rounding is None)  # fmt: skip
    dispatch.forget()
    case = (1, 4, 2, 3, 2), (4, 6, 3, 3, 3), (2, 1)
    x, weight, bias, residual, slopes, arguments = operands(case, torch.float64)
    plan = dispatch.plan_for(x, weight, bias, (2, 1, 0, 1, 1))
    plan.chosen["forward"], plan.plan_with = Selection(stub, {}, "a test"), None
    try:
        for activation in ACTIVATIONS:
            call = x, weight, bias, residual, slopes, arguments, activation
            epilogue, _ = parsed(given(activation, slopes), residual, None)
            ours(*(t.detach() for t in call[:5]), *call[5:])
            assert asked.pop() == (epilogue, True, activation == "prelu")
            y, leaves = ours(*call[:5], *call[5:]), leaves_of(call)
            asked.clear()
            y = ours(*call)
            assert asked.pop() == (epilogue if epilogue.from_output else epilogue.linear, True, False)
            found = torch.autograd.grad(y, leaves, torch.ones_like(y))
            for mine, own in zip(found, torch.autograd.grad(separate(*call).sum(), leaves), strict=True):
                torch.testing.assert_close(mine, own)
        ours(x, weight, bias, residual, slopes, arguments, "relu", rounding="torch")
        assert asked.pop() == (None, False, False), "it runs the plain forward, and torch's operations do the rest"
    finally:
        dispatch.forget()


# ------------------------------------------------------------------ torch's modes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    x, weight, bias, residual, slopes, arguments = operands(CASES[0])
    for activation in ("relu", "prelu", "silu"):
        call = x, weight, bias, residual, slopes, arguments, activation
        leaves = leaves_of(call)
        with torch.autocast("cpu", dtype):
            y = ours(*call)
            want = separate(x, weight, bias, residual.to(dtype), slopes.to(dtype), arguments, activation)
        assert y.dtype == dtype
        torch.testing.assert_close(y, want)
        found = torch.autograd.grad(y.float().sum(), leaves)
        assert [g.dtype for g in found] == [torch.float32] * len(leaves)
        for mine, own in zip(found, torch.autograd.grad(want.float().sum(), leaves), strict=True):
            torch.testing.assert_close(mine, own, rtol=1e-2, atol=1e-2 * own.abs().max().item())


def test_transforms_and_tracers_go_to_torchs_operations():
    x, weight, bias, residual, slopes, arguments = operands(CASES[0], torch.float64)
    for activation in ("relu", "prelu", "gelu"):

        def mine(x, r, activation=activation):
            return ours(x, weight, bias, r, slopes, arguments, activation)

        def own(x, r, activation=activation):
            return separate(x, weight, bias, r, slopes, arguments, activation)

        directions = torch.randn_like(x), torch.randn_like(residual)
        for found, want in zip(*(jvp(f, (x, residual), directions) for f in (mine, own)), strict=True):
            torch.testing.assert_close(found, want)
        gradients = [grad(lambda x, f=f: f(x, residual).sum())(x) for f in (mine, own)]
        torch.testing.assert_close(*gradients)
        stacked = torch.stack([x, 2 * x]), torch.stack([residual, -residual])
        torch.testing.assert_close(vmap(mine)(*stacked), vmap(own)(*stacked))
        traced = torch.jit.trace(lambda *operands, mine=mine: mine(*operands), (x, residual))
        torch.testing.assert_close(traced(2 * x, residual), own(2 * x, residual))
        if activation == "relu":
            graph = torch.fx.symbolic_trace(mine, concrete_args={"activation": activation})
            torch.testing.assert_close(graph(x, residual), own(x, residual))


def test_a_compiled_call_is_one_graph():
    x, weight, bias, residual, slopes, arguments = operands(CASES[0])
    call = x, weight, bias, residual, slopes, arguments, "leaky_relu"
    compiled, leaves = (
        torch.compile(partial(ours, rounding="torch"), backend="aot_eager", fullgraph=True),
        leaves_of(call),
    )
    with tritonconv.use(*PHASES):
        y = compiled(*call)
        torch.testing.assert_close(y, separate(*call))
        found = torch.autograd.grad(y.sum(), leaves)
    for mine, own in zip(found, torch.autograd.grad(separate(*call).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-4)


def test_slopes_of_a_parameter_in_a_graph_whose_sizes_are_symbolic():
    """Their size is a number there, and y's channels are a symbol: torch.compile finds no number among symbols."""
    x, weight, slopes = torch.randn(1, 2, 1, 1, 2), torch.randn(2, 6, 2, 2, 2), torch.nn.Parameter(SLOPES.clone())
    compiled = torch.compile(tritonconv.conv_transpose3d, backend="eager", fullgraph=True, dynamic=True)
    y = compiled(x, weight, activation=("prelu", slopes))
    assert torch.equal(y, F.prelu(torch.conv_transpose3d(x, weight), slopes))


# ------------------------------------------------------------------ refusals


def test_refusals_name_both():
    x, weight, bias, residual, slopes, arguments = operands(CASES[0])
    names = ", ".join(NAMES)
    refused = [
        ({"activation": "elu"}, ArgumentError, f"{names}, got 'elu'"),
        ({"activation": torch.relu}, ArgumentTypeError, f"a name .{names}.*got <built-in"),
        ({"activation": ()}, ArgumentTypeError, "a name .*got .."),
        ({"activation": ("relu", 1)}, ArgumentError, "'relu' takes no such parameter: .'relu', 1."),
        ({"activation": ("leaky_relu", 1, 2)}, ArgumentError, "takes no such parameter: .'leaky_relu', 1, 2."),
        ({"activation": ("leaky_relu", "a")}, ArgumentTypeError, "a number as its slope, got 'a'"),
        ({"activation": ("leaky_relu", True)}, ArgumentTypeError, "a number as its slope, got True"),
        ({"activation": ("gelu", "erf")}, ArgumentError, "'none' or 'tanh', got 'erf'"),
        ({"activation": "prelu"}, ArgumentTypeError, "a tensor of 1 or c_out values, got none"),
        ({"activation": ("prelu", 0.1)}, ArgumentTypeError, "got 0.1 .float."),
        ({"activation": ("prelu", slopes[:3])}, ArgumentError, r"\(1,\) or \(6,\).*got \(3,\)"),
        ({"activation": ("prelu", slopes.double())}, ArgumentTypeError, "torch.float64 but y is torch.float32"),
        ({"residual": residual[:1]}, ArgumentError, r"\(2, 6, 1, 3, 3\), got \(1, 6, 1, 3, 3\)"),
        ({"residual": residual.double()}, ArgumentTypeError, "torch.float64 but y is torch.float32"),
        ({"residual": residual.to("meta")}, ArgumentError, "on meta but y is on cpu"),
        ({"residual": 1.0}, ArgumentTypeError, "a tensor or None, got 1.0 .float."),
        ({"rounding": "up"}, ArgumentError, "None or 'torch', got 'up'"),
    ]  # fmt: skip
    for more, kind, text in refused:
        with pytest.raises(kind, match=text):
            tritonconv.conv_transpose3d(x, weight, bias, *arguments, **more)
    with pytest.raises(ArgumentError, match=r"\(6, 1, 3, 3\), got \(2, 6, 1, 3, 3\)"):
        tritonconv.conv_transpose3d(x[0], weight, bias, *arguments, residual=residual)
    with pytest.raises(TypeError):  # keywords alone: torch's positions stay torch's
        tritonconv.conv_transpose3d(x, weight, bias, 2, 1, 0, 1, 1, "relu")
    with pytest.raises(ArgumentError, match="residual expects the shape"):
        vmap(lambda x: tritonconv.conv_transpose3d(x, weight, bias, *arguments, residual=residual[:1]))(x[None])


def test_names_of_epilogues():
    assert str(parsed(("leaky_relu", 0.2), SLOPES, "torch")[0]) == "residual + leaky_relu(0.2), rounded as torch"
    assert str(Epilogue()) == "no epilogue"
    assert activated_(SLOPES, Epilogue(), None) is SLOPES
