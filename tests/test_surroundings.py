"""The user's surroundings: pictures have our style, folders are checked first, narrow encodings, shared stores."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import first_example
import pytest
import torch

from tritonconv.autotune import store
from tritonconv.autotune.tuning import journal
from tritonconv.errors import StoreError
from tritonconv.lab import cli
from tritonconv.lab.bench import roofs, runner
from tritonconv.lab.commands import tune

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = next(path for path in sorted((ROOT / "plots" / "examples").rglob("*.jsonl")) if not path.is_symlink())
CPU = torch.device("cpu")
PROBLEM = ("--x", "1x8x3x4x5", "--weight", "8x8x2x2x2", "--stride", "2", "--quiet")


def command(*arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own; a variable that is "" is not set."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    line = [sys.executable, "-m", "tritonconv", *map(str, arguments)]
    return subprocess.run(line, cwd=folder, env={name: value for name, value in whole.items() if value},
                          capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)  # fmt: skip


# ------------------------------------------------------------------ pictures


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> bytes:
    """The chart without anything of a user's."""
    folder = tmp_path_factory.mktemp("plain")
    done = command("report", EXAMPLE, "--charts", "speedup", "--output", folder, folder=folder, MPLBACKEND="")
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.svg")).read_bytes()


# One process with all of it: each by itself changes the picture, or ends in a traceback, where it is heeded.
STYLE = """
text.usetex: True
font.size: 30
axes.grid: True
lines.linewidth: 9
savefig.bbox: tight
savefig.dpi: 3
backend: nowhere
"""


@pytest.mark.xdist_group("pictures")
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "tkagg"])
def test_the_backend_of_a_notebook_is_of_no_account(tmp_path, plain, backend):
    arguments = ("report", EXAMPLE, "--charts", "speedup", "--output", tmp_path)
    done = command(*arguments, folder=tmp_path, MPLBACKEND=backend)
    assert (done.returncode, done.stderr) == (0, "")
    assert next(tmp_path.glob("*.svg")).read_bytes() == plain


@pytest.mark.xdist_group("pictures")
def test_a_users_style_is_of_no_account(tmp_path, plain):
    (tmp_path / "matplotlibrc").write_text(STYLE, encoding="latin-1")
    arguments = ("report", EXAMPLE, "--charts", "speedup", "--output", tmp_path / "out")
    done = command(*arguments, folder=tmp_path, MATPLOTLIBRC=str(tmp_path / "matplotlibrc"), MPLBACKEND="")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert next((tmp_path / "out").glob("*.svg")).read_bytes() == plain


def test_a_style_file_that_cannot_be_read_is_told_in_a_line(tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"# \xe9\n")
    done = command("report", EXAMPLE, "--output", tmp_path / "out", folder=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "matplotlib cannot be imported" in done.stderr and "matplotlibrc" in done.stderr


# ------------------------------------------------------------------ encodings


class Streams:
    """The standard streams of an encoding, in this process; ``text`` is what was written into both."""

    def __init__(self, encoding: str, monkeypatch) -> None:
        self.bytes, self.encoding = io.BytesIO(), encoding
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(self.bytes, encoding, write_through=True))

    @property
    def text(self) -> str:
        return self.bytes.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("report", "αβ/ü.jsonl", "--charts", "speedup"),
        ("report", "αβ/none.jsonl"),
        ("bench", "--help"),
        ("list",),
        ("bench", "--only", "αβ"),
    ],
)
def test_a_narrow_encoding_ends_in_no_traceback(tmp_path, monkeypatch, encoding, arguments):
    (tmp_path / "αβ").mkdir()
    (tmp_path / "αβ" / "ü.jsonl").write_bytes(EXAMPLE.read_bytes())
    monkeypatch.chdir(tmp_path)
    streams = Streams(encoding, monkeypatch)
    try:
        code = cli.main(arguments)
    except SystemExit as end:  # of --help
        code = end.code
    told = "αβ" if encoding == "utf-8" else "\\u03b1\\u03b2"
    assert code in (0, 2) and (told in streams.text or "αβ" not in str(arguments)), streams.text


def test_the_encoding_of_the_environment_ends_in_no_traceback(tmp_path):
    done = command("report", "αβ/none.jsonl", folder=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and "\\u03b1\\u03b2" in done.stderr and "Traceback" not in done.stderr


def test_the_locale_c_ends_in_no_traceback(tmp_path):
    (tmp_path / "αβ.jsonl").write_bytes(EXAMPLE.read_bytes())
    c = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = command("report", "αβ.jsonl", "--charts", "speedup", folder=tmp_path, **c)
    assert (done.returncode, done.stderr) == (0, "") and len(list(tmp_path.glob("*.png"))) == 1


# ------------------------------------------------------------------ folders


@pytest.fixture
def no_measurement(monkeypatch):
    def measured(*args, **how):
        raise AssertionError("measured before the folders were checked")

    monkeypatch.setattr(roofs, "measure", measured)
    monkeypatch.setattr(runner._Bench, "run", measured)
    monkeypatch.setattr(tune, "Session", measured)
    monkeypatch.setattr("tritonconv.lab.commands.campaign.Campaign", measured)


COMMANDS = {
    "tune": ("tune", *PROBLEM),
    "roofs": ("bench", "--roofs"),
    "campaign": ("campaign", "--seconds", "9", "--only", "vnet_up3", "--quiet", "--output", "out"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", ["a file", "no home"])
def test_a_store_that_cannot_be_written_is_told_in_a_line_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, no_measurement, name, kind
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITONCONV_CACHE", str(tmp_path / "file" / "store") if kind == "a file" else "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if kind == "no home":
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    assert cli.main(COMMANDS[name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "TRITONCONV_CACHE" in line and len(line) < 1000
    assert not (tmp_path / "results").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("tune", *PROBLEM),
        ("bench", "--roofs"),
        ("bench", "--overhead"),
        ("bench", "--only", "vnet_up3", "--quiet"),
        COMMANDS["campaign"][:-2],
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path, capsys, monkeypatch, own_store, arguments
):
    monkeypatch.setattr(roofs, "measure", lambda *args: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert cli.main([*arguments, "--output", str(tmp_path / "file" / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--output" in line or "out/store" in line


# ------------------------------------------------------------------ stores of several users


TIMING = journal.Timing("p", "forward", "forward_torch_native", {}, "s", "screen", {}, message="no", status="failed")


@pytest.mark.parametrize(("folder_mode", "wanted"), [(0o2775, 0o664), (0o777, 0o666), (0o755, 0o644), (0o700, 0o600)])
def test_the_files_of_a_store_may_be_written_by_who_may_write_into_its_folder(tmp_path, folder_mode, wanted):
    folder = tmp_path / "store"
    folder.mkdir()
    folder.chmod(folder_mode)
    before = os.umask(0o022)
    try:
        for _ in range(2):
            store.merge(store.Table("device"), folder)
            journal.Journal.open("device", folder).add(TIMING)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert len(modes) >= 2 and set(modes.values()) == {wanted}, modes


WRITE = """
import os, sys
from pathlib import Path
import filelock, filelock._unix, filelock._soft
from tritonconv.autotune import store
from tritonconv.autotune.tuning import journal
os.setgroups([]); os.setgid({gid}); os.setuid({uid}); os.umask(0o022)  # who need not see the environment's packages
store.merge(store.Table("device", ceilings={{"by{uid}": 1}}), Path({folder!r}))
status = "failed"
timing = journal.Timing("p{uid}", "forward", "v", {{}}, "s", "screen", {{}}, message="no", status=status)
journal.Journal.open("device", Path({folder!r})).add(timing)
print(len(journal.Journal.open("device", Path({folder!r})).timings))
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be two users")
def test_two_users_of_one_store_both_write(tmp_path_factory):
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(place) / "store"
        folder.mkdir()
        os.chown(folder, 0, 4242)
        folder.chmod(0o2775)
        counts = []
        for uid in (54321, 54322, 54321):
            code = WRITE.format(gid=4242, uid=uid, folder=str(folder))
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
                                  env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HOME": place})  # fmt: skip
            assert done.returncode == 0, done.stderr
            counts.append(done.stdout.strip())
        assert counts == ["1", "2", "2"]


def test_a_file_system_without_locks_has_a_file_for_one(tmp_path, monkeypatch):
    import filelock

    def acquire(self, *args, **how):
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    store.merge(store.Table("device"), tmp_path)
    path = store.path_of("device", tmp_path)
    assert path.is_file() and not Path(f"{path}.held").exists()
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.1)
    Path(f"{path}.held").write_text("")
    with pytest.raises(StoreError, match=r"\.held was held by another process"):
        store.merge(store.Table("device"), tmp_path)


# ------------------------------------------------------------------ the first example


@pytest.mark.parametrize("name", first_example.SURROUNDINGS)
def test_the_first_example_runs(tmp_path, name):
    try:
        done = first_example.run(sys.executable, name, tmp_path)
    finally:
        for path in (tmp_path, *tmp_path.rglob("*")):  # for pytest, which takes the folder away
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert "1 replaced, 0 left" in done.stdout and done.stdout.splitlines()[-1] == "(1, 32, 32, 32, 32)"
