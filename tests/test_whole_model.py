"""Whole models: the operations of a step, torch's layers against the converted ones, and the report. CPU only."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.test_results import ENVIRONMENT, result
from tritonconv.errors import ArgumentError
from tritonconv.lab import cli
from tritonconv.lab.bench import results
from tritonconv.lab.models import factories, steps, twins, whole_model

MODULE = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Dropout(), nn.ConvTranspose3d(2, 2, 2, stride=2),
                         nn.ConvTranspose3d(2, 2, 2, stride=2))

class Functional(nn.ConvTranspose3d):  # its layer is never called
    def __init__(self):
        super().__init__(1, 1, 2)
        self.up = nn.ConvTranspose3d(1, 1, 2)
    def forward(self, x):
        return torch.nn.functional.conv_transpose3d(x, self.weight)

class Uncalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose3d(1, 1, 2)
    def forward(self, x):
        return nn.functional.conv_transpose3d(x, self.up.weight)

class Fails(nn.Module):  # from a call on; of float64 the answers have another shape
    calls, last, kind = 0, 20, RuntimeError
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose3d(1, 1, 2, stride=2)
    def forward(self, x):
        Fails.calls += 1
        if Fails.calls > Fails.last:
            raise Fails.kind("late")
        y = self.up(x)
        return y[:, :, 1:] if x.dtype is torch.float64 else y

class NoNumbers(Fails):
    def forward(self, x):
        return self.up(x) * float("nan")

plain, number, broken = nn.Conv3d(1, 1, 1), lambda: 3, lambda: 1 / 0
frozen, exits = lambda: nn.ConvTranspose3d(1, 1, 2).requires_grad_(False), lambda: exit(3)
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """The name of a module with models in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_models_of_a_test.py").write_text(MODULE)
    yield "my_models_of_a_test"
    sys.modules.pop("my_models_of_a_test", None)


def bench(*arguments: str) -> tuple[int, results.Run]:
    code = cli.main(["bench", "--quiet", "--seconds", "0.1", *arguments, "--output", "out"])
    return code, results.load(results.latest(results.Path("out")))


def test_a_model_is_a_table_a_step_and_a_section_of_the_report(module, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(whole_model, "perf_counter", lambda: 0.0)  # the budget lasts
    code, run = bench("--model", f"{module}:make", "--input", "1x1x3x4x5", "--compile", "--seconds", "3")
    assert code == 0 and not run.results and run.environment["run"].startswith("model-")
    rows = {row["operation"]: row for row in run.operations}
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert rows["conv3d"]["calls"] == 1 and rows["conv3d"]["forward_ms"] > 0 and rows["conv3d"]["backward_ms"] > 0
    layers = {tuple(row["layers"]): row for row in rows.values() if row.get("layers")}
    assert set(layers) == {("2",), ("3",)}  # two sizes of one kind
    for row in layers.values():
        assert row["torch_ms"] > 0 and row["ours_ms"] > 0 and set(row["chosen"]) >= {"forward"}
        assert row["forward_ms"] > 0 and row["backward_ms"] > 0 and row["calls"] == 1
    assert layers[("3",)]["problem"]["size"] == [6, 8, 10]
    names = [row["variant"] for row in run.steps]
    assert names == ["torch", "torch_again", "tritonconv", "torch_compile", "tritonconv_compile"]
    assert all(row["n_runs"] >= 3 and row["speedup"] > 0 for row in run.steps)
    assert run.steps[2]["held_against"] == "float64" and run.steps[2]["gradient_error"] < 1e-5
    assert run.steps[3]["compile_s"] >= 0 and run.steps[4]["gradient_error"] < 1e-5
    assert run.steps[4]["over_torch_compile"] > 0
    printed = capsys.readouterr().out
    assert "transposed convolutions: " in printed and "torch.compile, convert(model)" in printed
    pytest.importorskip("matplotlib")
    from tritonconv.plots import charts

    assert cli.main(["report", "out", "--charts", "shares"]) == 0
    png, svg, page = capsys.readouterr().out.split()
    assert png.endswith("-shares.png") and "</svg>" in results.Path(svg).read_text()
    figure = charts.chart("shares").draw(run)
    assert "1x1x3x4x5, float32, NCDHW" in figure.axes[0].get_title(loc="left")
    text = results.Path(page).read_text()
    assert "Whole models" in text and "Operations of a training step" in text


def test_what_cannot_be_measured_is_said_in_a_line(module, monkeypatch, capsys):
    given = ["--input", "1x1x2x2x2"]
    said = {
        ("nobody",): "expects module:factory or one of nnunet, swinunetr, vqvae",
        (f"{module}:make",): "needs --input",
        ("no.such.module:make", *given): "'no.such.module' cannot be imported: ModuleNotFoundError",
        (f"{module}:nothing", *given): f"{module} has no 'nothing' that can be called",
        (f"{module}:number", *given): "cannot be built: TypeError: expected a torch.nn.Module, got a int",
        (f"{module}:broken", *given): "cannot be built: ZeroDivisionError",
        (f"{module}:exits", *given): "cannot be built: SystemExit",
        (f"{module}:frozen", *given): "has no training step: no floating output of the forward needs a gradient",
        (f"{module}:make", "--input", "1x1x9999999x9999999x9999"): "does not take",
        (f"{module}:plain", *given): "has no torch.nn.ConvTranspose3d",
        (f"{module}:Uncalled", *given): "calls none of its ConvTranspose3d",
        (f"{module}:make", "--input", "1x2x2x2x2"): "does not take 1x2x2x2x2: RuntimeError",
        (f"{module}:make,vqvae", *given): "goes with one model",
        (f"{module}:make", "--suite", "unet", *given): "--suite: goes with the layers, not with --model",
    }
    for arguments, words in said.items():
        assert cli.main(["bench", "--quiet", "--output", "out", "--model", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not results.Path("out").exists(), error


def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch):
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^models = \[(.*)\]$", project, re.MULTILINE)
    for name, built_in in factories.BUILT_IN.items():
        for package in built_in.packages:
            assert f'"{package.replace("_", "-")}>=' in extra
            monkeypatch.setattr(factories.importlib.util, "find_spec", lambda each, gone=package: each != gone or None)
            with pytest.raises(ArgumentError) as caught:
                factories.network(name, (), "cpu")
            assert str(caught.value) == f"argument --model: {name} needs {package}: pip install 'tritonconv[models]'"


def test_a_wrong_model_is_an_error_and_is_not_timed(module, monkeypatch, capsys):
    def converted(model, **how):
        report = convert(model, **how)
        with torch.no_grad():
            model[-1].bias.add_(0.01)
        return report

    convert = twins.convert
    monkeypatch.setattr(twins, "convert", converted)
    code, run = bench("--model", f"{module}:make", "--input", "1x1x2x2x2")
    assert code == 1 and [row["variant"] for row in run.steps] == ["torch", "torch_again"]
    assert run.errors[0]["status"] == "wrong" and "allowed 4 times torch's" in run.errors[0]["message"]
    assert "failed: " in capsys.readouterr().out


def test_a_model_that_fails_on_the_way_or_has_no_numbers_is_an_error_row(module, capsys):
    given = ["--input", "1x1x2x2x2"]
    code, run = bench("--model", f"{module}:NoNumbers", *given)
    assert code == 1 and not run.steps and run.errors[0]["message"] == "outputs or gradients are infinite or NaN"
    code, run = bench("--model", f"{module}:Fails", *given)
    assert code == 1 and run.operations and "while the steps were timed: RuntimeError: late" in run.errors[0]["message"]
    assert run.skips[0]["variant"] == "float64" and run.end["reason"] == "complete"
    code, run = bench("--model", f"{module}:Fails", *given, "--dtype", "float32,float64")  # neither runs once
    assert code == 1 and [row["dtype"] for row in run.errors] == ["float32", "float64"]
    fails = sys.modules[module].Fails
    fails.calls, fails.kind = 0, KeyboardInterrupt
    code, run = bench("--model", f"{module}:Fails", *given)
    assert code == 130 and run.operations and run.end["reason"] == "interrupted"
    assert "operation" in capsys.readouterr().out.rpartition("results: ")[0].rpartition("results: ")[2]


def test_a_compilation_that_fails_or_takes_too_long_is_a_row(module, monkeypatch):
    def fails(model):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fails)
    network = factories.network(f"{module}:make", [(1, 1, 2, 2, 2)], "cpu")
    wanted = twins.Wanted(torch.device("cpu"), torch.float32, "ndhwc", 0.1, compiled=True)
    for seconds, kind, words in ((100.0, "errors", "no compiler"), (0.0, "skips", "out of the budget of 0 s")):
        with results.Writer(results.Path("out")) as writer:
            writer.write("environment", {**ENVIRONMENT, "run": writer.run})
            one = whole_model.Measurement(network, dataclasses.replace(wanted, seconds=seconds), writer)
            one._compared()
            one._compiled_steps(whole_model.perf_counter() + seconds)
        rows = getattr(results.read(writer.path), kind)
        assert [row["variant"] for row in rows] == ["torch_compile", "tritonconv_compile"]
        assert all(words in row["message"] for row in rows)


def test_ours_is_compiled_where_torchs_was_however_long_that_took(module, monkeypatch):
    now = [0.0]

    def slow(model):
        now[0] += 0.2
        return model

    monkeypatch.setattr(torch, "compile", slow)
    monkeypatch.setattr(whole_model, "perf_counter", lambda: now[0])
    network = factories.network(f"{module}:make", [(1, 1, 2, 2, 2)], "cpu")
    wanted = twins.Wanted(torch.device("cpu"), torch.float32, "ncdhw", 0.1, compiled=True)
    with results.Writer(results.Path("out")) as writer:
        writer.write("environment", {**ENVIRONMENT, "run": writer.run})
        one = whole_model.Measurement(network, wanted, writer)
        one._compared()
        one._compiled_steps(0.1)
    run = results.read(writer.path)
    assert [row["variant"] for row in run.steps] == ["torch_compile", "tritonconv_compile"] and not run.skips
    assert [row["compile_s"] for row in run.steps] == [0.2, 0.2]


def test_under_autocast_the_problems_have_its_dtype_and_the_loss_takes_any_output():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose3d(1, 1, 2, stride=2)

        def forward(self, x):
            y = self.up(x, output_size=(5, 4, 4))
            return {"out": [y, y.argmax()], "loss": y.sum()}

    torch.manual_seed(0)
    model = Model()
    (x,) = steps.inputs_of([(1, 1, 2, 2, 2)], torch.bfloat16, "ndhwc", torch.device("cpu"), 0)
    assert x.dtype is torch.float32
    with whole_model.recorded(model) as calls:
        found = steps.training_step(model, model, [x], torch.bfloat16)()
    ((layer, problem),) = calls
    assert layer == "up" and problem.dtype is torch.bfloat16 and problem.out_size == (5, 4, 4)
    assert [each.dim() for each in found.outputs] == [5, 0] and len(found.gradients) == 2
    exact = steps.Errors(1e-6, 1e-6)
    assert steps.Errors(4e-6, 4e-6).within(exact, 0) and not steps.Errors(1e-6, float("nan")).within(exact, 1)


def written(folder, prefix: str, name: str, *rows: dict, device: str = "cpu") -> None:
    """A results file of a device, whose name says that it was written at ``name``."""
    head = {"kind": "environment", **ENVIRONMENT, "run": name, "device_name": device}
    path = folder / f"{prefix}20260101T00000{name}Z-0.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (head, *rows)))


def test_a_folder_has_all_models_of_its_device_beside_the_newest_layers(tmp_path):
    step = {"kind": "step", "inputs": "1", "dtype": "float32", "layout": "ncdhw", "variant": "torch", "p20_ms": 1.0,
            "p80_ms": 1.0, "n_runs": 5, "speedup": 1.0, "speedup_p20": 1.0, "speedup_p80": 1.0}  # fmt: skip
    written(tmp_path, results.PREFIX, "1", {"kind": "result", **result("old")})
    written(tmp_path, results.PREFIX, "2", {"kind": "result", **result("new")})
    written(
        tmp_path, results.MODEL, "3", {**step, "model": "a", "median_ms": 9.0}, {**step, "model": "b", "median_ms": 1.0}
    )
    written(tmp_path, results.MODEL, "4", {**step, "model": "a", "median_ms": 2.0})
    written(tmp_path, results.MODEL, "5", {**step, "model": "c", "median_ms": 3.0}, device="another")
    newest = results.load(tmp_path)  # of another device than the layers
    assert newest.run == "5" and [row["model"] for row in newest.steps] == ["c"] and not newest.results
    (tmp_path / "model-20260101T000005Z-0.jsonl").unlink()
    whole = results.load(tmp_path)
    assert whole.run == "2" and [row["layer"] for row in whole.results] == ["new"]
    assert [(row["model"], row["median_ms"], row["of_run"]) for row in whole.steps] == [
        ("b", 1.0, "3 (no commit, 2 threads)"), ("a", 2.0, "4 (no commit, 2 threads)")]  # fmt: skip
    for path in tmp_path.glob("bench-*"):
        path.unlink()
    assert results.load(tmp_path).run == "4" and len(results.load(tmp_path).steps) == 2


def test_a_section_has_the_steps_of_whole_models(tmp_path):
    pytest.importorskip("matplotlib")
    from tritonconv.plots import section

    step = {"kind": "step", "model": "unet", "inputs": "1x1x8x8x8", "dtype": "float32", "layout": "ncdhw",
            "variant": "tritonconv_compile", "compile_s": 7.5, "median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.0,
            "n_runs": 5, "speedup": 1.25, "speedup_p20": 1.0, "speedup_p80": 1.5}  # fmt: skip
    written(tmp_path, results.MODEL, "1", step)
    path = tmp_path / "README.md"
    path.write_text("<!-- tritonconv report: begin -->\n<!-- tritonconv report: end -->\n")
    section.update(results.load(tmp_path), path, every_layer=False)
    assert (
        "| unet | 1x1x8x8x8 | float32 | tritonconv_compile | 7.5 | 5 | 2 | 1.250 | 1.000 | 1.500 |" in path.read_text()
    )
