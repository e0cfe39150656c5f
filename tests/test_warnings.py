"""In a test a warning is an error; what a plugin of pytest warns of while it is set up is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PLUGIN = """
import warnings

warnings.warn("at its import")

def pytest_configure(config):
    warnings.warn("while it is set up")

def pytest_sessionfinish(session):
    warnings.warn("at the end")

def pytest_terminal_summary(terminalreporter):
    warnings.warn("in the summary")
"""
SAMPLE = """
import warnings
import pytest

def test_silent():
    pass

def test_that_warns():
    warnings.warn("in a test")

def test_of_what_will_be_deprecated():
    warnings.warn("in a test", DeprecationWarning)

@pytest.mark.filterwarnings("ignore:in a test")
def test_with_a_filter_of_its_own():
    warnings.warn("in a test")

@pytest.mark.filterwarnings("error")
def test_with_a_stricter_one():
    warnings.warn("in a test", DeprecationWarning)
"""


@pytest.mark.parametrize(
    ("options", "failed"),
    [((), {"test_that_warns", "test_with_a_stricter_one"}), (("-W", "ignore"), {"test_with_a_stricter_one"})],
    ids=["as it is", "the command line ignores warnings"],
)
def test_what_is_an_error(options, failed, tmp_path):
    (tmp_path / "a_plugin_that_warns.py").write_text(PLUGIN)
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    code = (
        f"import sys, pytest; sys.path[:0] = {[str(tmp_path), str(TESTS), str(TESTS.parent)]}; sys.exit(pytest.main())"
    )
    named = ("-c", TESTS.parent / "pyproject.toml", "-p", "conftest", "-p", "a_plugin_that_warns", "-rA", *options)
    command = [sys.executable, "-c", code, *map(str, named), "-p", "no:cacheprovider", str(tmp_path / "test_sample.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    said = [line.split() for line in done.stdout.splitlines()]
    names = {
        outcome: {words[1].split("::")[-1] for words in said if words[:1] == [outcome]}
        for outcome in ("PASSED", "FAILED")
    }
    assert names["FAILED"] == failed, done.stdout + done.stderr
    assert len(names["PASSED"]) == 5 - len(failed)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
