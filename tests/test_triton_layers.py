"""Triton kernels in use: a layer trains on them, weights are never stale, offsets beyond 32 bits, the accounting."""

from __future__ import annotations

import contextlib
import itertools
import math
from functools import partial
from types import SimpleNamespace

import interpreter
import pytest
import torch
from test_numerics import LAYERS, check, references
from test_triton_kernels import DTYPES, NAMES, ON_GPU, first_served, operands, small
from variant_cases import COPIES, DEVICE, Case, form, run, same

import tritonconv
from tritonconv import dispatch
from tritonconv.autotune.choose import Selection
from tritonconv.errors import ArgumentError
from tritonconv.forced import pinned
from tritonconv.kernels import triton_launch, triton_weights
from tritonconv.kernels.backward_data_gemm import backward_data_gemm_kernel
from tritonconv.kernels.forward_phases import forward_phases_kernel
from tritonconv.kernels.forward_shuffle import forward_shuffle_kernel
from tritonconv.kernels.registry import variant
from tritonconv.kernels.triton_buffers import Buffer
from tritonconv.kernels.triton_program import Program
from tritonconv.problem import PASSES

OF_PASS = {name: [n for n in NAMES if form(n).pass_name == name] for name in PASSES}

# (c_in, c_out, kernel, stride, padding, output_padding, groups): a layer of each class
TRAINED = {
    "k2 s2": (16, 16, 2, 2, 0, 0, 1),
    "k2 s2 to 5": (16, 5, 2, 2, 0, 0, 1),
    "k3 s2": (16, 24, 3, 2, 1, 1, 1),
    "depthwise": (16, 16, 3, 2, 1, 1, 16),
    "groups": (8, 8, 3, 2, 1, 0, 2),
    "one channel": (16, 1, 4, 2, 1, 0, 1),
}


GENERAL = ("forward_phases", "backward_data_gemm", "backward_weight_splitk")


def triples():
    """One variant per pass: each between the two general ones of the other passes, and those that share work."""
    found = [
        ("forward_shuffle", "backward_data_fused", "backward_weight_fused"),
        tuple(name + COPIES for name in GENERAL),
    ]
    for pass_name, general in zip(PASSES, GENERAL, strict=True):
        found += [tuple(name if g == general else g for g in GENERAL) for name in OF_PASS[pass_name]]
    return list(dict.fromkeys(found))


def served(names, problem) -> bool:
    return all(form(name).supports(problem, DEVICE) is None for name in names)


def in_force(names, problem) -> contextlib.AbstractContextManager[None]:
    """Inside the block these forms of variants are forced, each with its default config for the problem."""
    records = [(variant(name.removesuffix(COPIES)), form(name)) for name in names]
    return pinned(*(Selection(record, each.default(problem, DEVICE), "tested") for record, each in records))


# A GPU has no matrix instruction for exact products of float32, and the fused backward then serves none: its training
# steps are those of test_fused_backward.py, whose products are exact in TF32.
EXACT = [names for names in triples() if not ON_GPU or not any(name.endswith("_fused") for name in names)]


@pytest.mark.parametrize("names", EXACT, ids="+".join)
def test_a_layer_trains(names, launches):
    """Forward and both backward passes in Triton; outputs, gradients and the trained weights are torch's."""
    trained = 0
    for c_in, c_out, k, s, p, q, groups in TRAINED.values():
        torch.manual_seed(0)
        torchs = torch.nn.ConvTranspose3d(c_in, c_out, k, s, p, q, groups=groups).to(DEVICE)
        ours = tritonconv.ConvTranspose3d(c_in, c_out, k, s, p, q, groups=groups).to(DEVICE)
        ours.load_state_dict(torchs.state_dict())
        x = torch.randn(2, c_in, 2, 2, 3, device=DEVICE)  # torch answers one small image in NCDHW on a CPU
        out = torchs(x).shape
        problems = [
            tritonconv.Problem(2, c_in, c_out, (2, 2, 3), (k,) * 3, (s,) * 3, (p,) * 3, tuple(out[2:]),
                               groups=groups, layout=layout, bias=True) for layout in ("ndhwc", "ncdhw")
        ]  # fmt: skip
        problem = next((each for each in problems if served(names, each)), None)
        if problem is None or (trained and names != GENERAL):
            continue
        x = x.to(memory_format=problem.memory_format)
        trained += 1
        results = []
        for layer in (torchs, ours):
            optimizer, xs = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9), x.clone().requires_grad_()
            launches.clear()
            for _ in range(2):
                with in_force(names, problem):
                    y = layer(xs)
                optimizer.zero_grad()
                (y * y).mean().backward()
                optimizer.step()
            results.append([y, xs.grad, *(p.grad for p in layer.parameters()), *layer.parameters()])
        assert set(launches) >= {name.removesuffix(COPIES) for name in names}
        for mine, theirs in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert trained


@pytest.mark.parametrize("name", NAMES)
def test_rounding_is_torchs(name):
    """Random numbers: no further from float64 than the limit of every other variant; float32 sums in half types."""
    record, checked = form(name), 0
    labels = ("k2 s2", "k3 s2 p1 q1", "k4 s2 p1", "depthwise k3", "1 channel out", "k1 s2 q1", "anisotropic")
    for label, layout in itertools.product(labels, ("ndhwc", "ncdhw")):
        for dtype in DTYPES[1:] if not ON_GPU else DTYPES:
            problem = LAYERS[label].problem(dtype, layout)
            if record.supports(problem, DEVICE) is not None or (checked and not ON_GPU):
                continue
            checked += 1
            inputs, grad_y, (y, grad_x, grad_weight, grad_bias) = references(label, dtype)
            wanted = {"forward": [y], "backward_data": [grad_x], "backward_weight": [grad_weight, grad_bias]}
            dense = {"device": DEVICE, "memory_format": problem.memory_format}
            tensors = inputs[0].to(**dense), inputs[1].to(DEVICE), inputs[2].to(DEVICE)
            got = run(record, problem, record.default(problem, DEVICE), tensors, grad_y.to(**dense), True)
            for mine, want in zip(got, wanted[record.pass_name], strict=True):
                check(f"{name} {label}", mine.cpu(), want, dtype)
    assert checked


def far_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, an axis of them so far apart that offsets pass 2**31 elements (a few touched pages).

    The axis has at least 3 elements, so that the stride itself fits 32 bits: only its product does not.
    """
    axis = max((0, 2, 3, 4), key=lambda axis: tensor.shape[axis])
    strides = list(tensor.stride())
    strides[axis] = math.ceil(2**31 / (tensor.shape[axis] - 1) / 64) * 64
    assert strides[axis] < 2**31 <= strides[axis] * (tensor.shape[axis] - 1)
    needed = strides[axis] * (tensor.shape[axis] - 1) + tensor.numel() + 64
    view = torch.empty(needed, dtype=tensor.dtype, device=tensor.device).as_strided(tensor.shape, strides)
    return view.copy_(tensor)


@pytest.mark.parametrize("name", NAMES)
def test_offsets_beyond_32_bits(name):
    record = form(name)
    case, problem = first_served(record, dtype=torch.float16, longest_axis=3)
    (x, weight, bias, grad_y), wanted = operands(case, torch.float16, problem.layout)
    config = small(record.default(problem, DEVICE), 64)
    with contextlib.nullcontext() if ON_GPU else interpreter.overflow_checks():  # an error in place of a crash
        got = run(record, problem, config, (far_apart(x), weight, bias), far_apart(grad_y), True)
        assert all(map(same, got, wanted[record.pass_name]))
        if record.pass_name == "forward":
            out = far_apart(torch.full(problem.y_shape, math.nan, dtype=torch.float16, device=DEVICE))
            assert same(record.compute(problem, config, x, weight, bias, out=out), wanted["forward"][0])


PLANES = Case(n=1, channels=(8, 8), size=2, kernel=4, stride=2, front=1, back=1)
OF_PLANES = PLANES.problem(torch.float16, "ndhwc")
GRADIENTS = [name for name in NAMES if form(name).pass_name != "forward"]


@pytest.mark.parametrize("name", [name for name in GRADIENTS if form(name).supports(OF_PLANES, DEVICE) is None])
def test_a_plane_of_more_than_2_to_the_30(name):
    """Its stride fits 32 bits, and twice of it, a step of the convolution, does not."""
    record, problem = form(name), OF_PLANES
    (x, weight, bias, grad_y), wanted = operands(PLANES, torch.float16, "ndhwc")
    plane = 2**30 + 4096
    strides = (4 * plane, 1, plane, *grad_y.stride()[3:])
    far = torch.empty(3 * plane + grad_y.numel(), dtype=torch.float16, device=DEVICE)
    far = far.as_strided(grad_y.shape, strides).copy_(grad_y)
    with contextlib.nullcontext() if ON_GPU else interpreter.overflow_checks():
        got = run(record, problem, small(record.default(problem, DEVICE)), (x, weight, bias), far, True)
    assert all(map(same, got, wanted[record.pass_name]))


@pytest.mark.skipif(ON_GPU, reason="the interpreter's overflow checks; on a GPU the offsets above are real")
@pytest.mark.parametrize("name", NAMES)
def test_no_integer_overflows(name):
    record = form(name)
    case, problem = first_served(record, dtype=torch.float16)
    (x, weight, bias, grad_y), wanted = operands(case, torch.float16, problem.layout)
    with interpreter.overflow_checks():
        got = run(record, problem, record.default(problem, DEVICE), (x, weight, bias), grad_y, True)
    assert all(map(same, got, wanted[record.pass_name]))


def orders(record, problem):
    """Configs that differ in the packing of the weight, where the variant packs it."""
    config = small(record.default(problem, DEVICE), 64)
    return [{**config, "WEIGHT": order} for order in (0, 1, 2)] if "WEIGHT" in config else [config]


@pytest.mark.parametrize("name", OF_PASS["forward"] + OF_PASS["backward_data"])
def test_the_weight_is_never_stale(name):
    """After an optimizer step, an in-place edit under no_grad, and one through .data, which no version counter sees."""
    record = form(name)
    case, problem = first_served(record)
    (x, weight, bias, grad_y), wanted = operands(case, problem.dtype, problem.layout)
    parameter = torch.nn.Parameter(weight.clone())
    before, expected = weight.clone(), wanted[record.pass_name][0]

    def doubled_by_a_step():
        parameter.grad = -parameter.detach().clone()
        torch.optim.SGD([parameter], lr=1.0).step()

    def doubled_in_place():
        with torch.no_grad():
            parameter.mul_(2)

    def doubled_through_data():
        parameter.data.mul_(2)

    for config in orders(record, problem):
        for edit in (doubled_by_a_step, doubled_in_place, doubled_through_data):
            with torch.no_grad():
                parameter.copy_(before)
                zero = torch.zeros_like(bias)
                one = run(record, problem, config, (x, parameter, zero), grad_y, True)[0]
                edit()
                two = run(record, problem, config, (x, parameter, zero), grad_y, True)[0]
            assert torch.equal(2 * one, two), edit.__name__
            if record.pass_name == "backward_data":
                assert same(one, expected)


def test_the_weight_is_packed_once_per_version(monkeypatch):
    """A forward and its backward share one copy; the next step, with another version, makes its own."""
    made = []
    run = Program.run
    monkeypatch.setattr(triton_weights, "CACHED_BYTES", 0)
    monkeypatch.setattr(
        Program, "run", lambda program, operands: made.extend(program.kernels) or run(program, operands)
    )
    dtype, size = torch.float16, (1, 2, 2)
    x = torch.ones(1, 16, *size, dtype=dtype, device=DEVICE, requires_grad=True)
    layer = tritonconv.ConvTranspose3d(16, 16, 3, 2, dtype=dtype, device=DEVICE)
    optimizer, seen = torch.optim.SGD(layer.parameters(), lr=0.5), []
    with tritonconv.use("forward_phases", "backward_data_gemm"):
        dispatch._by_problem.clear()  # its config was chosen under the other threshold
        for _ in range(2):
            y = layer(x)
            y.sum().backward()
            seen.append(y.detach().clone())
            optimizer.step()
            optimizer.zero_grad()
    dispatch._by_problem.clear()
    dispatch._by_call.clear()
    assert [kernel.name for kernel in made].count("transpose_kernel") == 2
    assert not torch.equal(*seen)


def test_the_accounting_of_a_launch():
    """The kernels report the problem's own FLOPs and bytes to a profiler, under the kernel's name."""
    record = variant("forward_phases")
    case, problem = first_served(record, dtype=torch.float16)

    class Kernel:
        name = "forward_phases_kernel"

    args = triton_launch.geometry(problem, forward_phases_kernel) | {
        "x_ptr": torch.empty(1, dtype=torch.float16),
        "bias_ptr": object(),
    }
    seen = triton_launch.accounting((1,), Kernel, args)
    assert seen["flops16"] == problem.flops > 0
    assert seen["bytes"] == problem.bytes()
    assert seen["name"].startswith("forward_phases_kernel n")
    assert case.n == problem.n


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_of_every_variant_is_accounted_for(name):
    """It publishes the problem's FLOPs, from the arguments that it takes."""
    record = form(name)
    case, problem = first_served(record)
    (x, weight, bias, grad_y), _ = operands(case, problem.dtype, problem.layout)
    given = {"forward": (x, weight, bias), "backward_data": (grad_y, weight)}.get(record.pass_name, (x, grad_y, True))
    program = Program.of(partial(record.launches, problem, record.default(problem, DEVICE)), given)
    flops = []
    for launch in program.kernels:
        function = launch.function
        if triton_launch.accounting in (
            getattr(function, "launch_metadata", None),
            function.kwargs.get("launch_metadata"),
        ):
            args = {key: x if isinstance(value, Buffer) else value for key, value in launch.arguments.items()}
            seen = triton_launch.accounting(launch.grid, SimpleNamespace(name=launch.name), args)
            flops += [value for key, value in seen.items() if key.startswith("flops")]
    assert flops == [problem.flops]


def test_a_config_holds_nothing_that_its_kernel_does_not_read():
    """PACK is read by the function that the kernel hands its CONFIG on to."""
    for kernel, read in (
        (forward_shuffle_kernel, {"ROWS": 1}),
        (backward_data_gemm_kernel, {"BLOCK_M": 16, "PACK": 1}),
    ):
        config = triton_launch.gathered(kernel, read | {"num_warps": 4})["CONFIG"]
        assert config._asdict() == read
        with pytest.raises(ArgumentError, match=f"{kernel.fn.__name__} reads no RESIDENT, "):
            triton_launch.gathered(kernel, read | {"RESIDENT": 2})


def test_precision_is_what_torch_says_of_convolutions():
    switches, was = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    try:
        for said in ("tf32", "ieee"):
            switches.fp32_precision = said
            assert triton_launch.precision(torch.float32) == said
            assert triton_launch.precision(torch.float16) == "ieee"
    finally:
        switches.fp32_precision = was
