"""Stands in for NVIDIA's ncu: runs the command beside the stand-in for a GPU, counts its clock from start to stop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BEGIN = """
import stand_in_gpu, torch
stand_in_gpu.install()
stand_in_gpu.shrink()
torch.cuda.profiler.start = lambda: setattr(stand_in_gpu.now, "began", stand_in_gpu.now.us)
torch.cuda.profiler.stop = lambda: print("counted", stand_in_gpu.now.us - stand_in_gpu.now.began)
"""


def install(folder: Path) -> Path:
    """A program of the name in the folder."""
    path = folder / "ncu"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    path.chmod(0o755)
    return path


def main(arguments: list[str]) -> None:
    log = arguments.index("--log-file") + 1
    python, option, code, *rest = arguments[log + 1 :]
    done = subprocess.run([python, option, BEGIN + code, *rest], stdout=subprocess.PIPE, text=True, check=True)
    (us,) = (line.split()[1] for line in done.stdout.splitlines() if line.startswith("counted"))
    table = [
        "==PROF== Connected to process 1",
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"',
        f'"0","a_kernel(int)","GPU Speed Of Light Throughput","Duration","ns","{int(us) * 1000:,}"',
    ]
    Path(arguments[log]).write_text("\n".join(table))


if __name__ == "__main__":
    main(sys.argv[1:])
