"""attention in the CPU library: by the contract, calls out of the ordinary, and what it leaves to torch."""

import op_cases
import plain_ops
import pytest
import torch
from memory import guarded, poisoned_empty
from native_calls import needs_library
from op_checks import within_contract

import fastvit
from fastvit import BackendUnavailable, backends, ops, use_backend
from fastvit.ops import attention_native
from fastvit.ops.attention import attention_of_views
from fastvit.regimes import HEAD_DIMS, TOKENS

pytestmark = needs_library()
FP32 = torch.float32


@pytest.fixture(autouse=True)
def _cpp():
    with torch.no_grad(), use_backend(attention="cpp"):
        yield


def _float32(cell):
    return cell["dtype"] == FP32


# Pairwise over data, tokens and channels a head.
REGIMES = op_cases.regime_cells("attention", _float32, tokens=TOKENS, head_dim=HEAD_DIMS)
# Options pairwise, at sizes that neither six queries, twenty-four nor sixteen keys or channels divide.
SIZES = [{"tokens": 50, "head_dim": 22}, {"tokens": 35, "head_dim": 72}, {"tokens": 7, "head_dim": 8}]
OPTIONS = op_cases.cells("attention", dtype=(FP32,))
CELLS = [cell | SIZES[place % len(SIZES)] for place, cell in enumerate(OPTIONS)]


@pytest.mark.parametrize("cell", REGIMES, ids=op_cases.name)
def test_every_regime_is_within_the_contract(cell):
    call = op_cases.regime_call("attention", batch=2, heads=3, **cell)
    within_contract("attention", call, floor_only=cell["tokens"] <= 2)


@pytest.mark.parametrize("cell", CELLS, ids=op_cases.name)
def test_every_option_is_within_the_contract(cell):
    within_contract("attention", op_cases.build("attention", batch=2, **cell))


@pytest.mark.parametrize("kind", ["bool", "float", "keys"])
def test_a_row_whose_every_key_is_masked_gives_zeros(kind):
    call = op_cases.build("attention", dtype=FP32, batch=2, tokens=21)
    seen = torch.ones(21, 21, dtype=torch.bool)
    seen[5] = False
    if kind == "keys":
        call["key_mask"] = torch.tensor([[True], [False]]).expand(2, 21)
    else:
        call["attn_mask"] = seen if kind == "bool" else torch.zeros(21, 21).masked_fill(~seen, -torch.inf)
    out = ops.attention(**call)
    dead = out[1] if kind == "keys" else out[:, 5]
    assert dead.count_nonzero() == 0
    assert torch.equal(out == 0, plain_ops.attention(**call) == 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_what_is_not_finite_goes_where_torch_lets_it_go(value, part):
    call = op_cases.build("attention", dtype=FP32, batch=2, tokens=30)
    qkv = call["qkv"].unflatten(-1, (3, call["num_heads"], -1)).clone()
    qkv[1, 7, "qkv".index(part), 0, 3] = value
    call["qkv"] = qkv.flatten(2)
    ours = ops.attention(**call)
    with use_backend("reference"):
        torchs = ops.attention(**call)
    assert torch.equal(ours.isnan(), torchs.isnan())
    assert torch.equal(ours.isinf(), torchs.isinf())


def test_large_logits_neither_overflow_nor_vanish():
    qkv = 60 * torch.randn(1, 40, 3 * 2 * 32, generator=torch.Generator().manual_seed(0))
    out = ops.attention(qkv, 2)
    # Most weights are 0 or 1 then: each row is one of the values, or between two.
    assert out.isfinite().all()
    assert (out - plain_ops.attention(qkv.double(), 2)).abs().max() < 1e-2 * 60


def test_reads_and_writes_where_it_should():
    for tokens, head_dim in ((50, 22), (24, 16), (1, 1), (17, 64)):
        call = op_cases.build(
            "attention", dtype=FP32, batch=2, tokens=tokens, head_dim=head_dim, mask="float"
        )
        expected = ops.attention(**call)
        kept = op_cases.converted(call, guarded)
        with poisoned_empty():
            assert torch.equal(ops.attention(**kept), expected)


def test_views_with_any_strides():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 8, 31, generator=generator).permute(0, 3, 1, 2) for _ in range(3))
    with use_backend("reference"):
        expected = attention_of_views(q, k, v)
    torch.testing.assert_close(attention_of_views(q, k, v), expected)
    cross = attention_of_views(q[:, :9], k, v)
    torch.testing.assert_close(cross, expected[:, :9])


def test_the_bits_do_not_depend_on_the_threads(threads):
    call = op_cases.build("attention", dtype=FP32, batch=1, heads=2, tokens=197, head_dim=64, mask="bool")
    found = []
    for count in (1, 2, 2):
        threads(count)
        found.append(ops.attention(**call))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("empty", ["batch", "tokens"])
def test_nothing_in_gives_nothing(empty):
    qkv = torch.randn(*(0 if name == empty else 2 for name in ("batch", "tokens")), 24)
    assert ops.attention(qkv, 2).shape == (*qkv.shape[:2], 8)


# What it does not serve: a reason where it is named for attention, torch's own op where it is named for all.
def _training(qkv):
    return {"qkv": qkv.requires_grad_()}


UNSERVED = {
    "it gives no gradients": (_training, {}),
    "no dropout": (lambda qkv: {"qkv": qkv}, {"dropout_p": 0.5}),
    "takes float32, not bfloat16": (lambda qkv: {"qkv": qkv.bfloat16()}, {}),
    "takes float32, not float64": (lambda qkv: {"qkv": qkv.double()}, {}),
}


@pytest.mark.parametrize("reason", UNSERVED)
def test_what_it_does_not_serve(reason):
    given, options = UNSERVED[reason]
    call = given(torch.randn(1, 5, 24)) | options | {"num_heads": 2}
    with torch.enable_grad():
        with pytest.raises(BackendUnavailable, match=reason):
            ops.attention(**call)
        with use_backend("cpp"):
            ours = ops.attention(**call)
    assert ours.dtype == call["qkv"].dtype
    assert ours.requires_grad == call["qkv"].requires_grad


def test_values_of_another_width_and_no_keys_at_all():
    q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 4)
    with pytest.raises(BackendUnavailable, match="the same heads and channels"):
        attention_of_views(q, k, v)
    assert attention_of_views(q, k[:, :0], k[:, :0]).count_nonzero() == 0
    with pytest.raises(RuntimeError, match="k and v differ from q in shape"):
        attention_native.attend(*(t.transpose(1, 2) for t in (q, k, v)), None, 0.0, False, None)


def test_under_autocast_it_is_torchs():
    qkv = torch.randn(1, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(BackendUnavailable, match="takes float32, not bfloat16"):
            ops.attention(qkv, 2)
        with use_backend("cpp"):
            assert ops.attention(qkv, 2).dtype == torch.bfloat16


def test_named_for_all_it_serves_what_it_can(monkeypatch):
    seen = []
    monkeypatch.setattr(attention_native, "attend", lambda *a, **o: seen.append(a) or a[2])
    for backend in ("cpp", "reference"):
        with use_backend(backend):
            ops.attention(torch.randn(1, 5, 24), 2)
    assert len(seen) == 1


def test_the_tables_decide_for_auto(monkeypatch):
    asked = []

    def refusal(*question):
        asked.append(question)
        return None if question[4] == "" else "not measured"

    monkeypatch.setattr(backends.native_backend.measurements, "refusal", refusal)
    views = [torch.randn(2, 5, 3, 8) for _ in range(3)]
    with use_backend("auto"):
        assert backends.resolve("attention", *views) == "cpp"
        assert backends.resolve("attention", *views, is_causal=True) == "reference"
        assert backends.resolve("attention", *views, key_mask=torch.ones(2, 5).bool()) == "reference"
    sizes = {"head_dim": 8, "tokens": 5, "batch_heads": 6}
    assert [question[4:] for question in asked] == [("", sizes), ("causal", sizes), ("mask", sizes)]


def test_the_librarys_own_check_of_dtypes():
    with pytest.raises(RuntimeError, match="attention of .* in float64: the CPU library has float32 alone"):
        attention_native.attend(*[torch.randn(1, 1, 2, 8).double()] * 3, None, 0.0, False, None)


def test_a_model_runs_on_it():
    model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    images = torch.randn(2, 3, 32, 32)
    with use_backend("cpp"):
        ours = model(images)
    with use_backend("reference"):
        torch.testing.assert_close(ours, model(images), rtol=1e-4, atol=1e-5)
