"""The documentation: its Python runs as it stands, each block after those before it, and its links lead somewhere."""

from __future__ import annotations

import ast
import re
import tempfile
from pathlib import Path

import pytest

import tritonconv
from tritonconv import dispatch
from tritonconv.lab import markdown
from tritonconv.lab.bench import results
from tritonconv.lab.bench.standings import standings

ROOT = Path(__file__).parents[1]
READMES = [ROOT / name for name in ("README.md", "autotune/README.md", "kernels/README.md", "plots/README.md",
                                    "tritonconv/README.md", "plots/examples/README.md")]  # fmt: skip
TEXTS = {path: path.read_text(encoding="utf-8") for path in READMES}


def test_every_link_leads_to_a_file():
    links = [
        (path, link)
        for path, text in TEXTS.items()
        for link in re.findall(r"\]\(([^)#:]+)[)#]", text) + re.findall(r'src="([^"]+)"', text)
    ]
    assert [(str(path), link) for path, link in links if not list(path.parent.glob(link))] == []


def test_every_compile_time_argument_of_a_convolution_kernel_is_explained():
    """By name in kernels/README.md or in the kernel's docstring; so is each key of a config that a kernel reads."""
    text, unexplained = TEXTS[ROOT / "kernels/README.md"], set()
    entries = [
        node
        for path in (ROOT / "kernels").glob("*ward_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    ]
    for kernel in entries:
        names = {each.arg for each in kernel.args.args if each.annotation is not None}
        names |= {
            each.attr
            for each in ast.walk(kernel)
            if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "CONFIG"
        }
        said = set(re.findall(r"\w+", text + (ast.get_docstring(kernel) or "")))
        unexplained |= {(kernel.name, name) for name in names - said}
    assert len(entries) >= 27 and unexplained == set()


def test_each_block_of_python_runs(capsys, monkeypatch, tmp_path):
    pytest.importorskip("triton")  # a block forces Triton kernels
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Names that a variant's file has before its record.
    names = {"Variant": tritonconv.Variant, "launch": lambda *operands: None, "supports": lambda *asked: None}
    blocks = [
        block
        for text in TEXTS.values()
        for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        for shape in re.findall(r"^y = .*# (\([\d, ]+\))", block, re.MULTILINE):
            assert str(tuple(names["y"].shape)) == shape
    dispatch.forget()
    said = capsys.readouterr().out
    assert "1 replaced, 0 left" in said and "FilterSize" in said and "tuned on" in said
    assert names["VARIANT"].name == "forward_torch_mine"


def test_every_figure_of_the_readme_is_made_from_the_committed_rows():
    """The command for it stands in the README: ``tritonconv report ... --readme README.md``."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    from tritonconv.plots import headline, readme

    text = TEXTS[ROOT / "README.md"]
    (command,) = re.findall(r"^tritonconv report (.*) --readme README\.md$", text, re.MULTILINE)
    runs = [results.load(ROOT / name) for name in command.split()]
    before, between, after = markdown.parts(ROOT / "README.md", readme.COMMAND)
    picture = ROOT / command.split()[0] / readme.PICTURE
    assert between.strip() == readme.text(runs, picture.relative_to(ROOT).as_posix())
    with Image.open(picture) as image:
        assert image.info["Description"] == headline.digest(runs[0]) and image.width <= 1000
    # Elsewhere the only numbers with a point are the versions that are served.
    by_hand = re.sub(r"^```.*?^```", "", before + after, flags=re.DOTALL | re.MULTILINE)
    versions = set(re.findall(r"\d+\.\d+", (ROOT / "pyproject.toml").read_text())) | {"3.11"}  # of a fresh machine
    assert set(re.findall(r"\d+\.\d+", by_hand)) <= versions and "%" not in by_hand
    assert len(text.splitlines()) <= 150


def test_the_tables_of_each_device_are_those_of_its_rows():
    """``tritonconv report plots/examples/DEVICE --markdown FILE``, with every layer beside the rows."""
    pytest.importorskip("matplotlib")
    from tritonconv.plots import section

    for folder in {path.parent for path in (ROOT / "plots" / "examples").glob("*/*.jsonl")}:
        run = results.load(folder)
        ranked = standings(run.of_models())
        for name, every_layer in (("plots/README.md", False), ("plots/examples/README.md", True)):
            body = section.section(run, ranked, every_layer).strip()
            assert f"### {run.environment['device_name']}\n\n{body}\n\n" in TEXTS[ROOT / name]
