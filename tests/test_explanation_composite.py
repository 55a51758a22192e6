"""explain on models that take more than images: their vision tower, or one line that says what to pass."""

import pytest
import torch
import transformers as hf
from huggingface_models import BOTH, CUT, MLP, TEXT, build
from library_models import open_clip_model
from library_parity import images

import fastvit
from fastvit.errors import BackendUnavailable

DECODER = {name: TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
DECODER |= {"num_attention_heads": 2, "vocab_size": 60}


def _encoder_decoder():
    text = hf.BertConfig(**DECODER, is_decoder=True, add_cross_attention=True)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**MLP), text)
    return hf.VisionEncoderDecoderModel(config)


def _paligemma():
    text = {**DECODER, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 32}
    vision = {**MLP, "model_type": "siglip_vision_model"}
    config = hf.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=55, projection_dim=64
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def _dual_encoder():
    vision, text = hf.CLIPVisionConfig(**MLP), hf.BertConfig(**DECODER)
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text)
    return hf.VisionTextDualEncoderModel(config)


TOWERS = {
    "clip": (lambda: build("clip")[0], "vision_model"),
    "siglip": (lambda: build("siglip")[0], "vision_model"),
    "encoder decoder": (_encoder_decoder, "encoder"),
    "paligemma": (_paligemma, "model.vision_tower"),
    "dual encoder": (_dual_encoder, "vision_model"),
}


@pytest.mark.parametrize("name", TOWERS)
def test_without_inputs_the_vision_tower_is_explained(name):
    make, tower = TOWERS[name]
    model = fastvit.accelerate(make()).eval()
    explanation = fastvit.explain(model, arch="sm_90")
    assert explanation.part == tower
    assert f"of the blocks of {tower}, which alone runs on images" in str(explanation)
    assert explanation.coverage.blocks == 1.0
    assert all(row.module.startswith(f"{tower}.") for row in explanation.rows)
    alone = fastvit.explain(model.get_submodule(tower), arch="sm_90")
    inner = [row.module.removeprefix(f"{tower}.") for row in explanation.rows]
    assert inner == [row.module for row in alone.rows]


def test_with_inputs_the_whole_is_explained():
    model = fastvit.accelerate(build("clip")[0]).eval()
    model.text_model.encoder.layers[1].mlp.fc1.register_forward_hook(lambda *_: None)
    explanation = fastvit.explain(model, BOTH, arch="sm_90")
    assert explanation.part == ""
    assert explanation.coverage.blocks == 0.75
    assert [(row.module, row.reason) for row in explanation.rows if row.op == "forward"] == [
        ("text_model.encoder.layers.1", "fc1 carries a hook")
    ]


# open_clip's model takes images alone, and leaves its text tower out.
def test_blocks_that_are_not_run_are_rows_and_not_served():
    model, call = open_clip_model()
    model = fastvit.accelerate(model).eval()
    explanation = fastvit.explain(model, arch="sm_90")
    assert [row.module for row in explanation.rows if row.backend == "none"] == [
        f"transformer.resblocks.{n}" for n in range(2)
    ]
    assert explanation.coverage.blocks == 0.5
    assert fastvit.explain(model, call, arch="sm_90").coverage.blocks == 1.0


def test_what_runs_on_images_in_no_part_says_what_it_takes():
    with pytest.raises(
        ValueError, match="TextModel does not run on images alone: pass x, a mapping of input_ids"
    ):
        fastvit.explain(build("clip")[0].text_model)
    with pytest.raises(ValueError, match=r"pixel_values, pixel_attention_mask, spatial_shapes$"):
        fastvit.explain(build("siglip2")[0])


def test_what_depends_on_values_says_so():
    for model, call in (
        (_paligemma(), {"pixel_values": images(1), "input_ids": torch.tensor([[55] * 16 + [3]])}),
        (build("siglip2")[0], CUT),
    ):
        with pytest.raises(ValueError, match="depends on the values of its inputs, which a run without data"):
            fastvit.explain(model, call)


def test_a_backend_that_cannot_run_is_no_lack_of_inputs():
    model = fastvit.accelerate(build("clip")[0]).eval()
    with fastvit.use_backend("cuda"), pytest.raises(BackendUnavailable, match="'cuda' cannot run"):
        fastvit.explain(model)
