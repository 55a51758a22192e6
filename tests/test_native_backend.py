"""Where the compiled ops can run, what is said where they cannot, and where "auto" takes them."""

import shutil
import subprocess
from types import SimpleNamespace

import op_cases
import pytest
import torch
from native_calls import OPS, needs_library
from torch._subclasses import FakeTensorMode

from fastvit import BackendUnavailable, backends, extension, measurements, native_backend, ops, use_backend
from fastvit.backends import resolve
from fastvit.errors import ExtensionMismatch, ExtensionNotBuilt

LINEAR, RESIDUAL, MLP = OPS
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.setattr(backends, "_environment", {})
    monkeypatch.setattr(backends, "_disabled", False)
    monkeypatch.setattr(backends, "_unmeasured", False)
    monkeypatch.setattr(measurements, "_tables", {})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An installation with no library, for the test to put one in."""
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    monkeypatch.setattr(extension, "why_no_ops", extension.why_no_ops.__wrapped__)
    return tmp_path


@pytest.fixture
def gpu(monkeypatch):
    """This machine with a GPU of a chosen capability and a library for chosen ones; its tensors are fake."""
    facts = SimpleNamespace(name=H100, major=9, minor=0, archs=("80", "90a"))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(extension, "why_no_ops", lambda device: None)
    monkeypatch.setattr(extension, "cuda_archs", lambda: facts.archs)
    monkeypatch.setattr(native_backend, "machine_name", lambda device: H100)
    native_backend._no_code.cache_clear()
    with FakeTensorMode():
        yield facts
    native_backend._no_code.cache_clear()


def call(op, dtype=torch.float32, device="cpu", **options):
    return op_cases.converted(op_cases.build(op, dtype=dtype, **options), lambda t: t.to(device))


def fake(op, dtype=torch.float16):
    """Arguments on a GPU that is not there."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        given = op_cases.build(op, dtype=dtype)
    return op_cases.converted(given, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))


def refused(op, given):
    """The reason in the one line with which a named backend raises."""
    with use_backend("cpp"), pytest.raises(BackendUnavailable) as raised:
        getattr(ops, op)(**given)
    message = str(raised.value)
    assert "\n" not in message
    return message.removeprefix(f"{op}: backend 'cpp' cannot run: ")


def measured(monkeypatch, *rows):
    tables = {}
    for row in rows:
        key, parsed = measurements._parsed(row)
        tables.setdefault(key, []).append(parsed)
    monkeypatch.setattr(measurements, "_tables", tables)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("note", ["no C++ compiler was found at install time", None])
def test_an_absent_library_is_the_installers_reason(folder, op, note):
    if note:
        (folder / "_fastvit_cpu.missing").write_text(f"fastvit._fastvit_cpu is not built: {note}\n")
    reason = refused(op, call(op))
    assert reason == native_backend.can_run(op, "cpu")
    expected = f"fastvit._fastvit_cpu is not built: {note}" if note else "was not installed"
    assert expected in reason
    assert isinstance(extension.why_no_ops("cpu"), ExtensionNotBuilt)
    with use_backend("auto"):
        assert resolve(op, **call(op)) == "reference"
        assert getattr(ops, op)(**call(op)).isfinite().all()


@pytest.mark.parametrize(
    "content", [b"", b"not a library", b"\x7fELF" + b"\0" * 60], ids=["empty", "text", "ELF"]
)
def test_a_broken_library_gives_the_loaders_text(folder, content):
    (folder / "_fastvit_cpu.so").write_bytes(content)
    reason = refused(LINEAR, call(LINEAR))
    assert reason.startswith(f"_fastvit_cpu.so does not load here, beside torch {torch.__version__}: ")
    assert any(text in reason for text in ("file too short", "invalid ELF header", "wrong ELF class"))


def test_an_undefined_symbol_gives_the_loaders_text(folder):
    if COMPILER is None:
        pytest.skip("no C compiler")
    (folder / "library.c").write_text("void elsewhere(void); void here(void) { elsewhere(); }")
    command = [COMPILER, "-shared", "-fPIC", "-Wl,-z,now", "library.c", "-o", "_fastvit_cpu.so"]
    subprocess.run(command, cwd=folder, check=True)
    assert "undefined symbol: elsewhere" in refused(LINEAR, call(LINEAR))
    assert isinstance(extension.why_no_ops("cpu"), ExtensionMismatch)


@needs_library()
@pytest.mark.parametrize("op", OPS)
def test_what_the_cpu_library_does_not_take(op):
    assert native_backend.can_run(op, "cpu") is None
    assert native_backend.can_run(op, "cpu", **call(op)) is None
    assert refused(op, call(op, torch.float16)) == "it takes float32, bfloat16, float64, not float16"
    assert refused(op, call(op, device="meta")) == "it is for CPUs; the tensors are on meta"
    if op != LINEAR:
        scaled = call(op)
        scaled["sample_scale"].requires_grad_()
        assert refused(op, scaled) == "it gives no gradient to sample_scale"


@needs_library()
@pytest.mark.parametrize("op", OPS)
def test_auto_takes_what_was_measured_and_no_slower(monkeypatch, op):
    given = call(op)
    machine = native_backend.machine_name("cpu")
    sizes = {"width": given["fc1_weight" if op == MLP else "weight"].shape[1 if op != RESIDUAL else 0]}
    beside = "" if op == LINEAR else "scaled"
    row = {"op": op, "gpu": machine, "dtype": "float32", "options": beside, "ok": True, "ratio": 1.2} | sizes
    forward, backward = row | {"direction": "fwd"}, row | {"direction": "bwd"}
    with use_backend("auto"):
        measured(monkeypatch, forward)
        assert resolve(op, **given) == "cpp"
        assert resolve(op, **given | {"x": given["x"].clone().requires_grad_()}) == "reference"
        assert resolve(op, **call(op, torch.bfloat16)) == "reference"
        assert resolve(op, **call(op, width=16)) == "reference"
        measured(monkeypatch, forward, backward)
        assert resolve(op, **given | {"x": given["x"].clone().requires_grad_()}) == "cpp"
        measured(monkeypatch, forward | {"ratio": 0.9})
        assert resolve(op, **given) == "reference"
        assert "measured at 0.90 times torch's speed" in native_backend.worth(op, "cpu", **given)
        measured(monkeypatch, forward | {"ok": False})
        assert "miss the parity contract" in native_backend.worth(op, "cpu", **given)
        monkeypatch.setattr(backends, "_unmeasured", True)
        assert resolve(op, **given) == "cpp"


@needs_library()
@pytest.mark.parametrize("op", OPS)
def test_a_compiler_traces_the_choice(op):
    torch.compiler.reset()
    compiled = torch.compile(lambda given: resolve(op, **given), fullgraph=True, backend="eager")
    for backend, chosen in (("cpp", "cpp"), ("auto", "reference")):
        with use_backend(backend):
            assert compiled(call(op)) == chosen


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((7, 5), ("80", "90a"), False),
        ((8, 0), ("80",), True),
        ((8, 6), ("80",), True),
        ((9, 0), ("90a",), True),
        ((9, 0), ("80",), False),
        ((12, 1), ("120",), True),
        ((99, 0), ("80", "90a", "120"), False),
        ((8, 0), (), False),
    ],
)
def test_gpus_that_the_library_has_code_for(gpu, capability, archs, runs):
    (gpu.major, gpu.minor), gpu.archs = capability, archs
    reason = native_backend.can_run(LINEAR, "cuda", **fake(LINEAR))
    built = ", ".join(f"sm_{arch}" for arch in archs) or "nothing"
    found = f"{H100} is sm_{gpu.major}{gpu.minor}, and the library is built for {built}"
    assert reason == (None if runs else found)


@pytest.mark.parametrize("op", OPS)
def test_what_the_cuda_library_does_not_take(gpu, op):
    assert native_backend.can_run(op, "cuda", **fake(op)) is None
    assert native_backend.can_run(op, "cpu", **fake(op)) == "it is for CPUs; the tensors are on cuda"
    reason = native_backend.can_run(op, "cuda", **fake(op, torch.float64))
    assert reason == "it takes float16, bfloat16, float32, not float64"


def test_a_machine_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert native_backend.can_run(MLP, "cuda") == "this torch is built without CUDA"
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(extension, "why_no_ops", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native_backend.can_run(MLP, "cuda") == "it needs a CUDA GPU; torch finds none"
