"""The layout of the repository, the layering of its modules, the wheel, and the import on a bare machine."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tritonconv"
LINKED = ("kernels", "autotune", "plots")
TOP_LEVEL = {"pyproject.toml", "tritonconv", "kernels", "autotune", "tests", "plots", "README.md"}
BESIDE = {"Makefile", "LICENSE", "constraints.txt"}

# Lower never imports higher; modules of one layer may import each other. A module belongs to the longest name here that
# begins its own.
LAYERS = (
    ("errors", "switches", "registries", "symbolic", "private", "precision", "bounded"),
    ("problem", "device", "epilogue"),
    ("arguments",),
    ("kernels",),
    ("autotune",),
    ("fallback",),
    ("forced", "plan", "trial_plan", "epilogue_forward"),
    ("dispatch",),
    ("autograd", "operators", "guards", "autocast"),
    (
        "epilogue_road",
        "out_argument",
        "distributed.slabs",
        "distributed.halo",
        "distributed.agreement",
        "distributed.passes",
        "distributed.call",
        "distributed.dtensor_call",
    ),
    ("functional", "explain"),
    (
        "layer",
        "fused_layer",
        "fusion",
        "folding",
        "chains",
        "matlab",
        "convert",
        "graphed",
        "concatenation",
        "decoders",
        "distributed",
    ),
    # The wall: from here on what measures, which no call imports.
    ("lab.flags", "lab.markdown", "lab.text_table"),
    ("lab.bench", "lab.inspection"),
    ("autotune.tuning", "lab.profiling", "lab.models"),
    ("lab.verification", "lab.campaign", "lab.predictions"),
    ("lab.commands", "lab.cli"),
    ("", "__main__"),  # the package itself
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
WALL = RANK["lab.flags"]
MOST_ARGUMENTS, MOST_UNNAMED = 30, 6  # of a device function; of a call of one
HELPERS = ("sum_partials_kernel", "transpose_kernel")  # without a product
MODULES = 50  # of the product that the import loads
# The plots read results files: of the project they see the reader and the errors.
PLOTS_SEE = {"plots", "errors", *(f"lab.{name}" for name in (
    "markdown", "text_table",
    "bench.results", "bench.standings", "bench.counters", "bench.columns", "bench.noise"))}  # fmt: skip


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.split() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]


def sources() -> list[Path]:
    files = [path for path in PACKAGE.rglob("*.py") if not any(part in LINKED for part in path.parts[-2:-1])]
    return sorted(files + [path for name in LINKED for path in (ROOT / name).rglob("*.py")])


def module_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else path.relative_to(ROOT)
    return ".".join(relative.with_suffix("").parts)


def project_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("tritonconv.") for name in found if name.startswith("tritonconv.")}


def test_the_top_level_is_the_agreed_one():
    top = {name.split("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL | BESIDE
    assert top >= TOP_LEVEL | BESIDE


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders_are_relative_links_without_an_init(name):
    link = PACKAGE / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert not (ROOT / name / "__init__.py").exists()


def within(module: str, names: Iterable[str]) -> str:
    """The longest of the names that is the module or a package around it, "" where none is: then the package itself."""
    return max((name for name in names if f"{module}.".startswith(f"{name}.")), key=len, default="")


def test_lower_layers_do_not_import_higher_ones():
    wrong = []
    for path in sources():
        module = module_of(path)
        own = within(module, RANK)
        for name in project_imports(path):
            other = within(name, RANK)
            if module.startswith("plots."):
                allowed = within(name, PLOTS_SEE) != ""
            elif name.startswith("plots"):
                allowed = own == "lab.commands"  # only the command line draws
            else:
                allowed = RANK[other] <= RANK[own]
            if not allowed:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_no_imports_go_in_a_circle():
    """Those inside functions count too: a circle that is hidden is one all the same."""
    modules = {module_of(path): path for path in sources()}
    graph = {
        module: {name if name in modules else name.rpartition(".")[0] for name in project_imports(path)} & set(modules)
        for module, path in modules.items()
    }
    tuple(TopologicalSorter({module: names - {module} for module, names in graph.items()}).static_order())


def test_the_import_loads_the_product_alone():
    """A call and its import load nothing that measures; the tuner comes when it is asked for."""
    code = """
import sys, torch, tritonconv
print(*(name for name in sys.modules if name.startswith("tritonconv.")))
tritonconv.ConvTranspose3d(2, 2, 2, stride=2)(torch.ones(1, 2, 2, 2, 2, requires_grad=True)).sum().backward()
print(*(name for name in sys.modules if name.startswith("tritonconv.")))
print("triton" in sys.modules)  # no kernel is wanted on a CPU
print(tritonconv.tune.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported, called, triton, tuner = done.stdout.splitlines()
    behind = [name for name in called.split() if RANK[within(name.removeprefix("tritonconv."), RANK)] >= WALL]
    assert behind == [] and triton == "False" and tuner == "tune"
    assert len(imported.split()) <= MODULES


def test_a_file_is_a_room():
    long = {path.name: lines for path in [*sources(), *sorted((ROOT / "tests").glob("*.py"))]
            if (lines := len(path.read_text().splitlines())) > 350}  # fmt: skip
    assert long == {}


def device_functions() -> list[ast.FunctionDef]:
    return [
        node
        for path in sorted((ROOT / "kernels").glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
    ]


def constants_functions() -> set[str]:
    """The names of those that a device function calls while it is compiled."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "kernels").glob("*.py"))
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)
            and any("constexpr_function" in ast.unparse(each) for each in node.decorator_list)}  # fmt: skip


def test_a_device_function_takes_at_most_thirty_arguments_and_an_entry_kernel_says_what_a_program_owns():
    """An entry kernel is a jit function that a launch names: *_kernel."""
    functions = device_functions()
    counts = {each.name: len(each.args.posonlyargs + each.args.args + each.args.kwonlyargs) for each in functions}
    assert {name: count for name, count in counts.items() if count > MOST_ARGUMENTS} == {}
    entries = [each for each in functions if each.name.endswith("_kernel")]
    assert len(entries) >= len(list((ROOT / "kernels").glob("*ward_*.py")))
    words = ("program", "own", "rows", "columns", "depth")
    said = {each.name: (ast.get_docstring(each) or "").lower() for each in entries if each.name not in HELPERS}
    assert {name: text for name, text in said.items() if not all(word in text for word in words)} == {}


def test_a_device_call_names_its_arguments_from_the_seventh_on():
    functions = device_functions()
    names = {each.name for each in functions} | constants_functions()
    calls = [(each.name, call) for each in functions for call in ast.walk(each) if isinstance(call, ast.Call)]
    found = [
        (name, ast.unparse(call))
        for name, call in calls
        if isinstance(call.func, ast.Name) and call.func.id in names and len(call.args) > MOST_UNNAMED
    ]
    assert found == []


def test_one_name_for_one_thing():
    """No two classes, and no two modules beside the commands and the faces, share a name."""
    places: dict[str, list[str]] = {}
    for path in sources():
        module = module_of(path)
        if within(module, ("lab.commands", "matlab")) == "" and path.stem != "__init__":
            places.setdefault(f"{path.stem}.py", []).append(module)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_no_sentence_begins_with_what():
    """Prose is read once: a subject, a verb, an object."""
    files = [*sources(), *(ROOT / name for name in tracked() if name.endswith(".md")), *(ROOT / "tests").glob("*.py")]
    sentence = re.compile(r"(?:^|[.:#;]\s+|\"\"\")What\s+[^?\n]*$", re.MULTILINE)
    assert {path.name: found for path in files if (found := sentence.findall(path.read_text(encoding="utf-8")))} == {}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    clone = folder / "clone"  # built in a copy: a build leaves folders behind
    for name in tracked():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name, follow_symlinks=False)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(clone)], check=True, cwd=folder)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.xdist_group("wheel")
def test_the_wheel_holds_only_the_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tritonconv"}


@pytest.mark.xdist_group("wheel")
def test_the_wheel_holds_every_module_and_data_file(wheel):
    names = set(wheel.namelist())
    wanted = {f"tritonconv/{module_of(path).replace('.', '/')}.py" for path in sources()}
    wanted |= {f"tritonconv/{path.relative_to(PACKAGE)}" for path in (PACKAGE / "data").glob("*.json")}
    for folder in LINKED:
        wanted |= {f"tritonconv/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.json")}
    assert wanted - names == set()


def bare_python(code: str) -> str:
    script = textwrap.dedent(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_without_a_gpu_and_without_triton():
    out = bare_python(
        """
        import sys
        sys.modules["triton"] = None  # what an absent package looks like to an import
        import torch, tritonconv
        y = tritonconv.ConvTranspose3d(2, 3, 2, stride=2)(torch.ones(1, 2, 2, 2, 2))
        print(tuple(y.shape), {v.backend for v in tritonconv.variants()})
        """
    )
    assert out.strip() == "(1, 3, 4, 4, 4) {'torch'}"


def test_the_import_stays_light():
    heavy = ["matplotlib", "rich", "onnx", "torch._dynamo", "torch._inductor"]
    out = bare_python(f"import sys, tritonconv; print([n for n in {heavy} if n in sys.modules])")
    assert out.strip() == "[]"


def test_variants_list_themselves_by_file():
    from tritonconv.kernels import registry

    listed = {record.name: record for record in registry.variants()}
    assert set(listed) == {*registry._torchs(), *(registry._kernels() if registry.have_triton() else ())}
    for name, record in listed.items():
        assert record.backend == "torch" or record.deterministic, name
        stem = (record.launch or record.launches).__module__.rpartition(".")[2]
        idea = name.removeprefix(f"{record.pass_name}_")
        assert stem == (idea if record.backend == "torch" else registry._kernels()[name])
