"""Every Triton variant: exact on small integers, each element written, any strides. In the interpreter, or on a GPU.

Without a GPU Triton's interpreter runs the real kernels on the CPU (float32 and float16: its bfloat16 products are
wrong). On a GPU the same tests run compiled, in bfloat16 too.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from variant_cases import DEVICE, TINY, Case, complaints, expected, form, form_names, run, same

import tritonconv
from tritonconv import VariantNotApplicable
from tritonconv.kernels import backward_data_shuffle_given, forward_shuffle_given, triton_convolution
from tritonconv.kernels import triton_tiles as tiles
from tritonconv.problem import LAYOUTS, PASSES


def on_this_gpu(record) -> bool:
    """A GPU before sm_90 has no instruction for boxes, and their variants are of other GPUs."""
    problem = TINY["k3 s2 24"].problem(torch.float16, "ndhwc")
    return "has no instruction" not in (record.supports(problem, DEVICE) or "")


PLAIN = [record for record in tritonconv.variants() if record.backend == "triton" and on_this_gpu(record)]
NAMES = form_names(PLAIN)
ON_GPU = DEVICE.type == "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)


def small(config, rows=16) -> dict[str, int]:
    """The config with tiles of at most 16 and three splits, so that a tiny problem has several of each."""
    changed = {key: min(value, 16) if key.startswith("BLOCK_") else value for key, value in config.items()}
    changed |= {"BLOCK_M": rows} if "BLOCK_M" in config else {}
    changed |= {"BLOCK_D": 2, "BLOCK_H": 4, "BLOCK_W": 2} if "BLOCK_D" in config else {}
    return changed | {"SPLITS": 3} if "SPLITS" in config else changed


def configs_of(record, turn):
    """The configs of one test: the default, the default with small tiles, a neighbour with small tiles, in turn."""

    def configs(problem):
        default, space = record.default(problem, DEVICE), record.space(problem, DEVICE)
        # The interpreter takes as long for 256 rows as for 16: the larger problems get a few programs, not dozens.
        voxels = problem.n * math.prod(problem.out_size)
        rows = 16 if voxels * problem.groups <= 100 else 64 if voxels <= 400 else 256
        return [(default, small(default, rows), small(space[turn % len(space)], rows))[turn % 3]]

    return configs


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_exact(name, layout):
    served, found = 0, []
    for turn, case in enumerate(TINY.values(), start=list(LAYOUTS).index(layout)):
        dtypes = DTYPES if ON_GPU else DTYPES[turn % 2 : turn % 2 + 1]
        for dtype in dtypes:
            answer = complaints(
                form(name), case, dtype, layout, turn % 3 != 0, DEVICE, configs_of(form(name), turn // 2)
            )
            served += answer is not None
            found += answer or []
    assert found == []
    problems = (case.problem(torch.float32, layout) for case in TINY.values())
    assert served >= 3 or all(form(name).supports(problem, DEVICE) is not None for problem in problems)


SPLIT = ["backward_weight_splitk", "backward_weight_cells", "backward_weight_shuffle", "backward_weight_patches"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SPLIT)
def test_empty_chunks_add_nothing(name, layout):
    """Of more chunks than there are steps most are empty; the loop may be entered there too, see ``entered``."""

    def configs(problem):
        return [{**small(form(name).default(problem, DEVICE), 32), "SPLITS": 9}]

    cases = [TINY[label] for label in ("k2 s2 24", "k3 s2 p1", "more than half the kernel")]
    found = [complaints(form(name), case, torch.float16, layout, True, DEVICE, configs) for case in cases]
    assert not any(found) and found.count(None) < len(found)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["forward_phases", "forward_phases_packed", "backward_data_gemm"])
def test_more_taps_than_a_word_has_bits(name, layout):
    """Which taps find a voxel is looked up in the bits of an integer, or, of so many, worked out for each."""
    case = Case(n=1, channels=(16, 16), size=(2, 2, 4), kernel=(3, 2, 26), front=(1, 0, 9), back=(1, 1, 9))
    assert complaints(form(name), case, torch.float32, layout, True, DEVICE, configs_of(form(name), 1)) == []


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["backward_data_packed", "backward_data_gemm"])
def test_more_tiles_of_rows_than_are_in_a_group(name, layout):
    case = Case(channels=(5, 3), size=(2, 3, 5), kernel=3, stride=2, front=1, back=1)

    def configs(problem):
        return [{**small(form(name).default(problem, DEVICE)), "GROUP_M": 1}]

    assert complaints(form(name), case, torch.float32, layout, True, DEVICE, configs) == []


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["forward_gather", "backward_data_gemm"])
def test_the_last_group_of_tiles_is_not_full(name, layout):
    """Three tiles of rows in groups of two, and two of columns: the last group has a tile of rows for each of them."""
    case = Case(n=1, channels=(20, 20), size=(2, 3, 7), kernel=1)

    def configs(problem):
        config = {**small(form(name).default(problem, DEVICE)), "GROUP_M": 2, "BLOCK_W": 0}
        assert tiles.programs(problem, problem.size, problem.c_in, config) == 3 * 2
        return [config]

    assert complaints(form(name), case, torch.float32, layout, True, DEVICE, configs) == []


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["backward_data_depthwise"])
def test_the_most_voxels_of_a_lane(name, layout):
    """Four along h and two along w, more than any default has."""
    case = TINY["depthwise k5 s2"]
    space = form(name).space(case.problem(), DEVICE)
    most = {key: max(config[key] for config in space) for key in ("UNROLL_H", "UNROLL_W")}
    assert most == {"UNROLL_H": 4, "UNROLL_W": 2}

    def configs(problem):
        return [{**small(form(name).default(problem, DEVICE)), **most}]

    assert complaints(form(name), case, torch.float32, layout, True, DEVICE, configs) == []


def test_every_problem_has_a_kernel_in_every_pass():
    for layout in LAYOUTS:
        for label, case in TINY.items():
            problem = case.problem(torch.float16, layout)
            for pass_name in PASSES:
                ours = [r for r in tritonconv.variants(pass_name) if r.backend == "triton"]
                assert any(r.supports(problem, DEVICE) is None for r in ours), f"{label} {layout} {pass_name}"


def first_served(record, layout=None, dtype=torch.float32, at_least_voxels=4, longest_axis=1):
    """A case and its problem, in NDHWC where the variant serves that, in float16 where it serves no other dtype; None
    where it serves none."""
    layouts, dtypes = ("ndhwc", "ncdhw") if layout is None else (layout,), dict.fromkeys((dtype, torch.float16))
    for kind, each, case in itertools.product(dtypes, layouts, TINY.values()):
        problem = case.problem(kind, each)
        enough = problem.n * math.prod(problem.size) >= at_least_voxels and max(problem.size) >= longest_axis
        if enough and record.supports(problem, DEVICE) is None:
            return case, problem
    return None


def operands(case, dtype, layout):
    """x, weight, bias, grad_y on the device, and the exact answers of the passes."""
    inputs, grad_y, y, (grad_x, grad_weight, grad_bias) = expected(case, True)
    dense = {"device": DEVICE, "dtype": dtype, "memory_format": LAYOUTS[layout]}
    tensors = [inputs[0].to(**dense), inputs[1].to(DEVICE, dtype), inputs[2].to(DEVICE, dtype), grad_y.to(**dense)]
    return tensors, {"forward": [y], "backward_data": [grad_x], "backward_weight": [grad_weight, grad_bias]}


def flipped(t):
    """Axes in memory in reverse order."""
    return t.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)


def sliced(t):
    """A part of a larger buffer full of NaN: a read outside the part would show."""
    big = t.new_full([size + 3 for size in t.shape], math.nan)
    part = big[tuple(slice(1, 1 + size) for size in t.shape)]
    return part.copy_(t)


def spread(t):
    """Every second element of a buffer full of NaN along the last axis."""
    big = t.new_full([*t.shape[:-1], 2 * t.shape[-1]], math.nan)
    return big[..., ::2].copy_(t)


SERVED = [(name, layout) for name in NAMES for layout in LAYOUTS if first_served(form(name), layout) is not None]


def test_every_variant_serves_a_layout():
    assert {name for name, _ in SERVED} == set(NAMES)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "layout"), SERVED)
def test_operands_of_any_strides(name, layout):
    record = form(name)
    case, problem = first_served(record, layout)
    (x, weight, bias, grad_y), wanted = operands(case, problem.dtype, layout)
    for strided in (flipped, sliced, spread):
        bias_view = bias.expand(2, -1).t()[:, 0]
        tensors = strided(x), strided(weight), bias_view
        got = run(record, problem, small(record.default(problem, DEVICE), 64), tensors, strided(grad_y), True)
        assert all(map(same, got, wanted[record.pass_name])), strided.__name__


@pytest.mark.parametrize(
    "given", [forward_shuffle_given, backward_data_shuffle_given], ids=["forward", "backward_data"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_in_channels_last_is_taken_in_the_tiles_chosen(given, layout, monkeypatch):
    """The kernel that reads such a weight is another one, of the same products: no tuned tile is lost."""
    seen, real = [], triton_convolution.launch

    def recorded(kernel, grid, config, *args, **more):
        seen.append(config)
        return real(kernel, grid, config, *args, **more)

    monkeypatch.setattr(triton_convolution, "launch", recorded)
    case, problem = first_served(given.VARIANT, layout)
    (x, weight, bias, grad_y), wanted = operands(case, torch.float32, layout)
    weight = weight.to(memory_format=torch.channels_last_3d)
    assert not weight.is_contiguous()
    config = {**small(given.default(problem, DEVICE)), "num_stages": 1}
    got = run(given.VARIANT, problem, config, (x, weight, bias), grad_y, True)
    assert all(map(same, got, wanted[given.VARIANT.pass_name]))
    assert seen == [config]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", [name for name in NAMES if form(name).pass_name == "forward"])
def test_output_into_a_slice_of_a_larger_buffer(name):
    """The decoder's concatenation: y is written in place, and nothing beside it."""
    record = form(name)
    case, problem = first_served(record)
    (x, weight, bias, _), wanted = operands(case, problem.dtype, problem.layout)
    n, channels, *size = problem.y_shape
    shape = n + 1, channels + 5, *(s + 2 for s in size)
    buffer = torch.full(shape, 7.0, dtype=problem.dtype, device=DEVICE)
    part = buffer[1:, 3 : 3 + channels, 1:-1, 1:-1, 1:-1]
    got = record.compute(problem, small(record.default(problem, DEVICE)), x, weight, bias, out=part)
    assert got is part
    assert same(part, wanted["forward"][0])
    part.fill_(7.0)
    assert (buffer == 7.0).all()


@pytest.mark.gpu  # the interpreter runs programs one after the other, in one order
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_the_run(name):
    """Bitwise equal run to run (the sums of weight gradients are in a fixed order)."""
    record = form(name)
    case, problem = first_served(record, dtype=torch.float16)
    torch.manual_seed(0)
    x, weight, bias, grad_y = (torch.randn_like(t) for t in operands(case, torch.float16, problem.layout)[0])
    config = record.default(problem, DEVICE)
    first = run(record, problem, config, (x, weight, bias), grad_y, True)
    second = run(record, problem, config, (x, weight, bias), grad_y, True)
    assert record.deterministic
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", [record.name for record in PLAIN])
def test_what_is_out_of_reach_has_a_reason(name):
    record = form(name)
    for dtype in (torch.float64, torch.complex64):
        case, problem = first_served(record)
        assert str(dtype).removeprefix("torch.") in record.supports(case.problem(dtype, problem.layout), DEVICE)
    for case in TINY.values():
        for layout in LAYOUTS:
            why_not = record.supports(case.problem(torch.float32, layout), DEVICE)
            assert why_not is None or len(why_not) > 10
            if why_not is not None and layout == "ncdhw":
                x, weight, bias = (t.float().to(DEVICE).requires_grad_() for t in expected(case, True)[0])
                with tritonconv.use(name), pytest.raises(VariantNotApplicable) as caught:
                    case.call(x, weight, bias)
                assert why_not in str(caught.value)


@pytest.mark.skipif(ON_GPU, reason="of the interpreter alone: a GPU computes bfloat16, and test_exact runs it there")
def test_the_interpreter_refuses_bfloat16():
    for name in NAMES:
        case, problem = first_served(form(name))
        problem = case.problem(torch.bfloat16, problem.layout)
        assert "bfloat16" in form(name).supports(problem, DEVICE)


def test_cases_cover_what_they_should():
    """Channels 1, 3, 5, 16, 28 and 48, every kind of crop, output padding, dilation, groups and batch."""
    channels = {c for case in TINY.values() for c in case.channels}
    assert channels >= {1, 3, 5, 16, 28, 48}
    assert any(case.n == 0 for case in TINY.values())
    assert all(isinstance(case, Case) for case in TINY.values())
