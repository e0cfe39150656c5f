"""Compiles kernels only as far as it takes to know that no product reads registers while the program goes on.

Most of the time of a compilation comes behind Triton's own code for the GPU, and that code says where operand A of a
product is. Where one is in registers the kernel is compiled to its end. The others are left without machine code, so
Triton's cache is a folder of the block, and the process is one that launches nothing.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from functools import wraps

_READS_REGISTERS = re.compile(r"warp_group_dot %.*isAsync = true.* : tensor<")
# Metadata of the stages that are left out; nothing reads it.
_UNSAID = (
    "shared", "tmem_size", "global_scratch_size", "global_scratch_align", "profile_scratch_size",
    "profile_scratch_align",
)  # fmt: skip


def reads_registers(ttgir: str) -> bool:
    """Whether an asynchronous product of the code takes its operand A from registers."""
    return _READS_REGISTERS.search(ttgir) is not None


@contextlib.contextmanager
def shallow() -> Iterator[None]:
    """Inside the block NVIDIA's kernels are compiled so."""
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend

    stages = {name: getattr(CUDABackend, name) for name in ("make_llir", "make_ptx", "make_cubin")}

    @wraps(stages["make_llir"])
    def make_llir(self, src, metadata, *more):
        if reads_registers(str(src)):
            return stages["make_llir"](self, src, metadata, *more)
        metadata |= dict.fromkeys(_UNSAID, 0) | {"name": ""}
        return ""

    def passing(name: str, nothing):
        @wraps(stages[name])
        def stage(self, src, *more):
            return stages[name](self, src, *more) if src else nothing

        return stage

    before = knobs.cache.dir
    with tempfile.TemporaryDirectory() as folder:
        knobs.cache.dir = folder
        CUDABackend.make_llir = make_llir
        CUDABackend.make_ptx, CUDABackend.make_cubin = passing("make_ptx", ""), passing("make_cubin", b"")
        try:
            yield
        finally:
            knobs.cache.dir = before
            for name, stage in stages.items():
                setattr(CUDABackend, name, stage)
