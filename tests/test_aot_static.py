"""The machine code's counts, its loops' trips and the model, on texts small enough to count by hand."""

import pytest
import torch
from aot_runs import aot

pytest.importorskip("triton")
from fastvit_kernels.aot_sass import count_products, loops, parse
from fastvit_kernels.aot_static import Body, match, occupancy, slowest, traffic, unrolled
from fastvit_kernels.aot_trips import Loop, Unknown, product_loops
from fastvit_kernels.launch import Launch

SASS = """
	.section	.text.k,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P1 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/                   WARPGROUP.ARRIVE ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR40], RZ, !UPT, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R88, R24, gdesc[UR8].tnspB, R88, gsb0 ;
        /*0070*/                   MUFU.EX2 R3, R4 ;
        /*0080*/                   FMNMX R3, R3, R5, !PT ;
        /*0090*/                   FFMA R3, R3, R5, R6 ;
        /*00a0*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*00b0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00c0*/                   EXIT ;
.L_x_2:
        /*00d0*/                   BRA `(.L_x_2);
"""
# A loop in one branch, for the programs whose place is below %few, over blocks of 64 of %size.
TTIR = """
  tt.func public @k(%a: !tt.ptr<f16> {tt.divisibility = 16 : i32}, %size: i32, %few: i32) {
    %c64 = arith.constant 64 : i32 loc(#loc1)
    %c0 = arith.constant 0 : i32
    %c = arith.constant dense<0.000000e+00> : tensor<64x128xf32>
    %place = tt.get_program_id x : i32
    %first = arith.cmpi slt, %place, %few : i32
    scf.if %first {
      %from = arith.muli %place, %c64 : i32
      %total = scf.for %start = %from to %size step %c64 iter_args(%t = %c) -> (tensor<64x128xf32>)  : i32 {
        %s = tt.dot %x, %y, %c, precision = tf32 : tensor<64x32xf16> * tensor<32x16xf16> -> tensor<64x16xf32>
        %r = "tt.reduce"(%s) <{axis = 1 : i32}> ({
        ^bb0(%p: f32, %q: f32):
        }) : (tensor<64x16xf32>) -> tensor<64xf32>
        %t1 = tt.dot %s, %z, %t : tensor<64x16xf16> * tensor<16x128xf16> -> tensor<64x128xf32>
      }
      %tail = tt.dot %s, %z, %t : tensor<64x16xf16> * tensor<16x128xf16> -> tensor<64x128xf32>
    } else {
      scf.for %start = %c0 to %size step %c64  : i32 {
        %u = tt.dot %x, %y, %c : tensor<64x16xf16> * tensor<16x16xf16> -> tensor<64x16xf32>
      }
    }
    tt.return
"""

# No loop is left of these: 64 keys against 32 queries in a branch for each bit of %present; and between them,
# in a loop over %size rows, one over three words of each.
BRANCHES = """
  tt.func public @k(%present: i32, %size: i32) {
    %c0 = arith.constant 0 : i32
    %c1 = arith.constant 1 : i32
    %c3 = arith.constant 3 : i32
    %0 = arith.andi %present, %c1 : i32
    %1 = arith.cmpi ne, %0, %c0 : i32
    %dq:2 = scf.if %1 -> (tensor<64x32xf32>, tensor<64x64xf32>) {
      %s = tt.dot %k, %q, %c : tensor<64x64xbf16> * tensor<64x32xbf16> -> tensor<64x32xf32>
      scf.yield %s, %t : tensor<64x32xf32>, tensor<64x64xf32>
    } else {
      scf.yield %c, %t : tensor<64x32xf32>, tensor<64x64xf32>
    }
    scf.for %row = %c0 to %size step %c1  : i32 {
      scf.for %word = %c0 to %c3 step %c1  : i32 {
        scf.if %1 {
          %u = tt.dot %x, %y, %c : tensor<64x16xbf16> * tensor<16x16xbf16> -> tensor<64x16xf32>
        }
      }
    }
    %2 = arith.shrsi %present, %c1 : i32
    %3 = arith.andi %2, %c1 : i32
    %4 = arith.cmpi ne, %3, %c0 : i32
    %dq_1:2 = scf.if %4 -> (tensor<64x32xf32>, tensor<64x64xf32>) {
      %s = tt.dot %k, %q, %c : tensor<64x64xbf16> * tensor<64x32xbf16> -> tensor<64x32xf32>
      scf.yield %s, %t : tensor<64x32xf32>, tensor<64x64xf32>
    } else {
      scf.yield %dq#0, %dq#1 : tensor<64x32xf32>, tensor<64x64xf32>
    }
    tt.return
"""
BRANCHES_SASS = """
	.section	.text.k,"ax",@progbits
        /*0000*/                   R2P PR, R0, 0x3 ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR40], RZ, !UPT ;
        /*0030*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR44], R24 ;
        /*0040*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR48], R24 ;
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR52], R24, gsb0 ;
.L_x_0:
        /*0060*/              @!P1 BRA `(.L_x_1) ;
        /*0070*/                   HGMMA.64x32x16.F32.BF16 R40, gdesc[UR40], RZ, !UPT ;
        /*0080*/                   HGMMA.64x32x16.F32.BF16 R40, gdesc[UR44], R40 ;
        /*0090*/                   HGMMA.64x32x16.F32.BF16 R40, gdesc[UR48], R40 ;
        /*00a0*/                   HGMMA.64x32x16.F32.BF16 R40, gdesc[UR52], R40, gsb0 ;
.L_x_1:
        /*00b0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00c0*/                   EXIT ;
.L_x_2:
        /*00d0*/                   BRA `(.L_x_2);
"""


def launch(grid=(5,), warps=4, **args):
    return Launch(lambda: None, grid, args, num_warps=warps)


def test_a_loop_is_counted_by_pipe():
    code = parse(SASS)
    (body,) = map(Body.of, loops(code))
    # n16 with A from shared memory: 2048 + 512 bytes at 128 a cycle; n128 with A in registers: 128 / 2.
    assert body == Body(
        issue=9,
        mufu=8,
        alu=2,
        tensor=20 + 64,
        products={"64x16": 1, "64x128": 1},
        waits=1,
        barriers=1,
        flops=2 * 64 * (16 + 128) * 16,
    )
    assert count_products(code) == (2, 2)
    assert code[1].guard == "!P1" and code[code[1].target].opcode == "WARPGROUP.DEPBAR.LE"


@pytest.mark.parametrize("text", ["", "  .section .text", SASS.replace(".L_x_0:", "")])
def test_a_disassembly_that_cannot_be_followed_raises(text):
    with pytest.raises(ValueError, match=r"no instruction|nowhere"):
        parse(text)


def test_trips_are_those_of_every_program():
    # Of five programs two take the first branch: 1000 from 0 and from 64 in steps of 64 is 16 and 15 trips.
    outside, (first, second) = product_loops(launch(size=1000, few=2), TTIR)
    assert first == Loop(31, 2 * 64 * 32 * 16 + 2 * 64 * 16 * 128)
    assert second == Loop(3 * 16, 2 * 64 * 16 * 16)
    # The tail, which two of five compute.
    assert outside == Loop(5, 2 * 64 * 16 * 128 * 2 // 5)


def test_the_trips_of_a_loop_in_a_loop():
    _, (loop,) = product_loops(launch(present=1, size=7), BRANCHES)
    assert loop == Loop(5 * 7 * 3, 2 * 64 * 16 * 16)


# The whole-head backward: it has no loop, and each chunk of keys stands in a branch.
@pytest.mark.parametrize(("present", "taken"), [(3, 2), (2, 1), (1, 1), (4, 0)])
def test_products_in_branches_are_counted_where_they_are_taken(present, taken):
    outside, loops_of_it = product_loops(launch(present=present, size=0), BRANCHES)
    assert outside == Loop(5, taken * 2 * 64 * 64 * 32)
    code = parse(BRANCHES_SASS)
    whole = Body.of(code)
    assert not loops(code)
    # Four of m64n32k16 each, with A from shared memory: (2048 + 1024) / 128 cycles.
    assert (whole.flops, whole.tensor) == (2 * 2 * 64 * 64 * 32, 8 * 24)
    planned = [outside, *loops_of_it]
    if taken == 2:
        assert unrolled(whole, launch(), planned) == (5,)
        assert slowest([whole], (5 * 132,), 4) == ("tensor", pytest.approx(5 * 192 / 1.755e3))
    else:
        with pytest.raises(Unknown, match="no loop and 2621440 FLOP, where the IR has"):
            unrolled(whole, launch(), planned)


def test_a_branch_that_depends_on_memory_is_unknown():
    with pytest.raises(Unknown, match="the way at scf.if %4"):
        product_loops(launch(present=3, size=0), BRANCHES.replace("arith.shrsi %present, %c1", "tt.load %a"))


def test_trips_that_depend_on_memory_are_unknown():
    loaded = TTIR.replace("arith.muli %place, %c64", "tt.load %a")
    with pytest.raises(Unknown, match="the trips of scf.for %start = %from"):
        product_loops(launch(size=1000, few=2), loaded)


def body(flops):
    return Body(100, 80, 40, 60, {}, 1, 1, flops)


def test_loops_are_paired_by_their_products():
    planned = [Loop(7, 1000), Loop(9, 3000)]
    assert match([body(1600), body(600)], launch(warps=8), planned) == (9, 7)
    for made in ([body(1600)], [body(1600), body(1000)], [body(1400), body(600)]):
        with pytest.raises(Unknown, match="loops with"):
            match(made, launch(warps=8), planned)


def test_an_unrolled_kernel_runs_once_a_program():
    assert unrolled(body(1500), launch((5, 2)), [Loop(20, 700)]) == (10,)
    for planned in ([], [Loop(20, 800)], [Loop(10, 700)]):
        with pytest.raises(Unknown, match="no loop"):
            unrolled(body(1500), launch((5, 2)), planned)


def test_the_scarcest_resource_bounds():
    # 100 issue slots of each of 8 warps at 4 a cycle, 132 times 10 trips on 132 SMs at 1.755 GHz.
    name, floor = slowest([body(1)], [1320], 8)
    assert name == "issue" and floor == pytest.approx(10 * 200 / 1.755e3)
    assert slowest([body(1)], [], 8) == ("-", 0.0)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "ctas"),
    [(194, 77824, 4, 2), (242, 66048, 8, 1), (108, 65536, 8, 2), (40, 1024, 4, 12), (32, 0, 1, 32)],
)
def test_occupancy(registers, shared, warps, ctas):
    assert occupancy(registers, shared, warps) == ctas


def test_traffic_counts_what_is_expanded_once():
    q = torch.empty(2, 3, 4, dtype=torch.bfloat16, device="meta")
    mask = torch.empty(3, dtype=torch.uint8, device="meta").expand(2, 3)
    assert traffic(launch(q=q, mask=mask, none=None, size=5)) == 2 * 24 + 3


def test_the_table_of_a_compiled_kernel():
    run = aot("--static", "attend", "--markdown")
    assert run.returncode == 0, run.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines() if "|" in line
    ]
    in_flight, serialized = (dict(zip(rows[0], row, strict=True)) for row in rows[2:])
    # 4096 in steps of 64 by one program: 64 trips of two products, 4 HGMMA each.
    for row in in_flight, serialized:
        assert (row["trips"], row["HGMMA"], row["tensor"]) == ("64", "8 64x64", "256")
        assert int(row["registers"]) > 64 and int(row["issue"]) > 100 and int(row["MUFU"]) == 8 * 32
    assert int(in_flight["waits"]) < int(serialized["waits"]) == 8
    assert "modelled" in run.stdout


def test_only_sm_90_is_modelled():
    run = aot("--static", "attend", "--arch", "sm_80")
    assert (run.returncode, run.stderr) == (2, "aot: --static knows sm_90 alone\n")
