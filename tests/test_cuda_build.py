"""How the CUDA library is put together and judged, as far as it needs neither nvcc nor a GPU."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastvit.extension import BuildInfo

CSRC = Path(__file__).parent.parent / "csrc"
sys.path.insert(0, str(CSRC))
import cuda_report  # noqa: E402
import libraries  # noqa: E402

VERSION = "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n"
# As CUTLASS names its kernels: from the middle of 2000 letters.
NAME = "_Z1kI35KernelTmaWarpSpecialized{}EEENS5_IJNSA_ILi128EEES_4GMMA28MMA_64x256x16_F32{}_SS{}E"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of a package with CUTLASS's headers, which is installed."""
    header = tmp_path / "source" / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text(VERSION)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found if name == "cutlass_library" else None
    )
    return tmp_path


def test_cutlass_is_for_hopper_alone(package):
    found = libraries.find_cutlass(("80", "90a"))
    assert found == libraries.Cutlass("4.2.0", package / "source" / "include")
    assert libraries.find_cutlass(("80", "100")) is None


def test_without_cutlass_there_is_none(package, monkeypatch):
    (package / "source" / "include" / "cutlass" / "version.h").unlink()
    assert libraries.find_cutlass(("90a",)) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert libraries.find_cutlass(("90a",)) is None


@pytest.fixture
def cuda(tmp_path, monkeypatch):
    """Writes what would be built for architectures, with CUTLASS or without, and returns it as text."""
    monkeypatch.setattr(libraries._Ninja, "link", lambda build, *rest, **how: "\n".join(build.lines))
    for name in (
        "torch/lib/libtorch_cuda.so",
        "nvidia/cu13/include/cublasLt.h",
        "nvidia/cu13/lib/libcublasLt.so.13",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def built(archs, cutlass):
        tools = libraries.Tools("c++", tmp_path / "torch", "nvcc")
        return libraries.build_cuda(tools, tmp_path / "work", archs, cutlass)

    return built


def test_hoppers_own_sources_are_built_for_hopper_with_cutlass(cuda):
    text = cuda(("80", "90a"), libraries.Cutlass("4.2.0", Path("cutlass")))
    sources = sorted(path.name for path in CSRC.glob(libraries.HOPPER_SOURCES))
    assert sources
    for name in sources:
        flags = text.partition(f"build {name}.o: nvcc")[2].split("build ", 1)[0]
        assert "code=sm_90a" in flags
        assert "sm_80" not in flags
        assert "-DNDEBUG" in flags
        assert "pool = large" in flags
    assert "-DFASTVIT_CUTLASS" in text.partition("build fused_products.cpp.o: nvcc")[2].split("build ", 1)[0]


def test_without_cutlass_the_portable_products_alone_are_built(cuda):
    text = cuda(("90a",), None)
    assert "build fused_products.cpp.o" in text
    assert "FASTVIT_CUTLASS" not in text
    assert "_sm90.cu" not in text


def test_build_information_names_cutlass():
    info = BuildInfo("0.1.0", "gcc 13", 201703, "2.14.1", "auto", ("90a",))
    assert str(info).endswith("CUDA architectures: 90a, CUTLASS: none")


def test_waiting_for_products_before_a_call_is_a_fault():
    said = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert cuda_report.parse_ptxas(said) == ([], [said])


def instructions(*lines):
    """As cuobjdump prints them, 16 bytes each."""
    return "".join(f"        /*{16 * i:04x}*/  {line} ;  /* 0x0 */\n" for i, line in enumerate(lines))


# Both kinds of warp of a product: one branches to 0x0040 and loads, the other multiplies and stores.
WARPS = ("HGMMA.64x256x16.F32 R24, gdesc[UR4]", "UTMASTG.3D [UR8], [UR12]", "EXIT")
LOADS = ("UTMALDG.3D [UR8], [UR4]", "EXIT")
WAITING = instructions("@P0 BRA 0x0040", *WARPS, "ACQBULK", *LOADS)
WITHOUT = instructions("@P0 BRA 0x0040", *WARPS, "NOP", *LOADS)
SOMETIMES = instructions("@P0 BRA 0x0040", *WARPS, "@!P1 BRA 0x0060", "ACQBULK", *LOADS)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (WAITING, None),
        (WITHOUT, "UTMALDG.3D at 0x0050"),
        (SOMETIMES, "UTMALDG.3D at 0x0060"),
        (instructions("@P0 ACQBULK", "LDG.E R7, desc[UR18][R8.64+0x20]"), "LDG.E at 0x0010"),
        (instructions("@P0 HGMMA.64x256x16.F32 R24", "STG.E [R8.64], R7"), "STG.E at 0x0010"),
        (instructions("BRA.U !UP0, 0x0020", "ACQBULK", "REDG.E [R8.64], R7"), "REDG.E at 0x0020"),
        (instructions("BSSY B0, 0x0030", "ACQBULK", "EXIT", "ATOMG.E R7, [R8.64]"), "ATOMG.E at 0x0030"),
        (instructions("BRA 0x0020", "LDG.E R7, [R8.64]", "LDS R7, [R8]", "STS [R8], R7", "EXIT"), None),
        (instructions("BRX R8 -0x10", "ACQBULK"), "BRX at 0x0000"),
    ],
)
def test_memory_that_is_touched_without_a_wait_is_found(text, found):
    assert cuda_report.touches_early(text) == found


def test_a_kernel_of_cutlass_multiplies_by_warp_groups_and_waits(tmp_path, monkeypatch):
    listing = {"one": WAITING, "two": instructions("EXIT"), "three": WITHOUT, "StreamKScheduler": WITHOUT}
    (tmp_path / "listing").write_text("".join(f"  Function : {name}\n{listing[name]}" for name in listing))
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!/bin/sh\ncat {tmp_path}/listing\n")
    tool.chmod(0o755)
    monkeypatch.setattr(cuda_report, "find_cuobjdump", lambda: str(tool))
    kernels = [cuda_report.Kernel(name) for name in (*listing, "not there")]
    assert cuda_report.wrong_instructions(tmp_path, kernels) == [
        "two: no HGMMA",
        "three: UTMALDG.3D at 0x0050 may come before ACQBULK",
        "not there: no HGMMA",
    ]
    monkeypatch.setattr(cuda_report, "find_cuobjdump", lambda: None)
    assert cuda_report.wrong_instructions(tmp_path, kernels)[0].startswith("no cuobjdump")


def test_a_kernel_of_cutlass_is_named_by_its_tile():
    names = [
        NAME.format("Pingpong", "BF16", "19PersistentScheduler"),
        NAME.format("Cooperative", "F16", "16StreamKScheduler"),
    ]
    expected = ["128 x 256 pingpong BF16", "128 x 256 streamk F16"]
    assert [cuda_report.demangled(names)[name] for name in names] == expected
