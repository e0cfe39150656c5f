"""Reads a compiled kernel: its resources and the instructions that tell how it computes and moves data.

NVIDIA's are read from the machine code with the tools of Triton's wheel, AMD's from the assembly and its metadata.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from typing import Any

from tritonconv.lab.inspection.in_flight import early_writes
from tritonconv.lab.inspection.listing import instructions
from tritonconv.lab.inspection.records import ASYNC, BULK, THROUGH_REGISTERS
from tritonconv.lab.inspection.shallow import reads_registers

SECONDS_FOR_TOOL = 120.0

_WIDTH = re.compile(r"[US]?(8|16|64|128)")
_LEFT = re.compile(r"gsb0, 0x([0-9a-f]+)")
_FRAME = re.compile(r"\bR1, (R1, -?0x|c\[)")  # the stack pointer, loaded or moved by a number
_NVIDIA_MATRIX = re.compile(r"[A-Z]G?MMA|UTC[A-Z]*MMA")
_BULK = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED")
_AMD = re.compile(r"^\t([a-z]\w+)(.*)$", re.MULTILINE)
_AMD_MATRIX = ("v_mfma_", "v_smfmac_", "v_wmma_")


def resources(compiled: Any, backend: str) -> dict[str, Any]:
    """The measured fields of a :class:`~tritonconv.lab.inspection.records.Record` that no target changes."""
    metadata = compiled.metadata
    read = _nvidia(compiled.asm["cubin"]) if backend == "cuda" else _amd(compiled.asm["amdgcn"])
    return {
        "dot": dot_kind(compiled.asm["ttir"], backend),
        "warps": metadata.num_warps,
        "shared_bytes": metadata.shared,
        "tensor_memory_columns": getattr(metadata, "tmem_size", None) or 0,
        **read,
    }


def early_write(compiled: Any) -> str:
    """The first instruction that writes a register which a product in flight may read; empty where there is none."""
    if not reads_registers(compiled.asm["ttgir"]):
        return ""
    return next(iter(early_writes(_disassembled(compiled.asm["cubin"])[1])), "")


def dot_kind(ttir: str, backend: str) -> str:
    """The kind of the dots in Triton's own code; see ``Record.dot``. ``ieee`` is the precision it does not print."""
    dots = [line for line in ttir.splitlines() if "= tt.dot" in line]
    if not dots:
        return ""
    ieee = all("inputPrecision" not in line and re.search(r": tensor<[\dx]+xf32>", line) for line in dots)
    return "fma" if ieee and backend == "cuda" else "matrix"


def _nvidia(cubin: bytes) -> dict[str, Any]:
    usage, code = _disassembled(cubin, usage=True)
    return {
        **sass_counts(code),
        **loop_counts(code),
        "early_write": next(iter(early_writes(code)), ""),
        "registers": _number(r"REG:(\d+)", usage),
        "stack_bytes": _number(r"STACK:(\d+)", usage) if stack_is_used(code) else 0,
    }


def _disassembled(cubin: bytes, usage: bool = False) -> tuple[str, str]:
    """(cuobjdump's list of resources if ``usage``, else empty; nvdisasm's listing)."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources_used = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name) if usage else ""
        return resources_used, _output(knobs.nvidia.nvdisasm.path, "-c", file.name)


def stack_is_used(code: str) -> bool:
    """Whether nvdisasm's listing reads the stack pointer for more than to set up a frame that nothing touches."""
    return any(re.search(r"\bR1\b", line) and not _FRAME.search(line) for line in code.splitlines())


def sass_counts(code: str) -> dict[str, Any]:
    """Instruction counts of nvdisasm's listing."""
    words = [line.name.split(".") for line in instructions(code)]
    names = Counter(word[0] for word in words)
    return {
        "instructions": len(words),
        "matrix": {name: count for name, count in sorted(names.items()) if _NVIDIA_MATRIX.fullmatch(name)},
        "bulk_copies": sum(names[name] for name in _BULK),
        "async_copies": names["LDGSTS"],
        "local_accesses": names["LDL"] + names["STL"],
        "spill_load_bytes": sum(_width(word) for word in words if word[0] == "LDL"),
        "spill_store_bytes": sum(_width(word) for word in words if word[0] == "STL"),
        "stores": dict(Counter(str(_width(word)) for word in words if word[0] in ("STG", "ST"))),
    }


def loop_counts(code: str) -> dict[str, Any]:
    """Of the innermost loop that multiplies matrices (of several the first of those that multiply most): all its
    instructions, its loads by way and width, and the products that its waits leave in flight; see ``Record``."""
    listing = instructions(code)
    # Where the code ends for good: a jump back across it belongs to a wait out of line, and is no loop.
    ends = [place for place, line in enumerate(listing) if line.name.startswith("EXIT") and not line.guard]
    backward = [
        range(line.target, place + 1)
        for place, line in enumerate(listing)
        if line.name.startswith("BRA") and line.target is not None and line.target <= place
    ]

    def products(loop: range) -> int:
        return sum(bool(_NVIDIA_MATRIX.fullmatch(listing[place].name.split(".")[0])) for place in loop)

    loops = [loop for loop in backward if products(loop) and not any(place in loop for place in ends)]
    inner = [loop for loop in loops if not any(o != loop and o[0] >= loop[0] and o[-1] <= loop[-1] for o in loops)]
    body = [listing[place] for place in max(inner, key=products, default=range(0))]
    waits = [_LEFT.search(line.text) for line in body if line.name.startswith("WARPGROUP.DEPBAR")]
    left = [int(wait[1], 16) for wait in waits if wait]
    return {
        "loop_instructions": len(body),
        "loop_loads": dict(Counter(way for line in body if (way := _way(line.name.split("."))))),
        "products_in_flight": min(left) if left else None,
    }


def _way(word: list[str]) -> str:
    """How a load from global memory comes, and its bytes per thread; empty for another instruction."""
    if word[0] == "UTMALDG":
        return BULK
    ways = {"LDGSTS": ASYNC, "LDG": THROUGH_REGISTERS}
    return f"{ways[word[0]]} {_width(word)}" if word[0] in ways else ""


def _width(word: list[str]) -> int:
    """Bytes per thread of a load or store: LDL.64 has 8, LDL.U8 one, plain LDL 4."""
    bits = [int(width[1]) for part in word[1:] if (width := _WIDTH.fullmatch(part))]
    return bits[0] // 8 if bits else 4


def _amd(assembly: str) -> dict[str, Any]:
    instructions = [(name, rest) for name, rest in _AMD.findall(assembly) if "_" in name]
    local = sum(name.startswith("scratch_") or (name.startswith("buffer_") and "Folded" in rest)
                for name, rest in instructions)  # fmt: skip
    spilled = 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", assembly)  # per lane
    matrix = sum(name.startswith(_AMD_MATRIX) for name, _ in instructions)
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", assembly),
        "stack_bytes": _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly),
        "instructions": len(instructions),
        "matrix": {"MFMA": matrix} if matrix else {},
        "bulk_copies": 0,
        "async_copies": sum("load" in name and ("_lds" in name or " lds" in rest) for name, rest in instructions),
        "local_accesses": local,
        "spill_load_bytes": spilled,
        "spill_store_bytes": spilled,
    }


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output has no {pattern}: {text[:300]!r}")
    return int(match[1])


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_TOOL, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[:300]}")
    return done.stdout
