"""Inference engines beside torch, each set up as its own guide says, on as many threads as torch has."""

import copy
import io
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]


def why_not_onnxruntime(device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        return "onnx and onnxruntime are not both installed"
    if device.type == "cpu" and dtype != torch.float32:
        return f"its CPU kernels are not made for {_named(dtype)}"
    if device.type == "cuda" and dtype == torch.bfloat16:
        return "its exporter and kernels are not made for bfloat16"
    if _provider(device) not in import_module("onnxruntime").get_available_providers():
        return f"this build of onnxruntime has no {_provider(device)}"
    return None


def onnxruntime(model: nn.Module, x: Tensor) -> Call:
    """The model's ONNX graph with every optimisation of the runtime's; on a GPU without copies."""
    ort = import_module("onnxruntime")
    graph = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(copy.deepcopy(model), (x,), graph, dynamo=False, opset_version=20)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Its threads spin on for a while after a run: on the cores, and in the time, of who is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(graph.getvalue(), options, providers=[_provider(x.device)])
    name = session.get_inputs()[0].name
    if x.device.type == "cpu":
        return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])
    with torch.no_grad():
        out = torch.empty_like(model(x))
    element = {torch.float32: np.float32, torch.float16: np.float16}[x.dtype]

    def run(images: Tensor) -> Tensor:
        binding = session.io_binding()
        binding.bind_input(name, "cuda", images.device.index, element, images.shape, images.data_ptr())
        output = session.get_outputs()[0].name
        binding.bind_output(output, "cuda", out.device.index, element, out.shape, out.data_ptr())
        torch.cuda.current_stream().synchronize()  # the runtime has a stream of its own
        session.run_with_iobinding(binding)
        return out

    return run


def why_not_openvino(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "it is for CPUs"
    if dtype == torch.float16:
        return "on a CPU it computes float16 in float32"
    return "it is not installed" if find_spec("openvino") is None else None


def openvino(model: nn.Module, x: Tensor) -> Call:
    """Compiled for latency, with products in the model's dtype: images and logits are float32."""
    ov = import_module("openvino")
    wide = copy.deepcopy(model).float()
    with warnings.catch_warnings(action="ignore"):
        converted = ov.convert_model(wide, example_input=x.float())
    converted.reshape(list(x.shape))
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[x.dtype]
    how = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    how["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    request = ov.Core().compile_model(converted, "CPU", how).create_infer_request()

    def run(images: Tensor) -> Tensor:
        found = request.infer(images.float().numpy(), share_inputs=True, share_outputs=True)
        return torch.from_numpy(found[0]).to(x.dtype)

    return run


def why_not_tensorrt(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "it is for CUDA GPUs"
    return "it is not installed" if find_spec("torch_tensorrt") is None else None


def tensorrt(model: nn.Module, x: Tensor) -> Call:
    """TensorRT's engine for this shape, in the model's dtype."""
    trt = import_module("torch_tensorrt")
    with warnings.catch_warnings(action="ignore"):
        run = trt.compile(copy.deepcopy(model), ir="dynamo", inputs=[x], enabled_precisions={x.dtype})
    run(x)
    return run


def _provider(device: torch.device) -> str:
    return "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
