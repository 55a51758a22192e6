"""verify finds what is wrong, names the first block that is, and passes what is right."""

import json

import pytest
import torch
from timm_twins import twins

import fastvit
from fastvit import ParityError, VisionTransformer, ops
from fastvit.gemm_libraries import gemm_libraries
from fastvit.verification import op_cases, randomize, verify_op

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    return randomize(VisionTransformer(**tiny, init_values=0.1)).eval()


def test_a_right_model_passes_forward_and_backward(model):
    report = fastvit.verify(model, X, backward=True)
    report.raise_if_failed()
    names = [row.name for row in report.rows]
    assert names[:5] == ["embed", "blocks.0", "blocks.1", "blocks.2", "output"]
    assert names[-1] == "top-1"
    assert {n.removeprefix("grad ") for n in names if n.startswith("grad ")} == dict(
        model.named_parameters()
    ).keys()


def test_the_first_wrong_block_is_named(model, monkeypatch):
    original = ops.layer_norm_mlp
    calls = []

    def wrong_in_block_1(x, **arguments):
        calls.append(None)
        return original(x, **arguments | ({"eps": 1e-3} if len(calls) == 2 else {}))

    monkeypatch.setattr(ops, "layer_norm_mlp", wrong_in_block_1)
    report = fastvit.verify(model, X)
    failed = [row.name for row in report.rows if not row.ok]
    assert failed[0] == "blocks.1"
    with pytest.raises(ParityError, match=r"blocks\.1"):
        report.raise_if_failed()


def test_another_implementation_with_other_weights_fails(model):
    ours, theirs = twins("vit_tiny_patch16_224", depth=1)
    with torch.no_grad():
        theirs.blocks[0].mlp.fc2.bias += 1e-4
    assert not fastvit.verify(ours, torch.randn(1, 3, 224, 224), oracle=theirs).ok


def test_the_model_is_left_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fastvit.verify(model.train(), X, backward=True)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_dropout_cannot_excuse_a_wrong_model():
    ours, theirs = twins("vit_tiny_patch16_224", depth=2, img_size=64, drop_path_rate=0.5)
    with torch.no_grad():
        theirs.blocks[1].mlp.fc2.weight.mul_(1.3)
    x = torch.randn(2, 3, 64, 64)
    assert not fastvit.verify(ours.train(), x, oracle=theirs.train()).ok
    assert ours.training
    assert theirs.blocks[0].training


def test_a_lost_gradient_is_found(model, monkeypatch):
    original = ops.linear_residual
    calls = []

    def losing_the_first_bias(x, weight, bias, *args, **kwargs):
        calls.append(None)
        return original(x, weight, bias.detach() if len(calls) == 1 else bias, *args, **kwargs)

    monkeypatch.setattr(ops, "linear_residual", losing_the_first_bias)
    report = fastvit.verify(model, X, backward=True)
    assert [row.name for row in report.rows if not row.ok] == ["grad blocks.0.attn.proj.bias"]


def test_what_cannot_be_judged_is_refused(model):
    with pytest.raises(TypeError, match="verify needs floating images"):
        fastvit.verify(model, (X * 0).to(torch.uint8))
    with pytest.raises(ValueError, match="at least one image"):
        fastvit.verify(model, X[:0])
    with pytest.raises(ValueError, match="all are frozen"):
        fastvit.verify(model.requires_grad_(False), X, backward=True)


def test_torchs_other_gemm_library_is_a_baseline_of_our_own_model():
    ours, _ = twins("vit_tiny_patch16_224", depth=1)
    x = torch.randn(1, 3, 224, 224)
    outputs = []
    for _, context in gemm_libraries("cpu"):
        with context(), torch.no_grad():
            outputs.append(ours(x))
    assert len(outputs) == 2
    assert not torch.equal(*outputs)


def test_models_without_blocks_are_judged_whole():
    report = fastvit.verify(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 4)), X)
    assert [row.name for row in report.rows] == ["output", "top-1"]


def test_a_report_reads_and_parses(model):
    report = fastvit.verify(model, X)
    rows = json.loads(report.to_json())
    assert rows[0]["name"] == "embed"
    assert rows[0]["ok"] is True
    assert "blocks.2" in str(report)


def test_op_cases_cover_every_op_and_dtype():
    cases = op_cases()
    assert len(set(cases)) == len(cases)
    assert {case.op for case in cases} == set(ops.__all__)
    for op in ops.__all__:
        assert {case.dtype for case in cases if case.op == op} == {
            torch.float32,
            torch.float16,
            torch.bfloat16,
        }


# The ops in every regime are the business of tests/test_<op>.py; here, that a wrong op does not pass.
@pytest.mark.parametrize("op", ops.__all__)
def test_a_wrong_op_fails(op, monkeypatch):
    original = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args, **kwargs: original(*args, **kwargs) * 1.001)
    cases = [case for case in op_cases((torch.float32,)) if case.op == op and case.regime == "randn"]
    assert cases
    assert not any(verify_op(case).ok for case in cases)


@pytest.mark.parametrize("op", ops.__all__)
def test_a_right_op_passes(op):
    for case in op_cases((torch.float32,)):
        if case.op == op:
            assert verify_op(case).ok, case
