"""The epilogue in the forward kernels beside the operations that it is composed of. Runs in Triton's interpreter."""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch
from beside_torch import close
from variant_cases import CPU, Case

import tritonconv
from tritonconv import dispatch, epilogue_forward, epilogue_road
from tritonconv.autotune.choose import Selection
from tritonconv.epilogue import ACTIVATIONS, Epilogue, activated, finish
from tritonconv.forced import pinned
from tritonconv.kernels import triton_epilogue
from tritonconv.kernels.registry import have_triton, variant, variants

pytestmark = pytest.mark.skipif(not have_triton(), reason="Triton is not installed")

HALF, FLOAT = torch.float16, torch.float32
LAYOUTS = ("ncdhw", "ndhwc")
SHUFFLED = Case(n=1, channels=(2, 8), size=(1, 1, 3), kernel=(1, 1, 2), stride=(1, 1, 2))
PARTED = SHUFFLED._replace(channels=(2, 20))
OVERLAPPED = SHUFFLED._replace(kernel=(1, 1, 3), front=(0, 0, 1), back=(0, 0, 1))
FEW = OVERLAPPED._replace(channels=(2, 2))
DEPTHWISE = OVERLAPPED._replace(channels=(3, 3), groups=3, kernel=(1, 3, 3), stride=(1, 2, 2))
BOXED = OVERLAPPED._replace(n=2, channels=(16, 24))
INFINITE = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # 1 / inf is the 0 that is meant
TAKING = [each.name for each in variants("forward") if each.epilogue is not None]


def case_of(name: str, dtype, layout) -> Case | None:
    """The first case that the variant serves."""
    cases = (OVERLAPPED, SHUFFLED, PARTED, FEW, DEPTHWISE, BOXED)
    return next((each for each in cases if variant(name).supports(each.problem(dtype, layout), CPU) is None), None)


def layouts_of(name: str) -> tuple[str, ...]:
    """Those that the variant serves."""
    return tuple(each for each in LAYOUTS if case_of(name, FLOAT, each) is not None)


def given(name: str, dtype=FLOAT, layout=None, case=None):
    """(problem, default config, x, weight, bias, residual, slopes), of which every exact sum is a float32."""
    layout = layout or layouts_of(name)[0]
    case = case or case_of(name, dtype, layout)
    problem = case.problem(dtype, layout)
    torch.manual_seed(0)

    def numbers(*shape):
        return (torch.randint(-16, 17, shape) / 8).to(dtype)

    x = numbers(*problem.x_shape).contiguous(memory_format=problem.memory_format)
    channels = problem.c_out
    tensors = x, numbers(*problem.weight_shape), numbers(channels), numbers(*problem.y_shape), numbers(channels)
    return problem, variant(name).default(problem, CPU), *tensors


def computed(name, problem, config, x, weight, bias, epilogue, residual=None, slopes=None):
    slopes = slopes if epilogue.activation == "prelu" else None
    more = {"epilogue": epilogue, "residual": residual, "slopes": slopes}
    assert variant(name).epilogue(problem, config, epilogue)
    return variant(name).compute(problem, config, x, weight, bias, **more)


def near(y, z, epilogue, slopes) -> bool:
    """Whether y is the activation of the exact ``z``, rounded once."""
    exact = activated(z.double(), epilogue, slopes.double())
    ulps = torch.finfo(y.dtype).eps / 2 * exact.abs() + torch.finfo(y.dtype).tiny
    return bool(((y.double() - exact).abs() <= 1.01 * ulps + 2 * torch.finfo(FLOAT).eps * (1 + z.abs())).all())


def test_the_kernels_that_take_one():
    assert set(TAKING) >= {
        "forward_boxes", "forward_depthwise", "forward_depthwise_cells", "forward_gather", "forward_overlap",
        "forward_overlap_planes", "forward_phases", "forward_phases_packed", "forward_shuffle", "forward_shuffle_given",
        "forward_shuffle_parts", "forward_shuffle_resident",
    }  # fmt: skip


@INFINITE
@pytest.mark.parametrize("name", TAKING)
def test_every_combination_is_rounded_once(name):
    of_kind = {kind: given(name, *kind) for kind in product((FLOAT, HALF), layouts_of(name))}
    kinds = cycle(of_kind)
    sums = {}
    for kind, (problem, _, x, weight, *_) in of_kind.items():
        sums[kind] = torch.conv_transpose3d(
            x.double(), weight.double(), None, problem.stride, problem.crop, 0, problem.groups
        )
    for activation, with_residual, with_bias in product((None, *ACTIVATIONS), (True, False), (True, False)):
        kind = next(kinds)
        if not with_residual and not with_bias:
            next(kinds)  # so that each has every kind in turn
        problem, config, x, weight, bias, residual, slopes = of_kind[kind]
        epilogue = Epilogue(activation, 0.3 if activation == "leaky_relu" else 0.0, with_residual)
        z = sums[kind]
        z = z + bias.double().view(-1, 1, 1, 1) if with_bias else z
        z = z + residual.double() if with_residual else z
        operands = bias if with_bias else None, epilogue, residual if with_residual else None, slopes
        y = computed(name, problem, config, x, weight, *operands)
        assert y.shape == z.shape and y.is_contiguous(memory_format=problem.memory_format)
        assert near(y, z, epilogue, slopes), (kind, epilogue, with_bias)


@pytest.mark.parametrize("name", TAKING)
def test_torchs_rounding_has_torchs_bits(name):
    differs = 0
    for layout, activation in product(layouts_of(name), triton_epilogue.EXACT):
        problem, config, x, weight, bias, residual, slopes = given(name, HALF, layout)
        x, weight, bias, residual = (each + torch.randn_like(each) / 64 for each in (x, weight, bias, residual))
        sums = variant(name).compute(problem, config, x, weight, None)
        for b, r in ((bias, residual), (bias, None), (None, residual)):
            slope = 0.3 if activation == "leaky_relu" else 0.0
            epilogue = Epilogue(activation, slope, r is not None, "torch")
            y = computed(name, problem, config, x, weight, b, epilogue, r, slopes)
            assert torch.equal(y, finish(sums.clone(), epilogue, b, r, slopes)), (layout, epilogue)
        once = Epilogue(activation, slope, True)
        both = computed(name, problem, config, x, weight, bias, once, residual, slopes)
        stepwise = Epilogue(activation, slope, True, "torch")
        differs += not torch.equal(both, computed(name, problem, config, x, weight, bias, stepwise, residual, slopes))
    assert differs > 0


@INFINITE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_exact_from_small_to_large_and_keeps_a_nan(activation):
    """Near zero to its last digits, where torch's formula has them."""
    z = torch.cat([10 ** torch.linspace(-6, 1.5, 62), torch.tensor([0.6249, 0.6251])])
    case = Case(n=1, channels=(1, 1), size=(1, 1, 129), kernel=1)
    problem, config, _, weight, _, _, _ = given("forward_gather", case=case)
    x = torch.cat([z, -z, torch.tensor([float("nan")])]).view(1, 1, 1, 1, -1)
    epilogue, slopes = Epilogue(activation, -0.3), torch.tensor([0.3])
    y = computed("forward_gather", problem, config, x, torch.ones_like(weight), None, epilogue, None, slopes)
    exact = activated(x.double(), epilogue, slopes.double())
    error, eps = (y.double() - exact).abs(), torch.finfo(FLOAT).eps
    assert y.isnan().sum() == 1 and y[..., -1].isnan()
    bound = 4 * eps * (exact.abs() if activation in ("tanh", "sigmoid", "relu", "prelu") else x.double().abs())
    far = 1 + x.double().abs()  # of exp: its argument's rounding
    assert (error[..., :-1] <= (bound * far)[..., :-1]).all()


@pytest.mark.parametrize("activation", ["leaky_relu", "prelu"])
def test_a_zero_is_multiplied_by_the_slope(activation):
    """As torch does it, so that a slope that is a NaN shows."""
    problem, config, x, weight, *_ = given("forward_gather")
    epilogue, slopes = Epilogue(activation, float("nan")), torch.full((problem.c_out,), float("nan"))
    y = computed("forward_gather", problem, config, torch.zeros_like(x), weight, None, epilogue, None, slopes)
    assert y.isnan().all() and activated(torch.zeros_like(y), epilogue, slopes).isnan().all()


def test_operands_of_other_strides():
    """A residual of another layout, an expanded one, a slice; one slope, and a column of slopes."""
    problem, config, x, weight, bias, residual, slopes = given("forward_phases")
    epilogue = Epilogue("prelu", residual=True)
    want = computed("forward_phases", problem, config, x, weight, bias, epilogue, residual, slopes)
    beside = torch.stack([slopes, slopes + 1], 1)[:, 0]
    wide = torch.cat([residual, residual], 1)
    for r in (residual.contiguous(memory_format=torch.channels_last_3d), wide[:, : problem.c_out]):
        assert torch.equal(computed("forward_phases", problem, config, x, weight, bias, epilogue, r, beside), want)
    one = residual[:, :1, :, :, :1].expand_as(residual)
    y = computed("forward_phases", problem, config, x, weight, None, epilogue, one, slopes[:1])
    z = variant("forward_phases").compute(problem, config, x, weight, None)
    assert torch.equal(y, torch.nn.functional.prelu(z + one, slopes[:1]))


@pytest.mark.parametrize("name", TAKING)
def test_written_into_a_slice_at_once(name, monkeypatch):
    """A residual beside the slice has its strides; one of other strides is added by torch's operations, in place."""
    problem, _, x, weight, bias, residual, slopes = given(name)
    parts = slice(1, 1 + problem.c_out)
    buffer, wide = torch.full((2, problem.n, problem.c_out + 2, *problem.out_size), 7.0)
    wide[:, parts] = residual
    with tritonconv.use(name), torch.no_grad():

        def call(residual=residual, **more):
            arguments = x, weight, bias, problem.stride, problem.crop, 0, problem.groups
            return tritonconv.conv_transpose3d(*arguments, activation=("prelu", slopes), residual=residual, **more)

        want = call()
        close(call(out=buffer[:, parts]), want)
        monkeypatch.setattr(epilogue_forward, "finish", None)
        for out, r in ((buffer[:, parts], wide[:, parts]), (torch.empty_like(want), wide[:, parts])):
            assert call(r, out=out.fill_(7)) is out and torch.equal(out, want)
    assert (buffer[:, :1] == 7).all() and (buffer[:, -1:] == 7).all()


def test_the_backward_reads_the_weight_that_the_forward_packed():
    problem, _, x, weight, bias, residual, slopes = given("forward_gather", case=FEW._replace(channels=(2, 3)))
    pair = [variant(name) for name in ("forward_gather", "backward_data_gemm")]
    chosen = [Selection(each, {**each.default(problem, CPU), "WEIGHT": 1}, "the test's") for each in pair]
    for epilogue in (Epilogue("relu"), Epilogue("gelu"), Epilogue("tanh", rounding="torch")):
        dispatch.forget()
        with pinned(*chosen):
            y = tritonconv.conv_transpose3d(
                x.requires_grad_(), weight, bias, problem.stride, problem.crop,
                activation=epilogue.activation, rounding=epilogue.rounding,
            )  # fmt: skip
            (grad_x,) = torch.autograd.grad(y, x, residual)
            replays = dispatch.plan(problem, CPU).replays
        z = torch.conv_transpose3d(x, weight, bias, problem.stride, problem.crop)
        close(grad_x, torch.autograd.grad(activated(z, epilogue, slopes), x, residual)[0])
        (kind,) = replays["backward_data"].kept.values()
        assert "transpose_kernel" not in [kernel.name for kernel in kind.program.kernels], epilogue


def test_groups_have_their_own_channels():
    case = SHUFFLED._replace(channels=(4, 8), groups=2)
    epilogue = Epilogue("prelu", residual=True)
    for name in ("forward_shuffle", "forward_phases", "forward_phases_packed", "forward_gather"):
        problem, config, x, weight, bias, residual, slopes = given(name, case=case)
        y = computed(name, problem, config, x, weight, bias, epilogue, residual, slopes)
        z = torch.conv_transpose3d(x, weight, bias, problem.stride, groups=2) + residual
        assert near(y, z, epilogue, slopes), name


@pytest.mark.parametrize("name", TAKING)
def test_the_residual_and_the_slope_are_those_of_the_element(name):
    """Of several images, planes, rows, and of channels that fill no tile where the variant has such."""
    for layout in layouts_of(name):
        own = case_of(name, FLOAT, layout)
        odd = own._replace(n=2, size=(2, 3, 3), channels=(own.channels[0], 3))
        served = variant(name).supports(odd.problem(FLOAT, layout), CPU) is None
        case = odd if served else odd._replace(channels=own.channels)
        problem, config, x, weight, bias, residual, slopes = given(name, FLOAT, layout, case)
        epilogue = Epilogue("prelu", residual=True)
        y = computed(name, problem, config, x, weight, bias, epilogue, residual, slopes)
        z = torch.conv_transpose3d(x, weight, bias, problem.stride, problem.crop, 0, problem.groups) + residual
        assert near(y, z, epilogue, slopes), layout


def test_a_weight_in_other_strides_leads_to_the_kernel_that_packs_it():
    problem, config, x, weight, bias, residual, slopes = given("forward_shuffle_given", HALF)
    other = weight.contiguous(memory_format=torch.channels_last_3d)
    epilogue = Epilogue("gelu", residual=True)
    first, second = (
        computed("forward_shuffle_given", problem, config, x, each, bias, epilogue, residual, slopes)
        for each in (weight, other)
    )
    assert torch.equal(first, second)


def test_declined_where_others_add_up_the_sums_or_the_bits_are_torchs():
    problem, config, *_ = given("forward_phases")
    takes = variant("forward_phases").epilogue
    assert takes(problem, config, Epilogue("relu")) and not takes(problem, {**config, "SPLITS": 2}, Epilogue("relu"))
    assert takes(problem, config, Epilogue("relu", rounding="torch"))
    assert not takes(problem, config, Epilogue("gelu", rounding="torch"))
    for columns, fits in ((64, True), (128, False)):  # 64 and 128 sums of a thread
        tile = {**config, "BLOCK_M": 128, "BLOCK_N": columns, "num_warps": 4}
        assert takes(problem, tile, Epilogue("relu"))
        assert takes(problem, tile, Epilogue("gelu")) is takes(problem, tile, Epilogue(None, residual=True)) is fits
        box = {"BLOCK_D": 2, "BLOCK_H": 8, "BLOCK_W": 8, "BLOCK_N": columns, "num_warps": 4}  # 128 voxels
        assert variant("forward_boxes").epilogue(problem, box, Epilogue("gelu")) is fits


def test_a_call_runs_it_in_the_kernel(monkeypatch):
    problem, _, x, weight, bias, residual, slopes = given("forward_phases")
    want = finish(torch.conv_transpose3d(x, weight, bias, problem.stride, problem.crop), Epilogue(
        "prelu", residual=True), None, residual, slopes)  # fmt: skip
    for module in (epilogue_forward, epilogue_road):
        monkeypatch.setattr(module, "finish", None)
    with tritonconv.use("forward_phases"), torch.no_grad():
        y = tritonconv.conv_transpose3d(
            x, weight, bias, problem.stride, problem.crop, activation=("prelu", slopes), residual=residual
        )
    assert (y - want).abs().max() <= 8 * torch.finfo(FLOAT).eps * want.abs().max()
