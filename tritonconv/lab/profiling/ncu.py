"""Runs NVIDIA's Nsight Compute for the counters of the kernels that a process launches while profiling is on.

Source: https://docs.nvidia.com/nsight-compute/NsightComputeCli. ``--profile-from-start off`` counts between
``cudaProfilerStart`` and ``cudaProfilerStop``, ``--page details --csv`` prints a line per counter of a section.
"""

from __future__ import annotations

import csv
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tritonconv.errors import ResultsError
from tritonconv.lab.inspection.workers import kill

SECTIONS = (
    "SpeedOfLight",
    "LaunchStats",
    "Occupancy",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
)
HEAD = '"ID",'  # the table begins with it, below what the tool says of its own progress
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6}
MOST_CHARACTERS = 300  # of an error


@dataclass
class KernelCounters:
    """A launch of a kernel. ``counters`` by "name [unit]", as ncu names them, in base units."""

    kernel: str
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def duration_us(self) -> float:
        """Time of the kernel alone, with cold caches, at the clock that the GPU had. Raises ResultsError without it."""
        for unit, factor in MICROSECONDS.items():
            if f"Duration [{unit}]" in self.counters:
                return self.counters[f"Duration [{unit}]"] * factor
        raise ResultsError(f"ncu: no duration of {self.kernel} in {', '.join(self.counters)[:MOST_CHARACTERS]}")


def count(ncu: str, command: Sequence[str], seconds: float) -> list[KernelCounters]:
    """The launches that a command makes while profiling is on, in their order.

    Raises ResultsError with what ncu or the command said where there are none, or after so many seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        sections = [part for name in SECTIONS for part in ("--section", name)]
        arguments = [
            ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details",
            "--print-units", "base", *sections, "--log-file", str(log), *command,
        ]  # fmt: skip
        try:
            # A group of its own: a kill reaches the command too.
            tool = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                    start_new_session=hasattr(os, "killpg"))  # fmt: skip
        except OSError as error:
            raise ResultsError(f"ncu: cannot run {ncu!r}: {error}") from None
        try:
            output, _ = tool.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise ResultsError(f"ncu: not done after {seconds:.0f} s") from None
        finally:
            if tool.poll() is None:
                kill(tool)
                tool.communicate()
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    kernels = list(read(text))
    if tool.returncode or not kernels:
        raise ResultsError(f"ncu: exit code {tool.returncode}: {_reason(text, output)}")
    return kernels


def read(text: str) -> Iterator[KernelCounters]:
    """The launches of a table of the details page; what is no number is passed over."""
    lines = text.splitlines()
    first = next((index for index, line in enumerate(lines) if line.startswith(HEAD)), len(lines))
    launches: dict[str, KernelCounters] = {}
    for row in csv.DictReader(lines[first:]):
        name, value = row.get("Metric Name"), _number(row.get("Metric Value"))
        if name and value is not None:
            launch = launches.setdefault(row["ID"], KernelCounters(row["Kernel Name"]))
            launch.counters[f"{name} [{row.get('Metric Unit') or ''}]"] = value
    yield from launches.values()


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def _reason(log: str, output: str) -> str:
    """ncu's errors, else the last line of the command's: of a traceback the error."""
    errors = [line for line in log.splitlines() if line.startswith("==ERROR==")]
    lines = errors or output.strip().splitlines()[-1:] or log.strip().splitlines()[-1:] or ["it counted no kernel"]
    return " ".join(lines)[:MOST_CHARACTERS]
