"""Every timing of the tuner, stored at once: what lets a tuning run that was killed go on where it was.

One JSON line per timing, beside the user's table of the device. A timing is used again only for exactly the same
problem, variant, config, revision and versions. A line that a kill cut short is skipped.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tritonconv.autotune.model import eager_ms
from tritonconv.autotune.store import locked, path_of, shared_mode
from tritonconv.errors import StoreError, StoreWarning
from tritonconv.kernels.registry import renamed

OK, WRONG, FAILED = "ok", "wrong", "failed"
SCREEN, FINAL = "screen", "final"  # stages
# In a results file.
MEASURED = ("median_ms", "p20_ms", "p80_ms", "n_runs", "speedup", "sm_mhz", "late_samples", "host_ms")


@dataclass(frozen=True)
class Timing:
    """One candidate on one problem. Times in ms; ``speedup`` over torch's own in the same rounds, None where torch
    cannot run the problem; a candidate that failed or was wrong has a message and no times."""

    problem: str
    pass_name: str
    variant: str
    config: Mapping[str, int]
    source: str
    stage: str
    versions: Mapping[str, str | None]
    status: str = OK
    message: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    n_runs: int = 0
    speedup: float | None = None
    torch_ms: float | None = None
    sm_mhz: float | None = None  # of a GPU's multiprocessors meanwhile
    late_samples: int = 0  # in which the host was too late, so that its time is in them
    host_ms: float | None = None  # for the call

    @property
    def identity(self) -> str:
        parts = (self.problem, self.pass_name, self.variant, self.config, self.source, self.stage, self.versions)
        return json.dumps(parts, sort_keys=True)

    @property
    def eager_ms(self) -> float:
        """The time of an eager call that ran (:func:`tritonconv.autotune.model.eager_ms`), as far as it is known."""
        return eager_ms(self.median_ms or 0.0, self.host_ms or 0.0)

    @property
    def row(self) -> dict[str, object]:
        """The fields of its row in a results file besides the problem's; the kind is ``timing`` where it is OK, else
        ``error``."""
        found: dict[str, object] = {"variant": self.variant, "config": dict(self.config), "stage": self.stage}
        names = MEASURED if self.status == OK else ("status", "message")
        return found | {name: getattr(self, name) for name in names}


@dataclass
class Journal:
    """The timings of one device by identity. ``folder`` None is the user's. Where the file cannot be read or written, a
    journal that need not be ``lasting`` holds its timings for this process alone."""

    device: str
    folder: Path | None = None
    lasting: bool = True
    timings: dict[str, Timing] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return path_of(self.device, self.folder).with_suffix(".timings.jsonl")

    @classmethod
    def open(cls, device: str, folder: Path | None = None, lasting: bool = True) -> Journal:
        """Reads what is there; lines that are no timings are left out with one warning.

        Raises StoreError where a lasting one cannot be read.
        """
        journal, bad = cls(device, folder, lasting), 0
        try:
            text = journal._text()
        except StoreError:
            if lasting:
                raise
            return journal
        for line in text.splitlines():
            timing = _timing(line)
            if timing is None:
                bad += bool(line.strip())
            else:
                journal.timings[timing.identity] = timing
        if bad:
            warnings.warn(f"tuner's timings: {journal.path}: {bad} damaged lines left out", StoreWarning, stacklevel=2)
        return journal

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise StoreError(f"cannot read {self.path}: {error}") from None

    def find(self, like: Timing) -> Timing | None:
        """The stored timing of what ``like`` names."""
        return self.timings.get(like.identity)

    def refuses(self, like: Timing) -> bool:
        """The candidate that ``like`` names was wrong or failed, and is not tried again."""
        known = self.find(like)
        return known is not None and known.status != OK

    def add(self, timing: Timing) -> None:
        """On disk when this returns. Raises StoreError where a lasting one cannot be written."""
        self.timings[timing.identity] = timing
        try:
            self._write(timing)
        except StoreError:
            if self.lasting:
                raise

    def _write(self, timing: Timing) -> None:
        line = json.dumps(asdict(timing), allow_nan=False) + "\n"
        with locked(self.path), self.path.open("ab") as file:
            if not file.tell():
                self.path.chmod(shared_mode(self.path))
            if file.tell() and not self._ends_a_line():
                line = "\n" + line  # behind a line that a kill cut short
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def _ends_a_line(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _timing(line: str) -> Timing | None:
    try:
        data: Any = json.loads(line)
        name, config = renamed(data["variant"], data["config"])
        timing = Timing(**{**data, "variant": name, "config": config})
        texts = (timing.problem, timing.pass_name, timing.variant, timing.source, timing.stage)
        times = (timing.median_ms, timing.p20_ms, timing.p80_ms)
        sound = timing.status in (OK, WRONG, FAILED) and all(type(text) is str for text in texts)
        timed = timing.status != OK or all(isinstance(each, (int, float)) and each > 0 for each in times)
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return timing if sound and timed and isinstance(timing.config, dict) else None
