"""Beside the writers: normalisation folded in, another model's optimizer, memory, what may not be held."""

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from native_calls import needs_library
from tiny_twins import assert_close, assert_same_weights, images, output, pair, served_by
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_leaves
from weight_writers import WRITERS
from writing import delta, edited

import fastvit
from fastvit import derived

X = images()
MODES = ("train", "inference")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture
def cpp():
    with served_by("cpp"):
        yield


def computes(model, x=X):
    with torch.no_grad():
        return output(model, x)


def kept():
    """Weak references to all tensors that are kept of weights."""
    leaves = tree_leaves([copy.value for copy in derived.everything()])
    return [weakref.ref(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]


def alive(references):
    if any(reference() is not None for reference in references):
        gc.collect()
    return sum(reference() is not None for reference in references)


PIXELS = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IMAGES = {
    "bytes": PIXELS,
    "floats": PIXELS / 255,
    "floats, channels last": (PIXELS / 255).to(memory_format=torch.channels_last),
}


def agree(ours, twin, given):
    """One normalises what it is given, the other is given it normalised."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        # Not by `output`, which makes floats of bytes.
        assert_close(ours(given), output(twin, (PIXELS / 255 - mean) / std))


# Triton's kernel, here by the interpreter, reads mean and std out of a copy of the projection.
@pytest.mark.parametrize(
    ("kernel", "given"),
    [("reference", "bytes"), ("triton", "bytes"), ("triton", "floats, channels last")],
)
@pytest.mark.parametrize("writer", ["in place", "torch_ema", "another process", "data of vectors alone"])
@pytest.mark.parametrize(("family", "mode"), [("timm", "train"), ("timm", "inference"), ("own", "train")])
def test_a_model_that_normalises_follows_its_weights(family, mode, writer, given, kernel):
    ours, twin = pair(family, mode)
    fastvit.fold_normalize(ours, MEAN, STD)
    with served_by("reference"), fastvit.use_backend(patch_embed=kernel):
        for _ in range(2):
            agree(ours, twin, IMAGES[given])
        for fast, plain in zip(WRITERS[writer](ours), WRITERS[writer](twin), strict=True):
            assert_same_weights(fast, plain)
            agree(fast, plain, IMAGES[given])


@pytest.mark.parametrize("given", IMAGES)
def test_one_number_of_a_projection_that_normalises(given):
    ours, twin = pair("timm")
    fastvit.fold_normalize(ours, MEAN, STD)
    with served_by("reference"), fastvit.use_backend(patch_embed="triton"):
        for at in (0, 777, -1):
            agree(ours, twin, IMAGES[given])
            for model in (ours, twin):
                model.patch_embed.proj.weight.data.view(-1)[at] += 1
        agree(ours, twin, IMAGES[given])


@needs_library()
@pytest.mark.parametrize("family", ["timm", "timm, q, k, v apart", "hf vit"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_students_steps_cost_a_frozen_teacher_nothing(family, fused, cpp):
    teacher, twin = pair(family, "inference")
    student, _ = pair(family)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, fused=fused)
    before, values = computes(teacher), derived.everything()
    assert values
    for _ in range(2):
        loss = (output(student.train(), X) - computes(teacher)).square().mean()
        loss.backward()
        optimizer.step()
        student.eval()
        assert torch.equal(computes(teacher), before)
        there = derived.everything()
        assert all(any(value is again for again in there) for value in values)
    for model in (teacher, twin):  # and its own optimizer is seen
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.SGD(model.parameters(), lr=0.1, fused=fused).step()
    assert_close(computes(teacher), computes(twin))


def trained(model):
    output(model.train(), X).square().mean().backward()


ENDS = {
    "restore": fastvit.restore,
    "another dtype": lambda model: model.to(torch.float64),
    "half and back": lambda model: model.half().float(),
    "training": trained,
    "another mode": fastvit.accelerate,
}


@needs_library()
@pytest.mark.parametrize("family", ["timm", "timm, q, k, v apart", "hf vit", "hf dinov2"])
@pytest.mark.parametrize("end", ENDS)
def test_copies_go_when_they_serve_no_longer(family, end, cpp):
    """At once, or at the next call."""
    ours, _ = pair(family, "inference")
    computes(ours)
    old = kept()
    assert old
    ENDS[end](ours)
    if any(reference() is not None for reference in old):
        computes(ours) if end != "training" else trained(ours)
    assert alive(old) == 0


@needs_library()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["timm", "timm, q, k, v apart", "hf vit", "torchvision"])
def test_nobody_holds_a_weak_reference_to_a_parameter(family, mode, cpp):
    """torch.utils.swap_tensors refuses those that have one."""
    ours, _ = pair(family, mode)
    runner = fastvit.graphed(ours, (2,))
    computes(ours), runner(X), runner(X)
    assert {name: n for name, p in ours.named_parameters() if (n := weakref.getweakrefcount(p))} == {}


@needs_library()
@pytest.mark.parametrize("restored", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["timm", "hf vit"])
def test_conversions_may_swap_parameters(family, mode, restored, cpp, monkeypatch):
    ours, twin = pair(family, mode)
    computes(ours)
    if restored:
        fastvit.restore(ours)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert_close(computes(ours.double()), computes(twin.double()))
        state = {name: 1.25 * value for name, value in twin.state_dict().items()}
        for model in (ours, twin):
            model.load_state_dict(state)
        assert_close(computes(ours), computes(twin))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@needs_library()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["timm", "hf vit", "hf clip", "open_clip"])
def test_a_quantised_copy_holds_the_weights_of_its_day(family, mode, cpp):
    """torch quantises a copy; model and copy then go their own ways."""
    ours, twin = pair(family, mode)
    computes(ours)
    for model in (ours, twin):
        edited(model)
    copies = [torch.ao.quantization.quantize_dynamic(model, {nn.Linear}) for model in (ours, twin)]
    found, expected = map(computes, copies)
    assert (found - expected).norm() < 0.02 * expected.norm()  # of eight bits each
    assert_close(computes(ours), computes(twin))
    for model in (ours, twin):
        edited(model)
    assert_close(computes(ours), computes(twin))
    assert torch.equal(computes(copies[0]), found)


@needs_library()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "family", ["timm", "timm, q, k, v apart", "hf vit", "hf dinov2", "hf clip", "torchvision"]
)
@pytest.mark.parametrize("backend", ["reference", "cpp", "auto"])
def test_refresh_of_a_model_mends_it_and_leaves_others_alone(family, mode, backend):
    with served_by(backend):
        ours, twin = pair(family, mode)
        other, same = copy.deepcopy(ours), copy.deepcopy(twin)
        computes(ours), computes(other)
        for model in (ours, twin):
            for name, p in model.named_parameters():
                p.data.add_(delta(name, p))
        fastvit.refresh(ours)
        assert_close(computes(ours), computes(twin))
        assert_close(computes(other), computes(same))


@pytest.fixture
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@needs_library()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["timm", "timm, q, k, v apart"])
def test_a_sharded_model_that_keeps_its_gathered_weights_follows_what_it_loads(family, mode, cpp, mesh):
    both = pair(family, mode)
    for model in both:
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
    for _ in range(5):
        for _ in range(2):
            assert_close(*map(computes, both))
        for model in both:
            model.load_state_dict({name: 1.25 * value for name, value in model.state_dict().items()})
