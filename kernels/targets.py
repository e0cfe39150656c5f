"""The GPUs that kernels are compiled for: their limits, their data sheets, and how many blocks a multiprocessor holds.

Sources: NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the CUDA occupancy
calculator (registers are given to warps in units of 8 per thread; every block costs 1 KiB of shared memory more);
PTX ISA, "Tensor Memory" (512 columns). AMD, "CDNA 2" and "CDNA 3 Instruction Set Architecture" guides, and LLVM's
AMDGPUBaseInfo.cpp (512 vector registers per lane and SIMD in units of 8, 8 waves per SIMD, 16 workgroups per CU).
Rates: NVIDIA's data sheets of the parts named, dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

KIB = 1024
PARTITIONS = 4  # sub-cores of an SM, SIMDs of a CU: each with a quarter of the registers and of the warps
REGISTER_UNIT = 8  # per thread
TENSOR_MEMORY_COLUMNS = 512


class DataSheet(NamedTuple):
    """Rates of one part of an architecture: FLOP/s of float32 (``vector``), TF32 and two-byte products; bytes/s."""

    part: str
    vector: float
    tf32: float
    half: float
    memory: float
    multiprocessors: int


@dataclass(frozen=True)
class Target:
    """One architecture. Bytes, threads, blocks and registers are of one multiprocessor unless named otherwise.

    ``matrix`` names its newest matrix instruction; older ones run too, more slowly.
    """

    name: str
    backend: str  # Triton's: "cuda" or "hip"
    arch: int | str
    warp_size: int
    matrix: str
    shared_per_block: int
    shared: int
    threads: int
    blocks: int
    registers: int = 64 * KIB
    shared_reserved: int = KIB  # of each block, for the system
    sheet: DataSheet | None = None

    @property
    def warps(self) -> int:
        return self.threads // self.warp_size

    def gpu_target(self):
        """Triton's name for the target."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp_size)

    def resident_blocks(self, warps: int, registers: int, shared_bytes: int, tensor_memory: int = 0) -> int:
        """How many blocks of a kernel one multiprocessor holds at a time; 0 where not even one fits.

        ``warps`` per block, ``registers`` per thread, ``tensor_memory`` in columns.
        """
        if shared_bytes > self.shared_per_block or tensor_memory > TENSOR_MEMORY_COLUMNS:
            return 0
        units = -(-max(registers, 1) // REGISTER_UNIT) * REGISTER_UNIT * self.warp_size
        by_registers = self.registers // PARTITIONS // units * PARTITIONS
        limits = [self.blocks, min(by_registers, self.warps) // warps]
        if shared_bytes + self.shared_reserved:
            limits.append(self.shared // (shared_bytes + self.shared_reserved))
        if tensor_memory:
            limits.append(TENSOR_MEMORY_COLUMNS // tensor_memory)
        return min(limits)

    def occupancy(self, blocks: int, warps: int) -> float:
        """The part of the multiprocessor's threads (0 to 1) that so many blocks fill."""
        return blocks * warps / self.warps


def _nvidia(
    arch: int, matrix: str, shared_kib: int, threads: int, blocks: int, sheet: DataSheet | None = None
) -> Target:
    per_block, shared = (shared_kib - 1) * KIB, shared_kib * KIB
    return Target(f"sm_{arch}", "cuda", arch, 32, matrix, per_block, shared, threads, blocks, sheet=sheet)


def _amd(arch: str) -> Target:
    return Target(
        arch, "hip", arch, 64, "MFMA", 64 * KIB, 64 * KIB, 2048, blocks=16, registers=4 * 512 * 64, shared_reserved=0
    )


T, G = 1e12, 1e9
H100 = DataSheet("H100 SXM", 66.9 * T, 494.7 * T, 989.4 * T, 3350 * G, 132)
TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, "HMMA", 164, 2048, 32, DataSheet("A100 SXM", 19.5 * T, 156 * T, 312 * T, 2039 * G, 108)),
        _nvidia(86, "HMMA", 100, 1536, 16, DataSheet("A10", 31.2 * T, 62.5 * T, 125 * T, 600 * G, 72)),  # RTX 3090
        _nvidia(87, "HMMA", 164, 1536, 16),  # Jetson Orin
        _nvidia(89, "HMMA", 100, 1536, 24, DataSheet("L40S", 91.6 * T, 183 * T, 362 * T, 864 * G, 142)),  # RTX 4090
        _nvidia(90, "HGMMA", 228, 2048, 32, H100),
        _nvidia(100, "UTCHMMA", 228, 2048, 32, DataSheet("B200", 75 * T, 1125 * T, 2250 * T, 8000 * G, 148)),
        _nvidia(103, "UTCHMMA", 228, 2048, 32),  # B300
        _nvidia(120, "HMMA", 100, 1536, 24, DataSheet("RTX 5090", 104.8 * T, 104.8 * T, 209.5 * T, 1792 * G, 170)),
        _amd("gfx942"),  # MI300X
        _amd("gfx90a"),  # MI250X
    )
}
NVIDIA = {target.arch: target for target in TARGETS.values() if target.backend == "cuda"}  # by compute capability
LEAST_SHARED_BYTES = min(target.shared_per_block for target in NVIDIA.values())
MULTIPROCESSORS = H100.multiprocessors  # an H200 has as many; a smaller machine only sees more waves
