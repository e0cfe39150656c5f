"""Epilogues in the key of a choice, in the tuner, the cost model, the benchmark and its rows. CPU only."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_runner import layer, run

import tritonconv
from tritonconv import ArgumentError, Problem, dispatch
from tritonconv.autotune import choose, model, store
from tritonconv.autotune.ceilings import of_capability
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.tuning import api, session, tasks
from tritonconv.autotune.tuning.compiled_ahead import jobs_of
from tritonconv.epilogue import ACTIVATIONS, Epilogue
from tritonconv.kernels.registry import have_triton, variant
from tritonconv.kernels.work import bytes_spared
from tritonconv.lab import cli
from tritonconv.lab.bench import conduct, contestants, float64, gate, operations, schema, stages, summary
from tritonconv.lab.bench.behind import off_the_kink
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.contestants import contestant
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.bench.workloads import workloads
from tritonconv.lab.inspection.launches import Launch
from tritonconv.plots import html
from tritonconv.problem import PASSES

CPU = torch.device("cpu")
UP = Problem(1, 4, 3, (3, 4, 5), (2, 2, 2), (2, 2, 2), (0, 0, 0), (6, 8, 10), bias=True)
BOTH = Epilogue("relu", residual=True)
WITH = replace(UP, epilogue=BOTH)
LEAKY = Epilogue("leaky_relu", 0.3)
STEP = "forward_backward"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's store, empty; the plans and tables of the process are put back."""
    monkeypatch.setenv("TRITONCONV_CACHE", str(tmp_path / "store"))
    monkeypatch.setattr(dispatch, "_by_call", {})
    monkeypatch.setattr(dispatch, "_by_problem", {})
    choose.forget()
    yield tmp_path / "store"
    choose.forget()


def test_the_forward_with_an_epilogue_has_a_key_of_its_own():
    assert str(Key.of(WITH, "forward")) == f"{Key.of(UP, 'forward')} then residual + relu"
    for name in PASSES[1:]:
        assert Key.of(WITH, name) == Key.of(UP, name)
    keys = {str(Key.of(replace(UP, epilogue=Epilogue(name, residual=r, rounding=how)), "forward"))
            for name in (None, *ACTIVATIONS) for r in (False, True) for how in (None, "torch")}  # fmt: skip
    assert len(keys) == 4 * (len(ACTIVATIONS) + 1)
    slopes = {Key.of(replace(UP, epilogue=replace(LEAKY, slope=slope)), "forward") for slope in (0.01, 0.3)}
    assert len(slopes) == 1


def stored(problem: Problem, name: str, pass_name: str = "forward") -> None:
    entry = store.Entry(name, {}, 1.0, 2.0, "", str(problem), pass_name, "2026-11-29T00:00:00+00:00")
    store.merge(store.Table(device_name(CPU), {str(Key.of(problem, pass_name)): entry}))
    dispatch.forget()


def test_without_an_entry_of_its_own_a_call_takes_the_plain_choice():
    torch.manual_seed(0)
    x, weight, bias, residual = (torch.randn(shape) for shape in (UP.x_shape, UP.weight_shape, (3,), UP.y_shape))
    own = "forward_torch_columns"

    def chosen() -> tuple[str, str]:
        y = tritonconv.conv_transpose3d(x, weight, bias, 2, activation="relu", residual=residual)
        torch.testing.assert_close(y, torch.relu(torch.conv_transpose3d(x, weight, bias, 2) + residual))
        tritonconv.conv_transpose3d(x, weight, bias, 2, activation=("leaky_relu", 0.4))
        names = {problem.epilogue: plan.choice("forward").variant.name for (problem, *_), plan in
                 dispatch._by_problem.items()}  # fmt: skip
        assert names[None] == names[LEAKY.kind]
        return names[None], names[BOTH]

    untuned = chosen()
    assert untuned[0] == untuned[1]
    stored(UP, "forward_torch_shuffle")
    assert chosen() == ("forward_torch_shuffle", "forward_torch_shuffle")
    stored(WITH, own)
    assert chosen() == ("forward_torch_shuffle", own)
    with tritonconv.use("forward_torch_native"):
        dispatch.forget()
        assert chosen() == ("forward_torch_native", "forward_torch_native")


def test_pinned_choices_come_before_an_entry(tmp_path):
    stored(WITH, "forward_torch_columns")
    operands = [torch.ones(shape) for shape in (UP.x_shape, UP.weight_shape, (3,))]
    tritonconv.conv_transpose3d(*operands, 2)
    assert dispatch.save_choices(tmp_path / "plain.json") == 1
    residual = torch.ones(UP.y_shape)
    tritonconv.conv_transpose3d(*operands, 2, activation="relu", residual=residual)
    assert dispatch.save_choices(tmp_path / "both.json") == 2
    own = {}
    for name in ("plain.json", "both.json"):
        dispatch.pin_choices(tmp_path / name)
        own[name] = dispatch.plan(WITH, CPU).choice("forward").variant.name
    dispatch.pin_choices(None)
    assert own["plain.json"] == dispatch.plan(UP, CPU).choice("forward").variant.name
    assert own["both.json"] == "forward_torch_columns"


def test_a_layer_with_an_epilogue_is_tuned_as_a_whole(folder, monkeypatch):
    monkeypatch.setattr(session, "PROBLEM_SECONDS", 0.05)
    rows = []
    tuning = session.Session(CPU, write=lambda kind, row: rows.append((kind, row)))
    layer = tritonconv.FusedConvTranspose3d(4, 3, 2, stride=2, activation="relu")
    seen = [problem for problem, _ in api.problems_of(layer, torch.ones(UP.x_shape), torch.ones(UP.y_shape))]
    assert seen == [UP, WITH]
    report = tuning.run(session.tasks_of([WITH]), Progress())
    plain = [(UP, name) for name in PASSES]
    assert {(task.problem, winner.pass_name) for task, winner in report.winners} == {(WITH, "forward"), *plain}
    assert report.winners[0][0].problem == WITH and not report.errors
    keys = {str(Key.of(*each)) for each in [(WITH, "forward"), *plain]}
    assert set(store.own(device_name(CPU)).entries) == keys
    timed = [row for kind, row in rows if kind == "timing"]
    assert {row.get("epilogue") for row in timed if row["pass"] != "forward"} == {None}
    assert {row["epilogue"] for row in timed if "epilogue" in row} == {"residual + relu"}
    assert len({row["variant"] for row in timed if "epilogue" in row}) > 3
    for problem, name in [(WITH, name) for name in PASSES] + plain:
        assert dispatch.plan(problem, CPU).choice(name).entry is not None
    assert "the plain layer's, and take its choice: of 0 stored before, of 1 tuned too" in str(report)
    again = session.Session(CPU).run(session.tasks_of([WITH]), Progress())
    assert [task.problem for task in again.known] == [WITH] and "of 1 stored before, of 0 tuned too" in str(again)


def test_the_plain_layer_is_tuned_for_its_gradients_alone_where_they_have_no_entry(folder, monkeypatch):
    stored(UP, "forward_torch_shuffle")  # the plain forward has one
    waiting = session.Session(CPU)._distinct(session.tasks_of([WITH, replace(WITH, epilogue=LEAKY)]))[0]
    assert [task.problem for task in waiting] == [WITH, UP, replace(WITH, epilogue=LEAKY)]
    for name in PASSES[1:]:
        stored(UP, f"{name}_torch_native", name)
    assert [task.problem for task in session.Session(CPU)._distinct(session.tasks_of([WITH]))[0]] == [WITH]
    layers = [tasks.Task(WITH, "psmnet_train_64_32+residual+relu", "stages")]
    assert [task.layer for task in tasks.with_plain(layers)] == [layers[0].layer, "psmnet_train_64_32"]


@pytest.mark.skipif(not have_triton(), reason="Triton is not installed")
def test_the_kernels_among_the_candidates_compute_the_epilogue():
    half = replace(WITH, dtype=torch.float16, layout="ndhwc", c_in=32, c_out=32)
    jobs = jobs_of([half, half.plain], "sm_90", configs=1)
    names = {each: {name for name, problem, _ in jobs if problem.epilogue == each} for each in (BOTH, None)}
    assert names[BOTH] and names[BOTH] < names[None]
    for name, problem, config in jobs:
        if problem.epilogue is not None:
            assert variant(name).finishes(problem, config, BOTH)
            kernels = variant(name).program(problem, config).kernels
            assert [kernel.arguments["CONFIG"].EPILOGUE.ACTIVATION for kernel in kernels[-1:]] == ["relu"]
            launch = Launch(name, problem, config, "ieee", "sm_90", ())
            assert Launch.of(launch.line()) == launch


def test_the_model_charges_for_the_residual_and_for_operations_apart():
    rates = of_capability((9, 0))
    large = replace(WITH, size=(64, 64, 64), out_size=(128, 128, 128), c_in=64, c_out=64, dtype=torch.float16)
    y_ms = 2 * 64 * 128**3 / rates.memory * 1e3
    record = variant("forward_torch_native")
    plain, apart = (model.estimate(record, each, {}, rates).ms for each in (large.plain, large))
    assert apart - plain == pytest.approx((BOTH.apart) * y_ms)
    taking = replace(record, epilogue=lambda *_: True)
    assert model.estimate(taking, large, {}, rates).ms - plain == pytest.approx(BOTH.beside * y_ms)
    assert bytes_spared(large) == (5 - 1) * 2 * 64 * 128**3


EPILOGUES = (stages.CONCAT, BOTH, LEAKY, Epilogue("prelu"), Epilogue("gelu_tanh"), Epilogue("silu", rounding="torch"))


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
def test_the_gate_holds_each_epilogue_against_float64(layout, monkeypatch):
    for epilogue in EPILOGUES:
        case = Case(replace(UP, epilogue=epilogue, layout=layout), CPU)
        assert contestant("torch", None, case, "forward", True).verdict.ok
        assert contestant("tritonconv", None, case, "forward", True).verdict.ok
        torchs = case.torch("forward")()
        _, errors = case.judge("forward")._distances("y", [torchs[0]])
        assert errors[0] < 1e-5  # by the pieces of a large problem too
    problem = replace(UP, epilogue=stages.CONCAT)
    for wrong in (lambda y, skip: torch.cat((y, y), 1), lambda y, skip: torch.cat((skip, y), 1)):
        monkeypatch.setattr(operations, "up_concat", lambda layer, x, skip, wrong=wrong: wrong(layer(x), skip))
        assert not contestant("tritonconv", None, Case(problem, CPU), "forward", True).verdict.ok
    plain = operations.our_operation(UP, None)
    monkeypatch.setattr(contestants, "our_operation", lambda problem, tensors: plain)
    assert not contestant("tritonconv", None, Case(WITH, CPU), "forward", True).verdict.ok


def torchs_outputs(case: Case) -> dict[str, torch.Tensor]:
    """Of torch's training step, those that there are."""
    found = zip(gate.OUTPUTS[STEP], case.torch(STEP)(), strict=False)
    return {name: each for name, each in found if each is not None}


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
def test_the_gate_holds_each_training_step_against_float64(layout):
    for epilogue in (*EPILOGUES, Epilogue("tanh", residual=True)):
        case = Case(replace(UP, epilogue=epilogue, layout=layout), CPU)
        for name in ("torch", "tritonconv"):
            assert contestant(name, None, case, STEP, True).verdict.ok, epilogue
        outputs = torchs_outputs(case)
        beside = epilogue.residual and epilogue.activation is not None  # else grad_y itself
        assert ("grad_beside" in outputs, "grad_slopes" in outputs) == (beside, epilogue.activation == "prelu")
        assert set(case.exact(STEP)) == set(outputs)
        for name, output in outputs.items():  # by the pieces of a large problem too
            assert case.judge(STEP)._distances(name, [output])[1][0] < 1e-4, name


@pytest.mark.parametrize("epilogue", [Epilogue("prelu", residual=True), stages.CONCAT], ids=str)
def test_torch_compile_trains_beside_them(epilogue, monkeypatch):
    """Its graph takes the leaves of the residual, the skip and the slopes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    case = Case(replace(UP, epilogue=epilogue), CPU)
    assert contestant("torch_compile", None, case, STEP, True).verdict.ok


@pytest.mark.parametrize("epilogue", [Epilogue("prelu", residual=True), Epilogue("silu"), stages.CONCAT], ids=str)
def test_the_pieces_of_a_training_step_in_float64_are_the_whole(epilogue, monkeypatch):
    case = Case(replace(UP, n=2, epilogue=epilogue, dtype=torch.float64), CPU)
    exact, t = case.exact(STEP), case.tensors
    monkeypatch.setattr(float64, "PIECE_ELEMENTS", 700)
    for name, want in exact.items():
        scale, (error,) = float64.distances(case.problem, t, name, [want])
        assert error < 1e-12 * scale, name
    single = case.on(replace(case.problem, dtype=torch.float32))
    cut = float64.outputs_of(single.problem, single.tensors, exact, float64.reference_in_tf32)
    for name, each in cut.items():  # of TF32's ten bits; the others are no products
        error = (each - single.exact(STEP)[name]).abs().max() / each.abs().max()
        assert error < 1e-2 and (error > 1e-6 or name not in ("y", "grad_x", "grad_weight")), name


def test_no_gradient_is_held_to_a_side_of_a_kink():
    """Where z is near 0 a dtype may round it to the other side: there grad_y is 0, of values that change too."""
    half = replace(UP, epilogue=BOTH, dtype=torch.bfloat16)
    case, smooth = Case(half, CPU), Case(replace(half, epilogue=Epilogue("gelu")), CPU)
    t, drawn = case.tensors, case.tensors.grad_y.clone()
    assert 0.01 < (drawn == 0).float().mean() < 0.3 and (smooth.tensors.grad_y != 0).all()
    with conduct.Operands(t, partial(off_the_kink, half, t)) as operands:
        operands.change_wholly()
        z = torch.conv_transpose3d(t.x.double(), t.weight.double(), t.bias.double(), UP.stride) + t.beside.double()
        assert (z.abs() < torch.finfo(torch.bfloat16).eps * z.abs().max())[t.grad_y != 0].sum() == 0
        assert ((t.grad_y == 0) & (drawn != 0)).any()
    assert torch.equal(t.grad_y, drawn)
    assert contestant("tritonconv", None, case, STEP, True).verdict.ok
    assert case.put_back() == "" and torch.equal(t.grad_y, drawn)
    uneven = replace(half, out_size=(5, 8, 10))
    assert not uneven.torch_crop.exact and (Case(uneven, CPU).tensors.grad_y != 0).all()  # the forward alone is tuned


@pytest.mark.parametrize("epilogue", [BOTH, Epilogue("prelu"), Epilogue("gelu"), stages.CONCAT], ids=str)
def test_a_wrong_gradient_of_a_training_step_is_found(epilogue, monkeypatch):
    right, names = operations.our_operation, ["x", "weight", "bias"]
    names += ["beside"] * epilogue.residual + ["slopes"] * (epilogue.activation == "prelu")
    for name in names:

        def operation_of(problem, t, name=name):
            if not t.x.requires_grad:
                return right(problem, t)

            def operation(*operands):
                own = getattr(t, name)
                other = replace(t, **{name: 2 * own - own.detach()})  # the same value, twice the gradient
                return right(problem, other)(other.x, other.weight, other.bias, *operands[3:])

            return operation

        monkeypatch.setattr(contestants, "our_operation", operation_of)
        verdict = contestant("tritonconv", None, Case(replace(UP, epilogue=epilogue), CPU), STEP, True).verdict
        assert not verdict.ok and verdict.output == f"grad_{name}", (name, verdict)


def test_the_named_layers():
    named = {each.name: str(each.epilogue) for each in workloads(stages.SUITE)}
    assert named == {
        "nnunet_resenc_160x192_up4+concat": "concat",
        "psmnet_train_64_32+residual+relu": "residual + relu",
        "3dgan_64_1+sigmoid": "sigmoid",
    }
    assert not any(each.epilogue for each in workloads())
    for given in (Epilogue("gelu_tanh", residual=True), LEAKY, Epilogue("relu", rounding="torch")):
        flags = dict(zip(("--activation", "--rounding"), (given.activation, given.rounding), strict=True))
        assert all((flag in " ".join(given.flags)) == bool(value) for flag, value in flags.items())
    assert stages.of_words("leaky_relu:0.3", False, None) == LEAKY
    assert stages.of_words("gelu:tanh", True, None) == Epilogue("gelu_tanh", residual=True)
    with pytest.raises(ArgumentError, match="activation"):
        stages.of_words("relu:2", False, None)


def test_rows_of_an_epilogue_are_apart_from_those_of_plain_layers(tmp_path, capsys, quick):
    tiny = layer()
    _, found = run(tmp_path, tiny, *stages.with_epilogue((tiny,), BOTH), layouts=("ndhwc",))
    apart, columns = found.of_stages(), schema.EPILOGUE.replace("?", "").split()
    assert {row["layer"] for row in found.of_models()} == {"tiny"} and len(found.of_models()) == 4
    cells = [(name, variant) for name in ("forward", STEP) for variant in ("torch", "tritonconv")]
    assert [(row["pass"], row["variant"]) for row in apart] == cells
    for row in apart:
        assert row["layer"] == "tiny+residual+relu"
        assert [row[name] for name in columns[:4]] == ["residual + relu", "relu", True, None]
        problem = tiny.problem()
        y_bytes = 4 * torch.Size(problem.y_shape).numel()
        plain = [problem.bytes(name) for name in (PASSES if row["pass"] == STEP else PASSES[:1])]
        assert row["bytes"] == sum(plain) + y_bytes and row["spared_bytes"] == 4 * y_bytes
        schema.check({name: value for name, value in row.items() if name not in columns})
        with pytest.raises(ValueError, match="spared_bytes"):
            schema.check({name: value for name, value in row.items() if name != "spared_bytes"})
    assert {row["layer"] for group in summary.groups(found.results) for row in group.rows} == {"tiny"}
    assert "against torch's separate operations" in summary.summary(found)
    assert {line.split()[4] for line in summary._stages(found) if " + relu " in line} == {"forward", STEP}
    assert html._against_the_best(found).count("tiny+residual+relu") == 2 and "tiny+" not in html._means(found)
    assert cli.main(["bench", "--only", "psmnet", "--passes", "backward_data", "--concat"]) == 2
    assert "only forward and forward_backward are measured" in capsys.readouterr().err


def test_explain_says_who_computes_the_epilogue(capsys):
    operands = [torch.ones(shape) for shape in (UP.x_shape, UP.weight_shape, (3,))]
    y = torch.ones(UP.y_shape)
    text = str(tritonconv.explain(*operands, 2, activation=("leaky_relu", 0.3), residual=y, out=y))
    assert "epilogue residual + leaky_relu(0.3): torch's operations in y's memory" in text
    assert "out=: the answer is computed and copied" in text
    assert "gradients: torch's derivative of the epilogue, then those of the plain layer" in text
    assert "--activation leaky_relu:0.01 --residual" in text
    with tritonconv.use("forward_torch_shuffle"):
        assert "out=: y is written there at once" in str(tritonconv.explain(*operands, 2, out=y))
    capsys.readouterr()
