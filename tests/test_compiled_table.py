"""What explain says of torch.compile over accelerated models, and from which rows."""

import json
from dataclasses import replace

import pytest
import torch
from accelerated import pair

import fastvit
from fastvit import measurements, native_backend
from fastvit_benchmarks.harness import Row, Timing, machine
from fastvit_benchmarks.tables import compiled

SMALL = "vit_small_patch16_224"


def row(provider, ms, batch=1, ok=True):
    known = {"op": SMALL, "dtype": "float32", "shape": (3, 224, 224), "batch": batch, "ok": ok}
    return Row.of(Timing((ms, ms, ms)) if ok else None, machine(), provider=provider, **known)


def test_the_worst_batch_against_the_compilers_best():
    rows = [
        *(row("timm compiled", 12.0), row("timm compiled, frozen", 9.0), row("fastvit compiled", 10.0)),
        *(row("timm compiled", 80.0, 8), row("fastvit compiled", 40.0, 8), row("timm eager", 1.0, 8)),
        *(row("timm compiled", 1.0, 64), row("fastvit compiled", 40.0, 64, ok=False)),
        replace(row("timm compiled, frozen", 1.0), ok=False, reason="wrong: output"),
    ]
    (found,) = compiled.table(rows, "a CPU")
    assert (found["op"], found["gpu"], found["width"], found["ratio"]) == ("model", "a CPU", 384, 0.9)


@pytest.mark.parametrize(("ratio", "said"), [(0.9, True), (1.1, False)])
def test_explain_says_where_the_compiler_loses(ratio, said, tmp_path, monkeypatch):
    known = {
        "op": "model",
        "gpu": native_backend.machine_name("cpu"),
        "dtype": "float32",
        "options": "compiled",
    }
    rows = [known | {"direction": "fwd", "width": 64, "ok": True, "ratio": ratio}]
    (tmp_path / "measured.json").write_text(json.dumps(rows))
    monkeypatch.setattr(measurements, "user_file", lambda: tmp_path / "measured.json")
    measurements.clear()
    try:
        fast = pair()[1]
        explanation = fastvit.explain(fast, torch.zeros(1, 3, 32, 32))
        word = "torch.compile is faster over the original model: over this one measured at 0.90 times"
        assert (word in str(explanation)) == said
        assert bool(json.loads(explanation.to_json())["compiler"]) == said
    finally:
        monkeypatch.undo()
        measurements.clear()
