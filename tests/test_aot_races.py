"""The scan for writes under other groups' products: on a few lines, and on a kernel without its barriers."""

import pytest
from aot_runs import python

pytest.importorskip("triton")
from fastvit_kernels.aot_intervals import Interval, bounds
from fastvit_kernels.aot_races import races

# A block of 64 x 64 halves at 8192 (descriptor 512, rows of 128 bytes, 1024 between groups of eight) is read,
# and overwritten by 16 bytes of each thread in the next trip.
PTX = """
.visible .entry k()
{
	mov.u32 	%r1, %tid.x;
	mov.b32 	%r2, global_smem;
	shl.b32 	%r3, %r1, 4;
	add.s32 	%r4, %r2, %r3;
	add.s32 	%r5, %r2, 8192;
	bfe.u32 	%r6, %r5, 4, 14;
	cvt.u64.u32 	%rd1, %r6;
	or.b64 	%rd2, %rd1, 4611686293305294848;
$L__BB0_1:
	st.shared.v4.b32 	[%r4+8192], {%r20, %r21, %r22, %r23};
	bar.sync 	0;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r30}, {%r40,%r41,%r42,%r43}, %rd2, %p1, 1, 1, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	bar.sync 	0;
	@%p2 bra 	$L__BB0_1;
	ret;
}
"""
STORE, WAIT, BAR = (
    "	st.shared.v4.b32 	[%r4+8192]",
    "	wgmma.wait_group.sync.aligned 0;\n",
    "	bar.sync 	0;\n",
)
SAID = ["st.shared.v4.b32 \t[%r4+8192] may overwrite what m64n64k16.f32.bf16.bf16 reads"]


def without_second_bar(text=PTX):
    head, _, tail = text.rpartition(BAR)
    return head + tail


def test_a_barrier_behind_the_wait_is_what_keeps_it_safe():
    assert races(PTX, 8) == []
    assert races(without_second_bar(), 8) == SAID
    assert races(without_second_bar().replace(WAIT, BAR + WAIT), 8) == SAID
    assert races(without_second_bar(), 4) == []


@pytest.mark.parametrize(
    "barrier", ["	bar.sync 	1, 128;\n", "	@%p3 bar.sync 	0;\n", "	bar.arrive 	0, 256;\n"]
)
def test_a_barrier_of_some_threads_is_none(barrier):
    assert races(without_second_bar().replace(WAIT, WAIT + barrier), 8) == SAID


def test_a_path_around_the_barrier_counts():
    around = PTX.replace(WAIT + BAR, f"{WAIT}	@%p4 bra 	$L__BB0_2;\n{BAR}$L__BB0_2:\n")
    assert races(around, 8) == SAID


def test_what_is_left_in_flight_is_waited_for_later():
    # wait_group 1 leaves the last product: it is waited for in the next trip, behind the barrier of this one.
    late = PTX.replace(WAIT, WAIT.replace("0;", "1;"))
    assert races(late, 8) == []
    assert races(late.replace(STORE, WAIT + STORE), 8) == SAID


@pytest.mark.parametrize(
    ("offset", "races_"),
    [(8192 + 8191, True), (8192 + 8192, False), (8192 - 4096, False), (8192 - 4095, True)],
)
def test_only_what_overlaps_is_accused(offset, races_):
    # 256 threads of 16 bytes each are 4096 bytes from the offset on.
    assert bool(races(without_second_bar().replace("[%r4+8192]", f"[%r4+{offset}]"), 8)) == races_


@pytest.mark.parametrize(
    "write",
    [
        "	st.shared.b32 	[%r99], %r20;\n",
        "	cp.async.ca.shared.global [ %r5 + 0 ], [ %rd9 + 0 ], 0x4, %r7;\n",
        "	@%p5 cp.async.bulk.tensor.2d.shared::cta.global [%r2], [%rd9, {%r1, %r1}], [%r8];\n",
        "	stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5], {%r1, %r1, %r1, %r1};\n",
        "	atom.shared.add.u32 	%r9, [%r2], 1;\n",
    ],
)
def test_every_kind_of_write_is_seen(write):
    text = without_second_bar().replace("[%r4+8192]", "[%r4+65536]").replace(WAIT, WAIT + write)
    (said,) = races(text, 8)
    assert said.startswith(write.strip().split(",")[0])


def test_reads_are_no_writes():
    reads = "	ld.shared.b32 	%r9, [%r5];\n	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r9}, [%r5];\n"
    text = without_second_bar().replace("[%r4+8192]", "[%r4+65536]").replace(WAIT, WAIT + reads)
    assert races(text, 8) == []


def test_bounds_follow_a_buffer_that_turns():
    lines = """
	mov.b32 	%r1, -1;
$L__BB0_1:
	add.s32 	%r2, %r1, 1;
	setp.gt.s32 	%p1, %r2, 2;
	selp.b32 	%r1, 0, %r2, %p1;
	shl.b32 	%r3, %r1, 13;
	mov.u32 	%r4, %tid.x;
	and.b32 	%r5, %r4, 48;
	or.b32 	%r6, %r3, %r5;
	add.s32 	%r7, %r7, 1;
	ld.param.b32 	%r8, [k_param_0];
	add.s32 	%r9, %r8, 1;
	and.b32 	%r10, %r9, 96;
	@%p2 bra 	$L__BB0_1;
""".splitlines()
    found = bounds([line.strip() for line in lines], 8)
    assert found["%r3"][:2] == (0, 2 << 13) and found["%r6"][:2] == (0, (2 << 13) + 48)
    assert found["%r4"][:2] == (0, 255) and found["%r10"][:2] == (0, 96)
    assert found["%r9"][:2] == (None, None) and "%r7" not in found


def test_a_sum_that_may_wrap_is_anywhere():
    lines = [
        "cvt.u64.u32 	%rd1, %r1;",
        "ld.param.b32 	%r1, [k];",
        "and.b32 	%r2, %r1, -2;",
        "shr.u32 	%r3, %r1, 1;",
    ]
    found = bounds([*lines, "shl.b32 	%r4, %r3, 1;", "add.s32 	%r5, %r4, 8;"], 8)
    assert found["%r3"][:2] == (0, 2**31 - 1)
    assert found["%r5"][:2] == (None, None)


def test_intervals_overlap_at_their_ends():
    assert Interval(0, 15).overlaps(Interval(15, 20)) and not Interval(0, 14).overlaps(Interval(15, 20))
    assert Interval(None, None).overlaps(Interval(3, 3)) and Interval(5, None).overlaps(Interval(0, 5))
    assert not Interval(None, 4).overlaps(Interval(5, None))


# A real kernel of eight warps, as it is and without its barriers.
COMPILED = """
import re
from dataclasses import replace
from aot_toys import attention
from fastvit_kernels.aot_compile import _faults, compile_launch

compiled, said = compile_launch(replace(attention(0), num_warps=8), 90)
print(list(_faults(compiled, said, "half", 10**6, 8, 8)))
compiled.asm["ptx"] = re.sub(r"\\tbar\\.sync.*\\n", "", compiled.asm["ptx"])
(fault,) = _faults(compiled, said, "half", 10**6, 8, 8)
print(fault)
"""


def test_a_compiled_kernel_fails_without_its_barriers(tmp_path):
    run = python("-c", COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr
    intact, broken = run.stdout.splitlines()
    assert intact == "[]" and broken.startswith("race: cp.async") and broken.endswith(" more")
