"""What ptxas says is read line by line, and a line that is not known is not passed over."""

import pytest

pytest.importorskip("triton")
from fastvit_kernels.aot_ptxas import Said, read

USUAL = """
ptxas info    : 11 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function '_k' for 'sm_90a'
ptxas info    : Function properties for _k
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 93 registers, used 1 barriers, 24 bytes cumulative stack size
ptxas info    : Compile time = 49.467 ms
"""
LOST = "(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to X in '_k'"
WAITED = "(C7517) warpgroup.wait is injected in around line 455 by compiler to allow use of registers"
FENCED = (
    "(C7519) warpgroup.arrive is injected in around line 1372 by compiler to allow use of registers in GMMA"
)


@pytest.mark.parametrize("name", ["ptxas", "ptxas-blackwell"])
def test_the_usual_is_facts_alone(name):
    assert read(USUAL.replace("ptxas", name)) == Said(registers=93, spilled=24, serialized=(), strange=())


@pytest.mark.parametrize(("line", "serialized"), [(LOST, (LOST,)), (WAITED, (WAITED,)), (FENCED, ())])
def test_what_holds_products_up_is_found(line, serialized):
    said = read(f"ptxas info    : {line}\n{USUAL}")
    assert (said.serialized, said.strange) == (serialized, ())


@pytest.mark.parametrize(
    "line",
    [
        "ptxas warning : Value of threads per SM for entry _k is out of range",
        "ptxas info    : (C7600) Potential Performance Loss: something new",
        "ptxas info    : Used many registers",
        "Segmentation fault",
    ],
)
def test_what_is_not_understood_is_kept(line):
    said = read(USUAL + line)
    assert said.strange == (line,) and said.registers == 93


@pytest.mark.parametrize("missing", ["Compiling", "Used"])
@pytest.mark.parametrize("silent", [False, True])
def test_a_log_that_tells_of_no_compile_is_strange(missing, silent):
    lines = [] if silent else [line for line in USUAL.splitlines() if missing not in line]
    assert read("\n".join(lines)).strange[-1].startswith("not a word")
