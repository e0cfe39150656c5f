"""Copies between slices by elements of 16 bytes, as on a GPU; here of tensors of the CPU."""

from __future__ import annotations

import pytest
import torch

import tritonconv
from tritonconv.kernels import torch_layout
from tritonconv.kernels.torch_layout import CHANNELS_LAST, CONTIGUOUS, filled, to_layout

ORDERS = {"ncdhw": CONTIGUOUS, "ndhwc": CHANNELS_LAST}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SIZE = (3, 2, 4)


@pytest.fixture
def wide(monkeypatch) -> list[torch.dtype | None]:
    """Every copy counts as a large one on a GPU; the dtypes of those that were made so, None of one that was not."""
    made: list[torch.dtype | None] = []
    real = torch_layout._wide_rows

    def rows(out, tensor):
        found = real(out, tensor)
        made.append(None if found is None else found[0].dtype)
        return found

    monkeypatch.setattr(torch_layout, "_large_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch_layout, "_wide_rows", rows)
    return made


def values(shape, dtype, order=CONTIGUOUS) -> torch.Tensor:
    """Random bits, NaNs with payloads among them."""
    count = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 256, (count,), dtype=torch.uint8)
    return bits.view(dtype).view(shape).contiguous(memory_format=order)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


@pytest.mark.parametrize("layout", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(1, 1), (3, 5), (8, 8), (16, 24), (12, 4)], ids=str)
def test_a_slice_gets_the_bits_and_its_neighbours_keep_theirs(wide, layout, dtype, channels):
    order, (own, beside) = ORDERS[layout], channels
    for first in (True, False):
        whole = values((2, own + beside, *SIZE), dtype, order)
        before, source = whole.clone(), values((2, own, *SIZE), dtype, order)
        at = 0 if first else beside
        assert filled(whole.narrow(1, at, own), source) is not None
        assert same_bits(whole.narrow(1, at, own), source)
        rest = whole.narrow(1, own if first else 0, beside)
        assert same_bits(rest, before.narrow(1, own if first else 0, beside))
        assert same_bits(to_layout(whole.narrow(1, at, own), order), source)
    assert len(wide) >= 2


@pytest.mark.parametrize(
    ("layout", "dtype", "own", "beside", "offset", "want"),
    [
        ("ndhwc", torch.bfloat16, 16, 8, 0, torch.complex128),
        ("ndhwc", torch.bfloat16, 12, 12, 0, torch.complex64),
        ("ndhwc", torch.bfloat16, 6, 2, 0, torch.int32),
        ("ndhwc", torch.bfloat16, 5, 3, 0, None),
        ("ndhwc", torch.float32, 4, 8, 0, torch.complex128),
        ("ndhwc", torch.float32, 3, 3, 0, None),
        ("ncdhw", torch.bfloat16, 3, 5, 0, torch.complex128),
        ("ncdhw", torch.float64, 1, 3, 0, torch.complex128),
        ("ndhwc", torch.bfloat16, 16, 8, 1, None),
        ("ndhwc", torch.bfloat16, 16, 8, 2, torch.int32),
    ],
)
def test_the_elements_are_as_wide_as_rows_and_addresses_allow(wide, layout, dtype, own, beside, offset, want):
    storage = torch.zeros(2 * (own + beside) * 24 + offset, dtype=dtype)[offset:]
    assert (storage.data_ptr() - offset * dtype.itemsize) % 16 == 0
    if layout == "ndhwc":
        whole = storage.view(2, *SIZE, own + beside).permute(0, 4, 1, 2, 3)
    else:
        whole = storage.view(2, own + beside, *SIZE)
    source = values((2, own, *SIZE), dtype, ORDERS[layout])
    filled(whole[:, beside:], source)
    assert wide == [want] and same_bits(whole[:, beside:], source)


def test_what_has_no_such_rows_is_copied_as_ever(wide):
    source = torch.randn(2, 8, *SIZE)
    last = torch.empty_like(source, memory_format=CHANNELS_LAST)
    assert torch.equal(filled(last, source), source)  # another order
    assert torch.equal(filled(torch.empty(2, 8, 3, 2, 8)[..., ::2], source), source)  # gaps between voxels
    assert torch.equal(filled(torch.empty(2, 8, *SIZE, dtype=torch.float64), source), source.double())
    assert wide == [None] * 3


@pytest.mark.parametrize("layout", ORDERS)
def test_a_negated_or_conjugate_view_is_copied_with_its_signs(wide, layout):
    order = ORDERS[layout]
    real = values((2, 24, *SIZE), torch.float32, order).nan_to_num()[:, :16]
    for view in (torch._neg_view(real), torch.complex(real, real).conj()):
        dense = view.resolve_neg().resolve_conj()
        assert torch.equal(to_layout(view[:, 4:12], order), dense[:, 4:12])
        out = torch.zeros_like(dense)
        assert torch.equal(filled(out.conj() if out.is_complex() else torch._neg_view(out), dense), dense)
    layer = tritonconv.ConvTranspose3d(8, 8, 2, stride=2)
    x, skip = (torch.randn(2, 8, *size).contiguous(memory_format=order) for size in (SIZE, (6, 4, 8)))
    with torch.no_grad(), tritonconv.use("forward_torch_phases"):
        found = tritonconv.up_concat(layer, x, torch._neg_view(skip))
        assert torch.equal(found, torch.cat((layer(x), -skip), 1))
    assert set(wide) == {None}


def test_a_copy_that_autograd_records_stays_torchs(wide):
    source = torch.randn(2, 8, *SIZE, requires_grad=True)
    filled(torch.empty(2, 16, *SIZE)[:, :8], source).sum().backward()
    assert wide == [None] and torch.equal(source.grad, torch.ones_like(source))


@pytest.mark.parametrize("layout", ORDERS)
@pytest.mark.parametrize("skip_first", [False, True])
def test_a_stage_has_torchs_values_and_gradients(wide, layout, skip_first):
    order = ORDERS[layout]
    layer = tritonconv.ConvTranspose3d(8, 8, 2, stride=2)
    x = torch.randn(2, 8, *SIZE).contiguous(memory_format=order).requires_grad_()
    skip = torch.randn(2, 16, 6, 4, 8).contiguous(memory_format=order).requires_grad_()
    with tritonconv.use("forward_torch_phases"):  # is no stage of torch's own
        found = tritonconv.up_concat(layer, x, skip, skip_first)
        y = layer(x)
    want = torch.cat((skip, y) if skip_first else (y, skip), 1)
    assert torch.equal(found, want) and found.stride() == want.stride() and torch.complex128 in wide
    grad = torch.randn_like(want)
    leaves = (x, skip, layer.weight, layer.bias)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(want, leaves, grad))


def test_a_small_copy_and_one_on_a_cpu_are_torchs_own():
    assert not torch_layout._large_on_gpu(torch.empty(1 << 23))
    meta = torch.empty(1 << 23, device="meta")
    assert not torch_layout._large_on_gpu(meta)
