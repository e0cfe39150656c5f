"""The matrix products of the torch formulations by oneDNN: what MKL gives, exact on small integers. CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from variant_cases import CASES, complaints

from tritonconv.kernels import torch_products
from tritonconv.kernels.registry import variant
from tritonconv.kernels.torch_products import product, products, sum_of_products
from tritonconv.problem import LAYOUTS

NAMES = (
    "forward_torch_shuffle", "forward_torch_columns", "forward_torch_linear", "backward_data_torch_shuffle",
    "backward_data_torch_linear", "backward_weight_torch_shuffle", "backward_weight_torch_linear",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this build of torch has no oneDNN",
)


@pytest.fixture
def by_onednn(monkeypatch):
    """Every product is oneDNN's; the list holds the shape of each that was."""
    asked = []
    real = torch_products._onednn
    monkeypatch.setattr(torch_products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(torch_products, "ENOUGH_FLOPS", 0)
    monkeypatch.setattr(
        torch_products, "_onednn", lambda left, *more: asked.append(tuple(left.shape)) or real(left, *more)
    )
    return asked


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape).float()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_the_products_are_the_definition(by_onednn, n, strided):
    left, right = integers(5, 7), integers(7, 4)
    if strided:
        left, right = left.t().contiguous().t(), right.t().contiguous().t()
    for bias in (None, integers(4)):
        want = left @ right + (0 if bias is None else bias)
        assert torch.equal(product(left, right, bias), want)
    for voxels in (2, 40):  # fewer and more elements than the matrix has
        images, others = integers(n, 7, voxels), integers(n, 4, voxels)
        found = products(left, images)
        assert found.shape == (n, 5, voxels) and torch.equal(found, torch.matmul(left, images))
        assert torch.equal(sum_of_products(images, others), torch.einsum("nkv,nmv->km", images, others))
        assert found.view(n, 5, voxels // 2, 2).shape == (n, 5, voxels // 2, 2)  # as the phases are told apart
    assert by_onednn


def test_what_is_empty_of_another_dtype_or_little_is_left_to_torch(by_onednn, monkeypatch):
    assert product(torch.ones(2, 0), torch.ones(0, 3)).tolist() == [[0.0] * 3] * 2
    assert products(torch.ones(2, 3), torch.ones(0, 3, 4)).shape == (0, 2, 4)
    assert sum_of_products(torch.ones(0, 2, 4), torch.ones(0, 3, 4)).tolist() == [[0.0] * 3] * 2
    assert product(torch.ones(2, 3).double(), torch.ones(3, 4).double()).dtype is torch.float64
    monkeypatch.setattr(torch_products, "ENOUGH_FLOPS", 1000)
    product(torch.ones(5, 10), torch.ones(10, 9))
    assert by_onednn == []
    product(torch.ones(5, 10), torch.ones(10, 10))
    assert by_onednn == [(5, 10)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_formulations_are_exact_with_them(name, layout, by_onednn):
    answers = [
        complaints(variant(name), case, torch.float32, layout, bias)
        for case in CASES.values()
        for bias in (True, False)
    ]
    served = [found for found in answers if found is not None]
    assert [complaint for found in served for complaint in found] == []
    assert served and by_onednn


def test_mkl_is_slow_on_an_amd_cpu_with_avx512_alone(monkeypatch):
    cpuinfo, capability = {"text": "vendor_id\t: AuthenticAMD\n"}, {"name": "AVX512"}
    monkeypatch.setattr(Path, "read_text", lambda path, **how: cpuinfo["text"])
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability["name"])
    slow = torch_products.mkl_is_slow.__wrapped__
    assert slow()
    capability["name"] = "AVX2"
    assert not slow()
    capability["name"], cpuinfo["text"] = "AVX512", "vendor_id\t: GenuineIntel\n"
    assert not slow()
