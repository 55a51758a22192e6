"""What a compiler, an exporter, a tracer and autocast see of an op: one function each, of any batch."""

import op_cases
import plain_ops
import pytest
import torch
from op_checks import GRADS, gradients
from torch import nn

from fastvit import ops
from fastvit.regimes import OPS

# Bytes, and colours as a list, which a compiler must hold as constants.
OPTIONS = op_cases.FULL | {"patch_embed": {"images": "uint8", "normalized": "sequences"}}
BATCHED = {"images", "x", "residual", "qkv", "key_mask", "sample_scale"}
CELLS = [(op, cell) for op in OPS for cell in op_cases.cells(op)]
MAIN = {"patch_embed": "images", "attention": "qkv"}


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


class Layer(nn.Module):
    """An op as models call it: one argument comes in, the other tensors are the layer's own."""

    def __init__(self, op, call):
        super().__init__()
        self.op, self.main = op, MAIN.get(op, "x")
        self.constants = {}
        for name, value in call.items():
            if isinstance(value, torch.Tensor) and name != self.main:
                self.register_buffer(name, value)
            elif name != self.main:
                self.constants[name] = value

    def forward(self, main):
        own = {name: getattr(self, name) for name in self._buffers}
        return getattr(ops, self.op)(**{self.main: main}, **own, **self.constants)


def compiled_for_any_batch(function):
    """An op compiled whole, of whose arguments the batch is no constant."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def run(**call):
        for name in BATCHED & call.keys():
            torch._dynamo.mark_dynamic(call[name], 0)
        return compiled(**call)

    return run


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole_and_once_for_every_batch(op, training):
    function = getattr(ops, op)
    compiled_once = compiled_for_any_batch(function)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 8):
            call = op_cases.build(op, dtype=torch.float32, batch=batch, **OPTIONS[op])
            if training:
                found, expected = (gradients(f, call, GRADS["sum"]) for f in (compiled_once, function))
            else:
                found, expected = compiled_once(**call), function(**call)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", OPS)
def test_is_one_node_of_a_traced_graph(op):
    call = op_cases.build(op, dtype=torch.float32, **OPTIONS[op])
    layer = Layer(op, call)
    traced = torch.fx.symbolic_trace(layer)
    computed = [node for node in traced.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    assert [(node.op, node.target) for node in computed] == [("call_function", getattr(ops, op))]
    assert torch.equal(traced(call[layer.main]), layer(call[layer.main]))


# For any batch where a layer's own tensors have none: options that have one are left out. Dropped: another
# batch for linear_residual, whose residual is the layer's own here.
@pytest.mark.parametrize("op", OPS)
def test_exports(op):
    def call(batch):
        call = op_cases.build(op, dtype=torch.float32, batch=batch, **OPTIONS[op])
        return call | dict.fromkeys(call.keys() & {"key_mask", "sample_scale"})

    fixed = op == "linear_residual"
    layer = Layer(op, call(2))
    batch = None if fixed else {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(layer, (call(2)[layer.main],), dynamic_shapes={"main": batch}).module()
    for size in (2,) if fixed else (2, 5):
        main = call(size)[layer.main]
        torch.testing.assert_close(program(main), layer(main))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_answers_for_tensors_without_data(op, dtype):
    call = op_cases.build(op, dtype=dtype, **op_cases.FULL[op])
    on_meta = op_cases.converted(call, lambda tensor: tensor.to("meta"))
    real, meta = (getattr(ops, op)(**c) for c in (call, on_meta))
    assert meta.device.type == "meta"
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


# Everything in float32, and with activations that an autocast layer before it left in low precision.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(("op", "cell"), CELLS, ids=op_cases.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low", [False, True], ids=["float32 in", "low in"])
def test_autocasts_as_torchs_own_ops_do(op, cell, dtype, low):
    call = op_cases.build(op, dtype=torch.float32, **cell)
    main = MAIN.get(op, "x")
    if low and call[main].is_floating_point():
        call[main] = call[main].to(dtype)
    with torch.autocast("cpu", dtype):
        expected = getattr(plain_ops, op)(**call)
        found = getattr(ops, op)(**call)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
