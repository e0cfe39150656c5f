"""Compiles kernels only as far as it takes to know that no product reads registers while the program goes on.

Most of the time of a compilation comes behind Triton's own code for the GPU, and that code says where operand A of a
product is. Where one is in registers the kernel is compiled to its end. The others are left without machine code, so
Triton's cache is a folder of the block (not all versions give such kernels a key of their own), and the process is one
that launches nothing.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

_READS_REGISTERS = re.compile(r"warp_group_dot %.*isAsync = true.* : tensor<")
# Metadata of the stages that are left out; nothing reads it.
_LATE_FIELDS = (
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

    def leave_out(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
        if stages is None:  # Triton asks for the part of the key
            return "shallow", "shallow"
        deeper = stages["llir"]

        def llir(source: Any, metadata: dict[str, Any]) -> Any:
            if reads_registers(str(source)):
                return deeper(source, metadata)
            metadata |= dict.fromkeys(_LATE_FIELDS, 0) | {"name": ""}
            return ""

        def passing(stage: Callable[[Any, Any], Any], nothing: str | bytes) -> Callable[[Any, Any], Any]:
            return lambda source, metadata: stage(source, metadata) if source else nothing

        stages |= {"llir": llir, "ptx": passing(stages["ptx"], ""), "cubin": passing(stages["cubin"], b"")}
        return None

    with knobs.runtime.scope(), knobs.cache.scope(), tempfile.TemporaryDirectory() as knobs.cache.dir:
        knobs.runtime.add_stages_inspection_hook = leave_out
        yield
