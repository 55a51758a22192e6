"""A block's ops past decisions that were made before: the same numbers, and never where one may differ."""

from unittest import mock

import pytest
import torch
from direct_blocks import DIM, KERNELS, block, kernels_by_torch, ordinary, tokens
from timm.layers import LayerNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit import backends, gpus, measurements, recording, triton_backend
from fastvit.layers import direct
from fastvit.layers.block import Block
from fastvit.ops import choices, native


@pytest.fixture(autouse=True)
def fresh():
    direct.forget()
    yield
    direct.forget()


@pytest.fixture
def quick():
    with kernels_by_torch():
        yield


@pytest.fixture
def resolved():
    """How often an op was resolved."""
    with mock.patch.object(backends, "resolve", mock.Mock(wraps=backends.resolve)) as resolve:
        yield resolve


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"qkv_bias": False, "proj_bias": False},
        {"init_values": 0.5},
        {"qk_norm": True, "norm_layer": LayerNorm},
        {"scale_mlp_norm": True, "drop_path": 0.5},
    ],
    ids=lambda how: "+".join(how) or "plain",
)
def test_the_second_call_asks_nothing_and_gives_the_same_numbers(resolved, how, mode):
    made, x = block(mode, **how), tokens(2)
    without = torch.inference_mode if mode == "inference" else torch.no_grad
    with without(), fastvit.use_backend(**KERNELS):
        expected = ordinary(lambda: made(x))
        first = made(x)
        before = resolved.call_count
        second = made(x)
    assert before == 8
    assert resolved.call_count == before
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    theirs = type(made).original.forward(made, x).detach()
    torch.testing.assert_close(second, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_under_autocast(quick, resolved, mode, monkeypatch):
    monkeypatch.setattr(triton_backend, "_machine", lambda tensor: None)  # no interpreter: torch in its place
    made, x = block(mode, init_values=0.5), tokens(2)
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        outside = [made(x) for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16):
            expected = ordinary(lambda: made(x))
            first, before = made(x), resolved.call_count
            assert torch.equal(made(x), first)
            assert torch.equal(first, expected)
            assert resolved.call_count == before
        assert torch.equal(made(x), outside[0])
    assert not torch.equal(first, outside[0])
    torch.testing.assert_close(first, outside[0], rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize(
    "how", [{}, {"init_values": 0.5, "qk_norm": True}], ids=lambda how: "+".join(how) or "plain"
)
def test_fastvits_own_block(resolved, how):
    made, x = Block(DIM, 2, **how).eval(), tokens(2)
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        expected = ordinary(lambda: made(x))
        first, before = made(x), resolved.call_count
        assert torch.equal(made(x), first)
        assert torch.equal(first, expected)
    assert resolved.call_count == before


class Looking(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


class Seeing(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **kwargs or {})


# What makes the ops decide again, though module and tokens are the same.
STATES = {
    "gradients": torch.enable_grad,
    "another backend": lambda: fastvit.use_backend("reference"),
    "another for one op": lambda: fastvit.use_backend(linear_residual="reference"),
    "a recorder": recording.recording,
    "another word than the tables'": lambda: choices.folding(False),
    "a dispatch mode": Seeing,
}


def test_tables_are_asked_once(quick):
    made, x = block("inference"), tokens()
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        for _ in range(2):
            made(x)
        with (
            mock.patch.object(choices, "_is_chosen", side_effect=AssertionError),
            mock.patch.object(native, "product", side_effect=AssertionError),
        ):
            made(x)
        measurements.clear()
        with mock.patch.object(backends, "resolve", side_effect=LookupError), pytest.raises(LookupError):
            made(x)


@pytest.mark.parametrize("state", STATES)
def test_another_state_is_decided_anew(quick, resolved, state):
    made, x = block("train"), tokens()
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        for _ in range(2):
            made(x)
        before = resolved.call_count
        with STATES[state]():
            out = made(x)
        assert resolved.call_count > before
        with STATES[state]():
            assert torch.equal(out, ordinary(lambda: made(x)))
        before = resolved.call_count
        made(x)
        assert resolved.call_count == before


# Interpreted kernels take no bfloat16; where a GPU is assumed none is interpreted.
@pytest.mark.parametrize(
    "state",
    [lambda: torch.autocast("cpu", torch.bfloat16), lambda: gpus.assume_arch("sm_90")],
    ids=["autocast", "an assumed GPU"],
)
def test_what_a_kernel_cannot_run_is_refused_after_it_has_run(quick, state):
    made, x = block("train"), tokens()
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        for _ in range(2):
            made(x)
        with state(), pytest.raises(fastvit.BackendUnavailable):
            made(x)


def test_a_dispatch_mode_sees_the_ops(quick):
    made, x = block("train"), tokens()
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        made(x)
        made(x)
        with Seeing() as mode:
            made(x)
    assert [name for name in mode.seen if name.startswith("fastvit.")] == [
        f"fastvit.{name}_fwd.default" for name in direct.KERNELS
    ]


def test_transforms_and_traces_are_the_originals(quick):
    made, x = block("train"), tokens(2)
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        for _ in range(2):
            expected = made(x)
    with torch.no_grad():
        traced = torch.jit.trace(made, x)
        torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-4)
        assert "fastvit::" not in str(traced.inlined_graph)
        mapped = torch.func.vmap(made, in_dims=0)(x[:, None])
        torch.testing.assert_close(mapped[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_tokens_of_another_shape_are_another_kind(quick, resolved):
    made = block("train")
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        for x in (tokens(), tokens(3), tokens(3)[:, :3], tokens(3)[:, ::2]):
            before = resolved.call_count
            out = made(x)
            assert (resolved.call_count > before) == (x.shape != (3, 3, DIM) or x.stride(1) == DIM)
            assert torch.equal(out, ordinary(lambda x=x: made(x)))


def test_stochastic_depth_at_work_is_drawn_by_the_ops(quick):
    made, x = block("train", drop_path=0.5), tokens(8)
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        for _ in range(2):
            made(x)
        made.train()
        torch.manual_seed(3)
        drawn = made(x)
        torch.manual_seed(3)
        assert torch.equal(drawn, ordinary(lambda: made(x)))
        assert not torch.equal(drawn, made.eval()(x))


def test_ops_that_accelerate_was_told_to_leave_are_left(quick, resolved):
    made, x = block("train"), tokens()
    fastvit.accelerate(made, ops=["attention"])
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        for _ in range(3):
            before = resolved.call_count
            made(x)
            assert resolved.call_count > before


def test_a_call_that_the_reference_serves_stays_with_it(quick):
    made, x = block("train"), tokens()
    with torch.no_grad(), fastvit.use_backend("reference"):
        for _ in range(3):
            out = made(x)
        with recording.recording() as recorder:
            made(x)
    assert {event.backend for event in recorder.events} == {"reference"}
    assert not any(direct._known.values())
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        torch.testing.assert_close(made(x), out, rtol=1e-4, atol=1e-4)


def test_a_call_that_fails_is_not_known(quick):
    made, x = block("train"), tokens()
    with torch.no_grad(), fastvit.use_backend(**KERNELS | {"layer_norm_mlp": "cuda"}):
        for _ in range(2):
            with pytest.raises(fastvit.BackendUnavailable):
                made(x)
    assert not direct._known


def test_a_function_mode_changes_nothing(quick):
    made, x = block("train"), tokens()
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        outs = [made(x) for _ in range(2)]
        with Looking():
            outs.append(made(x))
    assert all(torch.equal(outs[0], out) for out in outs)


def test_kinds_are_bounded(quick):
    made = block("train")
    few = mock.patch.object(direct, "MOST", 3)
    with torch.no_grad(), fastvit.use_backend(**KERNELS), few:
        for batch in range(1, 6):
            made(tokens(batch))
            assert 1 <= len(direct._known) <= 3


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_projections_that_lie_apart(quick, resolved, mode):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": DIM, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=16)).eval()
    made, x = fastvit.accelerate(model, mode), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        first = made(x).last_hidden_state
        before = resolved.call_count
        second = made(x).last_hidden_state
        assert [call.args[0] for call in resolved.call_args_list[before:]] == ["patch_embed"]
    assert torch.equal(first, second)
    assert len(direct._known) == 1
    assert None not in direct._known.values()
