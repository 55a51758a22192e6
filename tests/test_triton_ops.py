"""The public ops on the Triton kernels, as torch sees them: registered, traced, compiled, differentiated.

What the kernels compute is judged elsewhere; here they run through their interpreter where there is no GPU.
"""

import op_cases
import plain_ops
import pytest
import torch
from op_checks import GRADS, gives_what_is_needed, gradients
from test_backends_environment import python
from test_op_compile import MAIN, Layer, compiled_for_any_batch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit import BackendUnavailable, ops, use_backend
from fastvit.backends import resolve

OPS = ("attention", "patch_embed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = op_cases.FULL | {"patch_embed": {"images": "uint8", "normalized": "tensors"}}
# What the kernels give gradients to; the rest is of the call.
TRAINED = {
    "attention": ("qkv", "q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias"),
    "patch_embed": ("images", "weight", "bias", "pos_embed", "prefix"),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _triton():
    torch.compiler.reset()
    with use_backend("triton"):
        yield


def build(op, dtype=torch.float32, **options):
    return op_cases.converted(op_cases.build(op, dtype=dtype, **options), lambda tensor: tensor.to(DEVICE))


def leaves(op, call):
    """The call with everything requiring gradients that can have them; bytes cannot."""
    trained = {name: call[name].detach() for name in TRAINED[op] if call.get(name) is not None}
    return {k: t.requires_grad_() if t.is_floating_point() else t for k, t in trained.items()}


def trained(op, call, function=None, grad="contiguous"):
    """Gradients of the public op, by name."""
    fixed = {name: value for name, value in call.items() if name not in TRAINED[op]}
    rest = {name: call[name] for name in call.keys() - fixed.keys()}
    function = function or getattr(ops, op)
    return gradients(lambda **given: function(**fixed, **given), rest, GRADS[grad])


def registered(op, call):
    """The arguments of the op's two entries in the dispatcher, as the public op gives them."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastvit":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    out = getattr(ops, op)(**call | leaves(op, call))
    with Watch(), torch.no_grad():
        getattr(ops, op)(**call)
    with Watch():
        out.backward(torch.ones_like(out))
    return seen


CELLS = [
    ("attention", {}),
    ("attention", FULL["attention"]),
    ("attention", {"mask": "float", "norm": "rms_norm", "affine": "weight", "rope": "interleaved"}),
    ("patch_embed", {}),
    ("patch_embed", FULL["patch_embed"]),
    ("patch_embed", {"bias": False, "positions": "patches", "prefix": 5, "patch": (2, 3)}),
]


@pytest.mark.parametrize(("op", "cell"), CELLS, ids=op_cases.name)
def test_is_a_well_behaved_torch_op(op, cell):
    """Its schema is true, its fake kernel right, its gradients registered, and AOTAutograd traces it."""
    entries = registered(op, build(op, **cell))
    assert [func._schema.name for func, _ in entries] == [f"fastvit::{op}_fwd", f"fastvit::{op}_bwd"]
    for func, args in entries:
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(func, args)
    func, args = entries[0]
    for place in range(3 if op == "attention" else 2):
        given = list(args)
        if given[place].is_floating_point():
            given[place] = given[place].detach().clone().requires_grad_()
            torch.library.opcheck(func, given)


# The kernels' own numbers are judged elsewhere: here every option arrives, in both directions.
@pytest.mark.parametrize(
    ("op", "cell"),
    [
        (op, cell)
        for op in OPS
        for cell in op_cases.cells(op, grad=tuple(GRADS))
        if cell.get("mask") != "causal"
    ],
    ids=op_cases.name,
)
def test_computes_what_the_reference_does(op, cell):
    call = build(op, **{k: v for k, v in cell.items() if k != "grad"})
    with torch.no_grad():
        torch.testing.assert_close(getattr(ops, op)(**call), getattr(plain_ops, op)(**call), **CLOSE)
    found, expected = (trained(op, call, f, cell["grad"]) for f in (None, getattr(plain_ops, op)))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole_and_once_for_every_batch(op, training):
    function = getattr(ops, op)
    compiled_once = compiled_for_any_batch(function)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 8):
            call = build(op, batch=batch, **FULL[op])
            if training:
                found, expected = (trained(op, call, f, "sum") for f in (compiled_once, function))
            else:
                found, expected = compiled_once(**call), function(**call)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", OPS)
def test_exports_as_one_op(op):
    def call(batch):
        return build(op, batch=batch, **FULL[op]) | ({"key_mask": None} if op == "attention" else {})

    layer = Layer(op, call(2))
    program = torch.export.export(
        layer, (call(2)[MAIN[op]],), dynamic_shapes={"main": {0: torch.export.Dim.DYNAMIC}}
    )
    names = [str(node.target) for node in program.graph.nodes if "fastvit" in str(node.target)]
    assert names == [f"fastvit.{op}_fwd.default"]
    for size in (2, 5):
        main = call(size)[MAIN[op]]
        torch.testing.assert_close(program.module()(main), layer(main))


@pytest.mark.parametrize("op", OPS)
def test_traces_symbolically(op):
    call = build(op, **FULL[op])
    layer = Layer(op, call)
    leaf = torch.fx.symbolic_trace(layer)
    assert [node.target for node in leaf.graph.nodes if node.op == "call_function"] == [getattr(ops, op)]
    torch.testing.assert_close(leaf(call[layer.main]), layer(call[layer.main]))

    tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    traced = make_fx(lambda given: getattr(ops, op)(**call | given), tracing_mode="symbolic")(tensors)
    assert f"fastvit.{op}_fwd.default" in [str(node.target) for node in traced.graph.nodes]
    torch.testing.assert_close(traced(tensors), getattr(ops, op)(**call))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("options", ["simple", "full"])
def test_empty_batch(op, options):
    cell = FULL[op] if options == "full" else {}
    call, full = build(op, batch=0, **cell), build(op, batch=2, **cell)
    assert getattr(ops, op)(**call).shape == (0, *getattr(ops, op)(**full).shape[1:])
    for name, gradient in trained(op, call).items():
        assert gradient.shape == call[name].shape
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("op", OPS)
def test_double_backward_raises(op):
    call = build(op)
    given = leaves(op, call)
    out = getattr(ops, op)(**call | given)
    name = MAIN[op]
    (gradient,) = torch.autograd.grad(out.square().sum(), given[name], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_every_mask_of_needed_gradients(op):
    call = build(op, **op_cases.FULL[op])
    everything = trained(op, call)
    gives_what_is_needed(op, call, TRAINED[op], everything)


def test_separate_projections_have_gradients_too():
    call = build("attention")
    qkv = call["qkv"].unflatten(-1, (3, call["num_heads"], -1))
    q, k, v = (part.contiguous().requires_grad_() for part in qkv.unbind(2))
    (_, args), _ = registered("attention", call)
    out, lse = torch.ops.fastvit.attention_fwd(q, k, v, *args[3:])
    assert lse.shape == (0,)
    assert not lse.requires_grad
    found = torch.autograd.grad(out, (q, k, v), GRADS["transposed"](out))
    expected = trained("attention", call, grad="transposed")["qkv"]
    torch.testing.assert_close(torch.stack(found, 2).flatten(2), expected)


def test_gradients_that_the_kernels_lack_are_refused():
    call = build("attention", mask="float", rope="half")
    for name in ("attn_mask", "rope_cos", "rope_sin"):
        with pytest.raises(BackendUnavailable, match="no gradients to attn_mask, rope_cos and rope_sin"):
            ops.attention(**call | {name: call[name].clone().requires_grad_()})
    with pytest.raises(BackendUnavailable, match="no gradients to mean and std"):
        ops.patch_embed(**build("patch_embed", normalized="std") | {"std": torch.ones(3).requires_grad_()})
    q, k, v = build("attention")["qkv"].unflatten(-1, (3, 2, -1)).unbind(2)
    mask = torch.zeros(7, 7, device=DEVICE, requires_grad=True)
    options = (None, "", *(None,) * 4, 1e-6, None, None, "half", 0, False)
    out, _ = torch.ops.fastvit.attention_fwd(q, k, v, 1.0, mask, *options)
    with pytest.raises(NotImplementedError, match="no gradient to attn_mask"):
        out.sum().backward()


# Everything in float32, and with what an autocast layer before it left in low precision. Dropped: bfloat16,
# which Triton's interpreter computes wrongly, and tokens wider than the kernels write, which they refuse.
@pytest.mark.parametrize(("op", "cell"), [*CELLS, ("patch_embed", {"positions": None, "prefix": 0})])
@pytest.mark.parametrize("low", [False, True], ids=["float32 in", "low in"])
def test_autocasts_as_torchs_own_ops_do(op, cell, low):
    call = build(op, **cell)
    if low and call[MAIN[op]].is_floating_point():
        call[MAIN[op]] = call[MAIN[op]].half()
    with torch.autocast(DEVICE, torch.float16):
        expected = getattr(plain_ops, op)(**call)
        try:
            found = getattr(ops, op)(**call)
        except BackendUnavailable as error:
            assert expected.dtype == torch.float32
            assert "under autocast the tokens are torch.float32" in str(error)
            return
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("layout", ["transposed", "every second channel"])
def test_strides_of_every_kind(layout):
    call = build("attention", batch=4)
    qkv = call["qkv"]
    strided = (
        qkv.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "transposed"
        else qkv.repeat_interleave(2, -1)[..., ::2]
    )
    torch.testing.assert_close(strided, qkv)
    torch.testing.assert_close(ops.attention(**call | {"qkv": strided}), ops.attention(**call))
    torch.testing.assert_close(trained("attention", call | {"qkv": strided}), trained("attention", call))


def test_runs_only_where_it_can():
    """Without the interpreter and without a GPU a named backend raises; with it, "auto" takes torch's op."""
    code = """
import torch, fastvit
from fastvit import BackendUnavailable, ops, use_backend
torch.cuda.is_available = lambda: False
try:
    with use_backend("triton"):
        ops.attention(torch.randn(1, 3, 24), 2)
except BackendUnavailable as error:
    print(error)
"""
    reason = "attention: backend 'triton' cannot run: Triton needs a CUDA GPU; the tensors are on cpu"
    assert python(code, TRITON_INTERPRET="0") == [reason]
    x = torch.randn(1, 3, 2, 4)
    with use_backend("auto"):
        assert resolve("attention", x, x, x) == "reference"
