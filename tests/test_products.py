"""The matrix products of the torch formulations by oneDNN, and as a GPU makes them: exact on small integers. CPU."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from allocations import peak
from variant_cases import CASES, Case, complaints, expected, same

import tritonconv
from tritonconv.device import cpu_vendor
from tritonconv.kernels import torch_products, torch_shuffle
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


@pytest.fixture
def by_convolution(monkeypatch):
    """Every product is a convolution, as on a GPU; the list holds the shape of each one's weight."""
    asked = []
    real = torch_products.F.conv1d, torch_products.F.conv2d, torch_products._sum_by_convolution
    monkeypatch.setattr(torch_products, "_by_convolution", lambda left, right: left.numel() > 0 and right.numel() > 0)
    monkeypatch.setattr(torch_products, "_by_onednn", lambda *operands: False)

    def counted(function):
        return lambda *operands: asked.append(tuple(operands[1].shape)) or function(*operands)

    one, two, total = map(counted, real)
    monkeypatch.setattr(torch_products, "F", SimpleNamespace(conv1d=one, conv2d=two))
    monkeypatch.setattr(torch_products, "_sum_by_convolution", total)
    return asked


@pytest.fixture(params=["by_onednn", "by_convolution"])
def otherwise(request):
    return request.getfixturevalue(request.param)


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape).float()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_the_products_are_the_definition(otherwise, n, strided):
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
    assert otherwise


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
def test_the_formulations_are_exact_with_them(name, layout, otherwise):
    answers = [
        complaints(variant(name), case, torch.float32, layout, bias)
        for case in CASES.values()
        for bias in (True, False)
    ]
    served = [found for found in answers if found is not None]
    assert [complaint for found in served for complaint in found] == []
    assert served and otherwise


def test_mkl_is_slow_on_an_amd_cpu_with_avx512_alone(monkeypatch):
    cpuinfo, capability = {"text": "vendor_id\t: AuthenticAMD\n"}, {"name": "AVX512"}
    monkeypatch.setattr(Path, "read_text", lambda path, **how: cpuinfo["text"])
    monkeypatch.setattr(torch_products, "cpu_vendor", cpu_vendor.__wrapped__)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability["name"])
    slow = torch_products.mkl_is_slow.__wrapped__
    assert slow()
    capability["name"] = "AVX2"
    assert not slow()
    capability["name"], cpuinfo["text"] = "AVX512", "vendor_id\t: GenuineIntel\n"
    assert not slow()


SWITCHES = {"fp32_precision", "allow_tf32", "allow_fp16_reduced_precision_reduction", "benchmark", "deterministic"}
SETTERS = {"set_float32_matmul_precision", "set_flags", "flags", "use_deterministic_algorithms", "set_default_dtype"}
CALL_PATH = ("kernels/*.py", "autotune/*.py", "tritonconv/dispatch.py", "tritonconv/autograd.py",
             "tritonconv/operators.py", "tritonconv/functional.py", "tritonconv/fallback.py")  # fmt: skip


def test_no_call_sets_a_switch_of_the_process():
    """Another thread's operations would see it, and no lock keeps them out."""
    root, found, seen = Path(__file__).resolve().parent.parent, [], 0
    for path in (each for pattern in CALL_PATH for each in root.glob(pattern)):
        seen += 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = {target.attr for target in targets if isinstance(target, ast.Attribute)} & SWITCHES
            if isinstance(node, ast.Call):
                names |= {getattr(node.func, "attr", None)} & SETTERS
            found += [f"{path.name}:{node.lineno}: {name}" for name in names]
    assert not found and seen > 50


def test_a_room_that_does_not_serve_is_left(monkeypatch):
    monkeypatch.setattr(torch_shuffle, "IMAGE_ELEMENTS", 1)
    monkeypatch.setattr(torch_products, "mkl_is_slow", lambda: False)
    for dtype, kernel in ((torch.float32, 2), (torch.float64, 2), (torch.bfloat16, 2), (torch.float32, (1, 2, 3))):
        case = Case(channels=(3, 2), size=(2, 3, 1), kernel=kernel, stride=kernel, n=2)
        problem = case.problem(dtype)
        (x, weight, bias), _, y, _ = expected(case, True)
        operands = [each.to(dtype) for each in (x, weight, bias)]
        room = torch.full((2, 2, *problem.out_size), torch.nan, dtype=dtype)
        for place in (room, room.contiguous(memory_format=torch.channels_last_3d), room[:, :1]):
            out = torch.full(problem.y_shape, torch.nan, dtype=dtype)
            assert same(torch_shuffle.forward(problem, {}, *operands, out=out, room=place), y)


def test_a_weight_as_large_as_y_is_not_copied_beside_the_result():
    layer = tritonconv.ConvTranspose3d(16, 4, 2, stride=2)
    x, skip = (
        torch.randn(2, c, n, n, n).contiguous(memory_format=torch.channels_last_3d) for c, n in ((16, 2), (4, 4))
    )
    with tritonconv.use("forward_torch_shuffle"), torch.no_grad():
        ours, torchs = peak(lambda: tritonconv.up_concat(layer, x, skip)), peak(lambda: torch.cat((layer(x), skip), 1))
    assert ours == torchs
