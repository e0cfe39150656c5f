"""PyTorch's own samples for conv_transpose3d (OpInfo, ModuleInfo), against torch itself. Runs on the CPU.

OpInfo has no error samples for the operation (torch 2.13); tests/test_arguments.py holds those.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from beside_torch import PHASES
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import tritonconv

OP = next(op for op in op_db if op.name == "nn.functional.conv_transpose3d")
MODULES = {info.module_cls.__name__: info for info in module_db if "ConvTranspose3d" in info.name}
OURS = {"ConvTranspose3d": tritonconv.ConvTranspose3d, "LazyConvTranspose3d": tritonconv.LazyConvTranspose3d}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64]
WIDE = {torch.complex64: torch.complex128, torch.complex128: torch.complex128}


def samples(dtype, noncontiguous=False):
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=True):
        chosen = sample.noncontiguous() if noncontiguous else sample
        weight, bias = (*chosen.args, None)[:2]
        yield (chosen.input, weight, bias), chosen.kwargs


def differentiate(function, tensors, kwargs, direction=None):
    """y and the gradients of the tensors given, with a fixed direction."""
    y = function(*tensors, **kwargs)
    if direction is None:
        generator = torch.Generator().manual_seed(2)
        direction = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    leaves = [t for t in tensors if t is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, direction)], direction


def torch_itself(x, weight, bias, padding=0, **kwargs):
    """torch's operation, cropped afterwards: its CPU weight gradient is unsafe with much padding (torch 2.13)."""
    y = OP.op(x, weight, bias, **kwargs)
    planes = (padding,) * 3 if isinstance(padding, int) else padding
    return y[(..., *[slice(p, size - p) for p, size in zip(planes, y.shape[-3:], strict=True)])]


def reference(tensors, kwargs, direction):
    """The same in double precision, from the same rounded numbers."""
    wide = [None if t is None else t.detach().to(WIDE.get(t.dtype, torch.float64)).requires_grad_() for t in tensors]
    return differentiate(torch_itself, wide, kwargs, direction.to(wide[0].dtype))[0]


def check(got, want, own, dtype, terms):
    """No further from the truth than twice torch, and sqrt(terms) roundings."""
    for ours, exact, torchs in zip(got, want, own, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == exact.shape
        unit = torch.finfo(dtype).eps * terms**0.5 * exact.abs().max().item()
        error, allowed = (ours - exact).abs().max().item(), (torchs - exact).abs().max().item()
        assert error <= 2 * allowed + unit


@pytest.mark.parametrize("noncontiguous", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opinfo_samples(dtype, noncontiguous):
    count = 0
    for tensors, kwargs in samples(dtype, noncontiguous):
        count += 1
        got, direction = differentiate(tritonconv.conv_transpose3d, tensors, kwargs)
        with torch.no_grad():
            exact = [None if t is None else t.to(WIDE.get(dtype, torch.float64)) for t in tensors]
            assert torch.allclose(torch_itself(*exact, **kwargs), OP.op(*exact, **kwargs), rtol=1e-10, atol=1e-10)
        want, (own, _) = reference(tensors, kwargs, direction), differentiate(torch_itself, tensors, kwargs, direction)
        terms = max(tensors[1][:, 0].numel(), want[0].numel())
        check(got, want, own, dtype, terms)
        if not dtype.is_complex and kwargs.get("stride", 1) not in (1, (1, 1, 1)):
            with tritonconv.use(*PHASES):
                check(
                    differentiate(tritonconv.conv_transpose3d, tensors, kwargs, direction)[0], want, own, dtype, terms
                )
    assert count >= 8


def test_opinfo_reference():
    """OpInfo's own independent formulation, in NumPy; it cannot express output_padding beyond the stride."""
    agreed = 0
    for tensors, kwargs in samples(torch.float64):
        arrays = [None if t is None else t.detach().numpy() for t in tensors]
        try:
            want = OP.ref(*arrays, **kwargs)
        except RuntimeError:
            continue
        agreed += 1
        got = tritonconv.conv_transpose3d(*[None if t is None else t.detach() for t in tensors], **kwargs)
        torch.testing.assert_close(got, torch.as_tensor(want), rtol=1e-10, atol=1e-10)
    assert agreed >= 6


def test_integer_samples():
    count = 0
    for sample in OP.sample_inputs("cpu", torch.int64, requires_grad=False):
        count += 1
        got = tritonconv.conv_transpose3d(sample.input, *sample.args, **sample.kwargs)
        assert torch.equal(got, OP.op(sample.input, *sample.args, **sample.kwargs))
    assert count >= 8


def module_cases():
    for name, dtype, training in itertools.product(
        MODULES, (torch.float64, torch.float32, torch.complex64), (True, False)
    ):
        yield pytest.param(name, dtype, training, id=f"{name}-{str(dtype)[6:]}-{'train' if training else 'eval'}")


@pytest.mark.parametrize(("name", "dtype", "training"), module_cases())
def test_module_samples(name, dtype, training):
    info, count = MODULES[name], 0
    for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training):
        count += 1
        layers, results = [], []
        for cls in (OURS[name], info.module_cls):
            torch.manual_seed(1)
            layer = cls(*sample.constructor_input.args, **sample.constructor_input.kwargs, device="cpu", dtype=dtype)
            torch.manual_seed(2)  # a lazy layer draws its parameters at the first call
            layers.append(layer.train(training))
            inputs = [t.detach().clone().requires_grad_() for t in sample.forward_input.args]
            y = layer(*inputs, **sample.forward_input.kwargs)
            y.backward(torch.ones_like(y))
            results.append([y.detach(), *(t.grad for t in inputs), *(p.grad for p in layer.parameters())])
        mine, own = layers
        assert list(mine.state_dict()) == list(own.state_dict())
        assert all(map(torch.equal, mine.state_dict().values(), own.state_dict().values()))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    assert count >= 1
