"""Kernels compiled ahead into a folder, and found there by another process, in another place, without compiling."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.nvidia import driver

from tritonconv.autotune.tuning import session
from tritonconv.errors import ArgumentError
from tritonconv.kernels import triton_compiled, triton_target
from tritonconv.kernels.triton_compiled import CompiledFolder, CompiledWarning
from tritonconv.lab import cli
from tritonconv.lab.commands import common
from tritonconv.lab.inspection import ahead
from tritonconv.lab.inspection.launches import Kernel, Launch, Launches

pytestmark = pytest.mark.xdist_group("ahead")  # one process compiles the folder for all

ROOT = Path(__file__).resolve().parent.parent
ASKED = ("--x", "1x4x4x4x4", "--weight", "4x1x3x3x3", "--stride", "2", "--groups", "4", "--dtype", "float16")
COMPILE = ("compile", "--target", "sm_90", *ASKED, "--layout", "ncdhw", "--candidates", "1", "--quiet", "--out")
# Each launch in the folder of TRITONCONV_COMPILED: how many of its kernels a process compiles, and finds.
LAUNCH_ALL = """
import triton
from tritonconv.lab.inspection import compiling, launches
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.registry import variant, variants

hits = []
variants()  # the kernels are loaded
triton.knobs.compilation.listener = lambda *, cache_hit, **more: hits.append(cache_hit)
for launch in list(launches.read_active()):
    with compiling.compiling_for(TARGETS[launch.target]):
        compiling.compile_launch(variant(launch.variant), launch.problem, launch.config)
print(hits.count(False), hits.count(True) > 0, type(triton.runtime.cache.get_cache_manager("00" * 32)).__name__)
"""
# The modules of all launches; a library with the names of CUDA's driver stands in for it.
LOAD_ALL = """
import ctypes, pathlib, subprocess
from triton import knobs
from triton.backends.nvidia import driver
from tritonconv.lab.inspection import compiling, launchers, launches
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.registry import variant, variants

folder = pathlib.Path(__file__).parent
names = sorted(set(launchers.DRIVER_CALL.findall(driver.make_launcher({}, {}, None))))
(folder / "names.c").write_text("".join(f"void {name}(void) {{}}\\n" for name in names))
library = folder / launchers.LIBRARY
made = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", folder / "names.c", "-o", library]
subprocess.run(made, check=True)
ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
knobs.nvidia.libcuda_path, driver.PyCUtensorMap = str(folder), object
variants()
loaded = []
for launch in list(launches.read_active()):
    with compiling.compiling_for(TARGETS[launch.target]):
        for _, kernel in compiling.compile_launch(variant(launch.variant), launch.problem, launch.config):
            loaded.append(driver.CudaLauncher(kernel.src, kernel.metadata).launch)
print(len(loaded))
"""


def python(*arguments: object, cache: Path, **variables: str) -> subprocess.CompletedProcess:
    """Python with arguments in a process that compiles, with Triton's own cache in a folder."""
    own = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The candidates of one problem for sm_90, compiled."""
    folder = tmp_path_factory.mktemp("ahead") / "made"
    done = python("-m", "tritonconv", *COMPILE, folder, cache=folder.parent / "cache")
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first == f"sm_90: {len(rows(folder))} launches compiled, 0 known before, 0 cannot be compiled, 0 left"
    assert str(folder) in last
    return folder


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """The folder, somewhere else."""
    return Path(shutil.copytree(made, tmp_path / "moved"))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / triton_compiled.LAUNCHES).read_text().splitlines()]


def edit_manifest(folder: Path, **fields: object) -> None:
    path = folder / triton_compiled.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# ---------------------------------------------------------------- what is in the folder


def test_every_pass_is_there_with_its_kernels(made):
    assert {name.split("_")[0] for name in (row["variant"] for row in rows(made))} == {"forward", "backward"}
    assert all(row["target"] == "sm_90" and row["kernels"] for row in rows(made))
    keys = {kernel["key"] for row in rows(made) for kernel in row["kernels"]}
    assert keys <= {path.name for path in (made / triton_compiled.KERNELS).iterdir()}


def test_only_what_a_launch_needs_is_there_and_no_path_of_this_machine(made):
    import triton

    files = [path for path in made.rglob("*") if path.is_file()]
    names = {path.name for path in files} - {triton_compiled.MANIFEST, triton_compiled.LAUNCHES}
    assert {Path(name).suffix for name in names} - {".so"} == {".cubin", ".json"}
    assert hasattr(driver, "make_launcher") or not any(name.endswith(".so") for name in names)
    places = [str(place).encode() for place in (ROOT, made, Path(triton.__file__).parent, Path.home() / ".triton")]
    for path in files:
        assert not [place for place in places if place in path.read_bytes()], path


def test_another_process_finds_all_of_a_moved_folder_and_writes_nothing_there(copied, tmp_path):
    for path in copied.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in [copied, *copied.rglob("*")]}
    done = python("-c", LAUNCH_ALL, cache=tmp_path / "cache", TRITONCONV_COMPILED=str(copied))
    assert done.stdout.split() == ["0", "True", "FolderFirst"], done.stderr
    assert {path: path.stat().st_mtime_ns for path in [copied, *copied.rglob("*")]} == before
    assert not list((tmp_path / "cache").rglob("*.cubin"))


def test_kernels_that_are_gone_or_cut_off_and_no_others_are_compiled(copied, tmp_path):
    first, *_, victim = copied.rglob("*.cubin")
    victim.unlink()
    first.write_bytes(first.read_bytes()[:-1])  # a copy that was cut off
    done = python("-c", LAUNCH_ALL, cache=tmp_path / "cache", TRITONCONV_COMPILED=str(copied))
    assert done.stdout.split() == ["2", "True", "FolderFirst"], done.stderr
    assert {path.name for path in (tmp_path / "cache").rglob("*.cubin")} == {first.name, victim.name}


def test_what_is_gone_or_cut_off_is_not_found_and_the_same_command_compiles_it_anew(copied, tmp_path):
    victims = {rows(copied)[0]["kernels"][0]["key"]}
    shutil.rmtree(copied / triton_compiled.KERNELS / victims.copy().pop())
    for module in list(copied.rglob("*.so"))[:1]:
        module.write_bytes(module.read_bytes()[:-1])
        victims.add(module.parent.name)
    lost = sum(
        bool(victims & {each["key"] for each in row["kernels"]} | victims & {key for key, _ in row["modules"]})
        for row in rows(copied)
    )
    checked = python("-m", "tritonconv", "compile", "--check", copied, "--quiet", cache=tmp_path / "cache")
    assert checked.stdout.endswith(f"{len(rows(copied)) - lost} of {len(rows(copied))} launches found\n")
    assert "from the folder" in checked.stdout and checked.returncode == 1
    done = python("-m", "tritonconv", *COMPILE, copied, cache=tmp_path / "cache")
    known = len(rows(copied)) - 2 * lost  # each has a second line now
    assert done.stdout.startswith(f"sm_90: {lost} launches compiled, {known} known before"), done.stderr
    checked = python("-m", "tritonconv", "compile", "--check", copied, "--quiet", cache=tmp_path / "cache")
    assert checked.stdout == f"{known + lost} of {known + lost} launches found\n"


@pytest.mark.skipif(not hasattr(driver, "make_launcher"), reason="this Triton builds no module for each signature")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_host_side_of_each_launch_is_there_too_and_loads_without_a_compiler(made, tmp_path):
    (tmp_path / "script.py").write_text(LOAD_ALL)
    done = python(tmp_path / "script.py", cache=tmp_path / "cache", TRITONCONV_COMPILED=str(made), CC="/bin/false")
    assert int(done.stdout) >= len(rows(made)), done.stderr


def test_the_same_command_compiles_nothing_anew_and_checks_what_is_there(made, tmp_path):
    before = sorted(made.rglob("*"))
    done = python("-m", "tritonconv", *COMPILE, made, cache=tmp_path)
    assert done.stdout.startswith(f"sm_90: 0 launches compiled, {len(rows(made))} known before"), done.stderr
    assert sorted(made.rglob("*")) == before and done.returncode == 0
    checked = python("-m", "tritonconv", "compile", "--check", made, "--quiet", cache=tmp_path)
    assert checked.stdout == f"{len(rows(made))} of {len(rows(made))} launches found\n"
    assert checked.returncode == 0


def test_a_check_says_what_is_not_found_and_compiles_nothing(copied, tmp_path):
    found = rows(copied)
    found[0]["config"]["num_warps"] *= 2  # never compiled
    found[1]["variant"] = "forward_gone"
    found[2]["target"] = "sm_80"
    found[3]["config"]["num_warps"] *= 2
    found[3]["kernels"][0]["source"] = "0" * 64
    (copied / triton_compiled.LAUNCHES).write_text("".join(json.dumps(row) + "\n" for row in found))
    cache = tmp_path / "cache"
    done = python("-m", "tritonconv", "compile", "--check", copied, "--quiet", cache=cache)
    assert done.returncode == 1
    assert done.stdout.endswith(f"{len(found) - 4} of {len(found)} launches found\n")
    assert "there is no variant forward_gone here" in done.stdout
    assert f"the source of {found[3]['kernels'][0]['name']} is not the one that was compiled" in done.stdout
    assert done.stdout.count("has other arguments, options or another assembler here") == 4  # twice in each list
    assert not list(cache.rglob("*.cubin"))


# ---------------------------------------------------------------- what differs


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"triton": "3.1.4"}, "compiled by Triton 3.1.4, Python"),
        ({"python": "3.7"}, "Python 3.7 on"),
        ({"machine": "aarch64"}, "on aarch64; here is Triton"),
        ({"build": "0" * 64}, "another build of Triton"),
        ({"environment": {"TRITON_DISABLE_LINE_INFO": "true"}}, "TRITON_DISABLE_LINE_INFO=true, here None"),
    ],
)
def test_a_folder_of_another_triton_says_what_differs(copied, fields, said):
    assert CompiledFolder.read(copied).difference is None
    edit_manifest(copied, **fields)
    folder = CompiledFolder.read(copied)
    assert said in folder.difference
    launch = Launch.of((copied / triton_compiled.LAUNCHES).read_text().splitlines()[0])
    assert not Launches(folder).has(launch.variant, launch.problem, launch.config, launch.precision, launch.target)
    with pytest.raises(ArgumentError, match="choose another folder"):
        ahead.open_folder(copied, "sm_90")


def test_a_folder_for_another_gpu_says_so_and_only_once(copied, monkeypatch):
    class Gpu:
        backend, arch = "cuda", 80

    monkeypatch.setattr(triton_target, "target", lambda: Gpu)
    triton_compiled.warn.cache_clear()
    folder = CompiledFolder.read(copied)
    assert folder.misfit == "compiled for sm_90; this GPU is sm_80"
    monkeypatch.setattr(triton_compiled, "_active", [folder])
    with pytest.warns(CompiledWarning, match="this GPU is sm_80: none of its kernels is used") as caught:
        assert [triton_compiled._fits(folder.misfit) for _ in range(3)] == [False] * 3
    assert len(caught) == 1
    Gpu.arch = 90
    assert folder.misfit is None


def test_edited_sources_are_told_apart(copied, tmp_path):
    """has(), which the tuner asks, where the interpreter has no keys and where the compiler has them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, pathlib\n"
        "from tritonconv.lab.inspection.launches import Launches\n"
        "from tritonconv.kernels.triton_compiled import CompiledFolder\n"
        "found = Launches(CompiledFolder.read(pathlib.Path(sys.argv[1])))\n"
        "def has(each, **other):\n"
        "    asked = {name: getattr(each, name) for name in ('problem', 'config', 'precision', 'target')} | other\n"
        "    return found.has(each.variant, *asked.values())\n"
        "print(*(has(each) for each in found))\n"
        "print(*(has(each, target='sm_80') for each in found), *(has(each, config={}) for each in found))\n"
        "print(*(has(each, precision='other') for each in found))\n"  # of no account for float16
    )
    edited = rows(copied)
    edited[0]["kernels"][0]["source"] = "0" * 64
    (copied / triton_compiled.LAUNCHES).write_text("".join(json.dumps(row) + "\n" for row in edited))
    done = python(script, copied, cache=tmp_path / "cache")
    rest = " True" * (len(edited) - 1)
    assert done.stdout.splitlines()[::2] == ["False" + rest] * 2, done.stderr
    assert set(done.stdout.splitlines()[1].split()) == {"False"}


def test_on_a_cpu_a_folder_is_of_no_use_and_does_no_harm(made, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "PROBLEM_SECONDS", 0.2)
    done = cli.main(["tune", *ASKED[:-2], "--dtype", "float32", "--device", "cpu", "--compiled",
                     str(made), "--store", str(tmp_path), "--output", str(tmp_path), "--quiet"])  # fmt: skip
    assert done == 0
    assert f"tritonconv tune: {made}: kernels for sm_90 serve no cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpu", "edited", "said"),
    [
        ("sm_90", False, "{all} launches for sm_90\n"),
        ("sm_90", True, "0 launches for sm_90; {all} more are of other sources of the kernels, and not used\n"),
        ("sm_80", False, "compiled for sm_90; this GPU is sm_80: none of its kernels is used\n"),
    ],
)
def test_beside_a_gpu_a_command_says_how_many_launches_it_takes(made, monkeypatch, capsys, gpu, edited, said):
    monkeypatch.setattr(triton_target, "INTERPRETED", False)
    monkeypatch.setattr(triton_target, "target_name", lambda: gpu)
    monkeypatch.setattr(Kernel, "edited", lambda kernel: edited)
    monkeypatch.setenv(triton_compiled.VARIABLE, "")
    common.use_compiled(argparse.Namespace(compiled=made, name="tune"), torch.device("cuda", 0))
    assert capsys.readouterr().err == f"tritonconv tune: {made}: {said.format(all=len(rows(made)))}"
    assert os.environ.get(triton_compiled.VARIABLE) == (str(made) if gpu == "sm_90" else None)
