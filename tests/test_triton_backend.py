"""Where the Triton kernels can run, and where "auto" takes them; GPUs are made up, tensors on them fake."""

import sys
from types import SimpleNamespace

import pytest
import torch
from test_backends_environment import python
from torch._subclasses import FakeTensorMode

from fastvit import BackendUnavailable, backends, measurements, ops, triton_backend, use_backend
from fastvit.backends import describe, resolve

H100 = "NVIDIA H100 80GB HBM3"
ROW = {"op": "attention", "gpu": H100, "dtype": "float16", "direction": "fwd", "options": "", "ok": True}


@pytest.fixture
def gpu(monkeypatch):
    """This machine with a GPU of a chosen capability, on which tensors are fake."""
    facts = SimpleNamespace(name=H100, major=9, minor=0)
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(triton_backend, "_installed", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(measurements, "_tables", {})
    monkeypatch.setattr(backends, "_environment", {})
    monkeypatch.setattr(backends, "_disabled", False)
    monkeypatch.setattr(backends, "_unmeasured", False)
    with FakeTensorMode():
        yield facts


def without_a_call(monkeypatch, ask):
    """The answer for any call on this machine. Only here torch finds the GPU: fake tensors would start it."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        return ask()


def heads(dtype=torch.float16, head_dim=64, device="cuda", **options):
    return torch.empty(2, 197, 12, head_dim, dtype=dtype, device=device, **options)


def measured(monkeypatch, *rows):
    tables = {}
    for row in rows:
        key, parsed = measurements._parsed(ROW | row)
        tables.setdefault(key, []).append(parsed)
    monkeypatch.setattr(measurements, "_tables", tables)


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True), ((99, 0), True)],
)
def test_gpus_from_ampere_on(gpu, monkeypatch, capability, runs):
    gpu.major, gpu.minor = capability
    reason = triton_backend.can_run_attention(heads())
    images, weight = torch.empty(1, 3, 32, 32, device="cuda"), torch.empty(8, 3, 16, 16, device="cuda")
    assert triton_backend.can_run_patch_embed(images, weight) == reason
    assert without_a_call(monkeypatch, triton_backend.can_run_attention) == reason
    if runs:
        assert reason is None
    else:
        found = ".".join(map(str, capability))
        assert reason == f"{H100} has compute capability {found}; the kernels need 8.0"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout_p": 0.1}, "its kernels have no dropout of attention weights"),
        ({"is_causal": True}, "its kernels have no causal form"),
        ({"scale": 0.0}, "its kernels need a scale above 0, not 0.0"),
        ({"scale": -1.0}, "its kernels need a scale above 0, not -1.0"),
        ({"scale": float("nan")}, "its kernels need a scale above 0, not nan"),
        ({"scale": 0.5, "qk_norm": "rms_norm", "num_prefix_tokens": 1}, None),
    ],
)
def test_options_that_the_kernels_lack(gpu, options, reason):
    assert triton_backend.can_run_attention(*[heads()] * 3, **options) == reason


def test_tensors_that_the_kernels_do_not_take(gpu):
    can_run = triton_backend.can_run_attention
    assert (
        can_run(heads(torch.float64)) == "its kernels take float16, bfloat16 and float32, not torch.float64"
    )
    assert can_run(heads(head_dim=264)) == "its kernels take up to 256 channels a head, not 264"
    assert can_run(heads(head_dim=256)) is None
    assert can_run(heads(device="meta")) == "meta tensors have no data"
    assert can_run(heads(device="cpu")) == "Triton needs a CUDA GPU; the tensors are on cpu"
    assert (
        triton_backend.can_run_patch_embed(*[torch.empty(1, 1, 1, 1, device="cuda").double()] * 2) is not None
    )


def test_wide_heads_are_refused_before_any_launch():
    message = "attention: backend 'triton' cannot run: its kernels take up to 256 channels a head, not 260"
    with use_backend("triton"), pytest.raises(BackendUnavailable) as raised:
        ops.attention(torch.zeros(1, 2, 3 * 260), 1)
    assert str(raised.value) == message


def test_machines_that_have_no_triton(gpu, monkeypatch):
    monkeypatch.undo()
    triton_backend._installed.cache_clear()
    monkeypatch.setattr(sys, "platform", "win32")
    assert triton_backend.can_run_attention() == "Triton runs on Linux; this is win32"
    monkeypatch.undo()
    triton_backend._installed.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert triton_backend.can_run_attention() == "Triton is not installed"
    triton_backend._installed.cache_clear()


def test_interpreted_kernels_take_no_bfloat16(monkeypatch):
    monkeypatch.setattr(triton_backend, "INTERPRETED", True)
    q = torch.zeros(1, 2, 1, 8)
    assert triton_backend.can_run_attention(q, q, q) is None
    assert "bfloat16 wrongly" in triton_backend.can_run_attention(*[q.bfloat16()] * 3)


def test_transforms_of_torch_func_run_torchs_own_op():
    qkv = torch.randn(3, 1, 5, 24)
    assert torch.func.vmap(lambda x: ops.attention(x, 2))(qkv).shape == (3, 1, 5, 8)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="torch.func"):
        torch.func.grad(lambda x: ops.attention(x, 2).sum())(qkv[0])


def test_auto_takes_what_was_measured(gpu, monkeypatch):
    q = [heads()] * 3
    assert resolve("attention", *q) == "reference"
    measured(monkeypatch, {"head_dim": 64, "tokens": [1, 272], "batch_heads": [1, None], "ratio": 1.2})
    assert resolve("attention", *q) == "triton"
    for other in ([heads(torch.bfloat16)] * 3, [heads(head_dim=72)] * 3, [heads(requires_grad=True)] * 3):
        assert resolve("attention", *other) == "reference"
    assert resolve("attention", *q, rope_cos=heads(), rope_sin=heads()) == "reference"
    measured(monkeypatch, {"options": "key_mask+norm", "ratio": 1.0}, {"ratio": 0.9})
    assert resolve("attention", *q, key_mask=heads(), qk_norm="rms_norm") == "triton"
    assert resolve("attention", *q) == "reference"


def test_auto_of_patch_embed(gpu, monkeypatch):
    images = torch.empty(2, 3, 224, 224, dtype=torch.uint8, device="cuda")
    weight = torch.empty(768, 3, 16, 16, dtype=torch.float16, device="cuda")
    assert resolve("patch_embed", images, weight) == "reference"
    sizes = {"patch": 16, "patch_width": 16, "channels": 3, "width": 768, "rows": [1, None]}
    measured(monkeypatch, {"op": "patch_embed", "options": "bytes", "ratio": 2.5} | sizes)
    assert resolve("patch_embed", images, weight) == "triton"
    assert resolve("patch_embed", images.half(), weight) == "reference"


def test_float32_is_judged_by_its_precision(gpu, monkeypatch):
    measured(monkeypatch, {"dtype": "tf32", "ratio": 1.1})
    before = torch.get_float32_matmul_precision()
    try:
        for precision, chosen in (("high", "triton"), ("highest", "reference")):
            torch.set_float32_matmul_precision(precision)
            assert resolve("attention", *[heads(torch.float32)] * 3) == chosen
            with torch.backends.cudnn.flags(allow_tf32=chosen != "triton"):
                assert triton_backend.tf32("patch_embed") == (chosen != "triton")
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_is_said_about_it(gpu, monkeypatch):
    # The others would be asked about these arguments too, and the CPU's row speaks for itself.
    rows = tuple(row for row in backends.TABLE["attention"] if row.device != "cpu")
    monkeypatch.setattr(backends, "TABLE", {"attention": rows})

    def why(*call):
        return {op: text for op, _, text in describe(*call)}["attention"]

    unmeasured = f"triton: not measured on {H100}"
    assert without_a_call(monkeypatch, why) == f"{unmeasured}; FASTVIT_UNMEASURED=1 uses it all the same"
    assert why(heads()).startswith(f"{unmeasured} at head_dim 64, N = 197; FASTVIT_UNMEASURED=1")
    measured(monkeypatch, {"ratio": 0.85})
    assert why(heads()).startswith(f"triton: measured at 0.85 times torch's speed on {H100} at head_dim 64")
    measured(monkeypatch, {"ratio": 1.0})
    assert without_a_call(monkeypatch, why) == why(heads()) == "first in the table"
    measured(monkeypatch)
    monkeypatch.setattr(backends, "_unmeasured", True)
    assert resolve("attention", heads()) == "triton"


def test_unmeasured_is_read_from_the_environment():
    code = """
import torch
from fastvit.backends import resolve
x = torch.zeros(1, 2, 1, 8)
print(resolve("attention", x, x, x))
"""
    assert python(code, TRITON_INTERPRET="1") == ["reference"]
    assert python(code, TRITON_INTERPRET="1", FASTVIT_UNMEASURED="1") == ["triton"]
