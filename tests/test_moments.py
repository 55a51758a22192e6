"""The moments of tokens that the ops give and take, and blocks hand on, in the CPU library."""

import op_cases
import pytest
import torch
from native_calls import leaves, needs_library
from op_checks import within_contract
from torch._subclasses import FakeTensorMode

from fastvit import accelerate, measurements, native_backend, ops, use_backend
from fastvit.layers import Block, halves
from fastvit.ops import choices, native
from fastvit.regimes import regimes_of

pytestmark = needs_library()
LINEAR, RESIDUAL, MLP = "layer_norm_linear", "linear_residual", "layer_norm_mlp"
GIVING, TAKING = (RESIDUAL, MLP), (LINEAR, MLP)
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
SIZES = {"batch": 3, "tokens": 27, "width": 136}


@pytest.fixture(autouse=True)
def _giving():
    with use_backend("cpp"), choices.giving_moments(True):
        yield


def build(op, dtype=FP32, **options):
    return op_cases.build(op, dtype=dtype, **SIZES, **options)


def moments_of(x):
    """In float64: of each 64 channels the mean and the sum of the squares after it, [parts, B * N, 2]."""
    parts = x.double().flatten(0, 1).split(native.MOMENT_COLUMNS, 1)
    return torch.stack([torch.stack([p.mean(1), p.var(1, correction=0) * p.shape[1]], 1) for p in parts])


@pytest.mark.parametrize("op", GIVING)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_moments_are_of_what_is_returned(op, dtype, frozen):
    call, function = build(op, dtype), getattr(ops, op)
    with torch.no_grad():
        out, moments = function(**call, frozen=frozen, with_moments=True)
        assert torch.equal(out, function(**call, frozen=frozen))
    assert moments.dtype == (FP64 if dtype == FP64 else FP32)
    torch.testing.assert_close(moments.double(), moments_of(out), rtol=1e-5, atol=1e-6)


# Also where no kernel has them beside the product: stochastic depth, LayerScale, and neither.
@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("sample_scale", [False, True])
def test_whatever_is_added_they_are_of_the_sum(layer_scale, sample_scale):
    call = build(RESIDUAL, layer_scale=layer_scale, sample_scale=sample_scale)
    with torch.no_grad():
        out, moments = ops.linear_residual(**call, with_moments=True)
    torch.testing.assert_close(moments.double(), moments_of(out), rtol=1e-5, atol=1e-6)


def taking(op):
    """The op with the moments of its tokens, in the type that they have in the library."""

    def call(x, *args, **options):
        wide = FP64 if x.dtype == FP64 else FP32
        with torch.no_grad():
            return getattr(ops, op)(x, *args, **options, moments=moments_of(x).to(wide))

    return call


@pytest.mark.parametrize("op", TAKING)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_a_norm_of_given_moments_is_within_the_contract(op, norm, dtype):
    within_contract(op, build(op, dtype, norm=norm, affine="weight"), taking(op))


CELLS = [(op, dtype, regime) for op in TAKING for dtype in (FP32, BF16) for regime in regimes_of(op, dtype)]


@pytest.mark.parametrize(("op", "dtype", "regime"), CELLS)
def test_in_every_regime(op, dtype, regime):
    call = op_cases.regime_call(op, regime, dtype, batch=3, tokens=27)
    within_contract(op, call, taking(op), offset_regime=regime == "mean_offset")


# Of other moments another result: it is them that are read, and not the tokens once more.
@pytest.mark.parametrize("op", TAKING)
def test_given_moments_are_read(op):
    call, function = build(op), getattr(ops, op)
    moments = moments_of(call["x"]).float()
    with torch.no_grad():
        out = function(**call)
        torch.testing.assert_close(function(**call, moments=moments), out)
        assert not torch.allclose(function(**call, moments=moments + 1), out, atol=1e-2)


@pytest.mark.parametrize("op", TAKING)
@pytest.mark.parametrize(
    "change", [lambda m: m[1:], lambda m: m[:, 1:], lambda m: m.double(), lambda m: m[0]]
)
def test_moments_of_other_tokens_are_refused(op, change):
    call = build(op)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"moments do not fit rows of \[81, 136\]"):
        getattr(ops, op)(**call, moments=change(moments_of(call["x"]).float()))


@pytest.mark.parametrize("op", GIVING)
def test_there_are_none_where_gradients_are_recorded(op):
    out, moments = getattr(ops, op)(**leaves(build(op)), with_moments=True)
    assert moments is None
    out.sum().backward()


@pytest.mark.parametrize("op", TAKING)
def test_a_recorded_norm_takes_its_own(op):
    call = build(op)
    wrong = moments_of(call["x"]).float() + 1
    given = leaves(call)
    assert torch.equal(getattr(ops, op)(**given, moments=wrong), getattr(ops, op)(**given))


@pytest.mark.parametrize("op", GIVING)
def test_there_are_none_unless_they_were_measured_to_be_worth_it(op):
    with torch.no_grad(), choices.giving_moments(False):
        assert getattr(ops, op)(**build(op), with_moments=True)[1] is None
    with torch.no_grad(), use_backend("reference"):
        assert getattr(ops, op)(**build(op), with_moments=True)[1] is None


@pytest.mark.parametrize("op", GIVING)
def test_on_a_gpu_a_table_decides(op, monkeypatch):
    row = {"op": op, "gpu": "NVIDIA H100", "dtype": "bfloat16", "options": "moments", "ok": True}
    row |= {"width": 768, "rows": [1, 1576], "ratio": 1.1, "direction": "fwd"}
    monkeypatch.setattr(native_backend, "machine_name", lambda device: row["gpu"])
    monkeypatch.setattr(choices, "_decided", {"moments": []})
    with FakeTensorMode():
        x = torch.empty(8, 197, 768, dtype=BF16, device="cuda")

    def chosen(**changes):
        key, parsed = measurements._parsed(row | changes)
        monkeypatch.setattr(measurements, "_tables", {key: (parsed,)})
        return choices.gives_moments(op, x, 768, BF16)

    assert chosen()
    for change in ({"ratio": 0.9}, {"ok": False}, {"options": "folded"}, {"width": 384}):
        assert not chosen(**change)
    assert not choices.gives_moments(op, torch.empty(8, 197, 768), 768, FP32)


@pytest.mark.parametrize("op", GIVING)
def test_a_compiler_knows_their_shape(op):
    call, function = build(op), getattr(ops, op)

    def run(call):
        out, moments = function(**call, with_moments=True)
        return ops.layer_norm_linear(out, None, None, torch.eye(SIZES["width"]), moments=moments), moments

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for found, expected in zip(compiled(call), run(call), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.fixture
def handed(monkeypatch):
    """The moments that came to the MLP half, call by call."""
    seen, original = [], ops.layer_norm_mlp

    def watched(*args, moments=None, **options):
        seen.append(moments)
        return original(*args, moments=moments, **options)

    monkeypatch.setattr(ops, "layer_norm_mlp", watched)
    return seen


def frozen_blocks():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block(136, 4, init_values=0.5) for _ in range(2))).eval()
    return accelerate(model, mode="inference")


X = torch.randn(2, 27, 136, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_block_hands_them_to_its_mlp(handed, mode):
    model = frozen_blocks()
    with mode():
        out = model(X)
        with choices.giving_moments(False):
            torch.testing.assert_close(out, model(X))
    assert [moments is not None for moments in handed] == [True, True, False, False]


def test_a_block_that_records_gradients_hands_nothing_on(handed):
    frozen_blocks()(X).sum().backward()
    assert handed == [None, None]


def test_tokens_that_were_written_to_have_none(handed):
    model = frozen_blocks()[0]
    with torch.no_grad():
        tokens = model._attention_half(X, None, False)
        tokens += 1
        out = model._mlp_half(tokens)
        assert torch.equal(out, model._mlp_half(tokens.clone()))
    assert handed == [None, None]


def test_other_tokens_have_none_and_what_was_handed_on_is_read_once(handed):
    model = frozen_blocks()[0]
    with torch.no_grad():
        tokens = model._attention_half(X, None, False)
        model._mlp_half(tokens.clone())
        model._mlp_half(tokens)
    assert handed == [None, None]
    assert halves._between.handed is None


def test_a_compiled_block_is_as_before(handed):
    model = frozen_blocks()[0]
    with torch.no_grad():
        expected = model(X)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(X), expected)
