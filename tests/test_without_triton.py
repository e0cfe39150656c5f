"""Triton that is absent, broken, too old or another module, and a package without sources or in a zip file.

Each in processes of its own, on the CPU; what a GPU does then is in test_stand_in_facts.py.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tritonconv.kernels import registry

ROOT = Path(__file__).resolve().parent.parent
# The source that is imported as ``triton``, and the reason given for it. None: a folder without __init__.py.
FAULTS = {
    "absent": ("", "Triton is not installed"),
    "library": ("raise ImportError('DLL load failed')", "Triton cannot be imported: ImportError: DLL load failed"),
    "system": ("raise OSError('GLIBC_2.99 not found')", "Triton cannot be imported: OSError: GLIBC_2.99 not found"),
    "dependency": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "script": ("import sys; sys.exit('usage: triton FILE')", "Triton cannot be imported: SystemExit: usage: triton"),
    "old": ("__version__, jit = '3.5.1', print", "Triton 3.5.1 is installed, and the kernels need 3.6 or later"),
    "development": ("__version__, jit = '3.5.1+git0', print", "Triton 3.5.1+git0 is installed"),
    "parts": ("__version__, jit = '99.1', print", "Triton 99.1 cannot be imported: triton.language: ModuleNotFound"),
    "module": ("__version__ = '8.0'", "is not the compiler Triton, but {folder}/triton/__init__.py"),
    "unversioned": ("jit = print", "is not the compiler Triton, but {folder}/triton/__init__.py"),
    "folder": (None, "is not the compiler Triton, but {folder}/triton"),
}
CALL = """
import warnings
warnings.simplefilter("error")
import torch, tritonconv
layer, x = tritonconv.ConvTranspose3d(2, 3, 2, stride=2), torch.ones(1, 2, 2, 2, 2, requires_grad=True)
y = layer(x)
assert torch.equal(y, torch.conv_transpose3d(x, layer.weight, layer.bias, 2))
y.sum().backward()
assert x.grad.shape == x.shape
"""


def python(first: Path, *arguments: str, **variables: str) -> str:
    """The output of a process that looks for modules in a folder, or a zip file, before the project's."""
    own = {**os.environ, "PYTHONPATH": f"{first}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=first.parent, env=own, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_triton(folder: Path, text: str | None) -> None:
    (folder / "triton").mkdir(parents=True)
    if text is not None:
        (folder / "triton" / "__init__.py").write_text(text)


def test_what_is_wrong_with_triton_is_named(tmp_path):
    for name, (text, _) in FAULTS.items():
        if name == "absent":
            (tmp_path / name).mkdir()
        else:
            as_triton(tmp_path / name, text)
    code = f"""
        import importlib, sys, torch
        from tritonconv.kernels import registry

        own, names = list(sys.path), {[*FAULTS]}
        for name in names:
            for module in [each for each in sys.modules if each.split(".")[0] == "triton"]:
                del sys.modules[module]
            # Without the folder of the packages, for a real Triton there comes before a folder that is no package.
            sys.path[:] = [f"{tmp_path}/{{name}}", *(each for each in own if "site-packages" not in each)]
            importlib.invalidate_caches()
            registry.triton_fault.cache_clear()
            assert not registry.have_triton() and {{each.backend for each in registry.variants()}} == {{"torch"}}
            print(registry.triton_fault())
        """
    said = python(tmp_path, "-c", textwrap.dedent(code)).splitlines()
    for (name, (_, fault)), line in zip(FAULTS.items(), said, strict=True):
        assert fault.format(folder=tmp_path / name) in line, name


@pytest.mark.parametrize("fault", ["library", "script"])
def test_a_cpu_needs_no_triton(tmp_path, fault):
    """No warning: nothing there would have had a Triton kernel."""
    text, said = FAULTS[fault]
    as_triton(tmp_path, text)
    code = """
        try:
            with tritonconv.use("forward_shuffle"): pass
        except tritonconv.ArgumentError as error:
            print(error)
        tritonconv.explain(x, layer.weight, layer.bias, 2)
        from tritonconv.lab import cli
        assert cli.main(["list"]) == 0
        for command in (["inspect", "forward_shuffle"], ["compile", "--target", "sm_90", "--out", "made"]):
            assert cli.main(command) == 2
        """
    lines = python(tmp_path, "-c", f"import sys; sys.stderr = sys.stdout\n{CALL}{textwrap.dedent(code)}").splitlines()
    told = [line for line in lines if said in line]
    assert len(told) == 5
    assert told[0].startswith("variant 'forward_shuffle' is not there: ")
    assert told[1].startswith("no Triton variant: ") and told[2].startswith("no Triton variant: ")
    assert told[3].startswith("tritonconv inspect: ") and told[4].startswith("tritonconv compile: ")


def test_a_call_on_a_cpu_asks_for_no_kernel(tmp_path):
    out = python(tmp_path, "-c", f"{CALL}\nimport sys; print([name for name in sys.modules if 'triton_tiles' in name])")
    assert out == "[]\n"


def test_the_triton_that_is_installed_is_whole():
    """Else every test of a kernel would be left out, and nobody told."""
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        assert registry.triton_fault() == "Triton is not installed"
    else:
        assert registry.triton_fault() is None


def test_a_kernel_that_cannot_be_imported_is_named(tmp_path):
    if not registry.have_triton():
        pytest.skip("needs Triton")
    shutil.copytree(ROOT / "tritonconv", tmp_path / "tritonconv", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tritonconv" / "kernels" / "forward_worse.py").write_text("import triton\ntriton.no_such_thing\n")
    code = f"{CALL}\nfrom tritonconv.kernels import registry; print(registry.triton_fault())"
    out = python(tmp_path, "-c", code)
    assert out.startswith("tritonconv's forward_worse cannot be imported with Triton ")
    assert "AttributeError: module 'triton' has no attribute 'no_such_thing'" in out


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A folder with the package, its links followed."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "tritonconv", folder / "tritonconv", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


PARTS = """
from tritonconv.autotune import store
from tritonconv.lab.bench.workloads import workloads
from tritonconv.kernels import registry
from tritonconv.plots import charts
assert store.SHIPPED.joinpath("README.md").read_text() and store.read("a GPU") == store.Table("a GPU")
print(*(record.name for record in registry.variants() if record.backend == "torch"))
print(*charts.names())
print(len(workloads()))
print(registry.triton_fault())
print(tritonconv.__file__)
"""


def test_a_package_without_sources_and_one_in_a_zip_file_have_all_but_kernels(copy, tmp_path):
    zipped = shutil.make_archive(str(tmp_path / "package"), "zip", copy, "tritonconv")
    bare = tmp_path / "bare"
    shutil.copytree(copy, bare)
    compileall.compile_dir(bare, quiet=1, legacy=True)
    for path in bare.rglob("*.py"):
        path.unlink()
    *whole, fault, file = python(copy, "-c", CALL + PARTS).splitlines()
    assert file == str(copy / "tritonconv" / "__init__.py") and fault == str(registry.triton_fault())
    assert "backward_weight_torch_native" in whole[0].split() and "roofline" in whole[1].split() and int(whole[2]) > 50

    *same, fault, file = python(bare, "-c", CALL + PARTS).splitlines()
    assert file == str(bare / "tritonconv" / "__init__.pyc") and same == whole
    assert fault.startswith("tritonconv is here without its sources") or not registry.have_triton()

    *same, fault, file = python(Path(zipped), "-c", CALL + PARTS).splitlines()
    assert file == f"{zipped}/tritonconv/__init__.py" and same == whole and fault == str(registry.triton_fault())


def test_a_kernel_runs_from_a_zip_file(copy, tmp_path):
    if not registry.have_triton():
        pytest.skip("needs Triton")
    zipped = shutil.make_archive(str(tmp_path / "package"), "zip", copy, "tritonconv")
    code = f"""{CALL}
warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, in the interpreter of Triton 3.6
with tritonconv.use("forward_shuffle"), torch.no_grad():
    y = tritonconv.conv_transpose3d(torch.ones(1, 2, 2, 2, 2), torch.ones(2, 3, 2, 2, 2), None, 2)
print(*y.unique().tolist(), tritonconv.__file__)
"""
    out = python(Path(zipped), "-c", code, TRITON_INTERPRET="1")
    assert out == f"2.0 {zipped}/tritonconv/__init__.py\n"


# Planning for a GPU that is not there: as much of torch.cuda as that asks for.
ON_A_GPU = """
import contextlib, warnings, torch
from types import SimpleNamespace
torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
torch.cuda.get_device_name, torch.cuda.get_device_capability = lambda device=None: "a GPU", lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
    name="a GPU", major=9, minor=0, multi_processor_count=132)
torch.cuda.device = lambda device: contextlib.nullcontext()
import tritonconv
from tritonconv import dispatch, explain
problem = tritonconv.Problem(1, 16, 16, (8, 8, 8), (2, 2, 2), (2, 2, 2), (0, 0, 0), (16, 16, 16), dtype=torch.float16)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(3):
        dispatch.forget()
        chosen = dispatch.plan(problem, torch.device("cuda", 0)).choice("forward")
print(chosen.variant.backend, *(f"{each.category.__name__}: {each.message}" for each in told))
try:
    with tritonconv.use("forward_shuffle"):
        dispatch.plan(problem, torch.device("cuda", 0)).choice("forward")
except tritonconv.VariantNotApplicable as error:
    print(error)
"""


@pytest.mark.skipif(not registry.have_triton(), reason="needs Triton")
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CC": "/no/such/compiler"}, "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/compiler'"),
        ({"CC": "/bin/false"}, "CalledProcessError: "),  # no headers, no libcuda
        ({"PATH": "/no/such/folder"}, "Failed to find C compiler"),
        ({"TRITON_CACHE_DIR": "{file}/cache"}, "NotADirectoryError: [Errno 20] Not a directory: '{file}/cache'"),
    ],
    ids=["no such compiler", "the compiler fails", "no compiler", "no cache"],
)
def test_a_gpu_that_triton_cannot_launch_on_runs_torchs_own_and_warns_once(tmp_path, variables, said):
    file = tmp_path / "file"
    file.touch()
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    given = {name: value.format(file=file) for name, value in variables.items()}
    environment = {name: value for name, value in os.environ.items() if name != "CC"}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU], env={**environment, "PYTHONPATH": str(ROOT), **own, **given},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    planned, forced = done.stdout.splitlines()
    assert planned.startswith(
        "torch KernelWarning: Triton cannot build its driver for the GPU, which takes a C compiler"
    )
    assert planned.count("KernelWarning") == 1 and said.format(file=file) in planned
    assert forced.startswith("forward_shuffle was forced but does not serve ") and said.format(file=file) in forced
