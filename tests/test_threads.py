"""Threads that run, record, accelerate and restore at the same time."""

import sys
import threading

import pytest
import torch
from accelerated import images, pair, run
from library_models import open_clip_model, torchvision_model

import fastvit
from fastvit import backends, frames, measurements, ops, recording, use_backend
from fastvit.layers.settings import Settings


def in_another_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_what_another_thread_runs_is_not_recorded():
    _, fast = pair()
    with recording.recording() as recorder, recording.inside("outer"):
        assert in_another_thread(lambda: len(run(fast, images())[1])) > 0
        assert recorder.events == []
        assert recorder.module == "outer"
        run(fast, images())
    assert {event.op for event in recorder.events} >= {"attention", "patch_embed"}


def test_a_recording_that_begins_or_ends_elsewhere_meanwhile():
    _, fast = pair()
    other = recording.recording()
    with recording.recording() as recorder:
        with recording.inside("child"):
            in_another_thread(other.__enter__)
        in_another_thread(lambda: other.__exit__(None, None, None))
        run(fast, images())
    assert recorder.module == ""
    assert recorder.events
    assert recording.active == []


QUESTION = ("attention", "no such GPU", "float32", ("fwd",), "", {})


def test_questions_are_heard_by_the_innermost_that_listens_in_their_thread():
    with measurements.listening() as outer:
        with measurements.listening() as inner:
            measurements.refusal(*QUESTION)
        assert (len(outer), len(inner)) == (0, 1)
        measurements.refusal(*QUESTION)
        in_another_thread(lambda: measurements.refusal(*QUESTION))
        with measurements.listening():
            pass
        measurements.refusal(*QUESTION)
    assert (len(outer), len(inner)) == (2, 1)
    measurements.refusal(*QUESTION)
    assert (len(outer), len(inner)) == (2, 1)


def test_threads_enter_and_leave_without_harm():
    """Of six that do nothing else, each sees what it entered innermost, or another's; and nothing stays."""
    shared, failures = use_backend("reference"), []

    def work():
        try:
            for _ in range(300):
                with use_backend("cpp"), shared, use_backend(attention="reference"):
                    assert backends.requested("attention") in ("reference", "cpp")
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert frames.stack == []


def test_what_a_model_is_told_holds_for_its_own_thread_alone():
    with backends.use_backend_here("reference"):
        assert in_another_thread(lambda: backends.requested("attention")) == "auto"
        assert backends.requested("attention") == "reference"


def transformers_model(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**sizes, image_size=32, patch_size=8)
    )
    return model.eval(), {"pixel_values": images()}


MODELS = {
    "vit": lambda: (pair(depth=1)[0], {"x": images()}),
    "eva": lambda: (pair("eva", depth=1)[0], {"x": images()}),
    "torchvision": lambda: torchvision_model(num_layers=1),
    "open_clip": lambda: open_clip_model({"layers": 1}, {"layers": 1}),
    "transformers": lambda: transformers_model("ViT"),
    "transformers, CLIP": lambda: transformers_model("CLIPVision"),
}


def tensors(out):
    out = out if isinstance(out, torch.Tensor | tuple) else tuple(out.values())
    return [each for each in (out if isinstance(out, tuple) else (out,)) if isinstance(each, torch.Tensor)]


def alike(found, expected):
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def restored_at(monkeypatch, model, count):
    """Another thread restores the model as its forward is to call an op, or its settings, for that time."""
    calls = [0]

    def watched(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == count:
                in_another_thread(lambda: fastvit.restore(model))
            return function(*args, **kwargs)

        return call

    for name in ops.__all__:
        monkeypatch.setattr(ops, name, watched(getattr(ops, name)))
    monkeypatch.setattr(Settings, "of", watched(Settings.of))
    return calls


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_restored_while_it_runs(kind, monkeypatch):
    model, inputs = MODELS[kind]()
    model = model.eval()
    expected, count = model(**inputs), 0
    originals = list(map(type, model.modules()))
    while True:
        fastvit.accelerate(model)
        count += 1
        with monkeypatch.context() as patch:
            calls = restored_at(patch, model, count)
            alike(model(**inputs), expected)
        if calls[0] < count:
            break
        assert list(map(type, model.modules())) == originals
    assert count > 6


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_accelerated_while_it_runs(kind):
    model, inputs = MODELS[kind]()
    model = model.eval()
    expected = model(**inputs)
    names = [name for name, module in model.named_modules() if not list(module.children())]
    for name in names:
        hook = model.get_submodule(name).register_forward_pre_hook(
            lambda *_: in_another_thread(lambda: fastvit.accelerate(model)) and None
        )
        alike(model(**inputs), expected)
        hook.remove()
        fastvit.restore(model)
