"""Rules, plans and their memory, and ``use``. Runs on the CPU; a CUDA device is only named, never touched."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from beside_torch import PHASES
from torch.utils.checkpoint import checkpoint

import tritonconv
from tritonconv import ArgumentError, Problem, VariantNotApplicable, dispatch
from tritonconv import forced as forced_module
from tritonconv.autotune import choose, model, nearby, rules
from tritonconv.autotune.choose import Selection
from tritonconv.forced import forced_variants
from tritonconv.kernels.registry import variant
from tritonconv.problem import PASSES, output_size

LAST = torch.channels_last_3d
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
X, WEIGHT, BIAS = torch.ones(1, 2, 2, 3, 2), torch.ones(2, 3, 3, 3, 3), torch.ones(3)


def problems(dtype=torch.float32):
    """Layers of the classes that models have, a few thousand."""
    classes = [(2, 2, 0, 0, 1), (3, 2, 1, 1, 1), (4, 2, 1, 0, 1), (4, 2, 3, 0, 1), (1, 2, 0, 1, 1), (3, 1, 1, 0, 1)]
    classes += [(5, 2, 2, 1, 1), (3, 2, 1, 0, 1), (3, 2, 2, 1, 2), (9, 4, 0, 0, 1), (4, 4, 0, 0, 1)]
    channels = [
        (1, 1),
        (3, 16),
        (16, 8),
        (32, 64),
        (64, 1),
        (64, 32),
        (96, 2),
        (384, 5),
        (320, 320),
        (512, 256),
        (768, 128),
    ]
    sizes = [(1, 1, 1), (2, 2, 4), (4, 4, 4), (8, 8, 8), (12, 12, 20), (24, 32, 40)]
    for (k, s, p, q, r), (c_in, c_out), size in itertools.product(classes, channels, sizes):
        out = output_size(size, (k,) * 3, (s,) * 3, (p,) * 3, (p,) * 3, (q,) * 3, (r,) * 3)
        triples = [size, (k,) * 3, (s,) * 3, (p,) * 3, out, (r,) * 3]
        if min(out) < 1:
            continue
        for n, layout, bias in ((1, "ncdhw", True), (2, "ndhwc", False), (2, "ncdhw", False), (2, "ndhwc", True)):
            yield Problem(n, c_in, c_out, *triples, 1, dtype, layout, bias)
            if c_in > 1:
                yield Problem(n, c_in, c_in, *triples, c_in, dtype, layout, bias)


@pytest.fixture
def fresh(monkeypatch):
    """Empty plan memories, and the list of the problems that calls made."""
    made = []

    def problem_of(*args):
        made.append(original(*args))
        return made[-1]

    original = dispatch.problem_of
    monkeypatch.setattr(dispatch, "problem_of", problem_of)
    monkeypatch.setattr(dispatch, "_by_call", {})
    monkeypatch.setattr(dispatch, "_by_problem", {})
    dispatch.repeated.clear()
    return made


# ------------------------------------------------------------------ rules


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel", "Another"])
def test_images_of_one_voxel_are_a_product_on_every_cpu(vendor, pass_name, monkeypatch):
    monkeypatch.setattr(rules, "cpu_vendor", lambda: vendor)
    first = Problem(32, 200, 512, (1, 1, 1), (4, 4, 4), (2, 2, 2), (0, 0, 0), (4, 4, 4))
    record, because = rules.choose(first, CPU, pass_name)
    assert record.name == f"{pass_name}_torch_linear" and "images of one voxel" in because
    cropped = dataclasses.replace(first, crop=(1, 1, 1), out_size=(2, 2, 2))
    assert rules.choose(cropped, CPU, pass_name)[0].name != record.name


@pytest.mark.parametrize("pass_name", PASSES)
def test_a_problem_that_no_row_is_like_goes_to_torchs_own(pass_name, monkeypatch):
    for module in (rules, nearby):
        monkeypatch.setattr(module, "cpu_vendor", lambda: "AuthenticAMD")
    tile = Problem(2, 64, 32, (16, 16, 16), (2, 2, 2), (2, 2, 2), (0, 0, 0), (32, 32, 32))
    native = rules.FALLBACK[pass_name]
    small = dataclasses.replace(tile, n=1, c_in=2, c_out=2, size=(2, 2, 2), out_size=(4, 4, 4))
    for problem, device, word in (
        (dataclasses.replace(tile, dtype=torch.float64), CPU, "float64"),
        (dataclasses.replace(tile, n=0), CPU, "empty"),
        (small, CPU, "expected to take less than 1"),
    ):
        record, because = rules.choose(problem, device, pass_name)
        assert record.name == native
        assert word in because


def test_every_choice_serves_its_problem():
    rng = random.Random(5)
    for problem in rng.sample(list(problems()), 400):
        changed = dataclasses.replace(problem, dtype=rng.choice([torch.float16, torch.float32, torch.float64]))
        for pass_name in PASSES:
            assert rules.choose(changed, CPU, pass_name)[0].supports(changed, CPU) is None


# ------------------------------------------------------------------ plans and their memory


def test_a_repeated_call_finds_its_plan(fresh):
    for _ in range(3):
        tritonconv.conv_transpose3d(X, WEIGHT, BIAS, stride=2, padding=1)
    assert len(fresh) == 1
    tritonconv.conv_transpose3d(X.clone(), WEIGHT.clone().requires_grad_(), BIAS, 2, 1)
    assert len(fresh) == 1, "values, identity and gradients do not matter"
    assert len(dispatch._by_call) == len(dispatch._by_problem) == 1


PAIR = torch.cat((X, X))  # for which torch answers in channels_last_3d: one small image would get NCDHW


@pytest.mark.parametrize("change", [
    {"x": PAIR.double()}, {"x": X}, {"x": PAIR.to(memory_format=LAST)}, {"bias": None},
    {"weight": torch.ones(2, 3, 3, 3, 1)}, {"stride": 1}, {"padding": 0}, {"padding": ((1, 1), (1, 1), (1, 0))},
    {"output_padding": 1}, {"dilation": 2}, {"weight": torch.ones(2, 3, 3, 3, 3).to(memory_format=LAST)},
])  # fmt: skip
def test_a_changed_call_does_not(fresh, change):
    call = {"x": PAIR, "weight": WEIGHT, "bias": BIAS, "stride": 2, "padding": 1, "output_padding": 0, "dilation": 1}
    for keywords in (call, call | change):
        tensors = [keywords[name] for name in ("x", "weight", "bias")]
        x = tensors[0]
        tensors = [None if t is None else t.to(x.dtype) for t in tensors]
        rest = {name: keywords[name] for name in ("stride", "padding", "output_padding", "dilation")}
        y = tritonconv.conv_transpose3d(*tensors, **rest)
        if not isinstance(rest["padding"], tuple):
            assert torch.equal(y, F.conv_transpose3d(*tensors, **rest))
    assert len(fresh) == 2
    assert fresh[0] != fresh[1]


def test_lists_are_taken_and_share_the_plan(fresh):
    for stride in ([2, 1, 2], [2, 1, 2], (2, 1, 2)):
        y = tritonconv.conv_transpose3d(X, WEIGHT, BIAS, stride=stride, padding=[1, 0, 1])
        assert torch.equal(y, F.conv_transpose3d(X, WEIGHT, BIAS, stride=stride, padding=[1, 0, 1]))
    assert len(dispatch._by_problem) == 1
    assert len(set(fresh)) == 1


def test_a_plan_keeps_no_tensor_alive(fresh):
    import weakref

    x = torch.ones(1, 2, 2, 2, 3)
    tritonconv.conv_transpose3d(x, WEIGHT)
    gone = weakref.ref(x)
    del x
    assert gone() is None


def test_the_deterministic_switch_changes_the_plan_where_it_must():
    tile = Problem(2, 64, 32, (16, 16, 16), (3, 3, 3), (2, 2, 2), (1, 1, 1), (32, 32, 32))
    ordinary = dispatch.plan(tile, CUDA)
    torch.use_deterministic_algorithms(True)
    try:
        restricted = dispatch.plan(tile, CUDA)
        empty = dispatch.plan(dataclasses.replace(tile, n=0), CUDA)
        on_cpu = dispatch.plan(tile, CPU)
    finally:
        torch.use_deterministic_algorithms(False)
    for pass_name in PASSES:
        choice = restricted.choice(pass_name)
        assert choice.variant.deterministic
        if not ordinary.choice(pass_name).variant.deterministic:
            assert "is not deterministic; the cost model's fastest that is: " in choice.reason
            ranked = model.rank(tile, CUDA, pass_name, choose.ceilings_of(CUDA))
            assert choice[:2] == next(each[:2] for each in ranked if each[0].deterministic)
            assert empty.choice(pass_name).variant.deterministic
        assert on_cpu.choice(pass_name) == dispatch.plan(tile, CPU).choice(pass_name)
    assert dispatch.plan(tile, CUDA) == ordinary, "and back"


def test_calls_from_many_threads(monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_PLANS", 3)
    failures, start = [], threading.Barrier(6)

    def work(seed):
        rng = random.Random(seed)
        start.wait()
        try:
            for _ in range(40):
                x = torch.full((1, 2, 2, 2, rng.randint(1, 9)), float(seed))
                if seed % 2:
                    with tritonconv.use(*PHASES):
                        y = tritonconv.conv_transpose3d(x, WEIGHT, BIAS, 2)
                        assert forced_variants() == tuple(sorted(PHASES))
                else:
                    y = tritonconv.conv_transpose3d(x, WEIGHT, BIAS, 2)
                    assert forced_variants() == (), "a block of another thread does not reach this one"
                assert torch.equal(y, F.conv_transpose3d(x, WEIGHT, BIAS, 2))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# ------------------------------------------------------------------ use


def chosen(*tensors, **keywords):
    names = {"stride": 2, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1} | keywords
    made = dispatch.plan_for(*(tensors or (X, WEIGHT, BIAS)), tuple(names.values()))
    return tuple(made.choice(name).variant.name for name in PASSES)


def test_a_call_under_use_is_another_call():
    usual = chosen()
    with tritonconv.use(*PHASES):
        assert chosen() == PHASES
    assert chosen() == usual
    assert usual != PHASES


def test_blocks_nest_and_the_inner_one_wins_per_pass():
    usual = chosen()
    with tritonconv.use(PHASES[0], "backward_data_torch_conv"):
        assert chosen() == (PHASES[0], "backward_data_torch_conv", usual[2])
        with tritonconv.use("forward_torch_other_layout", PHASES[2]):
            assert chosen() == ("forward_torch_other_layout", "backward_data_torch_conv", PHASES[2])
            with tritonconv.use():
                assert chosen() == ("forward_torch_other_layout", "backward_data_torch_conv", PHASES[2])
        assert chosen() == (PHASES[0], "backward_data_torch_conv", usual[2])
        made = dispatch.plan_for(X, WEIGHT, None, (2, 0, 0, 1, 1))
        assert made.choice("forward").reason == "forced by tritonconv.use"
    with pytest.raises(KeyError), tritonconv.use(*PHASES):
        raise KeyError
    assert chosen() == usual, "an error leaves the block too"


def test_use_refuses_unknown_names_and_two_of_a_pass():
    with (
        pytest.raises(ArgumentError, match=r"unknown variant 'forward_torch_magic'.*forward_torch_phases"),
        tritonconv.use("forward_torch_magic"),
    ):
        pass
    for other in ("forward_torch_native", "forward_torch_phases"):
        with (
            pytest.raises(ArgumentError, match=f"'forward_torch_phases' and '{other}'"),
            tritonconv.use(PHASES[0], other),
        ):
            pass
    assert forced_variants() == ()


def test_a_variant_that_does_not_serve_is_refused_in_the_forward_of_a_training_step(fresh):
    with tritonconv.use("backward_weight_torch_shuffle"):
        for _ in range(2):
            with pytest.raises(VariantNotApplicable, match="kernel = stride"):
                tritonconv.conv_transpose3d(X, WEIGHT.clone().requires_grad_(), BIAS, 2)


def test_a_pass_is_chosen_when_it_is_first_needed(fresh, monkeypatch):
    asked = []
    real = dispatch._choose
    monkeypatch.setattr(dispatch, "_choose", lambda *args: asked.append(args[-1]) or real(*args))
    with tritonconv.use("backward_weight_torch_shuffle"):  # which does not serve, and is not needed
        tritonconv.conv_transpose3d(X, WEIGHT, BIAS, 2)
        with torch.no_grad():
            tritonconv.conv_transpose3d(X, WEIGHT.clone().requires_grad_(), BIAS, 2)
    assert asked == ["forward"]
    weight = WEIGHT.clone().requires_grad_()
    y = tritonconv.conv_transpose3d(X, weight, BIAS, 2)
    y.sum().backward()
    assert set(asked) == set(PASSES)


def test_only_weights_that_are_packed_are_shared():
    each = Problem(1, 32, 16, (4, 4, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), (8, 8, 8), dtype=torch.float16)
    given = {name: variant(f"{name}_shuffle_given") for name in PASSES[:2]}
    packing = {name: variant(f"{name}_shuffle") for name in PASSES[:2]}
    for records, shared in ((given, False), (packing, True)):
        chosen = {name: Selection(one, {**one.default(each, CUDA)}, "") for name, one in records.items()}
        if shared:
            chosen = {name: one._replace(config={**one.config, "WEIGHT": 1}) for name, one in chosen.items()}
        assert dispatch.plan_of(each, CUDA, **chosen).kept_order == (1 if shared else None)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_a_call_anew_with_what_was_in_force(fresh, launches, reentrant):
    layer = tritonconv.ConvTranspose3d(2, 3, 3, stride=2)
    x = torch.randn(1, 2, 3, 4, 3, requires_grad=True)
    with tritonconv.use("forward_torch_phases"):
        y = checkpoint(layer, x, use_reentrant=reentrant)
    y.sum().backward()
    assert launches.count("forward_torch_phases") == 2
    launches.clear()
    y = checkpoint(layer, x, use_reentrant=reentrant)  # without the block nothing is in force, and is not afterwards
    y.sum().backward()
    assert "forward_torch_phases" not in launches


def test_what_was_in_force_is_forgotten_with_the_weight(fresh):
    weight = WEIGHT.clone().requires_grad_()
    gc.collect()  # weights of earlier tests
    before = dict(forced_module.trained)
    with tritonconv.use("forward_torch_phases"):
        tritonconv.conv_transpose3d(X, weight, BIAS, 2)
    assert len(forced_module.trained) == len(before) + 1
    del weight
    gc.collect()
    assert forced_module.trained == before
