"""``tritonconv compile``: which folders it refuses, and what it is about without flags."""

from __future__ import annotations

import argparse

import pytest
import torch

from tritonconv.kernels.registry import have_triton
from tritonconv.kernels.triton_compiled import KERNELS, MANIFEST
from tritonconv.lab import cli
from tritonconv.lab.bench.workloads import workloads
from tritonconv.lab.commands import common, problems
from tritonconv.lab.commands import compile as compile_

pytestmark = pytest.mark.skipif(not have_triton(), reason="Triton is not installed")

ASKED = ("--x", "1x4x4x4x4", "--weight", "4x1x3x3x3", "--stride", "2", "--groups", "4", "--quiet")


# ---------------------------------------------------------------- what is no folder


@pytest.mark.parametrize(
    ("given", "flag", "said"),
    [
        ("file", "--output", "{}/file: File exists"),
        ("file/deeper", "--output", "{}/file/deeper: Not a directory"),
        ("link", "--output", "{}/link: File exists"),
        ("inside", "--output", "{}/inside: holds no compiled.json, and is not empty: choose another folder"),
        ("full", "--output", "{}/full: holds no compiled.json, and is not empty: choose another folder"),
        ("damaged", "--output", "{}/damaged/compiled.json: cannot be read: Expecting"),
        ("directory", "--output", "{}/directory/compiled.json: cannot be read: Is a directory"),
        ("file", "--check", "{}/file/compiled.json: cannot be read: Not a directory"),
        ("file/deeper", "--check", "{}/file/deeper/compiled.json: cannot be read: Not a directory"),
        ("full", "--check", "{}/full: not a folder of compiled kernels, for it holds no compiled.json"),
        ("damaged", "--check", "{}/damaged/compiled.json: cannot be read: Expecting"),
        ("directory", "--check", "{}/directory/compiled.json: cannot be read: Is a directory"),
    ],
)
def test_what_is_no_folder_is_an_error_that_names_the_flag(tmp_path, monkeypatch, capsys, given, flag, said):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, file in (("inside", KERNELS), ("full", "thesis.tex"), ("damaged", MANIFEST)):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    (tmp_path / "directory" / MANIFEST).mkdir(parents=True)
    more = ("--target", "sm_90", *ASKED) if flag == "--output" else ()
    monkeypatch.setattr(compile_, "check_compiler", lambda: None)  # this may be the interpreter's process
    assert cli.main(["compile", flag, str(tmp_path / given), *more]) == 2
    assert capsys.readouterr().err.startswith(f"tritonconv compile: argument {flag}: {said.format(tmp_path)}")


# ---------------------------------------------------------------- what is compiled without flags


def test_without_flags_the_problems_are_those_of_a_campaign_on_a_gpu(tmp_path):
    parser = argparse.ArgumentParser()
    compile_.add(parser)
    options = parser.parse_args(["--target", "sm_90", "--out", str(tmp_path)])
    tasks, _ = problems.tasks_asked_for(options, torch.device("cpu"), "full")
    assert {task.problem.dtype for task in tasks} == {torch.bfloat16}
    assert {task.suite for task in tasks} <= set(common.model_suites())
    assert not {task.layer for task in tasks} & {layer.name for layer in workloads("kernelbench")}
    assert "(default: bfloat16; a model: its own)" in " ".join(parser.format_help().split())
    one = parser.parse_args(ASKED)
    assert {task.problem.dtype for task in problems.tasks_asked_for(one, torch.device("cpu"), "full")[0]} == {
        torch.bfloat16
    }
