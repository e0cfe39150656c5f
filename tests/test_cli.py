"""The command line: a small run from bench to pictures, and what bad input is answered with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tritonconv.autotune import nearby, rules
from tritonconv.autotune.tuning import session
from tritonconv.kernels import registry
from tritonconv.lab import cli
from tritonconv.lab.bench import call_overhead, case, measure, operations, progress, runner
from tritonconv.lab.bench.results import latest, read
from tritonconv.lab.commands import common

TINY = "swinunetr_fs48_up0"


pytestmark = pytest.mark.usefixtures("quick")


def bench(tmp_path, *flags) -> list[str]:
    return ["bench", "--only", TINY, "--device", "cpu", "--quiet", "--output", str(tmp_path), *flags]


def test_bench_then_report(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(runner, "MOST_CELL_SECONDS", 0.2)
    assert cli.main(bench(tmp_path, "--seconds", "100000")) == 0
    out, err = capsys.readouterr()
    assert err == ""
    path = out.rstrip().rsplit("results: ", 1)[1]
    run = read(tmp_path / path.rsplit("/", 1)[1])
    assert run.end["reason"] == "complete"
    assert {(row["layout"], row["pass"], row["variant"]) for row in run.results} == {
        (layout, name, variant)
        for layout in ("ncdhw", "ndhwc")
        for name in ("forward", "forward_backward")
        for variant in ("torch", "tritonconv")
    }
    assert "geomean" in out
    assert "batch at most 2" in out
    assert run.environment["command"].startswith(f"tritonconv bench --only {TINY}")

    assert cli.main(["report", str(tmp_path), "--charts", "roofline,best"]) == 0
    *pictures, page = capsys.readouterr().out.split()
    assert page == str(tmp_path / "report.html")
    assert [name.rsplit("-", 1)[1] for name in pictures] == [
        "roofline.png",
        "roofline.svg",
        "best.png",
        "best.svg",
    ]
    assert all(name.startswith(str(tmp_path / run.run)) for name in pictures)
    one = ("--pass", "forward", "--layout", "ncdhw", "--charts", "best", "--output", str(tmp_path / "new"))
    assert cli.main(["report", path, *one]) == 0
    made = sorted(each.name.removeprefix(run.run) for each in (tmp_path / "new").iterdir())
    assert made == ["-best-forward-ncdhw.png", "-best-forward-ncdhw.svg", "report-forward-ncdhw.html"]


def test_a_wrong_result_makes_the_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operations, "conv_transpose3d", lambda *args: F.conv_transpose3d(*args) + 1)
    assert cli.main(bench(tmp_path, "--passes", "forward", "--layout", "ncdhw")) == 1
    out = capsys.readouterr().out
    assert f"wrong: tritonconv on {TINY} (forward): y: max error" in out
    run = read(next(tmp_path.glob("bench-*.jsonl")))
    assert [row["variant"] for row in run.results] == ["torch"]


def test_an_interrupt_is_130_and_keeps_the_file(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "interleave", interrupt)
    assert cli.main(bench(tmp_path)) == 130
    assert "ended early (interrupted): 0 of 4 cells" in capsys.readouterr().out
    assert read(next(tmp_path.glob("bench-*.jsonl"))).end["reason"] == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--passes", "forward,sideways"], ["--passes", "'sideways'", "forward_backward"]),
        (["bench", "--layout", "nchw"], ["--layout", "'nchw'", "ncdhw, ndhwc"]),
        (["bench", "--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
        (["bench", "--suite", "unets"], ["--suite", "'unets'", "kernelbench"]),
        (["bench", "--scale", "tiny"], ["--scale", "'tiny'", "cpu", "full"]),
        (["bench", "--seconds", "-3"], ["--seconds", "'-3'", "above 0"]),
        (["bench", "--seconds", "soon"], ["--seconds", "'soon'"]),
        (["bench", "--seconds", "inf"], ["--seconds", "'inf'"]),
        (["bench", "--seed", "1.5"], ["--seed", "'1.5'", "integer"]),
        (["bench", "--only", "alexnet"], ["'alexnet'", "86 layers"]),
        (["bench", "--overhead", "--suite", "unet"], ["--suite", "the layers", "--overhead"]),
        (["bench", "--roofs", "--limit", "3"], ["--limit", "--overhead", "--roofs"]),
        (["bench", "--store", "x"], ["--store", "--roofs", "the layers"]),
        (["bench", "--roofs", "--overhead"], ["--overhead", "--roofs", "not allowed"]),
        (["report", "a", "b"], ["RESULTS", "--model"]),
        (["bench", "--variants", "forward_fast"], ["--variants", "'forward_fast'", "forward_torch_native"]),
        (
            ["bench", "--variants", "backward_data_torch_conv"],
            ["--variants", "backward_data", "forward,forward_backward"],
        ),
        (["report", "--pass", "upward"], ["--pass", "'upward'", "forward"]),
        (["explain", "psmnet"], ["'psmnet'", "psmnet_train_64_64"]),
        (["explain", TINY, "--layout", "x"], ["--layout", "'x'", "ndhwc"]),
        (["list", "--suite", "x"], ["--suite", "'x'", "gan"]),
        (["tun"], ["'tune'", "bench"]),
        ([], ["bench", "required"]),
    ],
    ids=" ".join,
)
def test_bad_usage_is_2_with_the_argument_what_was_given_and_what_is_allowed(capsys, arguments, words):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(word in err for word in words), err
    assert "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("command", [["bench"], ["explain", TINY]], ids=" ".join)
def test_a_missing_device_is_said(capsys, command):
    assert cli.main([*command, "--device", "cuda"]) == 2
    assert "--device: got 'cuda'" in capsys.readouterr().err


def test_one_of_several_gpus_is_current_from_then_on(monkeypatch, capsys):
    current = []
    for name, answer in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert common.device_of("cuda:1") == torch.device("cuda", 1) and current == [torch.device("cuda", 1)]
    assert common.device_of("cuda") == torch.device("cuda") and len(current) == 1
    assert cli.main(["explain", TINY, "--device", "cuda:2"]) == 2
    assert "got 'cuda:2', and there are 2 GPUs" in capsys.readouterr().err
    for name in ("cuda:", "cuda1", "gpu", "cuda:-1"):
        assert cli.main(["bench", "--device", name]) == 2
        assert f"got {name!r}, expected auto, cpu, cuda or cuda:N" in capsys.readouterr().err


def test_bad_files_are_2_and_named(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"kind": "environment", "schema": "one"}\n')
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    for arguments, words in (
        (["report", str(bad)], [f"{bad}:1", "schema", "'one'"]),
        (["report", str(tmp_path / "none.jsonl")], ["none.jsonl"]),
        (["report", str(tmp_path / "none")], ["none"]),
        (["report", str(tmp_path / "empty")], ["empty", "tritonconv bench"]),
        (bench(blocked), ["output", str(blocked)]),
    ):
        assert cli.main(arguments) == 2
        err = capsys.readouterr().err
        assert all(word in err for word in words), err


def test_report_says_what_the_file_has(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(bench(tmp_path, "--passes", "forward", "--layout", "ncdhw")) == 0
    capsys.readouterr()
    for flag, value in (("--pass", "backward_data"), ("--layout", "ndhwc"), ("--dtype", "float16")):
        assert cli.main(["report", str(tmp_path), flag, value]) == 2
        err = capsys.readouterr().err
        assert f"{flag} '{value}'" in err
        assert "only" in err


def test_the_overhead_of_a_call_is_measured_per_dtype_and_has_a_limit(tmp_path, capsys, monkeypatch):
    command = ["bench", "--overhead", "--device", "cpu", "--seconds", "0.2", "--output", str(tmp_path), "--limit"]
    assert cli.main([*command, "1e6", "--dtype", "float32,float64", "--use", "forward_torch_phases"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:7]] == [
        [name, dtype] for dtype in ("float32", "float64") for name in call_overhead.PASSES
    ]
    rows = read(latest(tmp_path)).overheads
    assert len(rows) == 12
    assert {(row["variant"], *row["forced"]) for row in rows} == {("torch",), ("tritonconv", "forward_torch_phases")}
    with monkeypatch.context() as context:
        context.setattr(call_overhead, "excess", lambda rows: {"forward": 5.0})
        assert [cli.main([*command, limit]) for limit in ("4", "6")] == [1, 0]
    capsys.readouterr()
    for name, why in (("forward_torch_conv", "needs stride 1"), ("forward_nowhere", "'forward_nowhere'")):
        assert cli.main([*command, "1e6", "--use", name]) == 2
        err = capsys.readouterr().err
        assert err.startswith("tritonconv bench: argument --use: ") and why in err


@pytest.mark.parametrize("name", cli.GONE)
def test_a_command_that_went_says_which_took_its_place(capsys, name):
    assert cli.main([name, "--anything", "else"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"tritonconv {name}: `tritonconv {cli.GONE[name]}` took its place\n"
    command, *flags = (word for word in cli.GONE[name].split() if word != "DIR")
    assert command in cli.COMMANDS and name not in cli.COMMANDS
    assert cli.main([command, "--help"]) == 0
    assert all(flag in capsys.readouterr().out for flag in flags)


def test_the_commands_are_at_most_ten(capsys):
    assert len(cli.COMMANDS) <= 10
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS) and not any(f"\n    {name} " in out for name in cli.GONE)


def test_flags_may_be_repeated_or_lists(tmp_path, capsys):
    flags = ["--passes", "forward", "--passes", "backward_data,forward", "--layout", "ndhwc"]
    assert cli.main(bench(tmp_path, *flags, "--variants", "forward_torch_columns")) == 0
    rows = [json.loads(line) for line in next(tmp_path.glob("bench-*.jsonl")).read_text().splitlines()]
    seen = {(row["pass"], row["variant"]) for row in rows if row["kind"] in ("result", "skip")}
    assert seen == {
        (name, variant) for name in ("forward", "backward_data") for variant in ("torch", "tritonconv")
    } | {("forward", "forward_torch_columns")}  # fmt: skip


def test_listing(capsys):
    assert cli.main(["bench", "--list", "--suite", "mednext", "--only", "k5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{record.name}\n    {record.idea}" in out for record in registry.variants())
    assert cli.main(["list", "--layers"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 87


def tune(tmp_path, *flags) -> int:
    one = ["--x", "1x4x3x4x5", "--weight", "4x3x2x2x2", "--stride", "2", "--device", "cpu", "--quiet"]
    return cli.main(["tune", *one, "--store", str(tmp_path / "store"), "--output", str(tmp_path), *flags])


def test_tune_tells_of_a_layer_without_memory_and_tunes_the_others(tmp_path, monkeypatch, capsys):
    def refuse(problem, *args):
        if problem.layout == "ndhwc":
            raise error
        return real(problem, *args)

    real, error = case.make_tensors, torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(case, "make_tensors", refuse)
    monkeypatch.setattr(session, "PROBLEM_SECONDS", 0.05)
    assert tune(tmp_path, "--layout", "ndhwc,ncdhw") == 1
    out = capsys.readouterr().out
    assert "3 choices" in out and "failed: problem 1: " in out and "OutOfMemoryError: CUDA out of memory" in out
    assert tune(tmp_path / "alone", "--layout", "ndhwc") == 1
    assert "0 choices" in capsys.readouterr().out
    assert read(next((tmp_path / "alone").glob("tune-*.jsonl"))).end["reason"] == "error"
    capsys.readouterr()
    assert tune(tmp_path / "well", "--layout", "ncdhw") == 0
    out = capsys.readouterr().out
    assert out.count("ncdhw") == out.count("  problem 1: ") == 3  # the layout once in the line of each choice
    error = TypeError("make_tensors() takes 4")
    with pytest.raises(TypeError, match="takes 4"):
        tune(tmp_path / "alone", "--layout", "ndhwc")
    end = read(latest(tmp_path / "alone")).end
    assert end["reason"] == "error" and "takes 4" in end["message"]


def test_explain_answers_for_the_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flags, device in ((["--device", "cpu"], "cpu"), (["--device", "cuda"], "cuda"), ([], "cuda")):
        assert cli.main(["explain", TINY, "--dtype", "float16", *flags]) == 0
        assert f"float16 ncdhw on {device}\n" in capsys.readouterr().out


def test_explain(capsys, monkeypatch):
    for module in (rules, nearby):
        monkeypatch.setattr(module, "cpu_vendor", lambda: "AuthenticAMD")
    layouts = ["--layout", "ncdhw,ndhwc"]
    assert cli.main(["explain", "mednext_k3_dw_512", *layouts, "--scale", "cpu", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count(" on cpu\n") == 2 and "forward: forward_torch_depthwise" in out
    assert "MedNeXt" in out


def test_help_states_the_scale_rule_and_module_entry():
    command = [sys.executable, "-m", "tritonconv", "bench", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "largest spatial axis is halved" in done.stdout
    assert done.stderr == ""


def test_progress_outside_a_terminal_is_a_line_now_and_then(capsys):
    now = iter([0.0, 1.0, 6.0, 7.0, 8.0])
    shown = progress.Lines(sys.stderr, clock=lambda: next(now))
    shown.begin(4)
    for name in "abcd":
        shown.step(name)
    assert capsys.readouterr().err.splitlines() == ["2/4 cells, 6 s, about 6 s left: b", "4/4 cells, 8 s: d"]


def test_progress_on_a_terminal_is_richs_bar_or_plain_without_rich(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress.progress(quiet=False)
    assert isinstance(bar, progress.Bar)
    bar.begin(1)
    bar.step("x")
    bar.close()
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    assert isinstance(progress.progress(quiet=False), progress.Lines)
    assert type(progress.progress(quiet=True)) is progress.Progress


@pytest.mark.gpu
def test_bench_on_a_gpu(tmp_path, capsys):
    flags = ["--only", TINY, "--device", "cuda", "--quiet", "--output", str(tmp_path), "--dtype", "bfloat16,float32"]
    assert cli.main(["bench", *flags]) == 0
    run = read(next(tmp_path.glob("bench-*.jsonl")))
    assert run.environment["device"] == "cuda"
    assert len(run.results) == 2 * 2 * 2 * 2
