"""Programs made for elsewhere: torch.export, ONNX and torch.jit.trace; and what tools on torch.fx find."""

import copy
import subprocess
import sys
from pathlib import Path

import huggingface_models
import library_models
import onnxruntime
import pytest
import torch
from accelerated import close, images, pair
from native_calls import needs_library
from test_graphs import model as own_model
from test_transforms import Tokens
from torch._dynamo.backends.common import aot_autograd
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx

import fastvit
from fastvit import BackendUnavailable, VisionTransformer, recording
from fastvit.verification import randomize

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
X = images(4)
# The beginning of a program for a process of its own.
PAIR = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
PAIR += "import torch, fastvit\nfrom accelerated import images, pair\n"


def _torchvision():
    model = randomize(library_models.torchvision_model()[0]).eval()
    return model, fastvit.accelerate(copy.deepcopy(model))


def _huggingface():
    model = Tokens(randomize(huggingface_models.build("vit")[0].vit.eval())).eval()
    return model, fastvit.accelerate(copy.deepcopy(model))


def _own():
    model = own_model()
    return copy.deepcopy(model), model


MODELS = {"timm": pair, "torchvision": _torchvision, "transformers": _huggingface, "fastvit": _own}


@pytest.fixture(params=MODELS)
def both(request):
    return MODELS[request.param]()


@pytest.fixture(params=["grad", "no_grad"])
def recorded(request):
    with torch.set_grad_enabled(request.param == "grad"):
        yield


@pytest.fixture
def eager(monkeypatch):
    """`auto` takes every kernel that runs."""
    monkeypatch.setattr(fastvit.backends, "_unmeasured", True)


def python(code, *arguments):
    """Runs code in a process of its own, which says nothing on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def _ours(graph):
    return [str(node) for node in graph.nodes() if "fastvit::" in str(node)]


def _changed(model):
    generator = torch.Generator().manual_seed(5)
    return {n: p + 0.1 * torch.randn(p.shape, generator=generator) for n, p in model.state_dict().items()}


# The first question to the CPU, whether it multiplies bfloat16, is a torch op whose answer is no tensor.
@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_a_cold_model_is_traced(backend):
    python(
        f"{PAIR}from fastvit import native_backend\n"
        f"with fastvit.use_backend('{backend}'): torch.jit.trace(pair()[1], (images(4),))\n"
        "def asked(x): return x * float(native_backend.multiplies_bfloat16())\n"
        "native_backend.multiplies_bfloat16.cache_clear()\n"
        "torch.jit.trace(asked, (torch.ones(2),))"
    )


@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_a_traced_model_is_saved_and_follows_its_weights(both, recorded, backend, eager, tmp_path):
    model, fast = both
    # Unchecked: torch's check traces again without gradients, where torchvision's attention is another.
    with fastvit.use_backend(backend):
        traced = torch.jit.trace(fast, (X,), check_trace=False)
    assert bool(_ours(traced.inlined_graph)) == (backend == "cpp")
    torch.jit.save(traced, tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    weights = _changed(model)
    for each in (model, loaded, traced):
        each.load_state_dict(weights)
    for each in (loaded, traced):
        close(each(X), model(X))


def test_an_exported_program_is_of_torchs_own_ops(both, recorded, eager):
    model, fast = both
    with recording.recording() as recorder:
        program = torch.export.export(fast, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert not [node for node in program.graph.nodes if "fastvit" in str(node.target)]
    assert {event.reason.partition(":")[0] for event in recorder.events} == {"exporting"}
    x = images(3)
    close(program.module()(x), model(x))
    assert not torch.compiler._is_exporting_flag


@needs_library()
@pytest.mark.parametrize("strict", [False, True])
def test_a_backend_that_is_named_stays_in_the_program(recorded, strict, tmp_path):
    """Whether or not gradients are recorded as it is made: it has them where it runs, in whatever process."""
    model, fast = pair()
    with fastvit.use_backend("cpp"):
        program = torch.export.export(fast, (X,), strict=strict)
    ops = [node for node in program.graph.nodes if "fastvit" in str(node.target)]
    assert len(ops) == 4 * len(fast.blocks)
    # What an op saves for gradients nobody reads in a program: there AOTInductor's packages crash.
    for node in ops:
        names = [argument.name for argument in node.target._schema.arguments]
        assert not dict(zip(names, node.args, strict=False)).get("save")
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((X, model(X).detach()), tmp_path / "expected.pt")
    python(
        "import sys, torch, fastvit\n"
        "x, expected = torch.load(sys.argv[2])\n"
        "with torch.no_grad(): found = torch.export.load(sys.argv[1]).module()(x)\n"
        "torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)",
        tmp_path / "model.pt2",
        tmp_path / "expected.pt",
    )
    loaded = program.module()
    with torch.enable_grad():
        for each in (loaded, model):
            each(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-3)


def test_onnx_runs_the_exported_model(both, eager, tmp_path):
    model, fast = both
    path = tmp_path / "model.onnx"
    batch = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(fast, (X,), path, dynamo=False, verbose=False, **batch)
    x = images(3)
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    close(torch.from_numpy(found), model(x).detach())


def test_onnx_has_no_op_of_ours(tmp_path):
    with (
        fastvit.use_backend("cpp"),
        pytest.raises(BackendUnavailable, match="is no op of ONNX: name no backend"),
    ):
        torch.onnx.export(pair()[1], (X,), tmp_path / "model.onnx", dynamo=False, verbose=False)
    torch.set_autocast_cache_enabled(True)  # torch's exporter leaves it off where a forward raises


def test_torch_compile_keeps_the_ops(eager):
    torch.compiler.reset()
    graphs = []

    def seen(graph, _):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        backend = aot_autograd(fw_compiler=seen)
        torch.compile(pair()[1], fullgraph=True, backend=backend)(X)
    assert sum("fastvit" in str(node.target) for graph in graphs for node in graph.graph.nodes) >= 8


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_quantisation_finds_every_module(name):
    model, fast = MODELS[name]()
    found, expected = (prepare_fx(each, get_default_qconfig_mapping(), (X,)) for each in (fast, model))
    assert [str(n.target) for n in found.graph.nodes] == [str(n.target) for n in expected.graph.nodes]
    assert sum(isinstance(module, torch.nn.Linear) for module in found.modules()) >= 5


def test_quantisation_finds_every_module_of_our_own_model():
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=5
    ).eval()
    prepared = prepare_fx(vit, get_default_qconfig_mapping(), (X,))
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    assert [sum(isinstance(m, layers) for m in each.modules()) for each in (prepared, vit)] == [6, 6]


USES = {
    "cpp": "with fastvit.use_backend('cpp'): fast(x).sum().backward()",
    "inference": "with fastvit.use_backend('cpp'), torch.inference_mode(): fast(x)",
    "graphed": "runner = fastvit.graphed(fast, [4])\nwith torch.no_grad(): runner(x), runner(x)",
    "threads": (
        "import threading\n"
        "def run():\n"
        "    with torch.no_grad(): fast(x)\n"
        "with fastvit.use_backend('cpp'):\n"
        "    threads = [threading.Thread(target=run) for _ in range(3)]\n"
        "    [t.start() for t in threads]; [t.join() for t in threads]"
    ),
}


@needs_library()
@pytest.mark.parametrize("use", USES)
def test_a_process_ends_without_a_word(use):
    code = f"{PAIR}fast, x = pair(mode='inference')[1], images(4)\n{USES[use]}"
    assert python(code) == ""
