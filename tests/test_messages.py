"""Messages are short, whatever was passed, and say what to do; the small faults of the command line. CPU only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tritonconv
from tritonconv.errors import LONGEST, ArgumentError, ArgumentTypeError, shortened
from tritonconv.lab import cli
from tritonconv.lab.bench import results, runner

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = next(path for path in sorted((ROOT / "plots" / "examples").rglob("*.jsonl")) if not path.is_symlink())
LONG = 10**5
HUGE = {
    "list": [2] * LONG, "string": "2" * LONG, "tuple": (1,) * LONG, "number": 10**4000, "nested": [[0] * LONG] * 3,
    "bytes": b"x" * LONG, "dict": {str(n): n for n in range(LONG)}, "tensor": torch.zeros(LONG // 100),
    "set": set(range(LONG)),
    "text of an object": type("Chatty", (), {"__repr__": lambda self: "x" * LONG})(), "nan": float("nan"), "none": None,
}  # fmt: skip
X, WEIGHT = torch.zeros(1, 2, 3, 3, 3), torch.zeros(2, 2, 2, 2, 2)
ARGUMENTS = ("stride", "padding", "output_padding", "groups", "dilation")
CALLS = {
    **{name: lambda value, name=name: tritonconv.conv_transpose3d(X, WEIGHT, **{name: value}) for name in ARGUMENTS},
    "input": lambda value: tritonconv.conv_transpose3d(value, WEIGHT),
    "weight": lambda value: tritonconv.conv_transpose3d(X, value),
    "bias": lambda value: tritonconv.conv_transpose3d(X, WEIGHT, 3 if value is None else value),
    **{f"layer {name}": lambda value, name=name: tritonconv.ConvTranspose3d(2, 2, **{"kernel_size": 2, name: value})(X)
       for name in ("padding_mode", *ARGUMENTS)},
    "layer output_size": lambda value: tritonconv.ConvTranspose3d(2, 2, 2)(X, 3 if value is None else value),
    "same": lambda value: tritonconv.TransposedConv3dLayer(2, 2, cropping=value)(X),
    "same stride": lambda value: tritonconv.TransposedConv3dLayer(2, 2, stride=value)(X),
    "initializer": lambda value: tritonconv.TransposedConv3dLayer(2, 2, weights_initializer=value)(X),
    "convert": lambda value: tritonconv.convert(value),
    "restore": lambda value: tritonconv.restore(value),
    "tune": lambda value: tritonconv.tune(value, seconds=1),
    "tune several": lambda value: tritonconv.tune([value], seconds=1),
    "use": lambda value: tritonconv.use(value).__enter__(),
    "variant": lambda value: tritonconv.Variant(f"forward_{value}", value, "", "torch", launch=print),
    "problem": lambda value: tritonconv.Problem(1, 1, 1, value, (1,) * 3, (1,) * 3, (0,) * 3, (1,) * 3),
    "pins": lambda value: tritonconv.pin_choices(3 if value is None else value),
}  # fmt: skip


@pytest.mark.parametrize("kind", HUGE)
@pytest.mark.parametrize("name", CALLS)
def test_no_message_is_long_or_says_that_the_error_is_internal(name, kind, own_store):
    found: Exception | None = None
    try:
        CALLS[name](HUGE[kind])
    except Exception as error:
        found = error
    text = str(found)
    assert 0 < len(text) <= LONGEST and "nternal error" not in text.lower(), f"{type(found)}: {text[:300]}"
    assert found is not None or kind == "none"


@pytest.mark.parametrize("kind", [ArgumentError, ArgumentTypeError, results.ResultsError])
def test_a_long_message_keeps_its_two_ends(kind):
    error = kind("begin " + "x" * LONG + " end")
    assert len(str(error)) <= LONGEST and str(error).startswith("begin x") and str(error).endswith("x end")
    assert f"({LONG + 10} characters)" in str(error)
    assert shortened("short") == str(kind("short")) == "short"


FLAGS = (
    ("bench", "--suite"), ("bench", "--variants"), ("bench", "--dtype"), ("bench", "--seconds"), ("bench", "--device"),
    ("bench", "--only"), ("bench", "--sizes"), ("bench", "--variant-file"), ("bench", "--compiled"),
    ("bench", "--seed"),
    ("bench", "--overhead", "--use"), ("bench", "--scale"), ("tune", "--x"), ("tune", "--model"), ("tune", "--suite"),
    ("report",), ("report", "--charts"), ("report", "--pass"), ("compare",), ("explain",), ("inspect",), ("nothing",),
    ("inspect", "--target"), ("inspect", "--layers"), ("campaign", "--seconds"), ("compile", "--target"), ("profile",),
)  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS, ids=" ".join)
@pytest.mark.parametrize("text", ["x" * LONG, "9" * LONG, ",".join("abc" * 9 for _ in range(999)), "x" * 9 + "\n" * 99])
def test_no_message_of_the_command_line_is_long(flag, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--input", "1x1x4x4x4"] if "--model" in flag else ["--weight", "1x1x1x1x1"] if "--x" in flag else []
    assert cli.main([*flag, text, *more]) == 2
    message = capsys.readouterr().err.partition("error: ")[2] or ""
    assert len(message) <= LONGEST + 1 and "nternal error" not in message


# ------------------------------------------------------------------ the command line


@pytest.mark.parametrize("place", ["begin", "middle", "end", "several"])
def test_a_blank_line_in_a_results_file_is_no_error(tmp_path, place):
    lines = EXAMPLE.read_text().splitlines(keepends=True)
    blank = {"begin": [0], "middle": [len(lines) // 2], "end": [len(lines)], "several": [0, 3, 3, 9]}[place]
    for index in reversed(blank):
        lines.insert(index, "  \n" if place == "several" else "\n")
    (tmp_path / "blank.jsonl").write_text("".join(lines))
    found, whole = results.read(tmp_path / "blank.jsonl"), results.read(EXAMPLE)
    assert found.results == whole.results and found.warnings == whole.warnings and found.end == whole.end


def test_a_fault_behind_a_blank_line_is_named_by_its_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text("\n\n{\n")
    with pytest.raises(results.ResultsError, match=r"bad\.jsonl:3: not JSON"):
        results.read(tmp_path / "bad.jsonl")


def test_nothing_measured_is_exit_code_1_with_the_reason(tmp_path, capsys, monkeypatch, quick, own_store):
    monkeypatch.setattr(runner._Bench, "_share", lambda self: 0)
    arguments = ["--only", "vnet_up3", "--passes", "forward", "--layout", "ncdhw", "--quiet", "--output", str(tmp_path)]
    assert cli.main(["bench", *arguments, "--seconds", "1"]) == 1
    assert capsys.readouterr().err == "tritonconv bench: nothing was measured: the budget was used up\n"
    problem = ["--x", "1x8x3x4x5", "--weight", "8x8x2x2x2", "--stride", "2", "--quiet", "--output", str(tmp_path)]
    assert cli.main(["tune", *problem, "--seconds", "0.000001"]) == 1
    assert capsys.readouterr().err == "tritonconv tune: nothing was tuned: the budget was used up\n"
    empty = ["--x", "0x8x3x4x5", "--weight", "8x8x2x2x2", "--quiet", "--output", str(tmp_path)]
    assert cli.main(["tune", *empty]) == 1
    assert "nothing was tuned: there is nothing to time" in capsys.readouterr().err


MODELS = """
from torch import nn
model = nn.Sequential(nn.ConvTranspose3d(1, 1, 2))
number = 3
def make(): return nn.Sequential(nn.ConvTranspose3d(1, 1, 2))
def needs(size): return model
def other(): return "a model"
def raising(): raise OSError("no weights")
"""
EXPECTED = "expected MODULE:FACTORY, a function without arguments that returns a torch.nn.Module"


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("mm_models:model", ("attribute 'model' of module 'mm_models' is a Sequential", EXPECTED)),
        ("mm_models:number", ("attribute 'number' of module 'mm_models' is a int", EXPECTED)),
        ("mm_models:absent", ("module 'mm_models' has no attribute 'absent'", EXPECTED)),
        ("mm_models:needs", ("mm_models:needs raised TypeError", "size", EXPECTED)),
        ("mm_models:other", ("mm_models:other returned a str", EXPECTED)),
        ("mm_models:raising", ("mm_models:raising raised OSError: no weights", EXPECTED)),
        ("mm_models", ("got 'mm_models'", EXPECTED)),
        (":make", ("got ':make'", EXPECTED)),
        ("mm_absent:make", ("module 'mm_absent' cannot be imported: ModuleNotFoundError",)),
        ("mm_broken:make", ("module 'mm_broken' cannot be imported: SyntaxError",)),
        ("mm_leaving:make", ("module 'mm_leaving' cannot be imported: SystemExit",)),
    ],
)
def test_a_bad_model_is_told_by_module_attribute_and_expectation(tmp_path, monkeypatch, capsys, named, words):
    for name, text in (("mm_models", MODELS), ("mm_broken", "def ("), ("mm_leaving", "raise SystemExit(3)")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mm_models", raising=False)
    assert cli.main(["tune", "--model", named, "--input", "1x1x4x4x4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tritonconv tune: argument --model: ") and all(word in line for word in words)


def test_a_model_that_does_not_run_on_its_input_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "mm_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", "--model", "mm_models:make", "--input", "1x7x4x4x4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mm_models:make does not run on --input 1x7x4x4x4: " in line


def test_accesses_without_triton_say_so(monkeypatch, capsys):
    from tritonconv.lab.commands import inspect

    monkeypatch.setattr(inspect, "variants", lambda: ())
    monkeypatch.setattr(inspect, "triton_fault", lambda: "Triton is not installed")
    for names in ([], ["forward_phases"]):
        assert cli.main(["inspect", *names, "--accesses"]) == 2
        assert capsys.readouterr().err == "tritonconv inspect: there is no Triton variant: Triton is not installed\n"
