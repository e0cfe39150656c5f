"""The facts that the stand-in for a GPU (stand_in_gpu.py) gives of itself, and the store of what it measures.

Variables of the environment give it another name (``STAND_IN_NAME``), compute capability (``STAND_IN_CAPABILITY``, as
9.0), number of multiprocessors (``STAND_IN_MULTIPROCESSORS``) and memory (``STAND_IN_MEMORY``, GiB), for what depends
on the GPU that there is. 0.0 is the capability of no GPU: nothing is compiled for it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from types import SimpleNamespace

NAME = os.environ.get("STAND_IN_NAME", "stand-in for a GPU")
CAPABILITY = tuple(map(int, os.environ.get("STAND_IN_CAPABILITY", "0.0").split(".")))
# As of torch.cuda.get_device_properties.
PROPERTIES = SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=int(os.environ.get("STAND_IN_MULTIPROCESSORS", 3)),
    total_memory=int(float(os.environ.get("STAND_IN_MEMORY", 16)) * (1 << 30)),
    L2_cache_size=1 << 20,
)


def own_store() -> None:
    """Where the caller names no folder with TRITONCONV_CACHE, one of this process is it.

    Times that are made up must not become the choices of a real GPU, whose name the stand-in may have.
    """
    if not os.environ.get("TRITONCONV_CACHE"):
        folder = tempfile.mkdtemp(prefix="stand-in-gpu-")
        os.environ["TRITONCONV_CACHE"] = folder  # of the processes that this one starts, too
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
