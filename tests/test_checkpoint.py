"""Checkpoints that can be read: what fits is loaded exactly, what does not fit changes nothing."""

import pytest
import torch
from checkpoints import FORMATS, Tiny, in_both_formats, refusal, save, unchanged
from torch import nn

from fastvit.checkpoint import compare, load_checkpoint, read_state_dict
from fastvit.errors import CheckpointError


@pytest.fixture
def path(tmp_path, request):
    return tmp_path / f"weights.{getattr(request, 'param', 'safetensors')}"


@in_both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_exact(path, dtype):
    source, target = Tiny().to(dtype), Tiny().to(dtype)
    report = load_checkpoint(target, save(source.state_dict(), path))
    assert report.ok
    assert str(report) == "every key fits"
    for key, tensor in target.state_dict().items():
        assert tensor.dtype == source.state_dict()[key].dtype
        assert torch.equal(tensor, source.state_dict()[key])


@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors", "weights"])
@pytest.mark.parametrize("real", FORMATS)
def test_the_content_decides_not_the_name(tmp_path, name, real):
    state = Tiny().state_dict()
    found = read_state_dict(save(state, tmp_path / f"real.{real}").rename(tmp_path / name))
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_dtype_and_requires_grad_stay_the_models(path):
    model = Tiny().half()
    model.pos_embed.requires_grad_(False)
    source = Tiny().state_dict()
    load_checkpoint(model, save(source, path))
    assert not model.pos_embed.requires_grad
    assert model.cls_token.requires_grad
    assert torch.equal(model.cls_token, source["cls_token"].half())


@pytest.mark.parametrize("path", ["pt"], indirect=True)
def test_module_versions_and_hooks_take_part(path):
    seen = []
    model = Tiny()
    model.norm.register_load_state_dict_pre_hook(lambda *args: seen.append(args[3]["version"]))
    load_checkpoint(model, save({"model": nn.DataParallel(Tiny()).state_dict()}, path))
    assert seen == [nn.BatchNorm1d._version]


def test_a_model_on_the_meta_device_is_an_error(path):
    save(Tiny().state_dict(), path)
    with pytest.raises(CheckpointError, match=r"to_empty"):
        load_checkpoint(Tiny(device="meta"), path)


# Wrappers and prefixes


@pytest.mark.parametrize("path", ["pt"], indirect=True)
@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_usual_nesting_is_taken_off(path, wrapper, prefix):
    inner = {prefix + key: tensor for key, tensor in Tiny().state_dict().items()}
    assert list(read_state_dict(save({wrapper: inner, "epoch": 3}, path))) == list(Tiny().state_dict())


@pytest.mark.parametrize("path", ["pt"], indirect=True)
def test_a_prefix_on_some_keys_only_is_kept(path):
    assert list(read_state_dict(save({"module.a": torch.ones(1), "b": torch.ones(1)}, path))) == [
        "module.a",
        "b",
    ]


@pytest.mark.parametrize("path", ["pt"], indirect=True)
def test_averaged_weights_are_never_a_silent_choice(path):
    plain, average = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    with pytest.warns(UserWarning, match=r"holds model, model_ema: model is read"):
        assert read_state_dict(save({"model_ema": average, "model": plain}, path))["a"] == 0
    assert "only averaged weights (state_dict_ema)" in refusal(save({"state_dict_ema": average}, path))


# What does not fit


@in_both_formats
@pytest.mark.parametrize("key", list(Tiny().state_dict()))
def test_each_tensor_one_off_is_refused(path, key):
    model, state = Tiny(), Tiny().state_dict()
    ours = state[key].shape
    state[key] = torch.zeros(*ours[:-1], ours[-1] + 1) if ours else torch.zeros(1)
    report = refusal(save(state, path), model)
    assert f"1 of another shape:\n  {key}: model {list(ours)}, file {list(state[key].shape)}" in report


@in_both_formats
def test_a_transposed_tensor_of_equal_size_is_refused(path):
    model, state = Tiny(), Tiny().state_dict()
    state["head.weight"] = state["head.weight"].T.contiguous()
    assert "head.weight: model [3, 4], file [4, 3]" in refusal(save(state, path), model)


@in_both_formats
def test_missing_and_extra_keys_are_all_named(path):
    model, state = Tiny(), Tiny().state_dict()
    del state["norm.bias"], state["cls_token"]
    state |= {"extra.one": torch.ones(1), "extra.two": torch.ones(2)}
    message = refusal(save(state, path), model)
    assert message.endswith(
        "does not fit Tiny:\n2 missing from the file:\n  cls_token\n  norm.bias\n"
        "2 not in the model:\n  extra.one\n  extra.two"
    )


def test_not_strict_loads_what_fits_and_reports_the_rest(path):
    model, state = Tiny(), Tiny().state_dict()
    del state["norm.bias"]
    kept = unchanged(model.head)
    state |= {"extra": torch.ones(1), "head.weight": torch.ones(5, 4), "head.bias": torch.ones(5)}
    report = load_checkpoint(model, save(state, path), strict=False)
    assert (report.missing, report.unexpected) == (("norm.bias",), ("extra",))
    assert report.wrong_shape == (("head.weight", (3, 4), (5, 4)), ("head.bias", (3,), (5,)))
    assert torch.equal(model.pos_embed, state["pos_embed"])
    assert kept()


@pytest.mark.parametrize(
    ("model", "file", "hint"),
    [
        (Tiny(), Tiny(classes=0), "pass num_classes=0 for a checkpoint without a head"),
        (Tiny(classes=0), Tiny(), "the file has a head, the model has none"),
        (Tiny(), Tiny(classes=7), "the file's head has 7 classes: pass num_classes=7"),
        (
            Tiny(grid=16),
            Tiny(grid=37),
            "positions for a 37x37 grid, the model has 16x16: build the model with img_size=518 "
            "and call set_input_size, or use create_model(..., img_size=)",
        ),
        (Tiny(grid=3), Tiny(classes=0), ""),
    ],
)
def test_hints(model, file, hint):
    report = compare(model.state_dict(), file.state_dict())
    assert report.hint.startswith(hint)
    assert bool(report.hint) == bool(hint)
    assert ("hint: " in str(report)) == bool(hint)
