"""The documentation: its Python runs as it stands, each block after those before it, and its links lead somewhere."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

import tritonconv
from tritonconv import dispatch

ROOT = Path(__file__).parents[1]
READMES = [ROOT / name for name in ("README.md", "autotune/README.md", "kernels/README.md", "plots/README.md",
                                    "tritonconv/README.md", "plots/examples/README.md")]  # fmt: skip
TEXTS = {path: path.read_text(encoding="utf-8") for path in READMES}


def test_every_link_leads_to_a_file():
    links = [(path, link) for path, text in TEXTS.items() for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    assert [(str(path), link) for path, link in links if not list(path.parent.glob(link))] == []


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
