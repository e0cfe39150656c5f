"""Which errors of a candidate only disqualify it, and which end the run.

A config may ask for more than a GPU has; that is found by trying. A mistake in the program is not a slow candidate, and
a GPU whose context is lost would fail every candidate after it: both propagate.
"""

from __future__ import annotations

import torch

# Classes of triton.runtime.errors and triton.compiler.errors, by name because Triton may be absent.
TOO_LARGE = ("OutOfResources", "PTXASError", "MLIRCompilationError")
# LLVM's and MLIR's passes give up on some tiles.
COMPILER = ("PassManager::run failed", "failed to translate module to LLVM IR", "LLVM ERROR")
OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator: can't allocate")
LAUNCH = (
    "too many resources requested",
    "invalid configuration argument",
    "invalid argument",
    "unable to find an engine",
)
LOST = ("illegal memory access", "misaligned address", "device-side assert", "unspecified launch failure",
        "illegal instruction")  # fmt: skip


def context_is_lost(error: BaseException) -> bool:
    """The GPU answers nothing more to this process."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


def disqualifies(error: BaseException) -> bool:
    """The candidate cannot run here, and the next one may."""
    if isinstance(error, torch.OutOfMemoryError) or type(error).__name__ in TOO_LARGE:
        return True
    if not isinstance(error, RuntimeError) or context_is_lost(error):
        return False
    text = str(error)
    return any(words in text for words in (*OUT_OF_MEMORY, *COMPILER)) or (
        ("CUDA" in text or "cuDNN" in text) and any(words in text for words in LAUNCH)
    )


def one_line(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
