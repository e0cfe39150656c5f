"""Kernels compiled ahead, where files are lost or damaged, compilers crash, and the folder is not what was expected."""

from __future__ import annotations

import argparse
import errno
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from tritonconv import Problem
from tritonconv.errors import ArgumentError
from tritonconv.kernels import triton_compiled
from tritonconv.kernels.registry import have_triton
from tritonconv.kernels.triton_compiled import KERNELS, LAUNCHES, MANIFEST, VARIABLE, CompiledFolder, CompiledWarning
from tritonconv.lab import cli
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.commands import common
from tritonconv.lab.commands import compile as compile_
from tritonconv.lab.inspection import ahead, launches, workers
from tritonconv.lab.inspection.launches import Kernel, Launch, Launches

pytestmark = pytest.mark.skipif(not have_triton(), reason="Triton is not installed")

GPU = torch.device("cuda", 0)
UP = Problem(1, 4, 4, (4, 4, 4), (3, 3, 3), (2, 2, 2), (0, 0, 0), (9, 9, 9), groups=4, dtype=torch.float16)
JOBS = [("forward_gather", UP, {"BLOCK_M": size}) for size in (16, 32, 64)]
# A compiling process: of each job a kernel and a module, under keys of the job's BLOCK_M.
ANSWERS = """
import os, sys
sys.path[:] = sys.argv[1:]
from multiprocessing.connection import Connection
from pathlib import Path
from tritonconv.lab.inspection.launches import Kernel, Launch
from tritonconv.lab.inspection.precompile import Answer
pipe = Connection(0)
while True:
    _, (*launch, file) = pipe.recv()
    size = launch[2]["BLOCK_M"]
    place, module = (Path(os.environ["TRITON_CACHE_DIR"], f"{kind}{size}") for kind in ("KEY", "SO"))
    place.mkdir(), module.mkdir()
    (place / "k.cubin").write_bytes(b"binary")
    (place / "k.json").write_text("{}")
    (place / "__grp__k.json").write_text('{"child_paths": {"k.json": "/x/k.json", "k.cubin": "/x"}}')
    (module / "m.so").write_bytes(b"module")
    pipe.send(Answer(Launch(*launch, (Kernel("k", place.name, "m:k", "0"),), ((module.name, "m.so"),))))
"""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """No folder is taken beyond a test; the kernels of ANSWERS are of the sources that are here."""
    triton_compiled.warn.cache_clear()
    monkeypatch.setattr(Kernel, "edited", lambda kernel: False)
    monkeypatch.setattr(workers, "WORKER", ANSWERS)
    monkeypatch.delenv(VARIABLE, raising=False)
    yield
    triton_compiled.remove()


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """The jobs compiled, once: starting a process that compiles takes over a second."""
    folder = ahead.open_folder(tmp_path_factory.mktemp("filled") / "made", "sm_90")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "edited", lambda kernel: False)
        patch.setattr(workers, "WORKER", ANSWERS)
        assert fill(folder).compiled == 3
    return folder.path


@pytest.fixture
def made(filled, tmp_path) -> CompiledFolder:
    """A copy of the folder, to damage."""
    return ahead.open_folder(Path(shutil.copytree(filled, tmp_path / "made")), "sm_90")


def fill(folder: CompiledFolder, progress: Progress | None = None) -> ahead.Filled:
    return ahead.compile_into(folder, JOBS, "sm_90", 1, None, progress or Progress())


def held(folder: CompiledFolder) -> list[int]:
    found = Launches(folder)
    return [config["BLOCK_M"] for name, problem, config in JOBS if found.has(name, problem, config, "tf32", "sm_90")]


# ---------------------------------------------------------------- files that are gone

DAMAGE = {
    "all kernels gone": lambda kernels: [shutil.rmtree(each) for each in kernels.iterdir()],
    "a kernel gone": lambda kernels: shutil.rmtree(kernels / "KEY32"),
    "a binary gone": lambda kernels: (kernels / "KEY32" / "k.cubin").unlink(),
    "a binary cut off": lambda kernels: (kernels / "KEY32" / "k.cubin").write_bytes(b"bin"),
    "facts cut off": lambda kernels: (kernels / "KEY32" / "k.json").write_bytes(b""),
    "lengths gone": lambda kernels: (kernels / "KEY32" / "__grp__k.json").unlink(),
    "lengths of nothing": lambda kernels: (kernels / "KEY32" / "__grp__k.json").write_text('{"sizes": {}}'),
    "lengths that are no text": lambda kernels: (kernels / "KEY32" / "__grp__k.json").write_bytes(b"\xff"),
    "a file in its place": lambda kernels: (shutil.rmtree(kernels / "KEY32"), (kernels / "KEY32").touch()),
    "a link in its place": lambda kernels: (
        (kernels / "KEY32").rename(kernels / "moved"),
        (kernels / "KEY32").symlink_to(kernels),
    ),
    "a module gone": lambda kernels: shutil.rmtree(kernels / "SO32"),
    "a module cut off": lambda kernels: (kernels / "SO32" / "m.so").write_bytes(b"mod"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_launch_that_lacks_files_is_not_held_and_is_compiled_anew(made, damage):
    assert held(made) == [16, 32, 64]
    DAMAGE[damage](made.path / KERNELS)
    left = [] if damage == "all kernels gone" else [16, 64]
    assert held(made) == left
    filled = fill(made)
    assert (filled.compiled, filled.known, filled.left, filled.failed) == (3 - len(left), len(left), 0, [])
    assert held(made) == [16, 32, 64]
    assert made.file("SO32", "m.so") == str(made.path / KERNELS / "SO32" / "m.so")


def test_a_command_counts_only_launches_whose_files_are_there_and_reads_the_list_once(made, monkeypatch, capsys):
    as_on_a_gpu(monkeypatch)
    shutil.rmtree(made.path / KERNELS / "KEY32")
    read = []
    lines = launches._lines
    monkeypatch.setattr(launches, "_lines", lambda path: read.append(path) or lines(path))
    common.use_compiled(argparse.Namespace(compiled=made.path, name="tune"), GPU)
    assert "2 launches for sm_90; of 1 more the folder lacks files\n" in capsys.readouterr().err
    assert compile_._size(made, 0, 1.0).endswith("of 1 more the folder lacks files")
    read.clear()
    assert len(launches.read_active()) == 3 and read == []


def as_on_a_gpu(monkeypatch) -> None:
    from tritonconv.kernels import triton_target

    monkeypatch.setattr(triton_target, "INTERPRETED", False)
    monkeypatch.setattr(triton_target, "target_name", lambda: "sm_90")
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)


# ---------------------------------------------------------------- a list of launches that is damaged


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b'{"variant": "\xff"}',
        b"\0",
        b"[" * 100_000,
        b"[]",
        b"7",
        b"{}",
        "of a kernel",
        "of a text",
        "of half a letter",
    ],
    ids=str,
)
def test_a_damaged_line_is_passed_over(made, line):
    path = made.path / LAUNCHES
    whole = sorted(path.read_bytes().splitlines())  # they were written as they were answered
    line = {
        "of a kernel": whole[1].replace(b'"key": "KEY32"', b'"key": 7'),
        "of a text": whole[1].replace(b"forward_gather", b"forward_\xff"),
        "of half a letter": whole[1].replace(b"forward_gather", b"forward_\\ud800"),
    }.get(line, line)
    path.write_bytes(b"\n".join([whole[0], line, whole[2], b""]))
    assert [each.config["BLOCK_M"] for each in Launches(made)] == [16, 64]
    assert fill(made).compiled == 1
    assert held(made) == [16, 32, 64]


def test_a_list_that_cannot_be_read_is_an_error_of_a_command_and_a_warning_of_a_call(made, monkeypatch, capsys):
    (made.path / LAUNCHES).unlink()
    (made.path / LAUNCHES).mkdir()
    said = f"{made.path / LAUNCHES}: cannot be read: Is a directory"
    for arguments in (["--check", str(made.path)], ["--output", str(made.path), "--target", "sm_90", *ASKED]):
        assert compiling(monkeypatch, *arguments) == 2
        assert f"argument {arguments[0]}: {said}" in capsys.readouterr().err
    as_on_a_gpu(monkeypatch)
    with pytest.raises(ArgumentError, match=r"argument --compiled: .*cannot be read: Is a directory"):
        common.use_compiled(argparse.Namespace(compiled=made.path, name="tune"), GPU)
    assert triton_compiled.active() is None
    monkeypatch.setenv(VARIABLE, str(made.path))
    triton_compiled.from_environment()
    with pytest.warns(CompiledWarning, match="cannot be read: Is a directory: the tuner does not know") as caught:
        assert [launches.read_active() for _ in range(3)] == [None] * 3
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("environment", []), ("environment", {"CC": 7}), ("targets", None), ("targets", [90])]
)
def test_a_manifest_with_values_of_another_kind_is_an_error_that_says_so(made, field, value):
    path = made.path / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ArgumentError, match=r"damaged .*Error") as caught:
        CompiledFolder.read(made.path)
    assert str(caught.value).startswith(f"{path}: ")


# ---------------------------------------------------------------- compilers that crash, a disk that is full

ASKED = ("--x", "1x4x4x4x4", "--weight", "4x1x3x3x3", "--stride", "2", "--groups", "4", "--jobs", "1", "--quiet")


def compiling(monkeypatch, *arguments: str) -> int:
    """The command's exit code, in this process, which may be the interpreter's."""
    monkeypatch.setattr(compile_, "check_compiler", lambda: None)
    monkeypatch.setattr(compile_, "jobs_of", lambda *_: list(JOBS))
    return cli.main(["compile", *arguments])


def test_crashes_that_follow_each_other_are_no_budget_that_was_used_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "WORKER", "raise SystemExit")
    assert compiling(monkeypatch, "--out", str(tmp_path / "out"), "--target", "sm_90", *ASKED) == 1
    out = capsys.readouterr().out
    assert "sm_90: 0 launches compiled, 0 known before, 2 cannot be compiled, 1 left" in out
    assert "1 not begun, for the compilers before it ended their processes one after the other" in out
    assert "budget" not in out


def test_a_budget_that_was_used_up_is_no_crash(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "WORKER", "import time; time.sleep(60)")
    compiling(monkeypatch, "--out", str(tmp_path / "out"), "--target", "sm_90", *ASKED, "--seconds", "0.5")
    out = capsys.readouterr().out
    assert "3 left\nthe budget was used up" in out and "not begun" not in out


class After(Progress):
    """Does something behind the first launch."""

    def __init__(self, what) -> None:
        self.what = what

    def step(self, text: str) -> None:
        self.what()
        self.what = lambda: None


@pytest.mark.parametrize("gone", ["", KERNELS])
def test_a_folder_that_is_removed_while_it_is_filled_is_an_error_that_names_it(tmp_path, monkeypatch, capsys, gone):
    out = tmp_path / "out"
    monkeypatch.setattr(compile_, "progress", lambda *_, **__: After(lambda: shutil.rmtree(out / gone)))
    assert compiling(monkeypatch, "--out", str(out), "--target", "sm_90", *ASKED) == 2
    assert f"argument --output: {out / KERNELS}" in capsys.readouterr().err


def test_a_full_disk_is_an_error_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    whole, written = ahead._portable, []

    def full(path: Path, roots):
        written.append(path)
        if len(written) > 3:  # the files of one launch
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, roots)

    monkeypatch.setattr(ahead, "_portable", full)
    arguments = ("--out", str(tmp_path / "out"), "--target", "sm_90", *ASKED)
    assert compiling(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert f"argument --output: {tmp_path / 'out'}: No space left on device; launches that are in" in error
    monkeypatch.setattr(ahead, "_portable", whole)
    assert compiling(monkeypatch, *arguments) == 0
    assert "2 launches compiled, 1 known before" in capsys.readouterr().out


def test_a_run_that_is_cut_off_before_the_manifest_leaves_a_folder_that_can_be_filled(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            ahead.open_folder(tmp_path, "sm_90")
    (tmp_path / f".{MANIFEST}.7").touch()  # of a process that was killed
    assert fill(ahead.open_folder(tmp_path, "sm_90")).compiled == 3


def test_the_reader_of_the_progress_may_be_gone(tmp_path):
    def gone():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        fill(ahead.open_folder(tmp_path / "out", "sm_90"), After(gone))


# ---------------------------------------------------------------- which folder is taken


def test_a_folder_that_does_not_fit_leaves_none_of_the_environment(made, tmp_path, monkeypatch, capsys):
    as_on_a_gpu(monkeypatch)
    other = Path(shutil.copytree(made.path, tmp_path / "other"))
    manifest = json.loads((other / MANIFEST).read_text())
    (other / MANIFEST).write_text(json.dumps({**manifest, "triton": "3.1.4"}))
    for given, device in ((other, GPU), (made.path, torch.device("cpu"))):
        monkeypatch.setenv(VARIABLE, str(made.path))
        triton_compiled.from_environment()
        assert triton_compiled.active() is not None
        common.use_compiled(argparse.Namespace(compiled=given, name="tune"), device)
        assert triton_compiled.active() is None and launches.read_active() is None
        assert VARIABLE not in common.os.environ
    assert "compiled by Triton 3.1.4" in capsys.readouterr().err


def test_without_triton_a_command_says_that_it_is_not_installed(made, monkeypatch, capsys):
    monkeypatch.setattr(common, "triton_fault", lambda: "Triton is not installed")
    common.use_compiled(argparse.Namespace(compiled=made.path, name="tune"), GPU)
    assert capsys.readouterr().err.endswith(": Triton is not installed: none of its kernels is used\n")


def test_a_launch_of_a_folder_is_read_again_with_its_modules():
    launch = Launch("forward_gather", UP, {}, "tf32", "sm_90", (Kernel("k", "KEY", "m:k", "0"),), (("SO", "m.so"),))
    assert Launch.of(launch.line()) == launch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launches.read_active() is None
