"""Problem's arithmetic against brute force: plain loops over every (input, tap) pair. Runs on the CPU, no kernel."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonconv import ArgumentError, ArgumentTypeError, Problem
from tritonconv import arguments as checks
from tritonconv.kernels.registry import variant
from tritonconv.problem import INT32_MAX, PASSES, Axis, TorchCrop, index_bits, largest_offset, output_size


def axis_hits(axis: Axis) -> dict[int, list[tuple[int, int]]]:
    """output index -> the (tap, input) pairs that meet there, by the definition and nothing else."""
    hits: dict[int, list[tuple[int, int]]] = {o: [] for o in range(axis.out)}
    for i in range(axis.size):
        for tap in range(axis.kernel):
            o = i * axis.stride + axis.dilation * tap - axis.crop
            if o in hits:
                hits[o].append((tap, i))
    return hits


def check_axis(axis: Axis) -> None:
    hits = axis_hits(axis)
    assert axis.hits == sum(len(pairs) for pairs in hits.values())
    owners = [phase.first + axis.stride * j for phase in axis.phases for j in range(phase.count)]
    assert sorted(owners) == list(range(axis.out)), "each output belongs to exactly one phase"
    for phase in axis.phases:
        first, count, taps, offsets = phase.first, phase.count, phase.taps, phase.offsets
        assert count >= 1
        assert list(taps) == sorted(taps)
        assert len(taps) == len(offsets)
        for j in range(count):
            reached = {(t, j + f) for t, f in zip(taps, offsets, strict=True) if 0 <= j + f < axis.size}
            assert reached == set(hits[first + axis.stride * j])
        # A tap is listed exactly where it would hit on an unbounded input.
        residue = (first + axis.crop) % axis.stride
        assert list(taps) == [t for t in range(axis.kernel) if (axis.dilation * t - residue) % axis.stride == 0]


def random_axis(draw) -> tuple[int, int, int, int, int, int, int]:
    """size, kernel, stride, dilation, front crop, back crop, appended planes; the output is never empty."""
    size, kernel, stride, dilation = draw(1, 6), draw(1, 6), draw(1, 5), draw(1, 4)
    full = (size - 1) * stride + dilation * (kernel - 1) + 1
    front = draw(0, full - 1)
    back = draw(0, full - 1 - front)
    appended = 0 if back else draw(0, max(stride, dilation) - 1)
    return size, kernel, stride, dilation, front, back, appended


def as_axis(size, kernel, stride, dilation, front, back, appended) -> Axis:
    (out,) = output_size([size], [kernel], [stride], [front], [back], [appended], [dilation])
    return Axis(size, kernel, stride, front, dilation, out)


def problem_of(axes, n=1, c_in=2, c_out=4, groups=1, **more) -> Problem:
    fields = [as_axis(*values) for values in axes]
    triples = {
        name: tuple(getattr(axis, field) for axis in fields)
        for name, field in [("size", "size"), ("kernel", "kernel"), ("stride", "stride"), ("crop", "crop")]
    }
    dilation, out_size = tuple(axis.dilation for axis in fields), tuple(axis.out for axis in fields)
    return Problem(n, c_in, c_out, **triples, out_size=out_size, dilation=dilation, groups=groups, **more)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_one_axis_against_brute_force(data):
    values = random_axis(lambda low, high: data.draw(st.integers(low, high)))
    axis = as_axis(*values)
    size, kernel, stride, dilation, front, back, appended = values
    assert axis.back_crop == back - appended
    # The last output is the last one of the uncropped result, less the back crop.
    assert axis.out == (size - 1) * stride + dilation * (kernel - 1) - front - back + appended + 1
    check_axis(axis)


@pytest.mark.parametrize("values", [
    (4, 2, 2, 1, 0, 0, 0), (1, 1, 1, 1, 0, 0, 0), (1, 3, 2, 1, 1, 1, 1), (5, 3, 2, 1, 1, 0, 0), (5, 3, 2, 1, 0, 1, 0),
    (4, 3, 2, 1, 2, 2, 0), (4, 5, 1, 1, 4, 3, 0), (6, 2, 3, 1, 0, 0, 2), (3, 1, 2, 1, 0, 0, 1), (3, 1, 5, 1, 2, 0, 0),
    (4, 3, 2, 2, 0, 0, 0), (4, 3, 4, 2, 1, 0, 0), (3, 4, 3, 3, 0, 2, 0), (2, 2, 2, 3, 0, 0, 2), (1, 1, 1, 3, 1, 1, 2),
    (7, 4, 2, 1, 6, 0, 0), (1, 6, 4, 4, 0, 20, 0), (2, 3, 6, 4, 3, 0, 3), (9, 1, 7, 1, 0, 0, 6),
])  # fmt: skip
def test_named_corners_of_one_axis(values):
    check_axis(as_axis(*values))


def test_a_dilation_that_shares_a_factor_with_the_stride_leaves_empty_phases():
    axis = as_axis(4, 3, 2, 2, 0, 0, 0)
    assert [phase.taps for phase in axis.phases] == [(0, 1, 2), ()]
    assert all(axis_hits(axis)[o] == [] for o in range(1, axis.out, 2))
    assert [phase.taps for phase in as_axis(3, 2, 5, 1, 0, 0, 0).phases] == [(0,), (1,), (), (), ()]


def volumes(count: int):
    rng = random.Random(7)
    for _ in range(count):
        groups = rng.choice((1, 1, 2, 3))
        c_in, c_out = groups * rng.randint(1, 3), groups * rng.randint(1, 3)
        more = {"dtype": rng.choice((torch.float32, torch.float16, torch.float64)), "bias": rng.random() < 0.5}
        axes = [random_axis(rng.randint) for _ in range(3)]
        yield problem_of(axes, rng.randint(0, 3), c_in, c_out, groups, **more)


def test_volumes_against_brute_force():
    for problem in volumes(150):
        hits = [axis_hits(axis) for axis in problem.axes]
        pairs = [sum(len(found) for found in axis.values()) for axis in hits]
        per_pair = 2 * problem.n * problem.c_in * problem.c_out // problem.groups
        assert problem.flops == per_pair * math.prod(pairs), problem
        # Phases: a partition of the output volume, heaviest first, the taps those of the axes.
        owned = set()
        for phase in problem.phases:
            steps = [
                range(axis.first, axis.first + stride * axis.count, stride)
                for axis, stride in zip(phase.axes, problem.stride, strict=True)
            ]
            outputs = set(itertools.product(*steps))
            assert len(outputs) == phase.voxels
            assert not outputs & owned
            owned |= outputs
            assert phase.taps == math.prod(len(axis.taps) for axis in phase.axes)
        assert owned == set(itertools.product(*(range(out) for out in problem.out_size)))
        weights = [phase.taps for phase in problem.phases]
        assert weights == sorted(weights, reverse=True)


def test_border_taps_are_not_useful_flops():
    # k3 s2 p1 output_padding 1 on 2 voxels: 4 outputs; of the 6 (input, tap) pairs one falls at -1.
    axis = as_axis(2, 3, 2, 1, 1, 1, 1)
    assert (axis.out, axis.hits) == (4, 5)
    assert problem_of([(2, 3, 2, 1, 1, 1, 1)] * 3, n=2, c_in=3, c_out=5).flops == 2 * 2 * 3 * 5 * 5**3
    # The useful FLOPs of an uncropped problem are all of them.
    assert problem_of([(4, 3, 2, 1, 0, 0, 0)] * 3, c_in=1, c_out=1).flops == 2 * (4 * 3) ** 3
    assert problem_of([(4, 3, 2, 1, 0, 0, 0)] * 3, n=0).flops == 0


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2), (torch.float32, 4), (torch.float64, 8)])
def test_bytes_of_the_three_passes(dtype, size):
    axes = [(4, 2, 2, 1, 0, 0, 0), (3, 3, 1, 1, 1, 1, 0), (2, 1, 3, 1, 0, 0, 2)]  # out 8, 3, 6
    problem = problem_of(axes, n=2, c_in=6, c_out=10, groups=2, dtype=dtype, bias=True)
    assert problem.x_shape == (2, 6, 4, 3, 2)
    assert problem.weight_shape == (6, 5, 2, 3, 1)
    assert problem.y_shape == (2, 10, 8, 3, 6)
    elements = 2 * 6 * 24 + 6 * 5 * 6 + 2 * 10 * 144
    assert [problem.bytes(name) for name in PASSES] == [(elements + 10) * size, elements * size, (elements + 10) * size]
    bare = dataclasses.replace(problem, bias=False)
    assert {bare.bytes(name) for name in PASSES} == {elements * size}
    assert problem.bytes() == problem.bytes("forward")
    assert problem.intensity("backward_data") == problem.flops / (elements * size)
    with pytest.raises(ArgumentError, match=r"forward, backward_data, backward_weight.*'backward'"):
        problem.bytes("backward")


def test_index_width_turns_at_two_to_the_31():
    assert [index_bits(INT32_MAX + step) for step in (-1, 0, 1)] == [32, 32, 64]
    tiny = problem_of([(1, 1, 1, 1, 0, 0, 0)] * 3)
    assert tiny.index_bits == 32
    # 2**31 elements reach offset 2**31 - 1, which still fits; one element more does not.
    assert dataclasses.replace(tiny, n=2**15, c_in=2**16, c_out=1).index_bits == 32
    assert dataclasses.replace(tiny, n=2**15 + 1, c_in=2**16, c_out=1).index_bits == 64
    assert dataclasses.replace(tiny, n=1, c_in=2**16, c_out=2**16).index_bits == 64, "the weight counts too"
    assert dataclasses.replace(tiny, n=2**16, c_in=1, c_out=2**16).index_bits == 64, "y counts too"


def test_largest_offset_is_the_last_element_of_the_view():
    rng = random.Random(3)
    for _ in range(60):
        shape = tuple(rng.randint(1, 4) for _ in range(4))
        strides = tuple(rng.choice((0, 1, 3, 7, 20)) for _ in range(4))
        reached = [sum(map(operator.mul, at, strides)) for at in itertools.product(*map(range, shape))]
        assert largest_offset(shape, strides) == max(reached)
    dense = torch.empty(2, 3, 4, 5, 6, device="meta")
    assert largest_offset(tuple(dense.shape), dense.stride()) == dense.numel() - 1


def test_torch_crop_gives_torch_what_it_can_express():
    ones, twos = (1, 1, 1), (2, 2, 2)
    assert TorchCrop.of((1, 1, 1), (1, 1, 1), ones, ones) == TorchCrop((1, 1, 1), (0, 0, 0), (0, 0, 0), (0, 0, 0))
    # One plane more at the front is torch's output padding where the stride (or the dilation) leaves room for it.
    assert TorchCrop.of((1, 0, 2), (0, 0, 1), twos, ones) == TorchCrop((1, 0, 2), (1, 0, 1), (0, 0, 0), (0, 0, 0))
    assert TorchCrop.of((1, 0, 2), (0, 0, 1), ones, twos).exact
    assert TorchCrop.of((1, 0, 2), (0, 1, 1), ones, ones) == TorchCrop((0, 0, 1), (0, 0, 0), (1, 0, 1), (0, 1, 0))
    assert TorchCrop.of((0, 0, 0), (-1, 0, -1), twos, ones) == TorchCrop((0, 0, 0), (1, 0, 1), (0, 0, 0), (0, 0, 0))
    for problem in volumes(100):
        crop = problem.torch_crop
        for i, axis in enumerate(problem.axes):
            assert crop.padding[i] + crop.front[i] == axis.crop
            assert crop.padding[i] - crop.output_padding[i] + crop.back[i] == axis.back_crop
            assert min(crop.padding[i], crop.front[i], crop.back[i], crop.output_padding[i]) >= 0
            assert crop.output_padding[i] < max(axis.stride, axis.dilation), "torch refuses more"
        surplus = [axis.crop - axis.back_crop for axis in problem.axes]
        room = [max(axis.stride, axis.dilation) for axis in problem.axes]
        assert crop.exact is all(0 <= extra < most for extra, most in zip(surplus, room, strict=True))


@pytest.mark.parametrize(("expected", "axes"), [
    (True, [(4, 2, 2, 1, 0, 0, 0)] * 3), (True, [(3, 1, 1, 1, 0, 0, 0), (2, 2, 2, 1, 0, 0, 0), (2, 3, 3, 1, 0, 0, 0)]),
    (False, [(4, 2, 2, 1, 0, 0, 0)] * 2 + [(4, 3, 2, 1, 1, 0, 0)]), (False, [(4, 2, 2, 1, 1, 0, 0)] * 3),
    (False, [(4, 2, 2, 1, 0, 0, 1)] * 3), (False, [(4, 2, 2, 1, 0, 1, 0)] * 3), (False, [(4, 2, 2, 2, 0, 0, 0)] * 3),
])  # fmt: skip
def test_tiles_exactly_means_one_tap_per_output(expected, axes):
    problem = problem_of(axes)
    assert problem.tiles_exactly is expected
    one_each = all(len(pairs) == 1 for axis in problem.axes for pairs in axis_hits(axis).values())
    assert one_each or not expected
    cpu = torch.device("cpu")
    assert (variant("forward_torch_shuffle").supports(problem, cpu) is None) is expected


def test_an_axis_of_one_voxel_has_any_stride():
    first = Problem(2, 5, 8, (1, 1, 1), (4, 4, 4), (1, 2, 4), (0, 1, 0), (4, 3, 4))
    assert first.without_overlap.stride == (4, 4, 4) and first.without_overlap.flops == first.flops
    assert dataclasses.replace(first, crop=(0, 0, 0), out_size=(4, 4, 4)).without_overlap.tiles_exactly
    long = dataclasses.replace(first, size=(1, 1, 2), stride=(1, 2, 2), out_size=(4, 3, 6))
    assert long.without_overlap is long  # outputs along w have several taps
    assert dataclasses.replace(long, stride=(1, 2, 4), out_size=(4, 3, 8)).without_overlap.stride == (4, 4, 4)
    assert dataclasses.replace(first, dilation=(2, 1, 1), out_size=(7, 3, 4)).without_overlap.stride == (1, 2, 4)


def test_depthwise_is_one_channel_in_and_out_per_group():
    axes = [(2, 3, 2, 1, 1, 1, 1)] * 3
    assert problem_of(axes, c_in=4, c_out=4, groups=4).depthwise
    for c_in, c_out, groups in ((4, 8, 4), (8, 4, 4), (4, 4, 2), (1, 1, 1), (4, 4, 1)):
        assert not problem_of(axes, c_in=c_in, c_out=c_out, groups=groups).depthwise


GOOD = {"n": 2, "c_in": 4, "c_out": 6, "size": (4, 4, 4), "kernel": (3, 3, 3), "stride": (2, 2, 2)}
GOOD |= {"crop": (1, 1, 1), "out_size": (8, 8, 8)}


@pytest.mark.parametrize(("field", "value"), [
    ("n", -1), ("c_in", 0), ("c_in", -3), ("c_out", -1), ("groups", 0), ("size", (4, 0, 4)), ("kernel", (3, 3, 0)),
    ("stride", (2, -2, 2)), ("stride", (2, 2)), ("crop", (1, 1, -1)), ("crop", (1, 1, 1, 1)), ("out_size", (8, 8, 0)),
    ("dilation", (1, 0, 1)), ("size", [4, 4, 4]), ("kernel", 3), ("groups", 3), ("out_size", (8, 8, 10)),
    ("layout", "nhwc"),
])  # fmt: skip
def test_a_wrong_value_is_refused_by_name(field, value):
    with pytest.raises(ArgumentError, match="Problem: ") as caught:
        Problem(**{**GOOD, field: value})
    assert field in str(caught.value)
    wrong = [entry for entry in value if not 0 < entry < 10] if isinstance(value, tuple) and len(value) == 3 else []
    assert str(value) in str(caught.value) or any(str(entry) in str(caught.value) for entry in wrong)


@pytest.mark.parametrize(("field", "value"), [
    ("n", 2.0), ("c_in", "4"), ("groups", True), ("c_out", None), ("stride", (2, 2.0, 2)), ("dilation", (1, True, 1)),
])  # fmt: skip
def test_a_wrong_type_is_refused_by_name(field, value):
    with pytest.raises(ArgumentTypeError, match=f"Problem: {field} expects an integer") as caught:
        Problem(**{**GOOD, field: value})
    wrong = next((entry for entry in value if type(entry) is not int), None) if isinstance(value, tuple) else value
    assert repr(wrong) in str(caught.value)
    assert type(wrong).__name__ in str(caught.value)


def test_appended_planes_stay_below_the_larger_of_stride_and_dilation():
    dilated = {**GOOD, "dilation": (3, 3, 3), "crop": (0, 0, 0)}
    full = 3 * 2 + 3 * 2 + 1
    assert Problem(**{**dilated, "out_size": (full + 2,) * 3}).axes[0].back_crop == -2
    with pytest.raises(ArgumentError, match=r"out_size \(13, 13, 16\) appends 3 planes.*= 2 may be"):
        Problem(**{**dilated, "out_size": (full, full, full + 3)})


def test_a_problem_is_a_value():
    one, two = Problem(**GOOD), Problem(**GOOD)
    assert one == two
    assert hash(one) == hash(two)
    assert one.phases
    assert one.flops > 0
    assert hash(one) == hash(two), "cached properties are no part of the value"
    assert one == two
    for field in dataclasses.fields(Problem):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, field.name, getattr(one, field.name))
    others = [{"n": 3}, {"dtype": torch.float16}, {"layout": "ndhwc"}, {"bias": True}, {"groups": 2}]
    assert len({one, two, *(dataclasses.replace(one, **change) for change in others)}) == 1 + len(others)


def test_str_shows_what_is_not_the_default():
    assert str(Problem(**GOOD)) == "n2 4->6 4x4x4 k3 s2 crop 1/0 float32 ncdhw"
    plain = problem_of([(4, 2, 2, 1, 0, 0, 0)] * 3, c_in=3, c_out=5)
    assert str(plain) == "n1 3->5 4x4x4 k2 s2 float32 ncdhw"
    axes = [(4, 3, 1, 1, 0, 2, 0), (5, 2, 2, 2, 1, 1, 0), (6, 1, 3, 1, 0, 0, 2)]
    full = problem_of(axes, c_in=4, c_out=6, groups=2, dtype=torch.bfloat16, layout="ndhwc", bias=True)
    assert str(full) == "n1 4->6 4x5x6 k3x2x1 s1x2x3 crop 0x1x0/2x1x-2 dil 1x2x1 g2 bfloat16 ndhwc bias"


def test_torch_has_no_arguments_for_a_crop_that_its_padding_cannot_express():
    uneven = Problem(1, 2, 3, (4, 4, 4), (4, 2, 2), (2, 2, 2), (0, 0, 0), (8, 8, 8))
    assert not uneven.torch_crop.exact
    with pytest.raises(ArgumentError, match="0 before and 2 behind, 0 before and 0 behind"):
        uneven.torch_arguments  # noqa: B018


def test_the_shortest_arguments_are_torchs_own():
    x, weight = torch.randn(1, 4, 3, 4, 5), torch.randn(4, 2, 3, 3, 3)
    for arguments, short in (
        ((1, 0, 0, 1, 1), ()),
        ((2, 0, 0, 1, 1), (2,)),
        ((2, 1, 0, 1, 1), (2, 1)),
        (((2, 2, 1), 0, (1, 1, 0), 1, 1), ((2, 2, 1), 0, (1, 1, 0))),
        ((1, 0, 0, 2, 1), (1, 0, 0, 2)),
        ((1, (0, 1, 1), 0, 1, 2), (1, (0, 1, 1), 0, 1, 2)),
    ):
        problem = checks.problem_of(x, weight, None, checks.geometry(*arguments))
        assert problem.shortest_arguments == short
        want = torch.conv_transpose3d(x, weight, None, *problem.torch_arguments)
        assert torch.equal(torch.conv_transpose3d(x, weight, None, *short), want)
