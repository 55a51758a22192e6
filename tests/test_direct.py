"""A block's ops past decisions that were made before: the same numbers, and never where one may differ."""

from unittest import mock

import pytest
import torch
from timm.layers import Attention, LayerNorm
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit import backends, gpus, recording
from fastvit.layers import direct
from fastvit.reference import attention as reference
from fastvit_kernels import attention

KERNELS = {"attention": "triton", **dict.fromkeys(direct.KERNELS.keys() - {"attention"}, "cpp")}
DIM, HEADS, TOKENS = 32, 2, 5


@pytest.fixture(autouse=True)
def fresh():
    direct.forget()
    yield
    direct.forget()


def block(mode="inference", dim=DIM, **how):
    torch.manual_seed(0)
    made = Block(dim, HEADS, **{"qkv_bias": True, **how}).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return fastvit.accelerate(made, mode)


def tokens(batch=1, dim=DIM, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(batch, TOKENS, dim).to(dtype)


@pytest.fixture
def quick():
    """The Triton kernels' numbers by torch: the interpreter takes its time."""

    def of_views(q, k, v, *, with_lse, precision, **options):
        return reference(q, k, v, **options), None

    def packed(qkv, num_heads, options):
        views = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
        return of_views(*views, with_lse=False, **options._asdict())[0]

    with mock.patch.multiple(attention, attention_fwd=of_views, attention_packed=packed):
        yield


@pytest.fixture
def resolved():
    """How often an op was resolved."""
    with mock.patch.object(backends, "resolve", mock.Mock(wraps=backends.resolve)) as resolve:
        yield resolve


def ordinary(call):
    with mock.patch.object(direct, "_kind", return_value=None):
        return call()


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


class Typed(torch.Tensor):
    pass


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
    "a dispatch mode": Seeing,
}


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
    "state", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: gpus.assume_arch("sm_90")], ids=str
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


def replaced(made, name, value):
    parent, _, last = name.rpartition(".")
    setattr(made.get_submodule(parent), last, value)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def hooked(made):
    made.attn.proj.register_forward_hook(lambda module, args, out: out + 1)


def pruned(made):
    prune.random_unstructured(made.mlp.fc1, "weight", 0.5)


def in_half(made):
    for parameter in made.parameters():
        parameter.data = parameter.data.half()


def typed(made):
    weight = nn.Parameter(made.mlp.fc2.weight.detach().as_subclass(Typed), requires_grad=False)
    made.mlp.fc2.weight = weight


EDITS = {
    "a hook": hooked,
    "pruning": pruned,
    "an activation": lambda made: replaced(made, "mlp.act", nn.SiLU()),
    "an unknown activation": lambda made: replaced(made, "mlp.act", Twice()),
    "a weight": lambda made: replaced(made, "attn.qkv.weight", nn.Parameter(torch.ones(3 * DIM, DIM))),
    "a weight's memory": lambda made: setattr(made.norm2.weight, "data", torch.full((DIM,), 3.0)),
    "numbers": lambda made: made.attn.proj.weight.data.mul_(2),
    "no bias": lambda made: replaced(made, "attn.proj.bias", None),
    "eps": lambda made: replaced(made, "norm1.eps", 0.5),
    "heads": lambda made: (replaced(made, "attn.num_heads", 4), replaced(made, "attn.head_dim", 8)),
    "a wider MLP": lambda made: replaced(made, "mlp", block(mlp_ratio=3.0).mlp),
    "a norm": lambda made: replaced(made, "norm2", nn.LayerNorm(DIM, eps=0.1)),
    "an identity": lambda made: replaced(made, "ls1", Twice()),
    "attention": lambda made: replaced(made, "attn", Attention(DIM, 4, qkv_bias=True)),
    "a patched forward": lambda made: replaced(made, "mlp.forward", lambda x: x),
    "another type": typed,
    "restore": fastvit.restore,
}


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_goes_unnoticed(quick, edit, mode):
    edited, twin, x = block(mode), block(mode), tokens()
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        for _ in range(2):
            edited(x)
        before = edited(x)
        torch.manual_seed(2)
        EDITS[edit](edited)
        after = edited(x)
        torch.manual_seed(2)
        EDITS[edit](twin)
        assert torch.equal(after, ordinary(lambda: twin(x)))
        assert edit in ("restore", "another type") or not torch.equal(after, before)
        assert torch.equal(after, edited(x))


def test_tokens_of_another_shape_are_another_kind(quick, resolved):
    made = block("train")
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        for x in (tokens(), tokens(3), tokens(3)[:, :3], tokens(3)[:, ::2]):
            before = resolved.call_count
            out = made(x)
            assert (resolved.call_count > before) == (x.shape != (3, 3, DIM) or x.stride(1) == DIM)
            assert torch.equal(out, ordinary(lambda x=x: made(x)))


def test_masks_and_causal_attention_are_asked_for_each_time(quick, resolved):
    made, x = block("train"), tokens()
    mask = torch.eye(TOKENS, dtype=torch.bool)
    with torch.no_grad(), fastvit.use_backend(**KERNELS):
        made(x)
        plain = made(x)
        for _ in range(2):
            before = resolved.call_count
            out = made(x, attn_mask=mask)
            assert resolved.call_count > before
            assert not torch.equal(out, plain)
        with pytest.raises(fastvit.BackendUnavailable, match="causal"):
            made(x, is_causal=True)
        assert torch.equal(made(x), plain)


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
