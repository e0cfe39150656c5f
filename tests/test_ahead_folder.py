"""The folder of kernels that were compiled ahead: filling it, reading it, and who takes what is in it."""

from __future__ import annotations

import ast
import dataclasses
import json
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch

from tritonconv import Problem
from tritonconv.autotune import ceilings, serving, store
from tritonconv.autotune.choose import Selection
from tritonconv.autotune.key import Key
from tritonconv.autotune.tuning import compiled_ahead
from tritonconv.autotune.tuning.candidates import Candidate, Effort, candidates
from tritonconv.errors import ArgumentError
from tritonconv.kernels import triton_compiled
from tritonconv.kernels.registry import have_triton, variant
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.triton_compiled import CompiledFolder, CompiledWarning, Maker
from tritonconv.lab import cli
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.inspection import ahead, workers
from tritonconv.lab.inspection.compiling import compiling_for
from tritonconv.lab.inspection.launches import Kernel, Launch, Launches
from tritonconv.lab.inspection.precompile import Precompiler
from tritonconv.precision import float32_precision
from tritonconv.problem import PASSES

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.device("cuda", 0)
UP = Problem(1, 4, 4, (4, 4, 4), (3, 3, 3), (2, 2, 2), (0, 0, 0), (9, 9, 9), groups=4, dtype=torch.float16)

pytestmark = pytest.mark.skipif(not have_triton(), reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """No folder is taken beyond a test."""
    triton_compiled.warn.cache_clear()
    monkeypatch.delenv(triton_compiled.VARIABLE, raising=False)
    yield
    triton_compiled.remove()


# ---------------------------------------------------------------- bad input


def test_what_is_no_folder_of_compiled_kernels_is_an_error_on_the_command_line(tmp_path, capsys):
    for command in ("tune", "bench", "campaign"):
        more = ("--seconds", "1", "--out", str(tmp_path / "out")) if command == "campaign" else ()
        assert cli.main([command, "--compiled", str(tmp_path), "--device", "cpu", *more]) == 2
        assert f"{tmp_path}: not a folder of compiled kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "format None, expected 2"),
        ('{"format": 1}', "format 1, expected 2"),
        ('{"format": 2}', r"damaged \(KeyError\('triton'\)\)"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_damaged_manifest_is_an_error_that_names_it(tmp_path, text, said):
    (tmp_path / triton_compiled.MANIFEST).write_text(text)
    with pytest.raises(ArgumentError, match=said) as caught:
        CompiledFolder.read(tmp_path)
    assert triton_compiled.MANIFEST in str(caught.value)


def test_a_call_goes_on_with_a_warning_where_the_variable_names_no_such_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(triton_compiled.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.warns(CompiledWarning, match="TRITONCONV_COMPILED: .*nowhere: not a folder of compiled kernels"):
        triton_compiled.from_environment()
    assert triton_compiled.active() is None


def test_the_compile_command_says_what_it_needs(tmp_path, capsys):
    for arguments, said in (
        (["--out", str(tmp_path)], "--target and --output are needed"),
        (["--target", "sm_90"], "--target and --output are needed"),
        (["--check", str(tmp_path), "--out", str(tmp_path)], "choose one"),
        (["--target", "sm_12", "--out", str(tmp_path)], "got 'sm_12', expected"),
    ):
        assert cli.main(["compile", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_not_filled(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ArgumentError, match="is not empty"):
        ahead.open_folder(tmp_path, "sm_90")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# ---------------------------------------------------------------- filling a folder

ANSWERS_ONCE = """
import os, sys, time
sys.path[:] = sys.argv[1:]
from multiprocessing.connection import Connection
from pathlib import Path
from tritonconv.lab.inspection.launches import Kernel, Launch
from tritonconv.lab.inspection.precompile import Answer
pipe = Connection(0)
_, (name, *launch, file) = pipe.recv()
if name != "forward_gather":
    time.sleep(60)
place = Path(os.environ["TRITON_CACHE_DIR"], "KEY")
place.mkdir()
(place / "k.cubin").write_bytes(b"binary")
(place / "k.ptx").write_bytes(b"text")
(place / "k.json").write_text('{"libs": [["lib", "/some/where/lib.bc"]]}')
(place / "__grp__k.json").write_text('{"child_paths": {"k.json": "/x/k.json", "k.ptx": "/x/k.ptx", "k.cubin": "/x"}}')
pipe.send(Answer(Launch(name, *launch, (Kernel("k", "KEY", "m:k", "0"),))))
time.sleep(60)
"""
JOBS = [("forward_gather", UP, {"BLOCK_M": 16}), ("forward_phases", UP, {}), ("forward_phases", UP, {"BLOCK_M": 16})]


def test_a_run_that_is_cut_off_leaves_what_is_done_in_a_valid_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "WORKER", ANSWERS_ONCE)
    folder = ahead.open_folder(tmp_path / "out", "sm_90")

    class Interrupted(Progress):
        def step(self, text: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ahead.compile_into(folder, JOBS, "sm_90", 2, None, Interrupted())
    place = tmp_path / "out" / triton_compiled.KERNELS / "KEY"
    assert {path.name for path in place.iterdir()} == {"k.cubin", "k.json", "__grp__k.json"}
    assert json.loads((place / "k.json").read_text()) == {"libs": [["lib", "lib.bc"]]}
    again = CompiledFolder.read(tmp_path / "out")
    assert again.group("KEY", "k.json") == {name: str(place / name) for name in ("k.json", "k.cubin")}
    assert [(each.variant, each.problem, each.config) for each in Launches(again)] == JOBS[:1]


def test_a_run_ends_when_its_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "WORKER", "import time; time.sleep(60)")
    filled = ahead.compile_into(ahead.open_folder(tmp_path / "out", "sm_90"), JOBS, "sm_90", 2, 0.1, Progress())
    assert (filled.compiled, filled.known, filled.left, filled.failed) == (0, 0, 3, [])


def test_a_line_that_was_cut_off_is_passed_over_and_written_behind(tmp_path):
    folder = ahead.open_folder(tmp_path / "out", "sm_90")
    launch = Launch("forward_gather", UP, {"BLOCK_M": 16}, "tf32", "sm_90", (Kernel("k", "KEY", "m:k", "0"),))
    (folder.path / triton_compiled.LAUNCHES).write_text('{"variant": "forw')
    with ahead._line_by_line(folder) as write:
        write(launch.line())
    assert list(Launches(folder)) == [launch]


def test_what_cannot_be_compiled_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "WORKER", "import sys; sys.stdin.buffer.read(1)")
    filled = ahead.compile_into(ahead.open_folder(tmp_path / "out", "sm_90"), JOBS[:1], "sm_90", 1, None, Progress())
    assert filled.failed == [(JOBS[0], "the compiler ended its process")] and filled.faults == 1
    assert list(Launches(CompiledFolder.read(tmp_path / "out"))) == []


def test_several_targets_share_a_folder(tmp_path):
    ahead.open_folder(tmp_path, "sm_90")
    assert (
        ahead.open_folder(tmp_path, "sm_80").targets
        == ahead.open_folder(tmp_path, "sm_90").targets
        == ("sm_90", "sm_80")
    )
    assert CompiledFolder.read(tmp_path).maker == Maker.here()


# ---------------------------------------------------------------- what takes it


class Held:
    """Launches of which those with an even BLOCK_M were compiled ahead."""

    def has(self, name, problem, config, precision, target) -> bool:
        return (problem, target) == (UP, "sm_90") and config.get("BLOCK_M", 1) % 2 == 0


def test_what_was_compiled_ahead_is_not_sent_to_the_compiling_processes(monkeypatch):
    monkeypatch.setattr(workers, "WORKER", "raise SystemExit")
    jobs = [("forward_gather", UP, {"BLOCK_M": size}) for size in (2, 4)]
    with Precompiler("sm_90", processes=1, ahead=Held()) as compiler:
        assert wait(compiler.start(jobs), timeout=300).not_done == set()
        assert not compiler.started
        (late,) = compiler.start([("forward_gather", UP, {"BLOCK_M": 3})])
        assert not late.result().ok and compiler.started


def test_candidates_that_were_compiled_ahead_come_first(monkeypatch):
    kernel, own = variant("forward_gather"), variant("forward_torch_native")
    field = [Candidate(Selection(kernel, {"BLOCK_M": size}, ""), 1.0) for size in (1, 2, 3, 4)]
    field.insert(1, Candidate(Selection(own, {}, ""), 1.0))
    assert compiled_ahead.was_compiled(UP, GPU) is None  # no folder is taken
    assert compiled_ahead.compiled_first(field, None) == field
    monkeypatch.setattr(compiled_ahead, "read_active", Held)
    monkeypatch.setattr(compiled_ahead, "target_of", lambda device: "sm_90")
    ahead = compiled_ahead.was_compiled(UP, GPU)
    order = [each.selection.config.get("BLOCK_M") for each in compiled_ahead.compiled_first(field, ahead)]
    assert order == [None, 2, 4, 1, 3]


def test_a_first_round_takes_only_what_was_compiled_ahead_where_there_is_something():
    effort = Effort(2, 1.5, 4.0, 1.0, formulations=False, ahead=True)
    with compiling_for(TARGETS["sm_90"]):
        rates = ceilings.nominal(GPU)
        usual = [each.label for each in candidates(UP, GPU, "forward", rates, effort)]
        whole = candidates(UP, GPU, "forward", rates, effort._replace(configs=12, near=1e9, far=1e9))
        last = [each for each in whole if each.label not in usual][-1]

        def only(record, config) -> bool:
            return (record, config) == last.selection[:2]

        found = [each.label for each in candidates(UP, GPU, "forward", rates, effort, only)]
        assert found == [last.label]
        assert [each.label for each in candidates(UP, GPU, "forward", rates, effort, lambda *_: False)] == usual
        deeper = effort._replace(ahead=False)
        assert [each.label for each in candidates(UP, GPU, "forward", rates, deeper, only)] == usual


def test_the_launches_of_a_problem_are_those_of_its_candidates_and_of_the_gates_problem():
    large = dataclasses.replace(UP, size=(32, 32, 32), out_size=(65, 65, 65))
    jobs = compiled_ahead.jobs_of([large], "sm_90", 2)
    assert {variant(name).pass_name for name, *_ in jobs} == {"forward", "backward_data", "backward_weight"}
    assert {variant(name).backend for name, *_ in jobs} == {"triton"}
    sizes = {problem.size for _, problem, _ in jobs}
    assert len(sizes) == 2 and large.size in sizes
    per_variant = [sum(name == other and problem == large for other, problem, _ in jobs) for name, *_ in jobs]
    assert max(per_variant) == 2
    assert len(jobs) == len({(name, problem, tuple(config.items())) for name, problem, config in jobs})


def test_rates_of_a_target_are_those_of_its_data_sheet():
    assert ceilings.of_capability((8, 0)).device == "A100 SXM"
    assert ceilings.of_capability((9, 9)) == ceilings.of_capability((9, 0))


def test_the_launches_of_a_folder_are_read_again_as_they_were_written():
    launch = Launch("forward_gather", UP, {"BLOCK_M": 16}, "tf32", "sm_90", (Kernel("k", "KEY", "m:k", "0"),))
    assert Launch.of(launch.line()) == launch
    assert float32_precision() in ("tf32", "ieee")


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_no_kernel_reads_a_constexpr_of_its_module(path):
    """In Triton 3.6.0 a kernel's key then depends on the order in which a process asks for the keys."""
    tree = ast.parse(path.read_text())
    values = [node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
    assert not [ast.unparse(each) for each in values if "constexpr(" in ast.unparse(each)]


def test_the_choices_that_ship_for_a_target_are_compiled_first():
    known = Problem(2, 320, 320, (4,) * 3, (2,) * 3, (2,) * 3, (0,) * 3, (8,) * 3, dtype=torch.bfloat16, layout="ndhwc")
    entries = store.shipped_table(serving.MEASURED).entries
    alike = (dataclasses.replace(known, bias=True), dataclasses.replace(known, n=1))  # served by the same entries
    asked_for = [("sm_90", problem, True) for problem in (known, *alike)]
    for target, problem, shipped in (*asked_for, ("sm_80", known, False)):
        jobs = compiled_ahead.jobs_of([problem], target, 1)
        asked = [(name, config) for name, each, config in jobs if each == problem]
        for pass_name in PASSES:
            both = entries[str(Key.of(known, pass_name))].choices(graphs=True)
            wanted = [(each.variant, each.config) for each in both if "_torch_" not in each.variant]
            assert wanted and all(each in asked[:3] for each in wanted) is shipped
