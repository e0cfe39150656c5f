"""The Python of the README runs as it stands, from top to bottom, each block after those before it."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

import tritonconv
from tritonconv import dispatch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_each_block_of_the_readme_runs(capsys, monkeypatch, tmp_path):
    pytest.importorskip("triton")  # a block forces Triton kernels
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # What stands before the record in a variant's file.
    names = {"Variant": tritonconv.Variant, "launch": lambda *operands: None, "supports": lambda *asked: None}
    for block in BLOCKS:
        exec(compile(block, README.name, "exec"), names)
        for shape in re.findall(r"^y = .*# (\([\d, ]+\))", block, re.MULTILINE):
            assert str(tuple(names["y"].shape)) == shape
    dispatch.forget()
    said = capsys.readouterr().out
    assert "1 replaced, 0 left" in said and "FilterSize" in said and "tuned on" in said
    assert names["VARIANT"].name == "forward_torch_mine"
