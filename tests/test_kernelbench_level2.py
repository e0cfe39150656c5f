"""KernelBench's level 2: its problems are the published operations, and are measured as it evaluates. CPU only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.test_results import ENVIRONMENT, result
from tritonconv.lab import cli
from tritonconv.lab.bench import kernelbench, results
from tritonconv.lab.bench.results import OURS, Writer
from tritonconv.lab.bench.workloads import workload, workloads
from tritonconv.lab.models import level2, level2_times
from tritonconv.lab.models.level2_times import Asked

CPU = torch.device("cpu")
SMALL = "kernelbench_l2_50"


def norm(y, m):
    """A batch norm in training, with its weight of 1 and bias of 0."""
    return F.batch_norm(y, None, None, training=True)


def group_norm(y, groups):
    return F.group_norm(y, groups)


def residuals(y, m):
    return ((y + m.bias + y) * y) + y


def swish_of_softmax(y, m):
    z = F.softmax(F.max_pool3d(y, 2, 2), 1) - m.subtract[:, None, None, None]
    return F.silu(z).amax(1)


def one_channel(y, m):
    z = y.logsumexp(1, keepdim=True)
    return (z * (z + 3).sigmoid() / 6 - m.bias).clamp(-1, 1)


# y is the output of the layer, m holds the parameters; l2_38 begins before the layer, l2_26 has a second input.
FORMULAS = {
    3: lambda y, m: F.gelu(F.avg_pool3d(F.layer_norm(y + 1, (64,)), 2)),
    13: lambda y, m: 2 * torch.tanh(F.softmax(y.mean(2, keepdim=True) + m.bias, 1)),
    15: lambda y, m: norm(y, m) - norm(y, m).mean((2, 3, 4), keepdim=True),
    20: residuals,
    26: lambda y, m, beside: (y + beside) * F.hardswish(y + beside),
    34: lambda y, m: F.gelu(F.layer_norm(y, (64,))),
    38: lambda y, m: F.softmax(y.clamp(0, 1).flatten(2), 2).reshape(y.shape),
    49: lambda y, m: F.softmax(y, 1).sigmoid(),
    50: lambda y, m: F.avg_pool3d(0.5 * y, 2) + m.bias,
    58: one_channel,
    60: lambda y, m: F.hardswish(group_norm(F.silu(y), 4)),
    61: lambda y, m: group_norm(F.relu(y), 8),
    72: lambda y, m: F.avg_pool3d(F.avg_pool3d(norm(y, m), 2), 2),
    74: lambda y, m: F.max_pool3d(F.leaky_relu(F.leaky_relu(y, 0.2) * m.multiplier, 0.2), 2),
    77: lambda y, m: norm(2 * y, m).mean((2, 3, 4), keepdim=True),
    78: lambda y, m: F.max_pool3d(F.max_pool3d(y, 2), 3).sum(1, keepdim=True),
    89: swish_of_softmax,
    96: lambda y, m: F.max_pool3d(0.5 * y, 2).mean((2, 3, 4), keepdim=True).clamp(0, 1),
    100: lambda y, m: y.clamp(min=-1) / 2,
}  # fmt: skip
# Two of them normalize the last axis, one knows the sizes of its output, and one pools by six.
SIZES = {3: (2, 2, 32), 34: (2, 2, 32), 38: (32, 64, 64), 78: (4, 4, 4)}


@pytest.mark.parametrize("number", FORMULAS)
def test_the_steps_of_a_problem_are_its_formula(number):
    network = level2.problem(f"kernelbench_l2_{number}", "cpu")
    torch.manual_seed(number)
    model = network.build()
    shapes = [(1, shape[1], *SIZES.get(number, (4, 3, 5))) for shape in network.inputs[:1]]
    inputs = [torch.rand(shape) for shape in shapes]
    with torch.no_grad():
        y = model.conv_transpose(F.avg_pool3d(inputs[0], 2) if number == 38 else inputs[0])
        inputs += [torch.rand_like(y)] * (len(network.inputs) - 1)
        got, want = model(*inputs), FORMULAS[number](y, model, *inputs[1:])
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_every_layer_of_level_2_has_a_problem_with_its_sizes():
    data = level2.definitions()
    assert "MIT" in data["licence"] and "KernelBench" in data["source"]
    names = [layer.name for layer in workloads(kernelbench.SUITE) if kernelbench.level_of(layer.name) == 2]
    assert set(names) == set(data["problems"]) and len(names) == len(FORMULAS)
    for name in names:
        layer, full, small = workload(name), level2.problem(name), level2.problem(name, "cpu")
        assert all(shape[0] == layer.n for shape in full.inputs)
        assert [shape[1:] for shape in small.inputs] == [shape[1:] for shape in full.inputs]
        assert {shape[0] for shape in small.inputs} == {2}
        if name != "kernelbench_l2_38":  # whose input is pooled first
            assert full.inputs[0] == layer.problem().x_shape


def test_fuse_takes_what_a_call_computes_and_a_batch_norm_stays_in_training():
    fused = {}
    for name in level2.definitions()["problems"]:
        mine, fused[name] = level2_times.ours(level2.problem(name, "cpu").build())
        assert mine.training == (name in {"kernelbench_l2_15", "kernelbench_l2_72", "kernelbench_l2_77"}), name
    assert fused["kernelbench_l2_61"] == ("ReLU relu",) and fused["kernelbench_l2_26"] == ("residual",)
    assert fused["kernelbench_l2_74"] == ("LeakyReLU leaky_relu",) and fused["kernelbench_l2_100"] == ()


def test_the_command_measures_the_whole_problem_as_kernelbench_defines_it(tmp_path, monkeypatch, capsys):
    switches, real = [], level2_times.measured

    def measured(*asked):
        switches.append(torch.backends.cudnn.conv.fp32_precision)
        real(*asked)

    monkeypatch.setattr(level2_times, "measured", measured)
    monkeypatch.setattr(level2_times, "MOST_TIMED_SECONDS", 0.0)
    command = ["bench", "--kernelbench", "ieee", "--only", "l2_50", "--quiet", "--output", str(tmp_path)]
    assert cli.main(command) == 0
    run = results.read(results.latest(tmp_path))
    assert [row["variant"] for row in run.problems] == ["torch", "torch_again", "tritonconv"] and not run.results
    assert {(row["model"], row["inputs"]) for row in run.problems} == {(SMALL, "2x3x16x32x32")}
    mine = run.problems[2]
    assert mine["max_difference"] <= mine["tolerance"] == 1e-4 and mine["fused"] == []
    assert mine["defined_batch"] == 128
    assert switches == ["ieee"] and "batch at most 2" in run.environment["scale_rule"]
    said = capsys.readouterr().out
    assert "a CPU multiplies float32 as it is" in said and "smaller than KernelBench's" in said
    assert "level 2: the whole problem" in said and "level 1" not in said and "of 1 problems" in said
    assert "torch against torch (null)" in said and "5.71 / 4.64" in said
    for wrong, words in ((["--suite", "unet"], "--suite: goes with the layers, not with --kernelbench"),
                         (["--dtype", "float16"], "--dtype: KernelBench's problems are float32"),
                         (["--only", "l3_"], "matches none")):  # fmt: skip
        assert cli.main([*command, *wrong]) == 2
        assert words in capsys.readouterr().err


def rows(tmp_path, asked: Asked) -> results.Run:
    with Writer(tmp_path) as writer:
        writer.write("environment", {**ENVIRONMENT, "cudnn_conv_fp32": "ieee"})
        level2_times.measured(level2.problem(SMALL, "cpu"), asked, writer)
    return results.read(writer.path)


def test_the_report_has_the_problems(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from tritonconv.plots import html

    monkeypatch.setattr(level2_times, "MOST_TIMED_SECONDS", 0.0)
    page = html.write(rows(tmp_path, Asked(CPU)), tmp_path, {}).read_text()
    assert "KernelBench&#x27;s level 2" in page and "2x3x16x32x32" in page


def test_a_problem_that_a_cpu_cannot_measure_in_its_seconds_or_memory_is_listed(tmp_path, monkeypatch):
    run = rows(tmp_path, Asked(CPU, seconds=0.01))
    assert not run.problems and "calls are not made in the 0.01 s of a problem" in run.skips[0]["message"]
    assert f"not run: {SMALL}, all: a call takes about" in kernelbench.text(run)
    monkeypatch.setattr(level2_times, "COPIES", 10**6)
    run = rows(tmp_path, Asked(CPU))
    assert not run.problems and "GB are free" in run.skips[0]["message"]


def test_a_folder_shows_the_newest_of_each_problem_beside_its_layers(tmp_path):
    pytest.importorskip("matplotlib")
    from tritonconv.plots import section

    times = {"median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.0, "n_runs": 5, "timing": "wall", "baseline": "torch"}
    where = {"inputs": "2x3x16x32x32", "layout": "ncdhw", "dtype": "float32", "defined_batch": 128}

    def write(prefix, *kinds_and_rows):
        with Writer(tmp_path, prefix) as writer:
            writer.write("environment", ENVIRONMENT)
            for kind, row in kinds_and_rows:
                writer.write(kind, row)

    def problem(name, **speed):
        for variant, ratio in speed.items():
            yield "problem", {**times, **where, "model": name, "variant": variant, "speedup": ratio,
                              "speedup_p20": ratio - 0.125, "speedup_p80": ratio + 0.125}  # fmt: skip

    write(results.PREFIX, ("result", result("a_layer")), ("result", result("a_layer", "tritonconv", 1.5)))
    layer_1 = result("kernelbench_l1_58", "tritonconv", 9.0)
    left_out = {"layer": "kernelbench_l2_100", "pass": "forward", "model": "kernelbench_l2_100", "variant": "all",
                "message": "too long"}  # fmt: skip
    of_another = {**left_out, "layer": SMALL, "model": SMALL}  # which a later run has measured
    write(results.KERNELBENCH, ("result", layer_1), ("skip", left_out), ("skip", of_another),
          *problem(SMALL, torch=1.0, torch_again=1.0, tritonconv=8.0),
          *problem("kernelbench_l2_3", torch=1.0, torch_again=1.0, tritonconv=0.5))  # fmt: skip
    write(results.KERNELBENCH, *problem(SMALL, torch=1.0, torch_again=1.25, tritonconv=2.0))
    run = results.load(tmp_path)
    assert {row["layer"] for row in run.results} == {"a_layer"}  # and not that of level 1
    path = tmp_path / "README.md"
    path.write_text("<!-- tritonconv report: begin -->\n<!-- tritonconv report: end -->\n")
    section.update(run, path, every_layer=False)
    shown = path.read_text()
    assert f"| {SMALL} | 2x3x16x32x32 |  | 128 | 2 | 2 | 2.00 | 1.88 | 2.12 | 1.25 |" in shown
    assert shown.index("| kernelbench_l2_3 ") < shown.index(f"| {SMALL} ")
    assert "Of 2 problems: geometric mean 1.00, the slowest 0.50, 1 below 1." in shown
    assert "\nNot measured: kernelbench_l2_100, all: too long.\n" in shown


@pytest.mark.parametrize(("shift", "right"), [(5e-5, True), (1e-2, False), (float("nan"), False)])
def test_an_answer_beyond_kernelbenchs_tolerance_is_wrong_and_counts(tmp_path, monkeypatch, shift, right):
    real = level2_times.ours

    def shifted(model):
        mine, fused = real(model)
        mine.register_forward_hook(lambda module, inputs, y: y + shift)
        return mine, fused

    monkeypatch.setattr(level2_times, "MOST_TIMED_SECONDS", 0.0)
    monkeypatch.setattr(level2_times, "ours", shifted)
    run = rows(tmp_path, Asked(CPU))
    assert [OURS in row["variant"] for row in run.problems] == [False, False] + [True] * right
    said = kernelbench.text(run)
    assert ("fast_0 100%, " if right else "fast_0 0%, ") in said
    if not right:
        assert "KernelBench allows 0.0001" in run.errors[0]["message"] and f"wrong: {OURS} on {SMALL}" in said


def test_both_compiled_models_are_contestants_and_a_failure_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(level2_times, "MOST_TIMED_SECONDS", 0.0)
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)
    run = rows(tmp_path, Asked(CPU, compiled=True))
    assert [row["variant"] for row in run.problems] == [
        "torch", "torch_again", "tritonconv", "torch_compile", "tritonconv_compile"]  # fmt: skip
    assert "over torch.compile: geometric mean" in kernelbench.text(run)

    def fails(model, **how):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fails)
    run = rows(tmp_path, Asked(CPU, compiled=True))
    assert [row["variant"] for row in run.problems] == ["torch", "torch_again", "tritonconv"]
    assert [row["variant"] for row in run.errors] == ["torch_compile", "tritonconv_compile"]
    assert run.skips == []
