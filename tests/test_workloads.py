"""The layers: their counts against independent ones, the suites, the CPU scaling rule, the order of a run."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonconv.arguments import geometry, problem_of
from tritonconv.errors import ArgumentError
from tritonconv.lab.bench import layer_sizes
from tritonconv.lab.bench import workloads as w
from tritonconv.lab.bench.calls import laid_out
from tritonconv.problem import LAYOUTS, Problem, output_size

ALL = w.workloads()
names = [layer.name for layer in ALL]


def test_there_are_86_layers_with_names_and_sources_of_their_own():
    assert len(ALL) == 86
    assert len(set(names)) == 86
    assert all("/" in layer.source for layer in ALL)


def test_every_layer_is_in_exactly_one_suite():
    others = (w.ALL, w.OF_HEROES, w.RANDOM, w.stages.SUITE)
    by_suite = [layer.name for suite in w.suites() if suite not in others for layer in w.workloads(suite)]
    assert Counter(by_suite) == Counter(names)
    assert {"unet", "gan", "stereo", "mednext", "kernelbench"} < set(w.suites())


def test_the_data_file_holds_nothing_that_is_not_read():
    rows = json.loads(w.DATA.read_text(encoding="utf-8"))["layers"]
    assert all(row.keys() == layer_sizes.Workload.__dataclass_fields__.keys() - {"family", "epilogue"} for row in rows)


def test_flops_and_bytes_equal_the_counts_in_the_data():
    counted = {layer.name: replace(layer.problem(torch.bfloat16), bias=False) for layer in ALL}
    gflop = {layer.name: pytest.approx(layer.gflop, abs=5.1e-5) for layer in ALL}
    mbytes = {layer.name: pytest.approx(layer.mbytes_bf16, abs=5.1e-4) for layer in ALL}
    assert {name: problem.flops / 1e9 for name, problem in counted.items()} == gflop
    assert {name: problem.bytes() / 1e6 for name, problem in counted.items()} == mbytes


@pytest.mark.parametrize("scale", layer_sizes.SCALES)
def test_torchs_arguments_come_back_from_the_problem(scale):
    given = {each.name: (each.stride, each.padding, each.output_padding, each.groups, each.dilation) for each in ALL}
    assert {layer.name: layer.problem(scale=scale).torch_arguments for layer in ALL} == given


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dispatch_sees_the_same_problem_as_the_run(layout):
    """The run plans by the problem, the operation by the tensors: they must agree on the layout too."""
    for layer in ALL:
        problem = layer.problem(layout=layout, scale="cpu")
        x, weight = torch.empty(problem.x_shape, device="meta"), torch.empty(problem.weight_shape, device="meta")
        bias = torch.empty(problem.c_out, device="meta") if problem.bias else None
        assert problem_of(laid_out(x, layout), weight, bias, geometry(*problem.torch_arguments)) == problem, layer.name


def test_the_scaled_layer_keeps_what_the_rule_keeps():
    wrong = []
    for layer in ALL:
        full, small = layer.problem(), layer.problem(scale="cpu")
        fields = ("c_in", "c_out", "kernel", "stride", "crop", "dilation", "groups", "bias")
        kept = all(getattr(small, field) == getattr(full, field) for field in fields)
        kept &= [axis.back_crop for axis in small.axes] == [axis.back_crop for axis in full.axes]
        within = small.flops <= layer_sizes.CPU_GFLOP * 1e9 and _mbytes(small) <= layer_sizes.CPU_MBYTES
        kept &= small.n == min(full.n, layer_sizes.CPU_BATCH)
        if not kept or within != (layer_sizes.left_out(layer, "cpu") is None):
            wrong.append(layer.name)
    assert wrong == []


def test_only_a_weight_over_the_limit_leaves_a_layer_out():
    reasons = {layer.name: why for layer in ALL if (why := layer_sizes.left_out(layer, "cpu"))}
    assert list(reasons) == ["dpot3d_patch16_768_32"]
    assert "403 MB" in reasons["dpot3d_patch16_768_32"]
    assert not any(layer_sizes.left_out(layer, "full") for layer in ALL)


def _mbytes(problem: Problem) -> float:
    return sum(4 * math.prod(shape) for shape in (problem.x_shape, problem.weight_shape, problem.y_shape)) / 1e6


triples = st.tuples(*[st.integers(1, 5)] * 3)


@st.composite
def problems(draw) -> Problem:
    kernel, stride = draw(triples), draw(triples)
    crop = tuple(draw(st.integers(0, k)) for k in kernel)
    size = tuple(draw(st.integers(1, 200)) + p for p in crop)
    out = output_size(size, kernel, stride, crop, crop, (0, 0, 0), (1, 1, 1))
    return Problem(
        n=draw(st.integers(1, 40)), c_in=draw(st.integers(1, 64)), c_out=draw(st.integers(1, 64)), size=size,
        kernel=kernel, stride=stride, crop=crop, out_size=tuple(max(1, extent) for extent in out),
    )  # fmt: skip


@given(problems())
@settings(max_examples=60, deadline=None)
def test_scaling_follows_its_rule(problem):
    small = layer_sizes.scaled(problem)
    assert small.n == min(problem.n, 2)
    assert all(1 <= new <= old for new, old in zip(small.size, problem.size, strict=True))
    assert all(new >= min(2, old) for new, old in zip(small.size, problem.size, strict=True))
    assert all(new == old or new in _halvings(old) for new, old in zip(small.size, problem.size, strict=True))
    assert min(small.out_size) >= 1
    assert [axis.back_crop for axis in small.axes] == [axis.back_crop for axis in problem.axes]
    assert layer_sizes.scaled(small) == small
    if small.flops > layer_sizes.CPU_GFLOP * 1e9 or _mbytes(small) > layer_sizes.CPU_MBYTES:
        assert w._halved(small) is None
    elif small.size != problem.size:  # no step too many: one step before, the limit was passed
        assert any(_was_over(small, axis) for axis in range(3))


def _halvings(size: int) -> set[int]:
    found = set()
    while size > 2:
        size = (size + 1) // 2
        found.add(size)
    return found


def _was_over(small: Problem, axis: int) -> bool:
    size = list(small.size)
    size[axis] *= 2  # the axis before its last halving had this size or one less
    before = layer_sizes.resized(small, tuple(size))
    return before.flops > layer_sizes.CPU_GFLOP * 1e9 or _mbytes(before) > layer_sizes.CPU_MBYTES


def test_equal_problems_are_timed_once_and_every_layer_is_accounted_for():
    for scale in layer_sizes.SCALES:
        found = w.distinct(ALL, scale)
        assert sorted([layer.name for layer, _ in found] + [name for _, same in found for name in same]) == sorted(
            names
        )
        assert len({layer.problem(scale=scale) for layer, _ in found}) == len(found)
    assert len(w.distinct(ALL, "cpu")) >= 65


def test_suites_take_turns_evenly():
    order = w.in_turn(ALL)
    assert Counter(order) == Counter(ALL)
    sizes = Counter(layer.suite for layer in ALL)
    half = Counter(layer.suite for layer in order[: len(order) // 2])
    assert all(abs(half[suite] - sizes[suite] / 2) <= 1 for suite in sizes)


def test_the_heroes_are_a_suite_and_come_once():
    found = [layer.name for layer in w.workloads("heroes")]
    assert sorted(found) == sorted(w.HEROES) and len(w.workloads(("unet", "heroes"))) < len(w.workloads("unet")) + 12


def test_only_filters_by_name_within_the_suites():
    assert {layer.name for layer in w.workloads(["stereo", "gan"], "64_1")} == {"3dgan_64_1"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: w.workloads("unets"), ["suite", "unets", "kernelbench"]),
        (lambda: w.workloads("mednext", "psmnet"), ["only='psmnet'", "7 layers", "mednext"]),
        (lambda: w.workload("psmnet"), ["'psmnet'", "psmnet_train_64_64"]),
        (lambda: ALL[0].problem(scale="half"), ["scale", "cpu, full", "'half'"]),
    ],
)
def test_errors_name_what_was_given_and_what_is_there(call, words):
    with pytest.raises(ArgumentError) as caught:
        call()
    assert all(word in str(caught.value) for word in words)


def test_random_layers():
    layers = w.workloads("random", seed=7)
    assert len(layers) == 60 and layers == w.workloads("random", seed=7) != w.workloads("random", seed=8)
    assert not set(layers) & set(w.workloads("all")) and w.workload(layers[5].name) == layers[5]
    shapes = {(layer.kernel, layer.stride, layer.padding, layer.dilation) for layer in ALL}
    for layer in layers:
        full, small = layer.problem(), layer.problem(scale="cpu")
        assert (layer.kernel, layer.stride, layer.padding, layer.dilation) in shapes
        assert 1 <= layer.n <= 8 and small.n == layer.n and max(layer.c_in, layer.c_out) <= 768
        assert small.flops <= layer_sizes.CPU_GFLOP * 1e9 or min(small.size) <= 2
        assert layer_sizes.left_out(layer, "cpu") is None and full.flops == pytest.approx(layer.gflop * 1e9)
    assert len({layer.c_in for layer in layers}) > 10 and len({layer.kernel for layer in layers}) > 4
    assert {layer.groups == layer.c_in for layer in layers} == {True, False}
    with pytest.raises(ArgumentError, match="random_7_60"):
        w.workload("random_7_60")
