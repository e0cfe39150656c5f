"""A CUDA driver that accepts everything and runs nothing, so that the host's time of a launch can be measured without
a GPU. Kernels are compiled for sm_90 by the real compiler, and launched through Triton's real launcher.

The tensors are on the CPU, and nothing reads or writes them. Needs a C compiler.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
VARIABLE = "TRITONCONV_STUB_DRIVER"


def run_beside(script: Path, *arguments: str, **how) -> subprocess.CompletedProcess:
    """Runs a Python script in a process that finds the stub where CUDA's driver would be."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE], check=True)
        root = str(SOURCE.parent.parent)
        environment = {
            **os.environ, VARIABLE: str(library), "TRITON_INTERPRET": "0", "TRITON_LIBCUDA_PATH": folder,
            "LD_LIBRARY_PATH": folder, "PYTHONPATH": os.pathsep.join((root, os.environ.get("PYTHONPATH", ""))),
        }  # fmt: skip
        return subprocess.run([sys.executable, str(script), *arguments], env=environment, check=False, **how)


def install() -> ctypes.CDLL:
    """Makes the stub Triton's driver in this process, which :func:`run_beside` started; its library."""
    library = ctypes.CDLL(os.environ[VARIABLE], mode=ctypes.RTLD_GLOBAL)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device=None) -> int:
            return 0

    triton.runtime.driver.set_active(Driver())
    return library
