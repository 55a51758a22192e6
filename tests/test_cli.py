"""Every command works without a GPU and exits 0; every failure is one clear line and a non-zero exit."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from fastvit import backends, cli, create_model
from fastvit.regimes import OPS
from fastvit.verification import op_cases


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process: (exit status, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastvit", *arguments])
        try:
            cli.main()
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        captured = capsys.readouterr()
        if isinstance(status, str):  # sys.exit(message): Python prints it and exits with 1
            return 1, captured.out, captured.err + status
        return status or 0, captured.out, captured.err

    return call


def test_info(run):
    status, out, _ = run("info")
    assert status == 0
    for word in (*backends.TABLE, "torch", torch.__version__, "python", "gpu", "extension"):
        assert word in out


def test_info_json(run):
    status, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert status == 0
    assert [row["op"] for row in facts["ops"]] == list(backends.TABLE)
    assert all(row["reason"] for row in facts["ops"])


def test_verify_a_model(run):
    status, out, _ = run("verify", "vit_tiny_patch16_224", "--batch-size", "1")
    assert status == 0
    assert "blocks.11" in out
    assert "timm's implementation" in out
    assert "15 checks, all within the contract" in out


def test_verify_a_checkpoint_in_bfloat16_as_json(run, tmp_path):
    # Many classes: of a few logits the error in half precision is chance.
    model = create_model("vit_tiny_patch16_224", num_classes=400)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    arguments = ("--checkpoint", str(tmp_path / "w.safetensors"), "--dtype", "bfloat16", "--json")
    status, out, _ = run("verify", "vit_tiny_patch16_224", "--batch-size", "1", *arguments)
    assert status == 0
    assert {row["dtype"] for row in json.loads(out)} == {"bfloat16"}


def test_verify_without_timm(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    status, out, _ = run("verify", "vit_tiny_patch16_224", "--batch-size", "1")
    assert status == 0
    assert "timm is not installed" in out


def test_verify_ops(run):
    status, out, _ = run("verify", "--ops", "--json")
    rows = json.loads(out)
    assert status == 0
    assert len(rows) == len(op_cases())
    assert all(row["ok"] for row in rows)


def test_a_failed_check_is_a_non_zero_exit(run, monkeypatch):
    from fastvit import ops

    original = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args, **kwargs: original(*args, **kwargs) * 1.01)
    status, out, err = run("verify", "vit_tiny_patch16_224", "--batch-size", "1")
    assert status == 1
    assert "FAILED" in out
    assert "checks failed" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["verify", "vit_bas_patch16_224"],
            "unknown model 'vit_bas_patch16_224': it is no variant of fastvit, no model of timm",
        ),
        (["verify", "vit_tiny_patch16_224", "--checkpoint", "none.pth"], "none.pth: No such file"),
        (["verify", "vit_tiny_patch16_224", "--device", "gpu"], "unknown device 'gpu'; try cpu or cuda"),
        (["verify", "vit_tiny_patch16_224", "--device", "meta"], "device 'meta' cannot be used here"),
        (["demo", "--photos", "no-such-folder"], "no-such-folder is missing; give a folder of photos"),
    ],
)
def test_failures_are_one_line(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 1
    assert err.startswith("fastvit: error: ")
    assert message in err
    assert "\n" not in err.strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_gpu_that_is_not_there(run):
    status, _, err = run("verify", "--ops", "--device", "cuda")
    assert status == 1
    assert "torch sees no CUDA GPU here" in err


@pytest.mark.parametrize(
    "arguments", [["verify"], ["verify", "vit_tiny_patch16_224", "--ops"], ["verify", "--batch-size", "0"]]
)
def test_usage_errors_exit_with_2(run, arguments):
    assert run(*arguments)[0] == 2


def test_as_a_process_the_error_has_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "fastvit.cli", "verify", "nope"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("fastvit: error: unknown model 'nope'")
    assert "Traceback" not in done.stderr


def test_explain_for_a_gpu_that_is_not_here(run):
    status, out, _ = run("explain", "test_vit", "--arch", "sm_90", "--json")
    assert status == 0
    facts = json.loads(out)
    assert facts["coverage"]["blocks"] == 1.0
    assert 0.5 < facts["coverage"]["flops"] <= 1.0
    assert {row["op"] for row in facts["rows"]} == {*OPS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "resnet18"], "resnet18 has no block of a vision transformer: there is nothing to"),
        (["explain", "test_vit", "--arch", "hopper"], "arch is 'hopper'; it must be like sm_80"),
        (["explain", "test_vitt"], "no folder with a config.json; did you mean test_vit"),
        (["tune", "test_vit", "--device", "cuda"], "device 'cuda': torch sees no CUDA GPU here"),
    ],
)
def test_failures_of_explain_and_tune_are_one_line(run, arguments, message):
    status, _, error = run(*arguments)
    assert status == 1
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_verify_of_another_librarys_model(run):
    status, out, error = run("verify", "eva02_tiny_patch14_224", "--json", "--batch-size", "1")
    assert status == 0, error
    names = [row["name"] for row in json.loads(out)]
    assert names[:3] == ["embed", "blocks.0", "blocks.1"]
    assert names[-2:] == ["output", "top-1"] or names[-1] == "output"


def test_a_folder_of_a_hugging_face_model(run, tmp_path):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    status, out, error = run("explain", str(tmp_path), "--arch", "sm_90", "--json")
    assert status == 0, error
    assert json.loads(out)["coverage"]["blocks"] == 1.0
    assert run("verify", str(tmp_path))[0] == 0
    assert "weights of its own" in run("explain", str(tmp_path), "--checkpoint", "x.pt")[2]


def test_tune_on_a_cpu(run):
    status, out, _ = run("tune", "test_vit", "--device", "cpu")
    assert status == 0
    assert "there is nothing to tune on a CPU" in out
