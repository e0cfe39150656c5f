"""The facts a results file must carry to be read elsewhere: versions, machine, device, commit, command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

from tritonconv.device import cpu_name
from tritonconv.precision import switches

SECONDS_FOR_TOOL = 5.0


def environment(device: torch.device, command: Sequence[str], seed: int) -> dict[str, object]:
    """The header of a results file. Facts that cannot be had are None; nothing here raises for lack of a tool."""
    commit, dirty = git_state(Path(__file__).resolve().parent)
    return {
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "seed": seed,
        "commit": commit,
        "dirty": dirty,
        "tritonconv": version("tritonconv"),
        "torch": torch.__version__,
        "triton": version("triton"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        **(_gpu(device) if device.type == "cuda" else {}),
    }


class OtherPrograms:
    """How many cores other programs keep busy, by Linux's counts of busy ticks (10 ms each); steal counts as theirs."""

    def __init__(self) -> None:
        self._last = self._look()

    def since_last(self) -> float | None:
        """Cores, on average since the call before (or since the start); None where it cannot be told."""
        before, self._last = self._last, self._look()
        if before is None or self._last is None:
            return None
        wall, busy, own = (now - then for now, then in zip(self._last, before, strict=True))
        return max(0.0, round((busy - own) / wall, 2)) if wall > 0 else None

    def _look(self) -> tuple[float, float, float] | None:
        """(wall, busy, own) in seconds. In a container with fewer cores than the host the counts are not comparable."""
        try:
            ticks = [
                int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
            ]
            if len(os.sched_getaffinity(0)) != os.cpu_count():
                return None
        except (OSError, ValueError, AttributeError):
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.monotonic(), busy, own.user + own.system


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module = sys.modules.get(package)
        return getattr(module, "__version__", None)


@cache
def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it) of the work tree that holds ``folder``; None where there is none.

    An installed package may lie inside someone else's repository, so the folder must be tracked there.
    """
    git = "git", "-C", str(folder)
    commit = _output(*git, "rev-parse", "HEAD") if _output(*git, "ls-files", "--", ".") else None
    if commit is None:
        return None, None
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return commit, bool(changes) if changes is not None else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_TOOL, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _gpu(device: torch.device) -> dict[str, object]:
    facts = torch.cuda.get_device_properties(device)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu_multiprocessors": facts.multi_processor_count,
        "gpu_memory_bytes": facts.total_memory,
        "gpu_capability": f"{facts.major}.{facts.minor}",
        "gpu_driver": driver.split("\n")[0].strip() or None if driver else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        **switches(),
    }
