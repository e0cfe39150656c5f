"""The GPUs that kernels are compiled for, their limits, and how many blocks of a kernel one multiprocessor holds.

Sources: NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the CUDA occupancy
calculator (registers are given to warps in units of 8 per thread; every block costs 1 KiB of shared memory more);
PTX ISA, "Tensor Memory" (512 columns). AMD, "CDNA 2" and "CDNA 3 Instruction Set Architecture" guides, and LLVM's
AMDGPUBaseInfo.cpp (512 vector registers per lane and SIMD in units of 8, 8 waves per SIMD, 16 workgroups per CU).
"""

from __future__ import annotations

from dataclasses import dataclass

from tritonconv.errors import ArgumentError

KIB = 1024
PARTITIONS = 4  # sub-cores of an SM, SIMDs of a CU: each with a quarter of the registers and of the warps
REGISTER_UNIT = 8  # per thread
TENSOR_MEMORY_COLUMNS = 512


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
        limits = [
            self.blocks,
            min(by_registers, self.warps) // warps,
            self.shared // (shared_bytes + self.shared_reserved)
            if shared_bytes + self.shared_reserved
            else self.blocks,
        ]
        if tensor_memory:
            limits.append(TENSOR_MEMORY_COLUMNS // tensor_memory)
        return min(limits)

    def occupancy(self, blocks: int, warps: int) -> float:
        """The part of the multiprocessor's threads (0 to 1) that so many blocks fill."""
        return blocks * warps / self.warps


def _nvidia(arch: int, matrix: str, shared_kib: int, threads: int, blocks: int) -> Target:
    return Target(
        name=f"sm_{arch}",
        backend="cuda",
        arch=arch,
        warp_size=32,
        matrix=matrix,
        shared_per_block=(shared_kib - 1) * KIB,
        shared=shared_kib * KIB,
        threads=threads,
        blocks=blocks,
    )


def _amd(arch: str) -> Target:
    return Target(
        name=arch,
        backend="hip",
        arch=arch,
        warp_size=64,
        matrix="MFMA",
        shared_per_block=64 * KIB,
        shared=64 * KIB,
        threads=2048,
        blocks=16,
        registers=4 * 512 * 64,
        shared_reserved=0,
    )


TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, "HMMA", shared_kib=164, threads=2048, blocks=32),  # A100
        _nvidia(86, "HMMA", shared_kib=100, threads=1536, blocks=16),  # A10, RTX 3090
        _nvidia(89, "HMMA", shared_kib=100, threads=1536, blocks=24),  # L40S, RTX 4090
        _nvidia(90, "HGMMA", shared_kib=228, threads=2048, blocks=32),  # H100, H200
        _nvidia(100, "UTCHMMA", shared_kib=228, threads=2048, blocks=32),  # B200
        _nvidia(120, "HMMA", shared_kib=100, threads=1536, blocks=24),  # RTX 5090, RTX PRO 6000
        _amd("gfx942"),  # MI300X
        _amd("gfx90a"),  # MI250X
    )
}


def target(name: str) -> Target:
    """The target of this name; raises ArgumentError that lists the names there are."""
    try:
        return TARGETS[name]
    except KeyError:
        raise ArgumentError(f"unknown target {name!r}; there are: {', '.join(TARGETS)}") from None
