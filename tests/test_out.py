"""``conv_transpose3d(..., out=)``: the answer in a view of the caller's, nothing beside it, and torch's refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from allocations import largest_allocation
from beside_torch import OURS, close
from torch._subclasses.fake_tensor import FakeTensorMode
from variant_cases import CASES, DEVICE, TINY, expected, same

import tritonconv
from tritonconv import ArgumentError, ArgumentTypeError
from tritonconv.autotune.choose import Selection
from tritonconv.forced import pinned
from tritonconv.kernels import torch_layout, torch_phase_copies, torch_shuffle
from tritonconv.kernels.registry import variant, variants
from tritonconv.out_argument import overlaps_itself, share_memory
from tritonconv.problem import LAYOUTS

HYPER = {"stride": 2, "padding": 1}
LAST = torch.channels_last_3d


def slice_of_sevens(problem, layout):
    """(a buffer of sevens, a slice of its channels and planes in which y fits)."""
    n, channels, *size = problem.y_shape
    shape = n + 1, channels + 3, *(extent + 1 for extent in size)
    buffer = torch.full(shape, 7.0, dtype=problem.dtype, device=DEVICE).contiguous(memory_format=LAYOUTS[layout])
    return buffer, buffer[1:, 1 : 1 + channels, 1:, :-1, 1:]


def written_wrongly(name, case, layout, out_layout) -> bool:
    problem = case.problem(layout=layout)
    inputs, _, y, _ = expected(case, True)
    x, weight, bias = (t.to(DEVICE, torch.float32) for t in inputs)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    buffer, part = slice_of_sevens(problem, out_layout)
    record = variant(name)
    config = {
        key: min(value, 16) if key.startswith("BLOCK_") else value
        for key, value in record.default(problem, DEVICE).items()
    }
    with pinned(Selection(record, config, "the test's")):
        for _ in range(2):  # the second call plays the launches of the first
            if case.call(x, weight, bias, out=part) is not part or not same(part, y):
                return True
            part.fill_(7.0)
    return not bool((buffer == 7.0).all())


def served(record, cases, layout):
    return [case for case in cases.values() if record.supports(case.problem(layout=layout), DEVICE) is None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_forward_writes_into_a_slice_of_either_format(layout, monkeypatch):
    for bound in ("IMAGE_ELEMENTS", "PART_ELEMENTS"):
        monkeypatch.setattr(torch_shuffle, bound, 100)  # so that small problems have several blocks
    wrong = []
    for record in variants("forward"):
        triton = record.backend == "triton"
        if triton and record.name != {"ncdhw": "forward_gather", "ndhwc": "forward_shuffle"}[layout]:
            continue  # tests/test_triton_kernels.py has them all
        cases = served(record, TINY, layout)[:1] if triton else served(record, CASES, layout)[:2]
        for each in LAYOUTS if not triton else (layout,):
            wrong += [f"{record.name}: {case}" for case in cases if written_wrongly(record.name, case, layout, each)]
    assert wrong == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_of_some_planes_at_a_time_are_those_of_all(layout, monkeypatch):
    x = torch.randn(2, 6, 5, 3, 4).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = torch.randn(6, 4, 2, 3, 1), torch.randn(4)
    with tritonconv.use("forward_torch_shuffle"):
        want = OURS(x, weight, bias, (2, 3, 1))
        for elements in (1, 300, 700, 10**6):
            monkeypatch.setattr(torch_shuffle, "IMAGE_ELEMENTS", elements)
            monkeypatch.setattr(torch_shuffle, "PART_ELEMENTS", elements)
            close(OURS(x, weight, bias, (2, 3, 1), out=torch.empty_like(want)), want)


def test_neighbours_along_w_are_written_together_where_they_can_be():
    """Of any strides, dtype and number of taps: what is not made of pairs is copied."""
    together = []
    shapes = itertools.product((1, 2, 3, 4, 6), (0, 1, 2), (0, 1), (torch.float32, torch.float64, torch.bfloat16))
    for kw, first, more, dtype in shapes:
        buffer = torch.full((2, 5, 6, 4, 3 * kw + 2 + more), 7.0, dtype=dtype)
        whole = buffer[:, 1:4, ..., first : first + 3 * kw] if first + 3 * kw <= buffer.shape[4] else buffer[:, :3]
        y = whole[..., : 3 * kw]
        phases = y.unflatten(2, (2, 3)).unflatten(4, (2, 2)).unflatten(6, (3, kw))
        values = torch.randn(phases.shape, dtype=dtype).transpose(6, 7).contiguous().transpose(6, 7)
        values[0, 0, 0, 0, 0, 0, 0] = float("nan")
        values[0, 0, 0, 0, 0, 0, 1] = -0.0
        torch_phase_copies.interleave(y, values.permute(0, 1, 3, 5, 7, 2, 4, 6))
        torch.testing.assert_close(phases, values, rtol=0, atol=0, equal_nan=True)
        assert bool(phases[0, 0, 0, 0, 0, 0, 1].signbit().all())
        assert int((buffer == 7.0).sum()) == buffer.numel() - phases.numel()
        together.append(torch_phase_copies._has_pairs(phases, kw))
    assert 5 < together.count(True) < len(together) / 2


def test_a_copy_in_blocks_fills_a_slice(monkeypatch):
    monkeypatch.setattr(torch_layout, "BLOCK_ELEMENTS", 1)
    values = torch.randn(2, 3, 8, 9, 10).contiguous(memory_format=LAST)
    for layout in LAYOUTS.values():
        buffer = torch.zeros(2, 7, 8, 9, 10).contiguous(memory_format=layout)
        assert torch.equal(torch_layout.filled(buffer[:, 2:5], values), values)
        assert not buffer[:, :2].any() and not buffer[:, 5:].any()


def call_of(dtype=torch.float32):
    x, weight, bias = torch.randn(2, 3, 2, 3, 4), torch.randn(3, 4, 3, 3, 3), torch.randn(4)
    return [each.to(dtype) for each in (x, weight, bias)]


def test_batchless_empty_and_lazy_tensors():
    x, weight, bias = call_of()
    want = OURS(x, weight, bias, **HYPER)
    out = torch.empty_like(want[0])
    assert OURS(x[0], weight, bias, **HYPER, out=out) is out
    close(out, want[0])
    conjugate = torch.zeros(want.shape, dtype=torch.complex64).conj().imag
    assert conjugate.is_neg()
    close(OURS(x, weight, bias, **HYPER, out=conjugate), want)
    for empty in (want.new_empty(0, *want.shape[1:]), OURS(x[:0], weight, bias, **HYPER)):
        assert OURS(x[:0], weight, bias, **HYPER, out=empty) is empty
    crop = torch.zeros(2, 4, 0, 5, 7, dtype=torch.float64)
    arguments = *[each.double() for each in (x[:, :, :1], weight, bias)], 2, ((2, 1), (1, 1), (1, 1))
    with pytest.raises(ArgumentError, match="would be empty"):
        OURS(*arguments, out=crop)
    half = want.to(torch.complex64)
    assert OURS(x.to(half.dtype), weight.to(half.dtype), None, **HYPER, out=half) is half  # by torch itself


def test_torchs_version_counter_sees_the_write():
    x, weight, bias = call_of()
    for name in ("forward_gather", "forward_torch_phases"):
        out = torch.empty_like(OURS(x, weight, bias, **HYPER))
        saved = (out * torch.ones(1, requires_grad=True)).sum()
        with tritonconv.use(name):
            OURS(x, weight, bias, **HYPER, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()


REFUSED = {
    "no tensor": (ArgumentTypeError, "out expects a tensor, got 3", lambda y: 3),
    "shape": (
        ArgumentError, r"out expects shape \(2, 4, 3, 5, 7\), got \(2, 4, 3, 5, 8\); .*input \(2, 3, 2",
        lambda y: y.new_ones(2, 4, 3, 5, 8),
    ),
    "axes": (ArgumentError, r"out expects shape .*got \(4, 3, 5, 7\)", lambda y: y[0]),
    "dtype": (
        ArgumentTypeError, "out is torch.float64 but the result is torch.float32; .*weight", lambda y: y.double(),
    ),
    "device": (ArgumentError, "out is on meta but the result is on cpu", lambda y: y.to("meta")),
    "one value": (
        ArgumentError, r"share memory, its strides are \(0, 0, 0, 0, 0\)",
        lambda y: y[:1, :1, :1, :1, :1].expand_as(y),
    ),
    "overlap": (ArgumentError, "share memory", lambda y: y.new_ones(5000).as_strided(y.shape, (400, 90, 30, 6, 1))),
    "gradient": (
        ArgumentError, "don't support automatic differentiation.* out of shape", lambda y: y.clone().requires_grad_(),
    ),
    "inference": (ArgumentError, "inference tensor", lambda y: made_in_inference(y)),
}  # fmt: skip


def made_in_inference(y):
    with torch.inference_mode():
        return y.clone()


@pytest.mark.parametrize("label", REFUSED)
def test_a_bad_out_is_refused_and_stays_as_it_was(label):
    kind, message, make = REFUSED[label]
    x, weight, bias = call_of()
    out = make(OURS(x, weight, bias, **HYPER))
    before = out if label == "no tensor" else out.detach().clone()
    with pytest.raises(kind, match=message):
        OURS(x, weight, bias, **HYPER, out=out)
    if label not in ("no tensor", "device"):
        assert torch.equal(out.detach(), before)


def test_operands_that_need_a_gradient_are_refused_as_torch_refuses_them():
    x, weight, bias = call_of()
    out = torch.ones_like(OURS(x, weight, bias, **HYPER))
    with pytest.raises(RuntimeError) as torchs:
        torch.add(weight.clone().requires_grad_(), 1, out=torch.empty_like(weight))
    for index, name in enumerate(("input", "weight", "bias")):
        operands = [each.clone().requires_grad_(index == place) for place, each in enumerate((x, weight, bias))]
        with pytest.raises(ArgumentError, match=f"{name} of shape") as ours:
            OURS(*operands, **HYPER, out=out)
        assert str(torchs.value).removeprefix("add")[:-1] in str(ours.value)
        assert bool((out == 1).all())
        with torch.no_grad():
            assert OURS(*operands, **HYPER, out=out) is out
        out.fill_(1)


def test_memory_shared_with_an_operand():
    x, weight, bias = call_of()
    buffer = torch.randn(2, 9, 4, 5, 6)
    for layout in LAYOUTS.values():
        whole = buffer.contiguous(memory_format=layout)
        image, out = whole[:, :3], whole[:, 3:7]  # the places of the two interleave, and none is in both
        want = OURS(image, weight, bias, 1, 1)
        assert torch.equal(OURS(image, weight, bias, 1, 1, out=out), want)
        with pytest.raises(ArgumentError, match=r"out \(2, 4, 4, 5, 6\) shares memory with input \(2, 3, 4, 5, 6\)"):
            OURS(image, weight, bias, 1, 1, out=whole[:, 2:6])
    for name, place in (("weight", 1), ("bias", 2)):
        storage = torch.randn(2000)
        operands = [x, weight, bias]
        operands[place] = storage[100 : 100 + operands[place].numel()].view_as(operands[place])
        with pytest.raises(ArgumentError, match=f"shares memory with {name}"):
            OURS(*operands, **HYPER, out=storage[:840].view(2, 4, 3, 5, 7))


def test_overlaps_are_found_as_by_counting():
    generator = torch.Generator().manual_seed(1)
    storage = torch.arange(4000)
    found = []
    for _ in range(300):
        pair = []
        for _ in range(2):
            shape = torch.randint(1, 4, (3,), generator=generator).tolist()
            strides = torch.tensor([0, 1, 2, 3, 6, 7, 12, 24])[torch.randint(0, 8, (3,), generator=generator)].tolist()
            pair.append(storage.as_strided(shape, strides, int(torch.randint(0, 40, (), generator=generator))))
        places = [set(each.flatten().tolist()) for each in pair]
        assert [overlaps_itself(each) for each in pair] == [
            len(places[index]) < each.numel() for index, each in enumerate(pair)
        ]
        shared = bool(places[0] & places[1])
        assert share_memory(*pair) or not shared  # never missed
        found.append((shared, share_memory(*pair)))
    assert found.count((False, False)) > 30 and found.count((True, True)) > 30
    assert not share_memory(storage[:10], torch.arange(10))


def test_autocast_names_its_dtype():
    x, weight, bias = call_of()
    with torch.autocast("cpu", torch.bfloat16):
        want = OURS(x, weight, bias, **HYPER)
        out = torch.empty_like(want)
        assert torch.equal(OURS(x, weight, bias, **HYPER, out=out), want)
        with pytest.raises(ArgumentTypeError, match=r"result is torch.bfloat16, in which autocast computes"):
            OURS(x, weight, bias, **HYPER, out=out.float())


def test_other_roads_compute_and_copy_or_refuse():
    x, weight, bias = call_of()
    want = OURS(x, weight, bias, **HYPER)

    def call(x, out):
        return OURS(x, weight, bias, **HYPER, out=out[:, 1:5]), out

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    buffer = torch.zeros(2, 6, *want.shape[2:])
    close(compiled(x, buffer)[0], want)
    close(buffer[:, 1:5], want)
    assert not buffer[:, 0].any() and not buffer[:, 5].any()
    traced = torch.jit.trace(lambda x, out: OURS(x, weight, bias, **HYPER, out=out), (x, want.clone()))
    close(traced(x, buffer[:, :4]), want)
    program = torch.export.export(Written(weight, bias), (x, want.clone()))
    close(program.module()(x, torch.zeros_like(want)), want)
    with FakeTensorMode() as mode:
        fake, out = (mode.from_tensor(each) for each in (x, want))
        assert OURS(fake, *map(mode.from_tensor, (weight, bias)), **HYPER, out=out) is out
    meta = [each.to("meta") for each in (x, weight, bias)]
    assert OURS(*meta, **HYPER, out=want.to("meta")).shape == want.shape
    with pytest.raises(ArgumentError, match=r"not served under a torch.func transform.*\(2, 4, 3, 5, 7\)"):
        torch.vmap(lambda x: OURS(x, weight, bias, **HYPER, out=want))(x[None])


class Written(torch.nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x, out):
        return OURS(x, self.weight, self.bias, **HYPER, out=out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tensor_of_the_size_of_y_is_made(layout, monkeypatch):
    monkeypatch.setattr(torch_shuffle, "IMAGE_ELEMENTS", 1000)
    monkeypatch.setattr(torch_shuffle, "PART_ELEMENTS", 1000)
    case = CASES["tile"]
    x, weight, bias = (t.to(torch.float32) for t in expected(case, True)[0])
    x = x.repeat(1, 1, 4, 2, 2).contiguous(memory_format=LAYOUTS[layout])
    with tritonconv.use("forward_torch_shuffle"):
        y = case.call(x, weight, bias)
        assert largest_allocation(lambda: case.call(x, weight, bias, out=y)) < y.nbytes / 2
