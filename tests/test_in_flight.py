"""Registers that are written while a product may read them, in listings as nvdisasm prints them."""

from __future__ import annotations

import pytest

from tritonconv.lab.inspection.in_flight import early_writes
from tritonconv.lab.inspection.shallow import reads_registers


def loop(*body: str) -> str:
    """A loop of these instructions, and the wait and the end behind it."""
    lines = (*body, "@P0 BRA `(.L_x_0)", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT")
    return ".L_x_0:\n" + "\n".join(f"        /*{16 * place:04x}*/    {line} ;" for place, line in enumerate(lines))


LOAD, OTHER = "LDSM.16.M88.4 R152, [R19+UR9]", "LDSM.16.M88.4 R160, [R20+UR9]"
FIRST = "HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR24].tnspB, R24, gsb0"
SECOND = "HGMMA.64x128x16.F32.BF16 R24, R160, gdesc[UR24].tnspB, R24, gsb0"
OPEN = FIRST.replace(", gsb0", "")
SHARED = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR40].tnspA, R24, gsb0"
WIDE, SHUFFLE = "LDG.E.128 R150, desc[UR4][R2.64]", "SHFL.IDX PT, R153, R3, RZ, 0x1f"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x{}".format

SAFE = {
    "a wait for all": loop(LOAD, FIRST, WAIT(0)),
    "a wait that leaves the other": loop(LOAD, OTHER, FIRST, SECOND, WAIT(0)),
    "the newest is read from elsewhere": loop(LOAD, FIRST, SHARED, WAIT(1)),
    "operand A in shared memory": loop(LOAD, SHARED, WAIT(3)),
    "a copy between two waits": loop(OTHER, "MOV R152, R160", FIRST, WAIT(0)),
    "another register": loop("LDS R151, [R2]", "LDS.128 R148, [R2]", FIRST, WAIT(1)),
    "a store, which reads": loop(FIRST, "STS.128 [R2], R152", WAIT(0)),
    "no product": loop(LOAD, WAIT(3)),
    "behind the end": loop(LOAD, FIRST, WAIT(0)) + f"\n.L_x_1:\n {LOAD} ;\n BRA `(.L_x_1) ;",
}
EARLY = {
    "the next turn": (loop(LOAD, FIRST, WAIT(1)), [LOAD]),
    "the same turn": (loop(FIRST, LOAD, WAIT(0)), [LOAD]),
    "the last of two": (loop(LOAD, OTHER, FIRST, SECOND, WAIT(1)), [OTHER]),
    "both of one group": (loop(LOAD, OTHER, OPEN, SECOND, WAIT(1)), [LOAD, OTHER]),
    "a group that is not committed": (loop(OPEN, WAIT(0), "LDS R155, [R2]", SECOND, WAIT(0)), ["LDS R155, [R2]"]),
    "one of four registers": (loop("LDS.64 R154, [R2]", FIRST, WAIT(1)), ["LDS.64 R154, [R2]"]),
    "the end of a wide one": (loop(WIDE, FIRST, WAIT(1)), [WIDE]),
    "behind a predicate": (loop("@!P1 ISETP.NE.AND P0, PT, R3, RZ, PT", "@P1 MOV R152, RZ", FIRST, WAIT(1)),
                           ["MOV R152, RZ"]),
    "a result beside a predicate": (loop(SHUFFLE, FIRST, WAIT(1)), [SHUFFLE]),
    "after the loop": (loop(FIRST, WAIT(1)).replace("WARPGROUP.DEPBAR.LE gsb0, 0x0", LOAD), [LOAD]),
}  # fmt: skip


@pytest.mark.parametrize("listing", SAFE.values(), ids=SAFE)
def test_nothing_is_written_early(listing):
    assert early_writes(listing) == ()


@pytest.mark.parametrize(("listing", "expected"), EARLY.values(), ids=EARLY)
def test_an_early_write_is_found(listing, expected):
    assert [each.strip() for each in early_writes(listing)] == expected


def test_a_way_around_the_wait_counts():
    """A spin on a barrier out of line joins the loop before the load: the products are in flight on that way too."""
    listing = f"""
.L_x_0:
    @!P0 BRA `(.L_x_1) ;
    {WAIT(0)} ;
.L_x_2:
    {LOAD} ;
    {FIRST} ;
    @P1 BRA `(.L_x_0) ;
    {WAIT(0)} ;
    EXIT ;
.L_x_1:
    BRA `(.L_x_2) ;
"""
    assert len(early_writes(listing)) == 1
    assert early_writes(listing.replace("    BRA `(.L_x_2)", f"    {WAIT(0)} ;\n    BRA `(.L_x_2)")) == ()


def test_operand_a_in_registers_is_seen_in_the_code_for_the_gpu():
    shared = "ttng.warp_group_dot %a, %b, %c {isAsync = true} : !ttg.memdesc<128x64xbf16> * !ttg.memdesc<64x128xbf16>"
    registers = shared.replace("!ttg.memdesc<128x64xbf16>", "tensor<128x64xbf16, #ttg.dot_op<{opIdx = 0}>>")
    assert not reads_registers(shared)
    assert reads_registers(f"{shared}\n{registers}")
    assert not reads_registers(registers.replace("isAsync = true", ""))  # waited for at once
