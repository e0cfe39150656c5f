"""Reading machine code: counts of instructions, the stack, the loop that multiplies."""

from __future__ import annotations

from tritonconv.lab.inspection import machine_code


def test_reading_machine_code():
    listing = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0020*/                   LDGDEPBAR ;
        /*0030*/                   STL.64 [R1+0x8], R2 ;
        /*0040*/              @P1  LDL R3, [R1] ;
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/                   UTMALDG.5D [UR8], [UR4] ;
        /*0070*/                   STG.E.U16 desc[UR4][R2.64], R5 ;
        /*0080*/              @P1  STG.E.128 desc[UR4][R2.64+0x10], R8 ;
    """
    assert machine_code.sass_counts(listing) == {
        "instructions": 9,
        "matrix": {"HGMMA": 1},
        "bulk_copies": 1,
        "async_copies": 1,
        "local_accesses": 2,
        "spill_load_bytes": 4,
        "spill_store_bytes": 8,
        "stores": {"2": 1, "16": 1},
    }
    assert machine_code.loop_counts(listing) == {
        "loop_instructions": 0,
        "loop_loads": {},
        "products_in_flight": None,
    }
    assert machine_code.stack_is_used(listing)
    frame = "LDC R1, c[0x0][0x37c] ;\nVIADD R1, R1, 0xfffffff8 ;\nIADD3 R1, R1, -0x8, RZ ;\nIMAD R10, R1X, R11, R12 ;"
    assert not machine_code.stack_is_used(frame)  # set up, and touched by nothing
    assert machine_code.stack_is_used(frame + "\nIADD3 R4, P0, R1, 0x4, RZ ;")
    ieee = "%1 = tt.dot %a, %b, %c : tensor<64x32xf32> * tensor<32x32xf32> -> tensor<64x32xf32>"
    tf32 = ieee.replace(" :", ", inputPrecision = tf32 :")
    half = ieee.replace("32xf32> *", "32xbf16> *").replace("32x32xf32>", "32x32xbf16>")
    kinds = [machine_code.dot_kind(text, "cuda") for text in ("%1 = tt.load %a", ieee, tf32, half)]
    assert kinds == ["", "fma", "matrix", "matrix"]
    assert machine_code.dot_kind(ieee, "hip") == "matrix"


def test_the_loop_that_multiplies_is_found():
    listing = """
.L_x_0:
        /*0000*/                   LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*0010*/              @P0  BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   MOV R1, R2 ;
.L_x_2:
        /*0030*/              @!P0 LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0050*/                   LDG.E.U8.CONSTANT R8, desc[UR4][R2.64] ;
        /*0058*/                   LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64] ;
        /*0060*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0068*/                   WARPGROUP.DEPBAR.LE gsb0, 0x2 ;
        /*0069*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0070*/              @P1  BRA `(.L_x_2) ;
        /*0080*/              @P1  BRA `(.L_x_3) ;
        /*0088*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0090*/              @P2  BRA `(.L_x_1) ;
.L_x_3:
        /*0098*/              @P3  EXIT ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   NOP ;
        /*00c0*/              @!P0 BRA `(.L_x_2) ;
    """
    assert machine_code.loop_counts(listing) == {
        "loop_instructions": 8,
        "loop_loads": {"registers 2": 1, "registers 16": 1, "registers 1": 1, "async 16": 1},
        "products_in_flight": 1,
    }
