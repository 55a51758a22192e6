"""explain: rows, coverage, architectures that are not here, and that it computes and changes nothing."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import timm
import torch
from accelerated import images, pair, run

import fastvit
from fastvit import gpus, measurements
from fastvit.explanation import Coverage, Row

X = images()
OPS = ["patch_embed", "layer_norm_linear", "attention", "linear_residual", "layer_norm_mlp"]
ROW = {
    "gpu": "a GPU of sm_90",
    "dtype": "float32",
    "direction": "fwd",
    "options": "",
    "ok": True,
    "ratio": 1.2,
}


def test_rows_say_what_a_run_does():
    _, fast = pair()
    _, events = run(fast, X)
    rows = fastvit.explain(fast, X).rows
    assert Counter(row.op for row in rows) == Counter(event.op for event in events)
    assert [row.module for row in rows] == ["patch_embed", *["blocks.0"] * 4, *["blocks.1"] * 4]
    assert {(row.op, row.backend) for row in rows} == {(event.op, event.backend) for event in events}


def test_with_a_backend_by_name():
    _, fast = pair()
    with fastvit.use_backend(layer_norm_mlp="cpp"):
        rows = [row for row in fastvit.explain(fast).rows if row.op == "layer_norm_mlp"]
    assert [(row.backend, row.accelerated, row.reason) for row in rows] == [
        ("cpp", True, "asked for by name")
    ] * 2


def test_for_an_architecture_that_is_not_here():
    _, fast = pair()
    explanation = fastvit.explain(fast, X, arch="sm_90")
    assert explanation.coverage.blocks == 1.0
    assert 0.8 < explanation.coverage.flops <= 1.0
    assert {row.op for row in explanation.rows} == set(OPS)
    for row in explanation.rows:
        assert row.accelerated
        assert row.backend == "reference"
        assert "not measured on a GPU of sm_90" in row.reason
    old = fastvit.explain(fast, arch="sm_75")
    assert old.coverage == Coverage(0.0, None)
    assert all("7.5; the kernels need 8.0" in r.reason or "older than sm_80" in r.reason for r in old.rows)
    assert gpus.assumed() is None


def test_what_was_measured_is_what_auto_takes(tmp_path, monkeypatch):
    (tmp_path / "fastvit").mkdir()
    row = ROW | {"op": "attention", "head_dim": 32, "tokens": [1, None], "batch_heads": [1, None]}
    (tmp_path / "fastvit" / "measured.json").write_text(json.dumps([row]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measurements.clear()
    _, fast = pair()
    try:
        rows = fastvit.explain(fast, arch="sm_90").rows
    finally:
        monkeypatch.undo()
        measurements.clear()
    assert {(r.op, r.backend) for r in rows if r.op in ("attention", "layer_norm_mlp")} == {
        ("attention", "triton"),
        ("layer_norm_mlp", "reference"),
    }


@pytest.mark.parametrize(("head_dim", "served"), [(64, [1.0, 1.0]), (128, [1.0, 0.0]), (256, [0.0, 0.0])])
def test_in_training_it_asks_for_gradients_too(head_dim, served):
    _, fast = pair(embed_dim=head_dim, num_heads=1, qk_norm=True)
    shares = [
        fastvit.explain(fast.train(training), arch="sm_90").coverage.blocks for training in (False, True)
    ]
    assert shares == served


def test_before_accelerate_and_after_restore():
    model, fast = pair()
    for each in (model, fastvit.restore(fast)):
        explanation = fastvit.explain(each)
        assert explanation.rows == tuple(
            Row(name, "forward", "original", False, reason)
            for name, reason in (
                ("patch_embed", "VisionTransformer makes its tokens in a way of its own"),
                ("blocks.0", "accelerate has not been called"),
                ("blocks.1", "accelerate has not been called"),
            )
        )
        assert explanation.coverage.blocks == 0.0


def test_it_changes_nothing():
    _, fast = pair()
    out, types = run(fast, X)[0], [type(m) for m in fast.modules()]
    pointers = [p.data_ptr() for p in fast.parameters()]
    fastvit.explain(fast, X, arch="sm_90")
    assert [type(m) for m in fast.modules()] == types
    assert [p.data_ptr() for p in fast.parameters()] == pointers
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fast.modules())
    assert torch.equal(run(fast, X)[0], out)


def test_it_computes_nothing():
    with torch.device("meta"):
        model = timm.create_model("vit_gigantic_patch14_224").eval()
    explanation = fastvit.explain(fastvit.accelerate(model), arch="sm_90")
    assert explanation.coverage.blocks == 1.0
    assert len(explanation.rows) == 1 + 4 * 48


def test_a_mapping_of_arguments():
    _, fast = pair()
    assert fastvit.explain(fast, {"x": X, "is_causal": True}).rows[-1].module == "blocks.1"


def test_as_text_and_json():
    _, fast = pair()
    explanation = fastvit.explain(fast, X, arch="sm_90")
    text = str(explanation)
    assert "blocks.0 to blocks.1 (2)  layer_norm_mlp" in text
    assert "can serve 100% of the blocks" in text
    facts = json.loads(explanation.to_json())
    assert facts["coverage"]["blocks"] == 1.0
    assert [row["op"] for row in facts["rows"]].count("attention") == 2


@pytest.mark.parametrize("arch", ["90", "sm_9", "hopper", "", "sm_x0"])
def test_an_unknown_architecture(arch):
    _, fast = pair()
    with pytest.raises(ValueError, match="it must be like sm_80, sm_90 or sm_120"):
        fastvit.explain(fast, arch=arch)


def test_a_model_that_does_not_say_its_size():
    with pytest.raises(ValueError, match="Linear does not say which image size it takes: pass x"):
        fastvit.explain(torch.nn.Linear(2, 2))


def _explained(**environment):
    code = (
        "import timm, torch, fastvit\n"
        "from fastvit import backends\n"
        "x = torch.empty(1, device='meta')\n"
        "print(dict((op, why) for op, _, why in backends.describe())['attention'])"
    )
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=given | environment, check=False)


def test_the_environment_names_an_architecture():
    assert "not measured on a GPU of sm_100" in _explained(FASTVIT_ARCH="sm_100").stdout
    wrong = _explained(FASTVIT_ARCH="hopper")
    assert wrong.returncode != 0
    assert "FASTVIT_ARCH: arch is 'hopper'; it must be like sm_80" in wrong.stderr
