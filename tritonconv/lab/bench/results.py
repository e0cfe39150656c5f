"""Results files: JSON Lines, one file per run, and the one reader that plots and summaries share.

The first row is the environment; then roofs, results, skips and errors as they are finished; the last row says how
the run ended. Each row is written, flushed and synced at once, so whatever stops a run, the finished rows stay.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from tritonconv.errors import ResultsError
from tritonconv.kernels.registry import renamed
from tritonconv.lab.bench.schema import SCHEMA, check

LATEST = "latest.jsonl"
PREFIX, CAMPAIGN, PROFILE, MODEL, KERNELBENCH = "bench-", "campaign-", "profile-", "model-", "kernelbench-"
NAME = re.compile(r"[a-z]+-\d{8}T\d{6}Z-[0-9a-f]+\.jsonl$")
# Rows that agree in these are about the same thing.
SAME = ("layer", "pass", "dtype", "layout", "variant", "config", "stage", "launch")
OF_MODEL = ("model", "inputs", "dtype", "layout")  # the same of rows about a whole model, with "variant"
# Of rows about whole models among those of other runs: the run that made them, its commit and threads.
OF_RUN = "of_run"
BESIDE = (PROFILE, MODEL, KERNELBENCH)  # runs that are shown beside the layers of another
# The lists of a run whose rows are about a layer, a pass, a dtype and a layout.
OF_LAYERS = ("results", "nulls", "timings", "tuned", "overheads", "profiles", "checks")
BASELINE, OURS, COMPILED, OURS_COMPILED = "torch", "tritonconv", "torch_compile", "tritonconv_compile"


class Writer:
    """Writes one run into a new file of ``folder``; a context manager.

    ``latest.jsonl`` points at it from its first row on, and a file without one does not stay. Never overwrites. Raises
    ResultsError where the folder or the file cannot be made.
    """

    def __init__(self, folder: Path, prefix: str = PREFIX) -> None:
        now = datetime.now(timezone.utc)
        # The microsecond in hexadecimal keeps runs of one second in order.
        self.run = f"{prefix}{now:%Y%m%dT%H%M%SZ}-{now.microsecond:05x}{secrets.token_hex(1)}"
        self.path = folder / f"{self.run}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("x", encoding="utf-8")
        except OSError as error:
            raise ResultsError(f"argument --output: cannot write results into {folder}: {error}") from None
        self._rows = 0
        self.environment: dict[str, object] = {}
        self.end: dict[str, object] = {"reason": "complete"}

    def _point_latest(self) -> None:
        folder = self.path.parent
        pointer, new = folder / LATEST, folder / f".{self.run}.link"
        try:
            new.symlink_to(self.path.name)
            os.replace(new, pointer)
        except OSError:  # no symlinks here: latest() then goes by the name, which carries the time
            new.unlink(missing_ok=True)

    def write(self, kind: str, row: Mapping[str, object]) -> dict[str, object]:
        """Appends one row and returns it. Raises ValueError for a number that JSON cannot hold."""
        record = {"kind": kind, **row}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._rows += 1
        if self._rows == 1 and not self.run.startswith(PROFILE):  # which goes with the run that it is about
            self._point_latest()
        return record

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if not self._rows:
            self.path.unlink(missing_ok=True)


@dataclass
class Run:
    """A results file in memory; every row is the dict of its line."""

    path: Path
    environment: dict
    roofs: list[dict] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)
    nulls: list[dict] = field(default_factory=list)
    timings: list[dict] = field(default_factory=list)
    tuned: list[dict] = field(default_factory=list)
    overheads: list[dict] = field(default_factory=list)
    slabs: list[dict] = field(default_factory=list)
    profiles: list[dict] = field(default_factory=list)
    checks: list[dict] = field(default_factory=list)
    operations: list[dict] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    problems: list[dict] = field(default_factory=list)
    skips: list[dict] = field(default_factory=list)
    errors: list[dict] = field(default_factory=list)
    end: dict | None = None
    warnings: list[str] = field(default_factory=list)
    selection: tuple[str, ...] = ()  # the values that :meth:`only` was asked for

    @property
    def run(self) -> str:
        return self.environment["run"]

    @property
    def disturbance(self) -> str | None:
        """A sentence where other programs kept more than a twentieth of the cores busy while results were taken."""
        seen = [row["other_cores"] for row in self.results if isinstance(row.get("other_cores"), (int, float))]
        cores = self.environment.get("cores")
        if not seen or not cores or sum(seen) / len(seen) < 0.05 * cores:
            return None
        busy = f"{sum(seen) / len(seen):.2g} of {cores} cores"
        return f"Other programs kept {busy} busy during the measurements, which disturbs them."

    def only(self, **values: str | None) -> Run:
        """The run with only those rows of layers whose fields have these values, as ``layout="ncdhw"``; None is any.

        Raises ResultsError for a value that no row has.
        """
        wanted = {key: value for key, value in values.items() if value is not None}
        rows = [*self.results, *self.timings, *self.overheads]
        for key, value in wanted.items():
            known = dict.fromkeys(row[key] for row in rows)
            if value not in known:
                raise ResultsError(f"--{key} {value!r}: {self.path} has rows for {', '.join(known) or 'no layer'} only")
        kinds: dict[str, Any] = {
            kind: [row for row in getattr(self, kind) if all(row[key] == value for key, value in wanted.items())]
            for kind in OF_LAYERS
        }
        return replace(self, selection=tuple(wanted.values()), **kinds)

    def of_models(self) -> list[dict]:
        """The results of plain layers, without those at sizes that no model has (``--sizes``)."""
        return [row for row in self.results if not row.get("family") and not row.get("epilogue")]

    def of_stages(self) -> list[dict]:
        """The results of layers with an epilogue, in the order of the file."""
        return [row for row in self.results if row.get("epilogue")]

    def values(self, key: str) -> list[str]:
        """The distinct values of a field of the results, in the order of the file."""
        return list(dict.fromkeys(row[key] for row in self.results))


def latest(folder: Path) -> Path:
    """The newest results file of a folder, profiles apart. Raises ResultsError where there is none."""
    pointer = folder / LATEST
    if pointer.exists():
        return pointer.resolve()
    paths = files(folder)
    return next((path for path in reversed(paths) if not path.name.startswith(PROFILE)), paths[-1])


def load(path: Path) -> Run:
    """A results file; of a folder the newest, or all parts of a campaign as one (:func:`merged`), with its profiles,
    the whole models of its device and the whole problems of KernelBench.

    The environment is that of the newest file that is none of these, where there is one.
    """
    if path.is_file() or path.suffix == ".jsonl":
        return read(path)
    newest = read(latest(path))
    paths = written(path, CAMPAIGN) if newest.path.name.startswith(CAMPAIGN) else []
    runs = list(map(read, paths)) or [newest]
    device = runs[-1].environment["device_name"]
    beside = [_beside(run) for kind in BESIDE for run in map(read, written(path, kind))
              if run.environment["device_name"] == device and run.path != newest.path]  # fmt: skip
    # It too goes with the newest of the layers, unless it has layers of its own.
    if newest.path.name.startswith((MODEL, KERNELBENCH)) and not newest.results:
        layers = [each for each in written(path) if not each.name.startswith(BESIDE)]
        of_layers = [run for run in map(read, layers[-1:]) if run.environment["device_name"] == device]
        beside, runs = ([*beside, _beside(newest)], of_layers) if of_layers else (beside, runs)
    return merged([*beside, *runs]) if beside or len(runs) > 1 else runs[0]


def _beside(run: Run) -> Run:
    """The rows that a run adds to the layers of another: of KernelBench the whole problems alone, for its layers are
    timed as it defines them."""
    if not run.path.name.startswith(KERNELBENCH):
        return run
    skips, errors = ([row for row in rows if "model" in row] for rows in (run.skips, run.errors))
    return Run(run.path, run.environment, problems=run.problems, skips=skips, errors=errors)


def files(folder: Path) -> list[Path]:
    """The results files of a folder, oldest first. Raises ResultsError for none."""
    paths = written(folder)
    if not paths:
        raise ResultsError(f"results: no results file in {folder.resolve()}; run tritonconv bench, or name a file")
    return paths


def written(folder: Path, prefix: str = "") -> list[Path]:
    """The files of a folder with rows in them whose names begin so, oldest first: the name carries the time.

    One that is empty is of a run that was killed before its first row.
    """
    named = [path for path in folder.glob(f"{prefix}*.jsonl") if NAME.match(path.name) and not path.is_symlink()]
    return sorted((path for path in named if path.stat().st_size), key=lambda path: path.name.split("-", 1)[1])


def merged(runs: Sequence[Run]) -> Run:
    """Runs of one device as one, given oldest first: the newest environment, and of rows about the same the newest.

    Results whose first column is none of the newest run's are left out with a warning: times of one column are not to
    be held against those of another. Raises ResultsError for runs of different devices.
    """
    devices = sorted({run.environment["device_name"] for run in runs})
    if len(devices) != 1:
        raise ResultsError(f"results: one device at a time, got {', '.join(devices) or 'no run'}")
    whole = Run(runs[-1].path, runs[-1].environment, end=runs[-1].end)
    for kind in OF_LAYERS:
        rows = {json.dumps([row.get(key) for key in SAME]): row for run in runs for row in getattr(run, kind)}
        getattr(whole, kind).extend(rows.values())
    for kind in ("operations", "steps", "problems"):  # of a model those of its newest run
        models = {tuple(row[key] for key in OF_MODEL): run for run in runs for row in getattr(run, kind)}
        getattr(whole, kind).extend(row | {OF_RUN: _made(run)} for run in runs for row in getattr(run, kind)
                                    if models[tuple(row[key] for key in OF_MODEL)] is run)  # fmt: skip
    for kind in ("roofs", "slabs", "skips", "errors", "warnings"):
        getattr(whole, kind).extend(row for run in runs for row in getattr(run, kind))
    _one_way_of_timing(whole, next((run.results for run in reversed(runs) if run.results), []))
    return whole


def _made(run: Run) -> str:
    """A run, its commit and, of a CPU, its threads."""
    env = run.environment
    threads = f", {env['threads']} threads" if env["device"] == "cpu" else ""
    return f"{run.run} ({(env['commit'] or 'no commit')[:10]}{threads})"


def _one_way_of_timing(whole: Run, newest: Sequence[dict]) -> None:
    ways = {row.get("timing") for row in newest}
    left_out = [row for row in whole.results if row.get("timing") not in ways]
    if left_out:
        whole.results = [row for row in whole.results if row.get("timing") in ways]
        names = ", ".join(sorted({str(row.get("timing")) for row in left_out}))
        whole.warnings.append(
            f"{len(left_out)} results of earlier runs are left out, which were timed otherwise: {names}"
        )


def read(path: Path) -> Run:
    """Reads and checks a results file.

    A last line that was cut off while it was written is left out with a warning. Raises ResultsError, naming the file
    and the line, for anything else that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"results: cannot read {path}: {error}") from None
    run: Run | None = None
    cut_off: list[str] = []
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():  # an editor's, or of files that were put together
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if line.endswith("\n"):
                raise ResultsError(f"{path}:{number}: not JSON: {error}") from None
            cut_off.append(f"{path}:{number}: the last line was cut off and is left out")
            break
        try:
            run = _with_row(run, path, row)
        except ValueError as error:
            raise ResultsError(f"{path}:{number}: {error}") from None
    if run is None:
        raise ResultsError(f"{path}:1: expected an environment row, the file has no finished line")
    run.warnings += cut_off
    return run


def _of_today(row: dict) -> dict:
    """The row with the names and configs that its variants have today."""
    chosen, config = row.get("chosen", {}), row.get("config") or {}
    if "chosen" not in row and "variant" in row:
        row["variant"], config = renamed(row["variant"], config)
        row |= {"config": config} if "config" in row else {}
    for pass_name, name in chosen.items():
        chosen[pass_name], of_pass = renamed(name, config.get(pass_name, {}))
        config |= {pass_name: of_pass} if pass_name in config else {}
    return row


def _with_row(run: Run | None, path: Path, row: dict) -> Run:
    """The run with a row more, a new one of the first. Raises ValueError for a row that is wrong."""
    check(row)
    kind = row["kind"]
    if run is None:
        if kind != "environment":
            raise ValueError(f"expected an environment row first, got kind {kind!r}")
        if row["schema"] != SCHEMA:
            raise ValueError(f"schema expects {SCHEMA}, which this version reads, got {row['schema']!r}")
        return Run(path, row)
    if kind == "environment":
        raise ValueError("a second environment row; one file holds one run")
    if kind == "end":
        run.end = row
    else:
        getattr(run, kind if kind == "tuned" else f"{kind}s").append(_of_today(row))
    return run
